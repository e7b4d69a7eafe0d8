"""Bootstrap intervals of means and of what they differ by, all from the same resampled prompts."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

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
