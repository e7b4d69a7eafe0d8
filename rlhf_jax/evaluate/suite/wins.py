"""Win rates against another model's answers, and what they would be for answers of equal length."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.data.rows import Refusal
from rlhf_jax.evaluate.intervals import DRAWS, Estimate
from rlhf_jax.evaluate.resampling import spread
from rlhf_jax.evaluate.suite.items import Against, Examinee, Figure, Found, Item, figure, unjudged
from rlhf_jax.feedback.judges import Pair, Verdict

RIDGE = 0.01  # of both coefficients, so that one-sided rows have a finite fit
SELDOM = 0.1  # of the prompts: fewer longer, or shorter, answers say little of what length does
STEPS = 25  # of Newton's method, which is at its end long before


def won(verdict: Verdict) -> float | None:
    """What the first answer wins of a pair, mean over both orders; in each 1, or a half for a tie, or 0.

    So a judge that says the same place in both orders has said nothing: a half. None without a verdict (`unjudged`).

    >>> won(Verdict(0.5, 0.9, 0.1)), won(Verdict(0.7, 0.9, 0.5)), won(Verdict(0.8))
    (0.5, 0.75, 1.0)
    """
    if verdict.probability is None or unjudged(verdict) is not None:
        return None
    orders = [verdict.ahead, verdict.behind]
    said = [x for x in orders if x is not None] if None not in orders else [verdict.probability]
    return float(np.mean([(1 + np.sign(x - 0.5)) / 2 for x in said]))


def wins(items: Sequence[Item], examinee: Examinee, seed: int = 0, against: Against | None = None) -> Found:
    """`win_rate`: the share of prompts whose answer is judged better than the other model's, in both orders, a tie a
    half; `length_controlled`: the same without what length does (`controlled`). No figure against itself.

    Args: against: must be there.
    """
    assert against is not None
    if examinee.name == against.name:
        return Found([], [], {})
    asked = [item.asked() for item in items]
    told = list(zip(items, examinee.answers(asked), against.answers(asked), strict=True))
    both = [(i, a, b) for i, a, b in told if not isinstance(a, Refusal) and not isinstance(b, Refusal)]
    left = {item.where: str(next(x for x in texts if isinstance(x, Refusal))) for item, *texts in told
            if any(isinstance(x, Refusal) for x in texts)}  # fmt: skip
    verdicts = against.judge([Pair(item.prompt, ours, theirs) for item, ours, theirs in both])
    kept, values, lengths, lines = [], [], [], []
    for (item, ours, theirs), verdict in zip(both, verdicts, strict=True):
        value = won(verdict)
        if value is None:
            left[item.where] = f"not judged, {unjudged(verdict)}"
            continue
        kept.append(item)
        values.append(value)
        lengths.append((len(ours), len(theirs)))
        line = {"where": item.where, "group": item.group, "prompt": item.prompt, "answer": ours, "other": theirs}
        chances = {"ahead": verdict.ahead, "behind": verdict.behind, "probability": verdict.probability}
        lines.append(line | chances | {"values": {"win_rate": value}})
    figures = figure("win_rate", kept, values, 0.5, seed=seed)
    if kept:
        estimate = controlled(np.asarray(values), np.asarray(lengths, np.float64), seed=seed).rate
        figures.append(Figure("length_controlled", estimate, len(kept), 0.5))
    return Found(figures, lines, left, extrapolated(lengths))


def extrapolated(lengths: Sequence[tuple[int, int]]) -> str:
    """A note where one model's answers are the longer ones to nearly all prompts, so that few show what length does.

    >>> extrapolated([(3, 9)] * 20)
    'length_controlled extrapolates: ours is the longer answer to 0% of the prompts'
    """
    if not lengths:
        return ""
    own, other = np.asarray(lengths).T
    said = f"length_controlled extrapolates: ours is the longer answer to {np.mean(own > other):.0%} of the prompts"
    # Answers of one length are what it asks for, so they count on both sides.
    return "" if min(np.mean(own >= other), np.mean(own <= other)) >= SELDOM else said


class Controlled(NamedTuple):
    """The win rate at equal length with its 95% interval, and the log-odds that being longer brings."""

    rate: Estimate
    length: float


def controlled(values: np.ndarray, lengths: np.ndarray, *, seed: int = 0) -> Controlled:
    """sig(theta) of the fit P(win) = sig(theta + phi tanh((own length - other length) / their deviation)).

    The logistic regression of AlpacaEval 2.0 without what it has from elsewhere: how hard each instruction is, fitted
    over many models, and a baseline that was told to be brief or verbose, which ties phi down. So where length goes
    with the kind of instruction, that is taken for length. Two models turned round have 1 less it. The interval fits
    every resampling of the prompts anew.

    Args:
      values: [N] what our answer wins, 0 to 1.
      lengths: [N, 2] characters of ours and the other.
    References: Dubois et al. 2024, arXiv:2404.04475, Eq. 1.
    """
    difference = lengths[:, 0] - lengths[:, 1]
    scale = difference.std()
    x = np.stack([np.ones(len(values)), np.tanh(difference / (scale if scale > 0 else 1.0))])
    rng, count = np.random.default_rng(seed), len(values)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    found = _fit(x, values, np.concatenate([np.ones((1, count)), draws]))
    rates = 1 / (1 + np.exp(-found[:, 0]))
    return Controlled(Estimate(float(rates[0]), *spread(rates[1:])), float(found[0, 1]))


def _fit(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The maximum of each weighting [D, N] over features [2, N], by Newton's method, [D, 2]."""
    found = np.zeros((len(weights), 2))
    squares = np.stack([x[0] * x[0], x[0] * x[1], x[1] * x[1]])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(found @ x, -30, 30)))
        gradient = (weights * (y - p)) @ x.T - RIDGE * found
        curve = (weights * p * (1 - p)) @ squares.T
        curves = curve[:, [0, 1, 1, 2]].reshape(-1, 2, 2) + RIDGE * np.eye(2)
        step = np.linalg.solve(curves, gradient[..., None])[..., 0]
        found += np.clip(step, -2, 2)  # far off, a whole step may overshoot
        if np.abs(step).max() < 1e-10:
            break
    return found
