"""Reward models of steps: how well they judge the steps of solutions, and what their scores make of whole ones."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.resampling import mean

SUBSETS = 200  # that a vote's accuracy is the mean over


class JudgedSteps(NamedTuple):
    """What scores of steps are worth; intervals resample solutions.

    Attributes:
      solutions, steps: how many there are; neutral steps are not counted.
      accuracy: share of steps, neutral ones left out, whose score is above 0 if they are right and below if they are
        wrong; a score of 0 counts a half.
      majority: share of the steps that have the more frequent label: the accuracy of one who always says it.
      first_wrong: share of solutions whose first step with a score below 0 is the first wrong one; of a solution
        without a wrong step, that no score is below 0.
      of_wrong, of_right: the same of the solutions that have a wrong step, and of those that have none.
    """

    solutions: int
    steps: int
    accuracy: Estimate | None
    majority: Estimate | None
    first_wrong: Estimate
    of_wrong: Estimate | None
    of_right: Estimate | None


def judge_steps(scores: Sequence[np.ndarray], labels: Sequence[Sequence[float]], *, seed: int = 0) -> JudgedSteps:
    """Holds the scores of each solution's steps against their labels.

    Args:
      labels: 1 right, 0 wrong, 0.5 neutral, which counts as no wrong step.
    """
    said, given = np.concatenate(list(scores)), np.concatenate([np.asarray(row, np.float64) for row in labels])
    units = np.repeat(np.arange(len(scores)), [len(row) for row in scores])
    clear = given != 0.5
    said, given, units = said[clear], given[clear], units[clear]
    right = (np.sign(said * (2 * given - 1)) + 1) / 2
    often = float(np.mean(given) >= 0.5) if len(given) else 1.0
    found = [_first(row, 0.0) == _first(row_labels, 0.5) for row, row_labels in zip(scores, labels, strict=True)]
    wrong = np.asarray([_first(row, 0.5) is not None for row in labels])
    hit, each = np.asarray(found, np.float64), np.arange(len(scores))
    of = lambda here: mean(hit[here], each[here], seed=seed) if here.any() else None
    return JudgedSteps(
        len(scores), len(given),
        mean(right, units, seed=seed) if len(given) else None,
        mean(given == often, units, seed=seed) if len(given) else None,
        mean(hit, each, seed=seed), of(wrong), of(~wrong),
    )  # fmt: skip


def _first(row: Sequence[float] | np.ndarray, below: float) -> int | None:
    """The place of the first number below a limit."""
    return next((place for place, value in enumerate(row) if value < below), None)


SOLUTION: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "product": lambda chances: chances.sum(axis=-1),
    "minimum": lambda chances: chances.min(axis=-1),
    "last": lambda chances: chances[..., -1],
}


def solution_score(scores: np.ndarray, how: str) -> np.ndarray:
    """The score of a whole solution from those of its steps [..., S], in nats: at most 0.

    product: log of the chance that all steps are right, the sum of log sig; minimum: of the least likely step; last:
    of the last one.

    References: Lightman et al. 2023, arXiv:2305.20050, sec. 2.6.

    >>> print(np.exp(solution_score(np.array([0.0, 0.0, 20.0]), "product")).round(4))
    0.25
    """
    return SOLUTION[how](-np.logaddexp(0, -np.asarray(scores, np.float64)))


def step_gains(scores: np.ndarray, how: str) -> np.ndarray:
    """What each step adds to the score of its solution, in nats [..., S]; their sum is `solution_score`.

    product: log sig(r_s); minimum: by how much the step is the least likely one so far, else 0; last: how much
    likelier the step is right than the one before.

    >>> print(step_gains(np.array([30.0, 0.0, 30.0]), "minimum").round(3) + 0.0)
    [ 0.    -0.693  0.   ]
    """
    scores = np.asarray(scores, np.float64)
    upto = [solution_score(scores[..., :count], how) for count in range(1, scores.shape[-1] + 1)]
    return np.diff(np.stack(upto, axis=-1), axis=-1, prepend=0.0)


def majority_of(
    answers: Sequence[Sequence[Hashable]], right: Sequence[Hashable], n: int, *, seed: int = 0, subsets: int = SUBSETS
) -> np.ndarray:
    """How often the most frequent of n answers is the right one, for each prompt, float [P].

    The mean over subsets of n of the N >= n that were drawn; of answers that are equally frequent each is as likely.
    One subset is enough for n = N, and n = 1 is the share of right answers.

    Args:
      answers: for each prompt its N final answers; None is one that gives no answer, and is never voted for.
      right: for each prompt the right one.
      seed: of the subsets.
    Raises: ValueError for n below 1 or above N.
    References: Wang et al. 2023, arXiv:2203.11171.

    >>> print(majority_of([["4", "4", "5"]], ["4"], 3), majority_of([["4", "4", "5"]], ["4"], 1).round(3))
    [1.] [0.667]
    """
    rng = np.random.default_rng(seed)
    return np.asarray([_vote(list(a), r, n, rng, subsets) for a, r in zip(answers, right, strict=True)])


def _vote(answers: list[Hashable], right: Hashable, n: int, rng: np.random.Generator, subsets: int) -> float:
    if not 1 <= n <= len(answers):
        raise ValueError(f"a vote of {n} can't be had from {len(answers)} answers")
    if n == 1:
        return answers.count(right) / len(answers)
    names = [name for name in dict.fromkeys(answers) if name is not None]
    if right not in names:
        return 0.0
    votes = np.asarray([[name == answer for name in names] for answer in answers], np.int64)
    if n == len(answers):
        counts = votes.sum(axis=0)[None]
    else:
        drawn = np.argsort(rng.random((subsets, len(answers))), axis=1)[:, :n]
        counts = votes[drawn].sum(axis=1)
    top = counts == counts.max(axis=1, keepdims=True)
    top &= counts > 0
    won = top[:, names.index(right)] / np.maximum(top.sum(axis=1), 1)
    return float(won.mean())
