"""Evaluation: intervals against closed forms, KL against the exact one, scorers that are wrong named."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from experiments import evaluate as program
from rlhf_jax.data import prompts
from rlhf_jax.data.rows import Message
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject, text_of
from rlhf_jax.evaluate.compare import Result, compare, has_kl, win_shares
from rlhf_jax.evaluate.intervals import paired
from rlhf_jax.evaluate.scorers import score
from rlhf_jax.models.decoder import Params
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Completion
from rlhf_jax.workdir import Policy, open_policy

ASKED = ["Once upon a time", "The dog", "A girl named Lily went", "It was"]


def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(completion)) for completion in completions]


@pytest.fixture(scope="module")
def policy(stories: pathlib.Path) -> Policy:
    return open_policy(str(stories))


def moved(params: Params, by: float) -> Params:
    """Other parameters close by."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return tree.unflatten([x + by * rng.normal(size=x.shape).astype(np.float32) * x.std() for x in leaves])


@pytest.fixture(scope="module")
def results(policy: Policy) -> list[Result]:
    other = moved(policy.params, 0.05)
    subjects = [Subject("base", policy.model, policy.params, policy.tokenizer)]
    subjects.append(Subject("moved", policy.model, other, policy.tokenizer))
    sampling = Sampling(max_new_tokens=16)
    return compare(subjects, ASKED, {}, brevity, baseline="base", sampling=sampling, samples=16)


def test_the_baseline_ties_with_itself(results):
    base = results[0]
    assert base.gain == (0, 0, 0) and base.wins == (0.5, 0.5, 0.5) and base.kl == (0, 0, 0)


def test_a_moved_model_is_away_from_the_baseline(results):
    base, other = results
    assert other.kl is not None and other.kl.low > 0
    np.testing.assert_allclose(other.gain.mean, other.score.mean - base.score.mean, rtol=1e-6)
    assert other.score.mean == np.mean([[-len(text) for text in row] for row in other.texts])
    assert other.wins.mean == win_shares(other.scores, base.scores).mean()


def test_the_kl_is_the_exact_one_where_that_can_be_summed(policy):
    # One token an answer: the exact KL is a sum over the vocabulary.
    from rlhf_jax.data.tokens import Encoder

    other = moved(policy.params, 0.05)
    one = Subject("other", policy.model, other, policy.tokenizer)
    base = Subject("base", policy.model, policy.params, policy.tokenizer)
    sampling = Sampling(max_new_tokens=1, temperature=1.2)
    _, found = compare([base, one], ASKED, {}, brevity, baseline="base", sampling=sampling, samples=200)
    exact = []
    for ids in Encoder(policy.tokenizer).prompts(ASKED):
        row = np.asarray(ids)[None]
        places = np.arange(row.shape[1], dtype=np.int32)[None]
        p, q = (
            np.asarray(policy.model.logits(x, policy.model.apply(x, row, places * 0 + 1, places)))[0, -1]
            for x in (other, policy.params)
        )
        log_p, log_q = (np.asarray(jax.nn.log_softmax(z.astype(np.float64) / 1.2), np.float64) for z in (p, q))
        exact.append(np.sum(np.exp(log_p) * (log_p - log_q)))
    assert found.kl is not None
    # Four prompts: the interval over prompts is no yardstick of the sampling error, which is this.
    assert abs(found.kl.mean - np.mean(exact)) < 4 * math.sqrt(2 * np.mean(exact) / (4 * 200))


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0), Sampling(top_k=3), Sampling(top_p=0.9), Sampling(min_p=0.1),
                 Sampling(repetition_penalty=1.1)], ids=str,
)  # fmt: skip
def test_answers_of_a_filtered_distribution_have_no_kl(sampling):
    assert not has_kl(sampling)
    assert has_kl(dataclasses.replace(Sampling(), temperature=0.7))


def test_intervals_are_those_of_the_normal_law_for_many_prompts():
    values = np.random.default_rng(0).normal(3, 2, 4000)
    found = paired({"x": values})["x"]
    half = 1.96 * values.std() / math.sqrt(len(values))
    np.testing.assert_allclose([found.low, found.high], [found.mean - half, found.mean + half], atol=0.15 * half)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = [(e := paired({"x": rng.exponential(size=60)}, seed=i)["x"]).low < 1 < e.high for i in range(200)]
    assert 0.88 < np.mean(hits) < 0.98


def test_a_paired_difference_is_surer_than_two_means():
    rng = np.random.default_rng(2)
    hard = rng.normal(size=200)  # how hard a prompt is moves both models alike
    a, b = hard + 0.1 * rng.normal(size=200), hard + 0.2 + 0.1 * rng.normal(size=200)
    found = paired({"a": a, "b": b, "difference": b - a})
    assert found["a"].high > found["b"].low
    assert found["difference"].low > 0.15
    assert found["difference"].mean == pytest.approx(found["b"].mean - found["a"].mean)


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        (lambda prompts, completions, **columns: [1.0], "gave 1 scores for 2 answers"),
        (lambda prompts, completions, **columns: [math.nan] * 2, "gave nan for the answer"),
    ],
)
def test_a_scorer_that_is_wrong_is_one_sentence(scorer, says):
    with pytest.raises(UserError, match=says):
        score(scorer, ["a"], [["b", "c"]], {})


def test_the_token_that_ends_an_answer_is_no_text(policy):
    prompt, tokens = np.asarray([1], np.int32), np.asarray([403, 407, 261], np.int32)
    read = lambda tokens, stop: text_of(policy.tokenizer)(prompt, Completion(0, 0, tokens, tokens, tokens, stop))
    assert read(tokens, "end") == read(tokens[:-1], "length") != read(tokens, "length")


def test_a_scorer_gets_conversations_and_the_columns_of_the_row():
    seen = []
    asked = [(Message("user", "2 + 2"),), (Message("user", "3 + 3"),)]

    def scorer(prompts, completions, *, answer):
        seen.append((prompts, completions, answer))
        return [0.0] * len(prompts)

    score(scorer, asked, [["4", "5"], ["6"]], {"answer": [4, 6]})
    ((given, told, answers),) = seen
    assert answers == [4, 4, 6]
    assert given[0] == [{"role": "user", "content": "2 + 2"}]
    assert told[2] == [{"role": "assistant", "content": "6"}]


def test_prompts_come_from_any_rows_that_have_some(tmp_path):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "chosen": "x"}, {"messages": said}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = prompts.read(str(tmp_path / "p.jsonl"))
    assert [one.text for one in asked] == ["a", "b", (Message("user", "hi"),)]
    assert prompts.columns(asked) == {"answer": [1, None, None], "chosen": [None, "x", None]}
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert [one.text for one in prompts.read(str(tmp_path / "p.txt"))] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question": "a"}\n', r"p.jsonl:1 has neither a column prompt nor messages"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', r"p.jsonl:2 can't be used "),
        ('{"prompt": "a"}\n{broken\n', r"p.jsonl:2 can't be used .invalid JSON"),
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path, content, says):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=says):
        prompts.read(str(tmp_path / "p.jsonl"))


def compared(tmp_path: pathlib.Path, **changes: Any) -> program.Compare:
    (tmp_path / "p.txt").write_text("\n".join(ASKED))
    given: dict[str, Any] = {
        "prompts": str(tmp_path / "p.txt"),
        "out": str(tmp_path / "out"),
        "scorer": "test_evaluate:brevity",
    }
    return program.Compare(**given | changes)


def test_the_program_writes_its_figures_answers_and_report(tmp_path, stories, capsys):
    given = compared(tmp_path, models=(str(stories),) * 2, names=("a", "<b>"), samples=2, max_new_tokens=8)
    program.main(given)
    figures = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["model"] for row in figures] == ["a", "<b>"]
    assert figures[1]["kl"] == {"mean": 0, "low": 0, "high": 0}  # the same model
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * len(ASKED) and {row["prompt"] for row in rows} == set(ASKED)
    page = (tmp_path / "out/report.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "2 answers each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": ()}, "no model to evaluate; give --models"),
        ({"models": ("x", "y"), "names": ("a", "a")}, "must be 2 different names"),
        ({"models": ("x",), "baseline": "z"}, "--baseline=z is none of the models; choose one of x"),
        ({"models": ("x",), "temperature": -1.0}, "--temperature=-1.0 is not allowed"),
        ({"models": ("x",), "seed": -1}, "--seed=-1 is not allowed; it must be from 0 to 4294967295"),
        ({"models": ("x",), "samples": 0}, "--samples=0 is not allowed"),
        ({"models": ("x",), "prompts": ""}, "there are no prompts; give --prompts=FILE"),
        ({"models": ("x",), "prompts": "nowhere.txt"}, "there is no file nowhere.txt; check --prompts"),
        ({"models": ("x",), "scorer": "gould"}, "there is no scorer 'gould'; the nearest is 'gold'"),
    ],
)
def test_what_can_be_mended_is_one_sentence_before_anything_is_opened(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        program.main(compared(tmp_path, **changes))
