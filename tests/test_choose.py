"""The program that chooses pairs, end to end: what people are then given, what it costs, and what it refuses."""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments import choose, label
from rlhf_jax import flags
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.states import states
from rlhf_jax.feedback import exchange
from rlhf_jax.feedback.judgement import Judgement
from rlhf_jax.feedback.record import Record
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.workdir import open_model
from tests import tiny

BLANK = [
    {"prompt": "Where is the key?", "completions": ["In the hall.", " In the shed.", "Sure!", "In the hall. "]},
    {"prompt": "Tell me a story.", "completions": ["A cat sat.", "Once upon a time.", "No."], "ranks": None},
    {"prompt": "Why?", "completions": ["So.", "Because.", "Ask."], "labeller": None},
    {"prompt": "What now?", "completions": ["Nothing."]},
]
CHAT = [{"prompt": [{"role": "user", "content": "Hi"}], "completions": ["Hello", "Go"], "tools": [{"name": "look"}]}]
RANKED = [
    {"prompt": "Where is the key?", "completions": ["Sure!", "In the hall."], "ranks": [1, 0], "labeller": "ann"},
    {"prompt": "Tell me a story.", "completions": ["No.", "A cat sat."], "ranks": [0.0, 0.0], "labeller": "ben"},
]


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(choose.run, "use_compile_cache", lambda: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a model that writes, an ensemble of two reward models, one alone, and rows."""
    folder = tmp_path_factory.mktemp("choose")
    tiny.write_model(folder / "model")
    base = open_model(str(folder / "model"))
    for seed in range(2):
        member = shutil.copytree(folder / "model", folder / "ensemble" / "members" / f"seed={seed}")
        kernel = jax.random.normal(jax.random.key(seed), (base.model.shape.width,))
        params = {name: value for name, value in base.params.items() if name != "head"}
        hf.write(epath.Path(member), base.model.with_head("score"), params | {"score": kernel, "score_bias": kernel[0]})
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "blank.jsonl").write_text(lines(BLANK))
    (folder / "chat.jsonl").write_text(lines(CHAT))
    (folder / "ranked.jsonl").write_text(lines(RANKED))
    (folder / "all.jsonl").write_text(lines(RANKED[:1]))
    (folder / "single.jsonl").write_text(lines(BLANK[3:]))
    (folder / "broken.jsonl").write_text(lines([*BLANK, {"prompt": "Q", "completions": ["A", ""]}]))
    return folder


def call(place: pathlib.Path, out: pathlib.Path, *words: str, rows: str = "blank,ranked") -> list[dict[str, Any]]:
    """The rows that a command line writes."""
    files = ",".join(str(place / f"{name}.jsonl") for name in rows.split(","))
    given = [f"--rows={files}", f"--out={out}", *(word.replace("PLACE", str(place)) for word in words)]
    flags.run(choose.main, choose.Choose, ["choose", *given])
    return [json.loads(line) for line in out.read_text().splitlines()]


def pairs_of(rows: list[dict[str, Any]]) -> set[tuple[str, ...]]:
    return {(str(row["prompt"]), *sorted(text.strip() for text in map(str, row["completions"]))) for row in rows}


def test_every_pair_that_nobody_compared_can_be_chosen_and_no_other(place, tmp_path, capsys):
    rows = call(place, tmp_path / "new" / "out.jsonl", "--strategy=random", "--pairs=99", rows="blank,chat,ranked")
    told = capsys.readouterr().out
    key, story = "Where is the key?", "Tell me a story."
    hello = "[{'role': 'assistant', 'content': 'Go'}]", "[{'role': 'assistant', 'content': 'Hello'}]"
    assert pairs_of(rows) == {
        (key, "In the hall.", "In the shed."), (key, "In the shed.", "Sure!"),
        (story, "A cat sat.", "Once upon a time."), (story, "No.", "Once upon a time."),
        ("Why?", "Because.", "So."), ("Why?", "Ask.", "So."), ("Why?", "Ask.", "Because."),
        (str(CHAT[0]["prompt"]), *hello),
    }  # fmt: skip
    assert len(rows) == 8 and all(row["ranks"] is row["labeller"] is None for row in rows)
    assert [row.get("tools") for row in rows if not isinstance(row["prompt"], str)] == [[{"name": "look"}]]
    assert "8 pairs to choose from, 2 labelled; chosen 8 of 4 prompts by random, 0 left" in told


@pytest.mark.parametrize(
    "words",
    [
        ("--strategy=prediction", "--model=PLACE/model"),
        ("--strategy=information", "--model=PLACE/model", "--read=last"),
        ("--strategy=diversity", "--model=PLACE/ensemble/members/seed=0", "--clear=0.9"),
        ("--strategy=disagreement", "--rewards=PLACE/ensemble"),
        ("--strategy=random",),
    ],
    ids=lambda words: words[0],
)
def test_what_is_chosen_is_what_people_are_given(place, tmp_path, capsys, words):
    """Choose, label on the record of `experiments.label`, export, and choose again: nobody is asked twice."""
    out = tmp_path / "tasks.jsonl"
    rows = call(place, out, *words, "--money=1.2", "--price=0.2", "--hours=1", "--seconds=60", "--labels=2")
    told = capsys.readouterr().out
    assert len(rows) == 3 and "money: 1.20 for 6 labels, 0.00 left" in told and "hours: 0.10 for 6 labels, 0.90" in told
    tasks = exchange.tasks_of(out, 2)
    assert [list(task.answers) for task in tasks] == [row["completions"] for row in rows]
    flags.run(label.main, label.Label, ["label", f"--tasks={out}", f"--judged={place / 'all.jsonl'}"])
    record = Record(out.with_suffix(".db"))
    assert {task.id for task in tasks} < record.tasks().keys()
    for number, task in enumerate(tasks):
        record.say(Judgement(id=str(number), task=task.id, labeller="cy", ranks=(0.0, 1.0)))
    export = place / f"{words[0].removeprefix('--strategy=')}.jsonl"
    flags.run(label.main, label.Label, ["label", f"--tasks={out}", f"--export={export}"])
    again = call(place, tmp_path / "again.jsonl", *words, "--pairs=9", rows=f"blank,ranked,{export.stem}")
    assert len(again) == 4 and not pairs_of(again) & pairs_of(rows)


def test_the_same_flags_give_the_same_bytes_and_another_seed_others(place, tmp_path):
    once, twice, other = (
        call(place, tmp_path / f"{number}.jsonl", "--strategy=random", "--pairs=3", f"--seed={seed}")
        for number, seed in enumerate((3, 3, 4))
    )
    assert once == twice != other
    few = call(place, tmp_path / "few.jsonl", "--strategy=random", "--pairs=9", "--max_per_prompt=1")
    assert len(few) == len({str(row["prompt"]) for row in few}) == 3
    assert len(call(place, tmp_path / "pool.jsonl", "--strategy=random", "--pairs=9", "--pool=2")) == 2


def test_hidden_states_are_those_of_each_answer_alone(place):
    """A mean over the answer's tokens, or the last one, whatever stands beside it in a batch."""
    opened = open_model(str(place / "model"))
    subject = Subject("m", opened.model, opened.params, opened.tokenizer)
    prompts, texts = ["Q: ", "A longer question: "], ["yes", "no, never"]
    told = {read: states(subject, prompts, texts, read=read) for read in ("mean", "last")}
    row = Encoder(opened.tokenizer).encode(prompts[1], texts[1])
    ids, at = jnp.asarray(row.ids)[None], jnp.arange(len(row))[None]
    hidden = np.asarray(jax.jit(opened.model.apply)(opened.params, ids, jnp.ones_like(at), at))[0]
    np.testing.assert_allclose(told["last"][1], hidden[-1], atol=2e-5)
    np.testing.assert_allclose(told["mean"][1], hidden[row.mask].mean(axis=0), atol=2e-5)
    np.testing.assert_allclose(states(subject, prompts[:1], texts[:1]), told["mean"][:1], atol=2e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--pairs=0",), "--pairs=0 is not allowed; it must be at least 1"),
        (("--labels=0",), "--labels=0 is not allowed; it must be at least 1"),
        (("--max_per_prompt=0",), "--max_per_prompt=0 is not allowed; it must be at least 1"),
        (("--seed=-1",), "--seed=-1 is not allowed; it must be from 0 to"),
        (("--clear=0",), "--clear=0.0 is not allowed; it must be above 0 and at most 1"),
        (("--money=-1", "--price=1"), "a budget of money=-1.0 is not allowed; it must be finite and at least 0"),
        (("--price=-2",), "a label of price=-2.0 is not allowed"),
        (("--money=5",), "--money has no end while a label takes none of it; give --price of a label too"),
        (("--hours=5",), "--hours has no end while a label takes none of it; give --seconds of a label too"),
        (("--price=1",), "nothing says how much may be spent; give --money and --price, --hours and --seconds, or"),
        (("--money=1", "--price=1", "--labels=2"), "the budget pays 1 labels, and a pair takes 2; raise it or lower"),
        (("--strategy=prediction", "--pairs=1"), "--strategy=prediction reads what a model knows of the answers; give"),
        (("--clear=0.5", "--pairs=1"), "--clear=0.5 reads what a model knows of the answers; give --model=RUN"),
        (("--strategy=disagreement", "--pairs=1"), "reads scores of several reward models; give --rewards=ENSEMBLE"),
        (("--model=PLACE/model", "--pairs=1"), "--strategy=random does not read --model; drop it or give --clear"),
        (("--rewards=PLACE/ensemble", "--pairs=1"), "does not read --rewards; drop it or take disagreement"),
        (("--read=last", "--pairs=1"), "--read says how --model is read, and there is none; drop it"),
        (("--pairs=1", "--rows=nowhere.jsonl"), "there is no data file or folder nowhere.jsonl; check --rows"),
        (("--pairs=1", "--rows=PLACE/broken.jsonl"), "broken.jsonl:5 can't be used"),
        (("--pairs=1", "--rows=PLACE/single.jsonl"), "holds no two different answers to a prompt"),
        (("--pairs=1", "--rows=PLACE/all.jsonl"), "all pairs of --rows="),
        (("--pairs=1", "--out=PLACE/all.jsonl"), "all.jsonl already exists; give a new file"),
        (("--pairs=1", "--rows="), "--rows and --out name what is read and written"),
        (
            ("--strategy=diversity", "--pairs=1", "--clear=0.5", "--model=PLACE/model", "--rows=PLACE/blank.jsonl"),
            "--clear goes by what is labelled, and nothing is",
        ),
    ],
)
def test_what_can_be_mended_is_one_sentence_before_a_model_is_opened(place, tmp_path, capsys, monkeypatch, words, says):
    for name in ("open_model", "open_rewards"):
        monkeypatch.setattr(choose, name, None)
    strategy = () if any(word.startswith("--strategy") for word in words) else ("--strategy=random",)
    refused(place, tmp_path, capsys, (*strategy, *words), says)


def test_one_reward_model_cant_disagree_with_itself(place, tmp_path, capsys):
    words = "--strategy=disagreement", "--rewards=PLACE/ensemble/members/seed=0", "--pairs=1"
    refused(place, tmp_path, capsys, words, "is one reward model, which agrees with itself; give an ensemble")


def refused(place, tmp_path, capsys, words, says):
    with pytest.raises(SystemExit) as exit:
        call(place, tmp_path / "out.jsonl", *words)  # of a flag that is given twice the last counts
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2 and len(lines) == 1 and says in lines[0], error
    assert not (tmp_path / "out.jsonl").exists()
