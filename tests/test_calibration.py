"""Calibration: labels drawn from the chances, hand-made cases, shares as labels; resampling against closed forms."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluate import resampling
from rlhf_jax.evaluate.calibration import calibration
from rlhf_jax.evaluate.intervals import paired

RNG = np.random.default_rng


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def drawn(count: int, seed: int = 0, by: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score differences, labels drawn with the chances sig(by * difference), a prompt each."""
    rng = RNG(seed)
    difference = rng.normal(0, 2, count)
    return difference, (rng.random(count) < sigmoid(by * difference)).astype(float), np.arange(count)


def test_labels_drawn_from_the_chances_are_calibrated_up_to_the_floor():
    found = [calibration(*drawn(count), seed=1) for count in (500, 4000)]
    for one in found:
        assert one.ece.low == 0  # what can't be told from 0 isn't
        assert one.ece.mean < 2 * one.floor
    assert found[1].floor < found[0].floor / 2.5  # it falls as 1 / sqrt(n)
    assert found[1].ece.mean < 0.03


def test_a_model_that_is_too_sure_is_seen():
    found = calibration(*drawn(2000, by=0.3))
    assert found.ece.low > 0.1 > 3 * found.floor
    assert all(one.share.mean < one.confidence for one in found.bins[3:])


def test_a_model_without_an_opinion_has_the_scores_of_a_coin():
    found = calibration(np.zeros(40), np.tile([1.0, 0.0, 1.0, 1.0], 10), np.arange(40))
    assert found.ece == (0, 0, 0)
    assert found.brier == (0.25,) * 3
    np.testing.assert_allclose(found.log_loss, math.log(2))
    (only,) = found.bins
    assert (only.count, only.confidence, only.share.mean) == (40, 0.5, 0.5)


def test_a_case_by_hand():
    # Confidences 0.75, 0.75, 0.9 and 0.9, in the bins from 0.75 and 0.9 on; the first prefers the second answer.
    chances, labels = np.array([0.25, 0.75 + 1e-9, 0.9 + 1e-9, 0.9 + 1e-9]), np.array([0.0, 0.0, 1.0, 0.0])
    chances[0] -= 1e-9
    found = calibration(np.log(chances / (1 - chances)), labels, np.arange(4))
    assert [(one.count, round(one.confidence, 6), one.share.mean) for one in found.bins] == [
        (2, 0.75, 0.5), (2, 0.9, 0.5)
    ]  # fmt: skip
    np.testing.assert_allclose(found.ece.mean, 0.5 * 0.25 + 0.5 * 0.4, rtol=1e-6)
    np.testing.assert_allclose(found.brier.mean, np.mean([0.0625, 0.5625, 0.01, 0.81]), rtol=1e-6)
    np.testing.assert_allclose(found.log_loss.mean, -np.log([0.75, 0.25, 0.9, 0.1]).mean(), rtol=1e-6)


def test_shares_are_as_many_labels():
    # Three labellers of each comparison, in rows of their own or as one row with their share.
    rng = RNG(3)
    difference, votes = rng.normal(0, 2, 60), (rng.random((60, 3)) < 0.7).astype(float)
    one = calibration(difference, votes.mean(axis=1), np.arange(60))
    three = calibration(np.repeat(difference, 3), votes.ravel(), np.repeat(np.arange(60), 3))
    for name in ("ece", "brier", "log_loss"):
        np.testing.assert_allclose(getattr(one, name), getattr(three, name), rtol=1e-9)


def test_the_order_in_which_answers_stand_means_nothing():
    difference, share, units = drawn(300)
    turned = calibration(-difference, 1 - share, units)
    np.testing.assert_allclose(turned.ece, calibration(difference, share, units).ece, rtol=1e-9)
    np.testing.assert_allclose(turned.brier, calibration(difference, share, units).brier, rtol=1e-9)


# Resampling


def test_a_record_a_unit_gives_the_normal_law_and_the_interval_of_paired():
    values = RNG(0).normal(3, 2, 2000)
    found = resampling.mean(values, np.arange(2000))
    other = paired({"x": values})["x"]
    half = 1.96 * values.std() / math.sqrt(2000)
    np.testing.assert_allclose(found, [values.mean(), values.mean() - half, values.mean() + half], atol=0.1 * half)
    np.testing.assert_allclose(found, other, atol=0.1 * half)


def test_copies_of_a_record_in_its_unit_tell_nothing_new():
    values, units = RNG(1).normal(size=100), np.arange(100)
    once, often = resampling.mean(values, units), resampling.mean(np.repeat(values, 5), np.repeat(units, 5))
    np.testing.assert_allclose(once, often, rtol=1e-9)
    alone = resampling.mean(np.repeat(values, 5), np.arange(500))
    assert alone.high - alone.low < 0.6 * (often.high - often.low)


def test_records_weigh_the_same_whatever_their_unit():
    # One prompt with 9 comparisons, all right, another with one that is wrong.
    found = resampling.mean(np.array([1.0] * 9 + [0.0]), np.array([0] * 9 + [1]))
    assert found == (0.9, 0.0, 1.0)


def test_intervals_of_a_ratio_hold_the_truth_as_often_as_they_say():
    rng, hits = RNG(2), 0
    for seed in range(100):
        sizes = rng.integers(1, 6, 60)
        units, ease = np.repeat(np.arange(60), sizes), np.repeat(rng.random(60), sizes)
        found = resampling.mean((rng.random(len(units)) < ease).astype(float), units, seed=seed)
        hits += found.low <= 0.5 <= found.high
    assert 88 <= hits <= 99


def test_correlations_are_those_of_numpy_and_none_of_a_constant():
    rng = RNG(4)
    x, units = rng.normal(size=400), np.repeat(np.arange(100), 4)
    y = 0.5 * x + rng.normal(size=400)
    found = resampling.correlation(x, y, units)
    assert found is not None
    np.testing.assert_allclose(found.mean, np.corrcoef(x, y)[0, 1], rtol=1e-9)
    assert found.low < found.mean < found.high and found.high - found.low < 0.25
    assert resampling.correlation(x, np.full(400, 3.0), units) is None
    ranked = resampling.correlation(resampling.ranks(np.exp(x)), resampling.ranks(x), units)
    assert ranked is not None and ranked.mean == pytest.approx(1)


def test_within_takes_away_what_units_differ_by():
    rng = RNG(5)
    units = np.repeat(np.arange(50), 4)
    rng.shuffle(units)
    own, prompts = rng.normal(size=200), rng.normal(0, 50, 50)
    left = resampling.within(own + prompts[units], units)
    means = np.array([own[units == u].mean() for u in units])
    np.testing.assert_allclose(left, own - means, atol=1e-9)
    assert set(np.unique(resampling.within(own, units, ranked=True))) == {-1.5, -0.5, 0.5, 1.5}
