"""The program of the public sets, end to end on a tiny model: table, files, gate, win rates, and what it refuses."""

import json
import pathlib
from typing import Any

import pytest

from experiments import suite as program
from rlhf_jax import flags
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.suite.items import Figure
from rlhf_jax.evaluate.suite.tasks import TASKS
from tests import tiny


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(program.run, "use_compile_cache", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("suite") / "tiny", tiny.CONFIG | {"max_position_embeddings": 256})


def jsonl(file: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """A few made rows of some of the sets."""
    made = tmp_path_factory.mktemp("data")
    choices = {f"choice{i}": str(i) for i in range(4)}
    row = lambda n: {"subject": f"s{n % 2}", "question": f"{n}?", "answer": str(n % 4)} | choices
    jsonl(made / "mmlu/test.jsonl", [row(n) for n in range(6)] + [row(0) | {"question": "sun " * 90}])
    jsonl(
        made / "xstest/xstest_prompts.jsonl", [{"prompt": f"p{n}", "label": "safe"} for n in range(4)] + [{"prompt": 3}]
    )
    jsonl(made / "llmbar/natural.jsonl", [{"input": "i", "output_1": "a", "output_2": "b", "label": 2}])
    jsonl(made / "arena-hard-prompts/question.jsonl", [{"prompt": f"p{n}"} for n in range(3)])
    return made


def lines(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def call(data: pathlib.Path, out: pathlib.Path, *words: str) -> None:
    flags.run(program.main, program.Suite, ["suite", f"--data={data}", f"--out={out}", *words])


def test_it_tells_all_that_it_measures(folder, data, tmp_path, capsys):
    file = tmp_path / "judge.txt"
    file.write_text("{prompt}\n1 {first}\n2 {second}\n---\nBest:\n")
    out = tmp_path / "out"
    call(data, out, f"--models={folder},{folder}", "--names=a,<b>", "--tasks=xstest,mmlu,llmbar,wins", "--rows=7",
         "--max_new_tokens=8", f"--judge={folder}", f"--template={file}")  # fmt: skip
    told = capsys.readouterr().out
    assert "Public sets" in told and "guessing" in told
    assert "xstest: 1 rows can't be used, the first" in told and "a, mmlu: 1 of 7 left out or in part" in told
    results = {(row["model"], row["task"]): row for row in json.loads((out / "results.json").read_text())}
    assert set(results) == {(m, t) for m in ("a", "<b>") for t in ("mmlu", "xstest", "llmbar", "wins")} - {
        ("a", "wins")
    }
    mmlu = results["a", "mmlu"]
    (accuracy,) = mmlu["figures"]
    assert accuracy["name"] == "accuracy" and accuracy["chance"] == 0.25 and accuracy["count"] == 6
    assert set(accuracy["groups"]) == {"s0", "s1"} and accuracy["low"] <= accuracy["mean"] <= accuracy["high"]
    assert [where.rpartition(":")[2] for where in mmlu["left_out"]] == ["7"]
    assert "over the context of 256" in next(iter(mmlu["left_out"].values()))
    rate, _ = results["<b>", "wins"]["figures"]
    assert rate["mean"] == 0.5  # the same model: every pair is a tie
    samples = lines(out / "samples.jsonl")
    mine = [line for line in samples if (line["model"], line["task"]) == ("a", "mmlu")]
    assert len(mine) == 7 and sum("left_out" in line for line in mine) == 1
    assert all(len(line["logprobs"]) == 4 for line in mine if "left_out" not in line)
    mean = sum(line["values"]["accuracy"] for line in mine if "left_out" not in line) / 6
    assert mean == pytest.approx(accuracy["mean"])
    assert [line["answer"] for line in samples if line["task"] == "xstest" and line["model"] == "a"]
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page and "To be known" in page


def test_the_gate_ends_it_with_status_one(folder, data, tmp_path, capsys):
    file = tmp_path / "gate.toml"
    file.write_text("[mmlu]\naccuracy = {at_most = 1.0}\n[xstest]\nrefused_safe = {at_most = 0.1}\n")
    words = (f"--models={folder}", "--tasks=mmlu,xstest", "--max_new_tokens=8", f"--gate={file}")
    call(data, tmp_path / "out", *words)
    assert "gate: tiny passes" in capsys.readouterr().out
    file.write_text("[mmlu]\naccuracy = {at_least = 1.0}\n")
    with pytest.raises(SystemExit) as end:
        call(data, tmp_path / "out", *words)
    assert end.value.code == 1
    told = capsys.readouterr().out
    assert "gate: tiny fails" in told and "mmlu.accuracy is" in told and "must be at least 1" in told
    assert (tmp_path / "out/report.html").exists()


def made(place: pathlib.Path, **changes: Any) -> program.Suite:
    given: dict[str, Any] = {"models": ("nowhere",), "data": (str(place),), "tasks": ("mmlu",)}
    return program.Suite(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": ()}, "no model to examine; give --models"),
        ({"models": ("x", "y"), "names": ("a", "a")}, "must be 2 different names"),
        ({"tasks": ("mmul",)}, "there is no task 'mmul'; the nearest is 'mmlu'"),
        ({"rows": 0}, "--rows=0 is not allowed"),
        ({"shots": -1}, "--shots=-1 is not allowed"),
        ({"seed": -1}, "--seed=-1 is not allowed"),
        ({"shots": 2, "tasks": ("xstest",)}, "--shots=2 is of mmlu, truthfulqa, gsm8k"),
        ({"temperature": -1.0}, "--temperature=-1.0 is not allowed"),
        ({"temperature": 1.0}, "--temperature is of written answers, and none of --tasks has any; drop it"),
        ({"template": "x"}, "--template is of pairs that a model judges"),
        ({"tasks": ("wins",)}, "the task wins needs a judge; give --judge"),
        ({"tasks": ("wins",), "judge": "x"}, "holds models against each other, and --models has one"),
        ({"judge": "x"}, "--judge is of the task wins, and --tasks has none"),
        ({"baseline": "x"}, "--baseline is of the task wins"),
        ({"tasks": ("wins",), "judge": "x", "models": ("a", "b"), "baseline": "c"}, "--baseline=c is none of"),
        ({"data": ()}, "there is no data; give --data=FOLDER"),
        ({"data": ("a", "b")}, "has two folders; give one"),
        ({"data": ("mmmlu=x",)}, "there is no task 'mmmlu'"),
        ({"data": ("a", "mmlu=")}, "--data=a,mmlu= gives mmlu no file; write mmlu=FILE, once"),
        ({"data": ("mmlu=a", "mmlu=b")}, "--data=mmlu=a,mmlu=b gives mmlu two places; write mmlu=FILE, once"),
        ({"top_k": 5, "tasks": ("xstest",)}, "--top_k changes nothing at --temperature=0"),
        ({"top_p": 0.5, "tasks": ("xstest",)}, "--top_p changes nothing at --temperature=0"),
        ({"min_p": 0.5, "tasks": ("xstest",)}, "--min_p changes nothing at --temperature=0"),
        ({"template": "nowhere.txt", "tasks": ("llmbar",)}, "there is no template nowhere.txt; check --template"),
        ({"chat_template": "nowhere.jinja"}, "there is no chat template nowhere.jinja; check --chat_template"),
        ({"data": ("a", "xstest=x")}, "--data=xstest=x is of a task that isn't run"),
        ({"data": ("/nowhere",)}, "there is no /nowhere/mmlu/test.jsonl for the task mmlu"),
        ({"gate": "nowhere.toml"}, "there is no file nowhere.toml; check --gate"),
    ],
)  # fmt: skip
def test_what_can_be_mended_is_one_sentence_before_anything_is_opened(data, changes, says):
    with pytest.raises(UserError, match=says):
        program.main(made(data, **changes))


def test_a_gate_is_held_to_the_tasks_before_a_model_is_opened(data, tmp_path):
    (tmp_path / "gate.toml").write_text("[mmlu]\nacuracy = {at_least = 0.1}\n")
    with pytest.raises(UserError, match=r"mmlu has no such figure; the nearest is 'accuracy'"):
        program.main(made(data, gate=str(tmp_path / "gate.toml")))
    with pytest.raises(UserError, match="model folder 'nowhere' doesn't exist"):
        program.main(made(data, out=str(tmp_path / "out")))


def test_guessing_is_told_of_every_model(data):
    made = lambda chance: {"mmlu": {"accuracy": Figure("accuracy", Estimate(0.5, 0.4, 0.6), 4, chance)}}
    read = {"mmlu": program.tasks.read("mmlu", str(data))}
    guessing = lambda *chances: program.table({f"m{n}": made(c) for n, c in enumerate(chances)}, read).rows[0][3]
    assert (
        guessing(0.25, 0.25) == "25.0%" and guessing(0.5, 0.25, None) == "25.0% or 50.0%" and guessing(None) == "none"
    )


def test_a_gate_is_held_to_the_kinds_of_the_models_before_they_are_asked(folder, data, tmp_path, monkeypatch):
    (tmp_path / "gate.toml").write_text("[llmbar]\nscored = {at_least = 0.1}\n")
    monkeypatch.setattr(program, "examine", lambda *given: pytest.fail("it was asked"))
    gate = str(tmp_path / "gate.toml")
    with pytest.raises(UserError, match="asks for llmbar.scored, which a reward model has, and none of the models"):
        program.main(made(data, models=(str(folder),), tasks=("llmbar",), gate=gate, out=str(tmp_path / "out")))


def test_a_reward_model_does_pairs_alone():
    class Scores:
        name, writes = "rm", False

    examinee: Any = Scores()
    assert program.able(examinee, list(TASKS)) == ["hhh", "llmbar"]
    with pytest.raises(UserError, match="rm is a reward model and can only do hhh, llmbar; add one to --tasks"):
        program.able(examinee, ["mmlu"])
