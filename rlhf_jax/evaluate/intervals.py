"""95% intervals: of means over prompts by the bootstrap, of shares after Wilson, of a few seeds by Student's t."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

DRAWS = 2000


class Estimate(NamedTuple):
    """A mean over prompts with the ends of its interval."""

    mean: float
    low: float
    high: float


def paired(values: Mapping[str, np.ndarray], *, seed: int = 0, level: float = 0.95) -> dict[str, Estimate]:
    """The mean of each column and its percentile interval.

    The prompts are resampled for all columns at once, and a prompt brings all of its numbers along: so the
    interval of a column of differences is that of a paired comparison.

    Args:
      values: columns float [n], one number a prompt (the mean over its samples), in one order of the prompts.
      seed: of the resampling.
      level: share of the resampled means inside, above 0 and below 1.
    References: Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13.

    >>> print(paired({"constant": np.full(10, 2.0)})["constant"])
    Estimate(mean=2.0, low=2.0, high=2.0)
    """
    table = np.stack([np.asarray(column, np.float64) for column in values.values()])
    count = table.shape[1]
    rng = np.random.default_rng(seed)
    # How often each prompt is drawn: whole counts, so that equal columns have exactly equal means.
    times = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    low, high = np.quantile(table @ times.T / count, [(1 - level) / 2, (1 + level) / 2], axis=1)
    ends = zip(table.mean(axis=1), low, high, strict=True)
    return {name: Estimate(*map(float, row)) for name, row in zip(values, ends, strict=True)}


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share seen in `count` trials (Wilson 1927, JASA 22, p. 209).

    >>> print([round(x, 3) for x in wilson(0.5, 100)])
    [0.404, 0.596]
    """
    if count <= 0:
        return 0.0, 1.0
    z = 1.959963984540054
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def student(values: Sequence[float]) -> Estimate:
    """The mean of a few independent numbers, as of seeds, with its 95% t interval; infinite ends for one number.

    References: Student 1908, Biometrika 6.

    >>> print([round(x, 3) for x in student([0.0, 0.1, 0.2])])
    [0.1, -0.148, 0.348]
    """
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)
