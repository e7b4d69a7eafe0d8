"""The program that judges pairs, end to end: what it prints and writes, and what it refuses."""

import json
import pathlib
import re
from typing import Any

import pytest

from experiments import judge as program
from rlhf_jax import flags
from rlhf_jax.data.config import Data
from rlhf_jax.data.dataset import load
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.feedback.judge_local import TOO_LONG
from rlhf_jax.feedback.judges import Recorded, Verdict
from rlhf_jax.workdir import open_policy
from tests import tiny
from tests.chat_server import completion, say, serve

KEY = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(program.run, "use_compile_cache", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("judge") / "model", tiny.CONFIG | {"max_position_embeddings": 160})


def lines(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def place(folder, tmp_path) -> pathlib.Path:
    (tmp_path / "short.txt").write_text("{prompt}\n1 {first}\n2 {second}\n---\nBest:\n")
    tiny.write_pairs(tmp_path / "pairs.jsonl", 6)
    rows = [{"instruction": f"q{n}?", "output_1": "a", "output_2": "b" * 4, "preference": 1 + n % 2} for n in range(4)]
    rows.append({"instruction": "long", "output_1": "a " * 90, "output_2": "b", "preference": 1})
    (tmp_path / "numbered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bar = {"input": "q?", "output_1": "a", "output_2": "b", "label": 1}
    (tmp_path / "llmbar.jsonl").write_text(json.dumps(bar) + "\n")
    return tmp_path


def call(place: pathlib.Path, *words: str) -> None:
    given = [word.replace("PLACE", str(place)) for word in words]
    flags.run(program.main, program.Judges, ["judge", *given])


def test_the_program_reports_and_writes_rows_to_train_on(place, folder, capsys):
    out = place / "out" / "soft.jsonl"
    files = "--rows=PLACE/pairs.jsonl,PLACE/numbered.jsonl"
    call(place, f"--judge={folder}", files, "--template=PLACE/short.txt", f"--out={out}")
    told = capsys.readouterr().out
    for title in ("Verdicts", "Position", "Agreement with the labels", "Length"):
        assert title in told
    assert "10 of 11" in told and f"wrote 10 pairs to {out}" in told
    rows = lines(out)
    assert all(0.5 <= row["probability"] <= 1 and row["labeller"] == "model" for row in rows)
    policy = open_policy(str(folder))
    data = load(
        Data(path=(str(out),), probability="probability", eval_share=0.0), Encoder(policy.tokenizer), "pair", 160, 0
    )
    assert sorted(e.probability for e in data.train) == sorted(row["probability"] for row in rows)


def test_the_program_compares_verdicts_on_file_and_averages_judges(place, folder, capsys):
    judges = "--judge=PLACE/numbered.jsonl:preference,PLACE/soft.jsonl:probability"
    rows = [{"prompt": f"q{n}?\n", "chosen": "a", "rejected": "b" * 4, "probability": 0.9} for n in range(4)]
    (place / "soft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(place, judges, "--rows=PLACE/numbered.jsonl", "--most=4", "--names=people,model", "--out=PLACE/mean.jsonl")
    told = capsys.readouterr().out
    assert "Judges among themselves" in told and "mean of all" in told and "Position" not in told
    assert [row["probability"] for row in lines(place / "mean.jsonl")] == pytest.approx([0.95, 0.55, 0.95, 0.55])
    call(place, judges, "--rows=PLACE/numbered.jsonl", "--most=1", "--messages", "--out=PLACE/chat.jsonl")
    assert lines(place / "chat.jsonl")[0]["prompt"] == [{"role": "user", "content": "q0?"}]


def test_tools_on_offer_stay_with_their_rows(place):
    asked, tools = [{"role": "user", "content": "Sky?"}], [{"type": "function", "function": {"name": "sky"}}]
    row = {"prompt": asked, "chosen": "blue", "rejected": "red", "tools": tools, "p": 0.25}
    (place / "tools.jsonl").write_text(json.dumps(row) + "\n")
    call(place, "--judge=PLACE/tools.jsonl:p", "--rows=PLACE/tools.jsonl", "--out=PLACE/out.jsonl")
    (soft,) = lines(place / "out.jsonl")
    assert soft["tools"] == tools and soft["prompt"] == asked and soft["probability"] == 0.75
    assert soft["chosen"] == [{"role": "assistant", "content": "red"}]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--judge=",), "there is no judge; give --judge=MODEL"),
        (("--rows=",), "there is nothing to judge; give --rows=FILE of pairs"),
        (("--most=0",), "--most=0 is not allowed; it must be at least 1"),
        (("--seed=-1",), "--seed=-1 is not allowed"),
        (
            ("--temperature=0.5",),
            "--temperature is of rationales, which --reasoning asks for, and there are none; drop",
        ),
        (("--endpoint.at_once=2",), "--endpoint is of judges behind an address, and there are none; drop it"),
        (("--judge=PLACE/numbered.jsonl:preference", "--reasoning"), "--reasoning is of judges that are asked"),
        (("--judge=PLACE/numbered.jsonl:preference", "--chat_template=x"), "--chat_template is of models that are"),
        (("--judge=https://me:s3cret@host/v1",), "the judge at host has no model; give --judge=https://HOST/v1#MODEL"),
        (
            ("--rows=PLACE/pairs.jsonl,PLACE/llmbar.jsonl", "--out=PLACE/new.jsonl"),
            "llmbar.jsonl is for evaluation alone, and --out writes rows to train on; drop one of the two",
        ),
        (("--messages",), "--messages is of what --out writes, and nothing is written; give --out or drop it"),
        (("--probability=preference",), "--probability is of rows of chosen and rejected, and there are none in"),
        (("--judge=https://h/v1#m", "--reasoning", "--top_k=3"), "--top_k is not sent to judges behind an address"),
        (("--judge=https://h/v1#m", "--endpoint.body=[]"), "--endpoint.body is no JSON object"),
        (("--judge=https://h/v1#m", "--endpoint.wait=0"), "--endpoint.wait=0.0 is not allowed; it must be finite"),
        (("--judge=https://h/v1#m", "--endpoint.calls=0"), "--endpoint.calls=0 is not allowed"),
        (
            ("--judge=https://h/v1#m", "--endpoint.cache=PLACE/short.txt"),
            "lies on a file, which is no folder; give anoth",
        ),
        (("--names=a,b",), "--names=a,b must be 1 different names, one a judge"),
        (("--names=mean of all",), "none 'mean of all'"),
        (("--template=PLACE/none.txt",), "there is no template"),
        (("--rows=PLACE/none.jsonl",), "there is no data file or folder"),
        (("--rows=PLACE/single.jsonl",), "holds single answers; give --rows files of pairs, rankings or two answers"),
        (("--judge=PLACE/nowhere",), "nowhere"),
        (("--judge=PLACE/numbered.jsonl:other",), "holds no two answers to compare .*it has no column 'other'"),
        (("--out=PLACE/numbered.jsonl",), "numbered.jsonl already exists; give a new file"),
    ],
)
def test_every_mistake_is_one_sentence(place, folder, capsys, monkeypatch, words, says):
    monkeypatch.setattr(program.LocalJudge, "__call__", None)  # no judge is asked
    (place / "single.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    defaults = {"--judge": str(folder), "--rows": "PLACE/numbered.jsonl"}
    own = {word.partition("=")[0] for word in words}
    more = [f"{name}={value}" for name, value in defaults.items() if name not in own]
    with pytest.raises(SystemExit) as exit:
        call(place, *words, *more)
    error = capsys.readouterr().err
    told = [line for line in error.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2 and len(told) == 1, error
    assert re.search(says.replace("(", r"\("), told[0]) and "s3cret" not in error, told[0]
    assert not (place / "new.jsonl").exists()


def test_a_judge_that_can_judge_nothing_says_why_and_writes_nothing(place, folder, capsys):
    with pytest.raises(SystemExit):
        call(place, f"--judge={folder}", "--rows=PLACE/numbered.jsonl", "--most=1", "--out=PLACE/out.jsonl")
    told = capsys.readouterr()
    assert TOO_LONG in " ".join(told.out.split()) and "no pair has a verdict of every judge" in told.err
    assert not (place / "out.jsonl").exists()


# Judges behind addresses


@pytest.fixture
def server(monkeypatch):
    with serve(monkeypatch) as made:
        yield made


def write_rows(file: pathlib.Path, count: int) -> None:
    rows = [{"instruction": f"q{n}", "output_1": "yes", "output_2": "no", "preference": 1} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_judges_behind_addresses_are_asked_before_others(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program.run, "use_compile_cache", lambda: None)
    order: list[str] = []
    monkeypatch.setattr(Recorded, "__call__", lambda self, pairs: order.append(self.name) or [Verdict(1.0)])
    write_rows(rows := tmp_path / "rows.jsonl", 1)
    words = [f"--judge={rows}:preference,{server.url}#m", f"--rows={rows}", "--endpoint.cache=", "--names=file,far"]
    flags.run(program.main, program.Judges, ["judge", *words])
    told = capsys.readouterr().out
    assert order == ["file"] and told.index("file") < told.index("far")
    server.reply = lambda question, number: say(b"no", 401)
    with pytest.raises(SystemExit):
        flags.run(program.main, program.Judges, ["judge", *words])
    assert order == ["file"] and "far answers 401" in capsys.readouterr().err


def test_the_program_says_what_was_spent_and_never_the_key(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program.run, "use_compile_cache", lambda: None)
    monkeypatch.setenv("MY_KEY", KEY)
    server.reply = lambda question, number: say(completion("A", {"A": 0.8, "B": 0.2}) if number > 1 else {"no": KEY})
    write_rows(tmp_path / "rows.jsonl", 3)
    words = [
        f"--judge={server.url}#large", f"--rows={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'out.jsonl'}",
        "--endpoint.key_from=MY_KEY", f"--endpoint.cache={tmp_path / 'kept'}", "--endpoint.at_once=1",
    ]  # fmt: skip
    flags.run(program.main, program.Judges, ["judge", *words])
    told = capsys.readouterr()
    assert "2 of 3" in told.out and "the reply is no chat completion" in " ".join(told.out.split())
    assert "large: 6 calls" in told.out and "0 from the cache" in told.out
    written = (tmp_path / "out.jsonl").read_text()
    assert len(written.splitlines()) == 2 and json.loads(written.splitlines()[0])["probability"] == 0.5
    assert KEY not in told.out + told.err + written and server.keys == [f"Bearer {KEY}"] * 6
