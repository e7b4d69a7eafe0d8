"""Labels of steps: by a verifier, by what comes of going on from them, and the program that writes them."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from experiments import steps
from rlhf_jax import flags
from rlhf_jax.data import formats, world_rows
from rlhf_jax.data.rows import Refusal, Stepwise
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject, text_of
from rlhf_jax.evaluate.step_labels import check_verifier, rolled_out, verified, world_steps
from rlhf_jax.feedback.exchange import tasks_of
from rlhf_jax.feedback.rewards import RewardFunctions
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler, number_of
from rlhf_jax.workdir import open_policy
from tests import tiny

SAMPLING = Sampling(max_new_tokens=8)
CHECKER = ("tests.rewards:letters",)  # the share of small letters, in the place of right and wrong


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(steps.run, "use_compile_cache", lambda: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("steps")
    tiny.write_model(folder / "model")
    rows = world_rows.prompts(4, 0, kinds=("sum",))
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.txt").write_text("one cat:\ntwo dogs:\n")
    return folder


@pytest.fixture(scope="module")
def subject(place) -> Subject:
    policy = open_policy(str(place / "model"))
    return Subject("tiny", policy.model, policy.params, policy.tokenizer, policy.end_ids)


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        (["3 + 4 = 7,", " 7 - 2 = 5.", " It is 5."], [True, True, True]),
        (["3 + 4 = 8,", " 8 - 2 = 6.", " It is 6."], [False, False, False]),
        (["3 + 4 = 7,", " 7 - 2 = 6.", " It is 6.", " Ask me again."], [True, False, False, False]),
        (["Sure!", " 3 + 4 = 7,", " 7 - 2 = 5.", " It is 5.", " Ask me again."], [True] * 5),
        (["3 + 4 = 7, 7 - 2 = 5.", " It is 4."], [True, False]),
        ([" It is 5."], [False]),  # the steps are left out
        (["3 + 4 = 7,", " 7 - 2 = 5."], [True, False]),  # and here the result
        (["Sure!"], [False]),
        (["3 + 4 = 7,", " 2 - 1 = 1."], [True, False]),  # goes on from another number
    ],
)
def test_steps_of_sums_by_hand(answer, labels):
    assert world_steps("What is 3 + 4 - 2?\n", answer) == labels
    assert world_steps([{"role": "user", "content": "What is 3 + 4 - 2?"}], answer) == labels


@pytest.mark.parametrize("told", [[True], [True, 0.5], [None, True]])
def test_a_verifier_says_one_thing_of_each_step(told):
    with pytest.raises(UserError, match="for the 2 steps of 'one two'; it must give each True or False"):
        verified(lambda prompt, steps, **_: told, ["Q"], [["one", " two"]], {})


def by_hand(subject: Subject, encoder: Encoder, prompt: str, before: str, samples: int, seed: int) -> float:
    """The mean of what the rollouts behind a beginning earn, each drawn by itself."""
    ids = encoder.encode(prompt, before, ends=(len(before),))
    ids = ids.ids[: ids.ends[-1] + 1]
    sampler = Sampler(subject.model, samples=samples)
    drawn = sampler.generate(
        subject.params, [ids], SAMPLING, jax.random.PRNGKey(seed), stop_ids=encoder.stop_ids(subject.end_ids),
        rows=[number_of(ids)],
    )  # fmt: skip
    texts = [before + text_of(subject.tokenizer)(ids, one) for one in drawn[0]]
    return float(np.mean([sum(map(str.islower, text)) / len(text) for text in texts]))


def test_a_step_is_worth_what_comes_of_it_whatever_else_is_asked(subject):
    encoder, checker = Encoder(subject.tokenizer), RewardFunctions.named(CHECKER)
    prompts, solutions = ["one cat:", "one cat:", "moon:"], [[" red.", " B.", "c"], [" red.", " D"], [" A"]]
    ask = lambda *places: rolled_out(
        subject, encoder, [prompts[i] for i in places], [solutions[i] for i in places], {}, checker,
        samples=3, sampling=SAMPLING, seed=5,
    )  # fmt: skip
    found = ask(0, 1, 2)
    found = [one for one in found if one is not None]
    assert [len(one.shares) for one in found] == [3, 2, 1]
    for number, (prompt, several) in enumerate(zip(prompts, solutions, strict=True)):
        whole = "".join(several)
        assert found[number].right == pytest.approx(sum(map(str.islower, whole)) / len(whole))
        assert found[number].shares[-1] == found[number].right
        for count in range(1, len(several)):
            expected = by_hand(subject, encoder, prompt, "".join(several[:count]), 3, 5)
            assert found[number].shares[count - 1] == pytest.approx(expected)
    assert found[0].shares[0] == found[1].shares[0], "the same beginning"
    again = ask(2, 1)[1]
    assert again is not None
    np.testing.assert_array_equal(again.shares, found[1].shares)
    with pytest.raises(UserError, match="the checker gold gave -?[0-9.]+ for the answer 'Ugh. 3'; it must give each a"):
        gold = RewardFunctions.named(("gold",))
        rolled_out(
            subject, encoder, ["What is 3 + 4?"], [["Ugh. 3"]], {}, gold, samples=1, sampling=SAMPLING, seed=0
        )  # fmt: skip


def test_equal_prompts_are_judged_by_their_own_columns(subject):
    """And a solution that can't be cut where a step ends is left out, alone."""
    encoder = Encoder(subject.tokenizer)
    told = lambda prompts, completions, answer, **_: [float(value == 4) for value in answer]
    checker = RewardFunctions({"told": told}, (1.0,))
    ask = lambda: rolled_out(
        subject, encoder, ["Solve it:"] * 2, [[" A", " B"]] * 2, {"answer": [4, 7]}, checker,
        samples=2, sampling=SAMPLING, seed=0,
    )  # fmt: skip
    shares = [None if one is None else one.shares.tolist() for one in ask()]
    assert shares == [[1.0, 1.0], [0.0, 0.0]]
    encode = encoder.encode_many
    encoder.encode_many = lambda items: [Refusal("a token reaches over it"), *encode(items)[1:]]
    assert [one is None for one in ask()] == [True, False]


def test_a_verifier_gets_the_columns_that_are_none_of_its_own():
    told = verified(lambda prompt, steps, answer: [True], ["Q"], [["one"]], {"steps": [["x"]], "answer": [1]})
    assert told == [[True]]
    with pytest.raises(UserError, match=r"can't be called with the data's columns \(answer\)"):
        check_verifier(lambda prompt, steps: [True], ["answer"])


def call(place: pathlib.Path, out: pathlib.Path, *words: str) -> list[dict[str, Any]]:
    """The rows that a command line writes."""
    given = [f"--model={place / 'model'}", f"--out={out}", "--max_new_tokens=8", "--step_end=[^x]", "--solutions=2"]
    flags.run(steps.main, steps.Label, ["steps", *given, *(word.replace("PLACE", str(place)) for word in words)])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rollouts_write_rows_that_a_model_of_steps_learns_from(place, tmp_path, capsys):
    words = ("--prompts=PLACE/mine.txt", f"--checker={CHECKER[0]}", "--rollouts=2", "--at_least=0.3")
    rows = call(place, tmp_path / "out.jsonl", *words)
    told = capsys.readouterr().out
    assert f"{len(rows)} different solutions of 4" in told and "of the solutions have no wrong one" in told
    for row in rows:
        assert row["labels"] == [share >= 0.3 for share in row["shares"]] and row["shares"][-1] == row["right"]
        (read,) = formats.adapt("stepwise", row, False)
        assert isinstance(read, Stepwise) and len(read.completions) == len(row["labels"])
    assert any(len(row["labels"]) > 1 for row in rows)


def test_a_verifier_judges_sums_and_people_get_tasks(place, tmp_path, capsys):
    rows = call(place, tmp_path / "world.jsonl", "--prompts=PLACE/sums.jsonl", "--by=world")
    for row in rows:
        assert row["labels"] == world_steps(row["prompt"], row["completions"]) and "shares" not in row
    call(place, tmp_path / "people.jsonl", "--prompts=PLACE/sums.jsonl", "--by=people")
    tasks = tasks_of(tmp_path / "people.jsonl")
    assert [list(task.answers) for task in tasks] == [row["completions"] for row in rows]
    assert {task.kind for task in tasks} == {"steps"} and "experiments.label --tasks=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give --checker=NAME, which says whether an answer is right"),
        (("--by=world", "--rollouts=3"), "--by=world does not read --rollouts; drop it"),
        (("--by=people", "--at_least=0.5"), "--by=people does not read --at_least; drop it"),
        (("--by=wurld",), "the nearest is 'world'"),
        (("--checker=gsm9k",), "the nearest is 'gsm8k'"),
        (("--checker=gsm8k",), "can't be called with the data's columns (none)"),
        (("--by=world", "--prompts=PLACE/mine.txt"), "mine.txt:1 is no sum of the synthetic world"),
        (("--checker=right", "--prompts=PLACE/mine.txt"), "mine.txt:1 is no sum of the synthetic world"),
        (("--by=world", "--step_end=("), "--step_end='(' is no regular expression"),
        (("--by=world", "--step_end=x*"), "--step_end='x*' also matches where there is no text"),
        (("--by=world", "--solutions=0"), "--solutions=0 is not allowed; it must be at least 1"),
        (("--checker=right", "--at_least=0"), "--at_least=0.0 is not allowed; it must be above 0 and at most 1"),
        (("--checker=right", "--top_k=1"), "all rollouts from a step would be the same"),
        (("--by=people", "--deadline=5"), "--by=people does not read --deadline; drop it"),
        (("--by=world", "--prompts=PLACE/mine.txt"), "and --by=world judges no others here"),
        (("--checker=right", "--prompts=PLACE/mine.txt"), "and --checker=right judges no others here"),
        (("--checker=right", "--temperature=0"), "all rollouts from a step would be the same"),
        (("--by=world", "--out=PLACE/mine.txt"), "mine.txt already exists; give a new file"),
    ],
)  # fmt: skip
def test_what_can_be_mended_is_one_sentence_before_anything_is_opened(
    place, tmp_path, capsys, monkeypatch, words, says
):
    monkeypatch.setattr(steps, "open_policy", None)
    with pytest.raises(SystemExit) as exit:
        call(place, tmp_path / "out.jsonl", "--prompts=PLACE/sums.jsonl", *words)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2 and len(lines) == 1 and says in lines[0], error


def test_the_model_itself_is_named_where_there_is_none(place, tmp_path):
    with pytest.raises(SystemExit):
        call(place, tmp_path / "out.jsonl", "--prompts=PLACE/sums.jsonl", "--by=world", "--model=nowhere/at/all")
    assert not epath.Path(tmp_path / "out.jsonl").exists()
