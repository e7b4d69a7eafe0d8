"""Bootstrap intervals of figures over units that are drawn whole, such as all comparisons of a prompt.

A figure is a function of sums over records; the units are resampled, and a unit brings all of its records along.
"""

import numpy as np

from rlhf_jax.evaluate.intervals import DRAWS, Estimate

CHUNK = 100  # resamplings made at a time


def totals(table: np.ndarray, units: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The sum of each row of the table, [R], and the same of every resampling, [R, DRAWS].

    Args:
      table: [R, N], a column a record.
      units: [N], whose record it is.
      seed: of the resampling; tables of the same units are resampled alike.
    """
    found, places = np.unique(units, return_inverse=True)
    count, rng = len(found), np.random.default_rng(seed)
    by_unit = np.stack([np.bincount(places, row, count) for row in np.asarray(table, np.float64)])
    rows = np.arange(CHUNK)[:, None] * count
    drawn = []
    for _ in range(DRAWS // CHUNK):
        who = (rng.integers(count, size=(CHUNK, count)) + rows).ravel()
        drawn.append(by_unit @ np.bincount(who, minlength=CHUNK * count).reshape(CHUNK, count).T)
    return by_unit.sum(axis=1), np.concatenate(drawn, axis=1)


def ratio(top: np.ndarray, bottom: np.ndarray, units: np.ndarray, *, seed: int = 0) -> Estimate:
    """The sum of `top` over that of `bottom`, which is above 0 for every unit, with its 95% percentile interval.

    >>> print(ratio(np.array([1.0, 0.0, 1.0]), np.ones(3), np.array([7, 7, 7])))  # one unit tells nothing of others
    Estimate(mean=0.6666666666666666, low=0.6666666666666666, high=0.6666666666666666)
    """
    whole, drawn = totals(np.stack([top, bottom]), units, seed)
    return Estimate(float(whole[0] / whole[1]), *spread(drawn[0] / drawn[1]))


def mean(values: np.ndarray, units: np.ndarray, *, seed: int = 0) -> Estimate:
    """The mean over records, each weighing the same, whatever its unit."""
    return ratio(values, np.ones(len(values)), units, seed=seed)


def spread(draws: np.ndarray) -> tuple[float, float]:
    """The ends between which 95% of the draws lie."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def ranks(values: np.ndarray) -> np.ndarray:
    """Places from 1 on, the mean of them for equal values.

    >>> print(ranks(np.array([5.0, 1.0, 5.0])))
    [2.5 1.  2.5]
    """
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def within(values: np.ndarray, units: np.ndarray, ranked: bool = False) -> np.ndarray:
    """Each value, or its rank among its unit's, less the mean of its unit."""
    made = np.zeros(len(values))
    _, places = np.unique(units, return_inverse=True)
    order = np.argsort(places, kind="stable")
    for part in np.split(order, np.cumsum(np.bincount(places))[:-1]):
        own = ranks(values[part]) if ranked else values[part]
        made[part] = own - own.mean()
    return made


def correlation(x: np.ndarray, y: np.ndarray, units: np.ndarray, *, seed: int = 0) -> Estimate | None:
    """Pearson's, with its 95% percentile interval; None where one of them doesn't vary.

    Of ranks it is Spearman's; they are those of the whole, also in a resampling.
    """
    x, y = x - x.mean(), y - y.mean()
    if not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return None
    x, y = x / x.std(), y / y.std()
    whole, drawn = totals(np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y]), units, seed)
    draws = _pearson(drawn)
    draws = draws[np.isfinite(draws)]  # of few units a resampling may hold equal ones alone
    return Estimate(float(_pearson(whole)), *spread(draws)) if len(draws) else None


def _pearson(sums: np.ndarray) -> np.ndarray:
    count, x, y, xx, yy, xy = sums
    variances = np.maximum(count * xx - x * x, 0) * np.maximum(count * yy - y * y, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variances > 1e-12 * count**4, (count * xy - x * y) / np.sqrt(variances), np.nan)
