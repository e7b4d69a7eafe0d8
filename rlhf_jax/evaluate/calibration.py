"""Whether the chances that a reward model gives are those with which people agree."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.resampling import spread, totals

BINS = 10
LABELLINGS = 200  # draws of labels that the floor is the mean over


class Bin(NamedTuple):
    """Comparisons of like confidence."""

    low: float  # the ends of the confidences that it takes
    high: float
    count: int
    confidence: float  # mean of those in it
    share: Estimate  # of labels that agree with the model


class Calibration(NamedTuple):
    """How far chances are from shares of labels; see `calibration`."""

    ece: Estimate
    floor: float
    brier: Estimate
    log_loss: Estimate
    bins: tuple[Bin, ...]  # those that hold something


def calibration(difference: np.ndarray, share: np.ndarray, units: np.ndarray, *, seed: int = 0) -> Calibration:
    """Expected calibration error, Brier score and log loss of the chances sig(difference).

    The confidence is the chance of the answer that the model prefers, from 0.5 to 1, in ten bins of equal width:

        ece = sum over bins of n_bin / n |share of labels for the preferred answer - mean confidence|
        brier = mean of s (1 - p)^2 + (1 - s) p^2,  log_loss = mean of -s log p - (1 - s) log(1 - p)

    Shares s count as that many labels, so one row with the share 2/3 is three rows of one label each, to all but the
    count. The error of a finite sample is above 0 also for a model that is right: `floor` is what it would be on
    average if labels were drawn from the model's own chances, one a comparison. A bootstrap lies above it once more,
    so the interval of the error is the reflected one (2 e - high, 2 e - low), not below 0; it reaches down to 0 where
    more than one in forty of such labellings have an error as large.

    Args:
      difference: [C] score of the first answer less that of the second.
      share: [C] of labels for the first.
      units: [C], what is resampled: the prompt.
    References: Guo et al. 2017, arXiv:1706.04599, Eq. 3; Brier 1950, Monthly Weather Review 78.
    """
    difference, share = (np.asarray(x, np.float64) for x in (difference, share))
    confidence, agree = confidences(difference, share)
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    of_bin = np.arange(BINS)[:, None] == bins[None]
    chance = np.exp(-np.logaddexp(0, -difference))
    brier = share * (1 - chance) ** 2 + (1 - share) * chance**2
    loss = share * np.logaddexp(0, -difference) + (1 - share) * np.logaddexp(0, difference)
    means = np.stack([np.ones(len(units)), brier, loss])
    # One resampling for all: means, and of each bin how far off it is, the labels that agree, and how many there are.
    table = np.concatenate([means, of_bin * (agree - confidence), of_bin * agree, of_bin])
    whole, drawn = totals(table, units, seed)
    count, off = drawn[0], np.abs(drawn[len(means) : len(means) + BINS]).sum(axis=0)
    ece = float(np.abs(whole[len(means) : len(means) + BINS]).sum() / len(units))
    low, high = spread(off / count)
    of_right = errors_if_right(confidence, bins, seed)
    reach = 0.0 if np.mean(of_right >= ece) > 0.025 else max(0.0, 2 * ece - high)
    brier_mean, loss_mean = (Estimate(float(whole[row] / len(units)), *spread(drawn[row] / count)) for row in (1, 2))
    agreed, held = (slice(len(means) + part * BINS, len(means) + (part + 1) * BINS) for part in (1, 2))
    return Calibration(
        Estimate(ece, reach, max(0.0, 2 * ece - low)),
        float(of_right.mean()),
        brier_mean,
        loss_mean,
        tuple(_bins(whole[agreed], whole[held], drawn[agreed], drawn[held], np.bincount(bins, confidence, BINS))),
    )


def confidences(difference: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chance of the answer that the model prefers, and the share of labels for it; 0.5 of equal scores."""
    confidence = np.exp(-np.logaddexp(0, -np.abs(difference)))
    return confidence, np.where(difference == 0, 0.5, np.where(difference > 0, share, 1 - share))


def errors_if_right(confidence: np.ndarray, bins: np.ndarray, seed: int = 0) -> np.ndarray:
    """The calibration errors of labels that are drawn with the chances that the model gives them, [LABELLINGS]."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(LABELLINGS):
        agree = rng.random(len(confidence)) < confidence
        found.append(np.abs(np.bincount(bins, agree - confidence, BINS)).sum() / len(confidence))
    return np.asarray(found)


def _bins(
    agreed: np.ndarray, held: np.ndarray, agreed_drawn: np.ndarray, held_drawn: np.ndarray, confidence: np.ndarray
) -> Iterator[Bin]:
    """The bins that hold something; a resampling in which one is empty says nothing of it."""
    for place in np.flatnonzero(held):
        there = held_drawn[place] > 0
        ends = spread(agreed_drawn[place][there] / held_drawn[place][there])
        share = Estimate(float(agreed[place] / held[place]), *ends)
        low, high = (float(0.5 + 0.5 / BINS * (place + side)) for side in (0, 1))
        yield Bin(low, high, int(held[place]), float(confidence[place] / held[place]), share)
