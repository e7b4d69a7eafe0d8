"""Models of steps: hand-made solutions, scores of whole ones, votes against exact sums."""

import itertools
from collections import Counter

import numpy as np
import pytest

from rlhf_jax.evaluate.best_of import best_of
from rlhf_jax.evaluate.process import judge_steps, majority_of, solution_score, step_gains


def test_steps_by_hand():
    scores = [np.array([2.0, 1.0, -1.0]), np.array([1.0, -1.0]), np.array([1.0, 3.0]), np.array([-1.0, 0.0])]
    labels = [(1, 1, 0), (0, 0), (1, 1), (0.5, 1)]
    found = judge_steps(scores, labels)
    assert (found.solutions, found.steps) == (4, 8)
    assert found.accuracy is not None and found.accuracy.mean == (3 + 1 + 2 + 0.5) / 8
    assert found.majority is not None and found.majority.mean == 5 / 8
    # The third step of the first; the second's is missed; the third is clear; a neutral step was called wrong.
    assert found.first_wrong.mean == 2 / 4
    assert found.of_wrong is not None and found.of_wrong.mean == 1 / 2
    assert found.of_right is not None and found.of_right.mean == 1 / 2


def test_solutions_are_resampled_whole():
    rng = np.random.default_rng(0)
    easy = rng.random(80) < 0.5  # all steps of a solution are judged alike
    scores = [np.full(6, 1.0 if one else -1.0) for one in easy]
    found = judge_steps(scores, [(1.0,) * 6] * 80)
    assert found.accuracy is not None
    half = 1.96 * 0.5 / np.sqrt(80)
    np.testing.assert_allclose(found.accuracy.high - found.accuracy.low, 2 * half, rtol=0.15)
    assert found.of_wrong is None and found.majority == (1, 1, 1)


def test_a_model_that_knows_the_labels_is_right_everywhere():
    rng = np.random.default_rng(1)
    labels = [tuple(rng.choice([0.0, 0.5, 1.0], rng.integers(1, 6))) for _ in range(30)]
    found = judge_steps([np.asarray(row) - 0.5 + 1e-9 for row in labels], labels)
    assert found.accuracy == (1, 1, 1) and found.first_wrong == (1, 1, 1)


def test_scores_of_solutions():
    scores = np.array([0.3, -2.0, 1.0])
    chances = 1 / (1 + np.exp(-scores))
    np.testing.assert_allclose(np.exp(solution_score(scores, "product")), chances.prod())
    np.testing.assert_allclose(np.exp(solution_score(scores, "minimum")), chances.min())
    np.testing.assert_allclose(np.exp(solution_score(scores, "last")), chances[-1])
    one = np.array([0.7])
    assert solution_score(one, "product") == solution_score(one, "minimum") == solution_score(one, "last")
    assert np.isfinite(solution_score(np.full(5, -1e4), "product"))


@pytest.mark.parametrize("how", ["product", "minimum", "last"])
def test_gains_of_steps_add_up_to_the_score_of_every_beginning(how):
    scores = np.random.default_rng(0).normal(scale=3, size=(4, 6))
    upto = np.cumsum(step_gains(scores, how), axis=1)
    for count in range(1, 7):
        np.testing.assert_allclose(upto[:, count - 1], solution_score(scores[:, :count], how), atol=1e-12)


def exact(answers: str, right: str, n: int) -> float:
    """Over all subsets; of equally frequent answers each is as likely."""
    won = []
    for subset in itertools.combinations(answers, n):
        votes = Counter(subset)
        top = [name for name, count in votes.items() if count == max(votes.values())]
        won.append((right in top) / len(top))
    return float(np.mean(won))


@pytest.mark.parametrize("answers", ["aabbbcc", "abcdefg", "aaaaaab", "bbbbbbb"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_a_vote_is_the_mean_over_subsets(answers, n):
    (found,) = majority_of([answers], ["a"], n, subsets=4000)
    assert found == pytest.approx(exact(answers, "a", n), abs=0 if n in (1, 7) else 0.03)


def test_an_answer_that_is_none_is_never_voted_for():
    assert majority_of([[None, None, "4"]], ["4"], 3).tolist() == [1.0]
    assert majority_of([[None, None]], ["4"], 2).tolist() == [0.0]
    assert 0.3 < majority_of([[None, None, None, "4"]], ["4"], 2)[0] < 0.7  # half of the subsets have it
    with pytest.raises(ValueError, match="a vote of 3 can't be had from 2 answers"):
        majority_of([["4", "5"]], ["4"], 3)


def test_the_seed_decides_the_subsets():
    answers = [list("aabbbccd")] * 3
    same = [majority_of(answers, ["a"] * 3, 4, seed=7, subsets=20) for _ in range(2)]
    assert same[0].tolist() == same[1].tolist()


def test_best_of_by_a_perfect_score_finds_a_right_answer_where_there_is_one():
    right = np.array([[0.0, 1, 0, 0], [0, 0, 0, 0]])
    assert best_of(right, 4, by=right + 0.1).tolist() == [1, 0]
    assert best_of(right, 2, by=right).tolist() == [0.5, 0]  # half of the pairs hold it
