"""Estimates over a few seeds; the published curves of over-optimisation, fitted; what is highest along a run."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from rlhf_jax.evaluate.intervals import Estimate, student

Law = Literal["best_of", "policy"]
WINDOW = 3  # values along a run that are taken together where one is looked at


class Fit(NamedTuple):
    """A curve of over-optimisation: gold as a function of d, the square root of the KL in nats."""

    law: Law
    alpha: float  # gold per d at the start
    beta: float  # how fast it is lost
    r2: float  # share of the variance of gold around its mean that the curve explains

    @property
    def peak(self) -> float:
        """The d of the highest gold; infinite where the curve doesn't turn."""
        if self.beta <= 0 or self.alpha <= 0:
            return math.inf if self.alpha > 0 else 0.0
        return self.alpha / (2 * self.beta) if self.law == "best_of" else math.exp(min(self.alpha / self.beta - 1, 700))

    def gold(self, d: np.ndarray) -> np.ndarray:
        """The curve at each d, 0 at 0."""
        d = np.asarray(d, float)
        return self.alpha * d - self.beta * _bent(self.law, d)


def fit(law: Law, d: Sequence[float] | np.ndarray, gold: Sequence[float] | np.ndarray) -> Fit:
    """Least squares of gold = d (alpha - beta d) for best of n, d (alpha - beta log d) for a policy.

    Args:
      d: square root of the KL from the start, at least 0.
      gold: above that of the start, in any unit.
    Raises: ValueError for less than three points: two are met by any curve.
    References: Gao et al. 2022, arXiv:2210.10760, Eq. 1 and 2 (section 3.1).

    >>> d = np.linspace(0.1, 4, 20)
    >>> found = fit("best_of", d, d * (2 - 0.5 * d))
    >>> print(round(found.alpha, 6), round(found.beta, 6), round(found.r2, 6), round(found.peak, 6))
    2.0 0.5 1.0 2.0
    """
    x, y = np.asarray(d, float), np.asarray(gold, float)
    if len(x) < 3:
        raise ValueError(f"{len(x)} points say nothing about the form of a curve; at least 3 are needed")
    columns = np.stack([x, -_bent(law, x)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    left, all_of_it = ((y - columns @ [alpha, beta]) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return Fit(law, float(alpha), float(beta), float(1 - left / all_of_it) if all_of_it > 0 else math.nan)


def within(d: Sequence[float], gold: Sequence[float], reach: float) -> tuple[list[float], list[float]]:
    """The points, as `fit` takes them, whose KL is at most `reach` nats, but never less than the first three."""
    near = [place for place, x in enumerate(d) if x**2 <= reach]
    kept = near if len(near) >= 3 else range(min(3, len(d)))
    return [float(d[place]) for place in kept], [float(gold[place]) for place in kept]


def _bent(law: Law, d: np.ndarray) -> np.ndarray:
    """What beta multiplies: d^2, or d log d, which is 0 at 0."""
    return d**2 if law == "best_of" else d * np.log(np.where(d > 0, d, 1.0))


def over_seeds(values: Sequence[float | None]) -> Estimate | None:
    """Mean and 95% t interval of the seeds that have a finite number; None for none, infinite ends for one.

    >>> print(over_seeds([1.0, None]))
    Estimate(mean=1.0, low=-inf, high=inf)
    """
    told = [float(value) for value in values if value is not None and math.isfinite(value)]
    return student(told) if told else None


# Along a run


def near(values: np.ndarray, place: int) -> float:
    """The mean over the WINDOW values around a place, moved inwards at the ends; those that aren't numbers left out."""
    low = min(max(place - WINDOW // 2, 0), max(len(values) - WINDOW, 0))
    return float(np.nanmean(values[low : low + WINDOW]))


def highest(values: np.ndarray) -> int:
    """The place around which the values are highest; it has a value itself."""
    means = [near(values, place) if np.isfinite(values[place]) else -math.inf for place in range(len(values))]
    return int(np.argmax(means))


def height(halves: np.ndarray) -> float:
    """The highest gold along a run, [2, R]: the place is chosen by one half of the answers, gold is the other's.

    The mean of both ways round. The highest of noisy values is too high on average; this isn't.
    """
    return float(np.mean([near(halves[1 - own], highest(halves[own])) for own in (0, 1)]))


def stopped(kl: np.ndarray, budget: float) -> int:
    """The last rollout before the KL is above a budget for the first time; at least the first."""
    over = np.flatnonzero(kl > budget)
    return max(int(over[0]) - 1, 0) if len(over) else len(kl) - 1


def order(values: np.ndarray) -> float:
    """The rank correlation of values with their places: 1 where each is higher than the one before."""
    return float(np.corrcoef(np.arange(len(values)), stats.rankdata(values))[0, 1])
