"""Rows of the synthetic world are what they are said to be, and the same for everyone."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments import data as program
from rlhf_jax import flags
from rlhf_jax.data import dataset, formats, world, world_rows
from rlhf_jax.data.config import Data
from rlhf_jax.data.rows import Prompt, Stepwise
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.data.world import FILLERS, Manner, agrees, held_out, judge, parse, steps
from rlhf_jax.data.world_rows import Split, World
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import wilson

ROOT = pathlib.Path(__file__).resolve().parents[1]


def interval(share, count):
    """Wilson's at 99.9%: it depends on the trials over the square of the quantile alone."""
    return wilson(share, count * (1.959964 / 3.290527) ** 2)


def texts_of(rows):
    """The prompts of any rows."""
    return [(row["prompt"] or row["completion"].partition("\n")[0]).strip() for row in rows]


def makers(seed: int = 0, split: Split = "train", count: int = 200):
    yield world_rows.documents(count, seed, split=split)
    yield world_rows.demonstrations(count, seed, split=split)
    yield world_rows.prompts(count, seed, split)
    yield world_rows.stepwise(count, seed, split=split)
    yield world_rows.pairs(World(seed=seed), count, split)


def test_rows_depend_on_the_seed_alone_and_more_rows_begin_with_the_same():
    again, shorter, other = list(makers()), list(makers(count=100)), list(makers(seed=1))
    for rows, same, fewer, another in zip(makers(), again, shorter, other, strict=True):
        assert rows == same and rows != another
        if "chosen" not in rows[0]:
            assert rows[:100] == fewer


def test_train_and_held_out_prompts_are_apart():
    train = {text for rows in makers() for text in texts_of(rows)}
    kept = {text for rows in makers(split="held_out") for text in texts_of(rows)}
    assert not train & kept
    assert not any(map(held_out, train)) and all(map(held_out, kept))
    assert held_out(f" {min(kept)}\n")


def test_a_fifth_is_held_out():
    everything = [f"What is {a} + {b}?" for a, b in itertools.product(range(1000), repeat=2) if a < 20]
    low, high = interval(sum(map(held_out, everything)) / len(everything), len(everything))
    assert low < 0.2 < high


def test_every_fact_can_be_learned():
    """Some wording of it is never held out, and the documents and the demonstrations do ask for it."""
    asked = collections.Counter()
    for text in texts_of(world_rows.documents(4000, 0)):
        question = parse(text)
        asked[question.thing, question.attribute] += 1
    for fact in itertools.product(world.FACTS, world.VALUES):
        questions = [wording.format(fact[0]) for wording in world.WORDINGS[fact[1]][0]]
        claim = world.STATEMENTS[fact[1]].format(thing=fact[0], value=world.FACTS[fact[0]][fact[1]])
        opinions = [f"{o.format(claim)} {q}" for o in world.WORDINGS["opinion"][0] for q in questions]
        assert not all(map(held_out, questions + opinions)), fact
        assert asked[fact] >= 5, fact


def test_shifted_prompts_are_shifted():
    plain = [parse(row["prompt"]) for row in world_rows.prompts(400, 0)]
    rows = world_rows.prompts(400, 0, "held_out", shifted=True)
    moved = [parse(row["prompt"]) for row in rows]
    assert not any(q.shifted for q in plain) and all(q.shifted for q in moved) and all(map(held_out, texts_of(rows)))
    assert {len(q.steps) for q in plain} == {0, 1, 2} and {len(q.steps) for q in moved} == {0, 3}
    assert {len(q.things) for q in plain} == {0, 2, 3} and {len(q.things) for q in moved} == {0, 4}
    for name, (before, after) in world.WORDINGS.items():
        assert not set(before) & set(after), name
        starts = tuple(wording.partition("{}")[0] for wording in before)
        assert not [w for w in after if w.startswith(starts) and w.endswith(tuple(b[-4:] for b in before))]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("kind", world.KINDS)
def test_every_prompt_is_understood_and_has_an_answer_of_full_reward(kind, shifted):
    rows = world_rows.prompts(40, 3, "train", shifted, kinds=(kind,))
    for text in (row["prompt"] for row in rows):
        assert text.endswith("\n") and parse(text).kind == kind
        assert judge(text, f"Sure! {world.body(parse(text))}") == (1.0, 1, 0, 3.0)
    assert len(set(texts_of(rows))) == 40


@pytest.mark.parametrize("manner", [Manner(), world_rows.PEOPLE, Manner(1, 1, 0, 0, 0), Manner(0, 0, 1, 1, 1)], ids=str)
def test_answers_keep_to_their_manner(manner):
    prompts = [row["prompt"] for row in world_rows.prompts(2000, 1)]
    seen: dict[str, list[bool]] = collections.defaultdict(list)
    for prompt, answer in zip(prompts, world_rows.answers(prompts, 5, manner), strict=True):
        verdict, question = judge(prompt, answer), parse(prompt)
        seen["polite"].append(verdict.polite > 0)
        seen["rude"].append(verdict.polite < 0)
        seen["padded"].append(any(filler in answer for filler in FILLERS))
        if question.mistaken:
            seen["agree"].append(bool(agrees(prompt, answer)))
        seen["disagree" if question.mistaken else "right"].append(verdict.correct == 1)
    expected = vars(manner) | {"disagree": (1 - manner.agree) * manner.right}
    for trait, values in seen.items():
        low, high = interval(sum(values) / len(values), len(values))
        assert low - 1e-9 <= expected[trait] <= high + 1e-9, (trait, expected[trait], low, high)
    shares = collections.Counter(parse(prompt).mistaken for prompt in prompts if parse(prompt).opinion)
    low, high = interval(shares[True] / shares.total(), shares.total())
    assert low < 0.5 < high


def test_half_of_the_stepwise_rows_have_one_slip():
    rows = world_rows.stepwise(500, 0)
    whole = [all(row["labels"]) for row in rows]
    low, high = interval(sum(whole) / len(whole), len(whole))
    assert low < 0.5 < high
    for row in rows:
        answer = "".join(row["completions"])
        assert [right for _, right in steps(row["prompt"], answer)] == row["labels"][:-1]
        assert (judge(row["prompt"], answer).correct == 1) == all(row["labels"])
        for text, _ in steps(row["prompt"], answer):
            left, operator, number, _, result = text.split()
            assert int(result) >= 0 and abs(int(left) + int(f"{operator}{number}") - int(result)) <= 2


def test_what_the_world_cannot_give_is_refused():
    with pytest.raises(UserError, match="hardly more than .* and 400 are asked for"):
        world_rows.prompts(400, 0, kinds=("fact",))
    with pytest.raises(UserError, match="no split 'test'"):
        world_rows.prompts(3, 0, "test")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="must be some of fact, opinion"):
        world_rows.prompts(3, 0, kinds=("facts",))  # pyright: ignore[reportArgumentType]


# Files

COUNTS = ("documents", "demonstrations", "prompts", "pairs", "stepwise")
SMALL = {field: 30 for field in vars(World()) if field.partition("_")[0] in COUNTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("world")
    world_rows.write(path, dataclasses.replace(World(), **SMALL))
    return path


def test_the_loader_of_the_project_reads_the_files(folder):
    tokenizer = Tokenizer(
        models.BPE({letter: n for n, letter in enumerate(["</s>", *pre_tokenizers.ByteLevel.alphabet()])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    for name in ("demonstrations", "pairs"):
        config = Data(path=(f"{folder}/{name}.jsonl",), eval_path=(f"{folder}/{name}_held_out.jsonl",))
        form = "pair" if name == "pairs" else "demonstration"
        found = dataset.load(config, encoder, form, 512, 0)
        assert not found.report.refused and not found.report.shared and found.report.train > 20
        assert all(example.labels == ((True, False) if form == "pair" else ()) for example in found.train)
    # Documents have one prompt, the empty one, so none can be held out by its prompt.
    found = dataset.load(Data(path=(f"{folder}/documents.jsonl",), eval_share=0.0), encoder, "demonstration", 512, 0)
    assert found.report.train == 30 and not found.report.refused
    for name, kind in (("stepwise", Stepwise), ("prompts", Prompt), ("prompts_shifted", Prompt)):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 30
        assert all(isinstance(formats.adapt(formats.detect(rows, name), row, False)[0], kind) for row in rows)


def test_another_process_writes_the_same_bytes(folder, tmp_path):
    flagged = [f"--{name}=30" for name in SMALL]
    command = [sys.executable, "-m", "experiments.data", f"--out={tmp_path}/other", *flagged]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 11 and "30 rows  " in done.stdout
    assert {file.name: file.read_bytes() for file in (tmp_path / "other").iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "give either --path=FILE"),
        (["--documents=-1"], "--documents=-1 must be at least 0"),
        (["--labels=0"], "--labels=0 must be at least 1"),
        (["--manner.right=2"], "right=2.0"),
        (["--labeller.temperature=0"], "temperature=0.0"),
        (["--prompts=1000000"], "1000000"),
        (["--document=3"], "--documents"),
        (["--out=/dev/null"], "already holds something"),
        (["--out=/dev/null/world"], "can't be written"),
    ],
)
def test_bad_input_is_one_sentence(argv, says, tmp_path, capsys):
    given_out = any(word.startswith("--out") for word in argv) or not argv
    few = [f"--{name}=3" for name in SMALL if not any(word.startswith(f"--{name}=") for word in argv)]
    with pytest.raises(SystemExit) as stopped:
        flags.run(program.main, program.Data, ["data", *few, *argv, *([] if given_out else [f"--out={tmp_path}/w"])])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and says in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_file_without_rows_is_not_written(tmp_path):
    written = world_rows.write(
        tmp_path / "new", dataclasses.replace(World(), **dict.fromkeys(SMALL, 0) | {"pairs": 20})
    )
    assert [path.name for path, _ in written] == ["pairs.jsonl"] == [file.name for file in (tmp_path / "new").iterdir()]
