"""Choosing pairs: the head against plain optimisation, designs against brute force, planted pairs, budgets."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import choosing
from rlhf_jax.feedback.choosing import READS, STRATEGIES, Budget, Pool, fit


def made(seed: int = 0, answers: int = 9, width: int = 3, labelled: int = 6, **more: Any) -> Pool:
    """Answers of one prompt with random features and scores, some of whose pairs are labelled."""
    rng = np.random.default_rng(seed)
    every = np.asarray(list(itertools.combinations(range(answers), 2)))
    every = every[rng.permutation(len(every))]
    return Pool(
        every[labelled:], rng.normal(size=(answers, width)), rng.normal(size=(4, answers)), every[:labelled],
        rng.choice([0.0, 0.5, 1.0], labelled), **{"prior": 1.0, **more},
    )  # fmt: skip


def gradient(function, x, step=1e-5):
    """Central differences, along the last axis."""
    ways = step * np.eye(len(x))
    return np.stack([(function(x + way) - function(x - way)) / (2 * step) for way in ways], axis=-1)


# The head


@pytest.mark.parametrize(("count", "prior", "scale"), [(40, 0.7, 1.0), (40, 1e-3, 30.0), (3, 2.0, 1.0), (0, 3.0, 1.0)])
def test_the_head_is_where_and_as_curved_as_plain_optimisation_finds(count, prior, scale):
    rng = np.random.default_rng(count)
    x, y, weight = scale * rng.normal(size=(count, 4)), rng.random(count), rng.gamma(1.0, size=count)

    def loss(w):
        surprise = np.where(y > 0, np.logaddexp(0, -x @ w) * y, 0) + np.logaddexp(0, x @ w) * (1 - y)
        return prior / 2 * (w**2).sum() + (weight * surprise).sum()

    head = fit(x, y, weight, prior)
    found = optimize.minimize(loss, head.mean + 0.01, method="BFGS", options={"gtol": 1e-9})
    assert loss(head.mean) <= found.fun + 1e-9
    np.testing.assert_allclose(head.mean, found.x, atol=2e-4 / prior**0.5)
    np.testing.assert_allclose(gradient(loss, head.mean), 0, atol=1e-5)
    slope = lambda w: prior * w - x.T @ (weight * (y - 1 / (1 + np.exp(-(x @ w)))))
    np.testing.assert_allclose(head.precision, gradient(slope, head.mean), rtol=1e-5, atol=1e-5)


def test_the_head_of_separable_labels_of_long_differences_converges():
    x = np.asarray([[300.0, 1.0], [-200.0, 2.0], [500.0, -1.0]])
    head = fit(x, np.asarray([1.0, 0.0, 1.0]), prior=1e-4)
    p = 1 / (1 + np.exp(-x @ head.mean))
    np.testing.assert_allclose(x.T @ (np.asarray([1.0, 0.0, 1.0]) - p) - 1e-4 * head.mean, 0, atol=1e-5)


def test_turning_a_pair_and_its_label_round_changes_nothing_and_weights_are_copies():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(8, 3)), rng.random(8)
    one, turned, twice = fit(x, y), fit(-x, 1 - y), fit(np.repeat(x, 2, axis=0), np.repeat(y, 2))
    np.testing.assert_allclose(one.mean, turned.mean, atol=1e-9)
    np.testing.assert_allclose(twice.mean, fit(x, y, np.full(8, 2.0)).mean, atol=1e-9)


@pytest.mark.parametrize("wrong", [{"y": [1.2]}, {"y": [np.nan]}, {"prior": 0.0}, {"weight": [-1.0]}])
def test_what_no_head_can_be_fitted_to_is_refused(wrong):
    given = {"y": [0.5], "weight": [1.0], "prior": 1.0} | wrong
    with pytest.raises(ValueError, match="y must be from 0 to 1"):
        fit(np.ones((1, 2)), np.asarray(given["y"]), np.asarray(given["weight"]), given["prior"])


# Designs


def precision_behind(pool: Pool, places) -> np.ndarray:
    """What the batch makes of the head's precision, by its definition."""
    head = pool.head()
    x = pool.differences(pool.pairs[list(places)])
    p = 1 / (1 + np.exp(-x @ head.mean))
    return head.precision + sum(c * np.outer(v, v) for c, v in zip(p * (1 - p), x, strict=True))


def entropy_taken(pool: Pool, places) -> float:
    return np.linalg.slogdet(precision_behind(pool, places))[1] - np.linalg.slogdet(precision_behind(pool, []))[1]


def variance_left(pool: Pool, places) -> float:
    """The mean variance of the head over all pairs of the pool."""
    x, covariance = pool.differences(pool.pairs), np.linalg.inv(precision_behind(pool, places))
    return float(np.mean([v @ covariance @ v for v in x]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "worth"), [("information", entropy_taken), ("prediction", lambda *a: -variance_left(*a))]
)
def test_each_pick_is_the_best_next_one_by_definition(name, worth, seed):
    pool, taken = made(seed), []
    for place in STRATEGIES[name](pool, 6, 0).tolist():
        others = [one for one in range(len(pool.pairs)) if one not in taken]
        best = max(worth(pool, [*taken, one]) for one in others)
        assert worth(pool, [*taken, place]) == pytest.approx(best, abs=1e-9)
        taken.append(place)


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_batch_is_nearly_the_d_optimal_one(seed):
    """Of all batches of 3: never below 1 - 1/e, which is proved, and here never below 95%."""
    pool = made(seed, answers=7)
    best = max(entropy_taken(pool, batch) for batch in itertools.combinations(range(len(pool.pairs)), 3))
    assert entropy_taken(pool, choosing.information(pool, 3).tolist()) >= 0.95 * best


def test_a_batch_counts_what_its_earlier_picks_tell():
    """Six copies of one long difference and a shorter one of another direction: the second pick is the other."""
    features = np.asarray([[0.0, 0.0], *[[4.0 + k / 100, 0.0] for k in range(6)], [0.0, 2.0]])
    pool = Pool(np.asarray([[0, k] for k in range(1, 8)]), features, prior=1.0)
    alone = [entropy_taken(pool, [place]) for place in range(7)]
    assert int(np.argmin(alone)) == 6  # by itself it tells least
    for name in ("information", "diversity"):
        assert STRATEGIES[name](pool, 2, 0).tolist() == [5, 6], name


def test_what_is_labelled_is_told_already():
    features = np.asarray([[0.0, 0.0], [4.0, 0.0], [4.1, 0.0], [0.0, 2.0]])
    pool = Pool(
        np.asarray([[0, 1], [0, 3]]), features, labelled=np.asarray([[2, 0]]), label=np.asarray([0.5]), prior=1.0
    )
    assert choosing.information(pool, 1).tolist() == choosing.diversity(pool, 1).tolist() == [1]
    fresh = dataclasses.replace(pool, labelled=np.zeros((0, 2), int), label=np.zeros(0))
    assert choosing.information(fresh, 1).tolist() == choosing.diversity(fresh, 1).tolist() == [0]


def test_predictions_are_not_led_away_by_the_odd_one_that_is_longest():
    """Forty pairs along one direction, one longer pair along another, which D-optimality takes first."""
    features = np.concatenate([[[0.0, 0.0], [0.0, 3.0]], [[2.0 + k / 50, 0.0] for k in range(40)]])
    pool = Pool(np.asarray([[0, k] for k in range(1, 42)]), features, prior=1.0)
    assert choosing.information(pool, 1).tolist() == [0]
    assert choosing.prediction(pool, 3).min() > 0


@pytest.mark.parametrize("seed", range(3))
def test_farthest_first_by_plain_distances(seed):
    pool = made(seed)
    x, known = pool.differences(pool.pairs), list(pool.differences(pool.labelled))
    taken = choosing.diversity(pool, 8).tolist()
    far = lambda v: min(min(np.linalg.norm(v - c), np.linalg.norm(v + c)) for c in known)
    for place in taken:
        assert far(x[place]) == pytest.approx(max(far(v) for v in x), rel=1e-6)
        known.append(x[place])


def test_disagreement_by_plain_entropies():
    pool = made(3)
    entropy = lambda p: -p * np.log(p) - (1 - p) * np.log(1 - p)
    worth = []
    assert pool.scores is not None
    for i, j in pool.pairs:
        p = [1 / (1 + np.exp(row[j] - row[i])) for row in pool.scores]
        worth.append(entropy(np.mean(p)) - np.mean([entropy(one) for one in p]))
    assert choosing.disagreement(pool, 5).tolist() == np.argsort(worth)[::-1][:5].tolist()
    sure = Pool(np.asarray([[0, 1], [0, 2]]), scores=np.asarray([[900.0, 0.0, 900.0], [0.0, 900.0, 900.0]]))
    assert choosing.disagreement(sure, 2).tolist() == [0, 1]  # no warning where a chance is 0 or 1


def test_planted_informative_pairs_are_found():
    """Of 300 pairs 10 differ in a feature that no other does: information and diversity ask for these."""
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(600, 4)), np.zeros((600, 1))], axis=1)
    planted = rng.choice(300, 10, replace=False)
    features[2 * planted, 4] = 6 + rng.random(10)
    known = Pool(np.arange(600).reshape(300, 2), features, prior=0.1)
    others = [place for place in range(300) if place not in planted][:40]
    pool = dataclasses.replace(known, labelled=known.pairs[others], label=rng.random(40))
    for name in ("information", "diversity"):
        first = STRATEGIES[name](pool, 2, 0)
        assert set(first.tolist()) & set(planted.tolist()), name
    assert not set(choosing.random(pool, 2, 0).tolist()) & set(planted.tolist())


# What every strategy owes


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_pair_twice_none_that_is_labelled_and_not_too_many_of_a_group(name):
    pool = made(5, group=np.arange(30) % 3, most=4)
    doubled = np.concatenate([pool.pairs[:10], pool.pairs[:10, ::-1], pool.labelled[:, ::-1], [[2, 2]] * 4])
    pool = dataclasses.replace(pool, pairs=doubled)
    places = STRATEGIES[name](pool, 100, 7)
    assert 4 < len(places) <= 10
    pairs = {tuple(sorted(pair)) for pair in pool.pairs[places].tolist()}
    assert len(pairs) == len(places) and not pairs & {tuple(sorted(pair)) for pair in pool.labelled.tolist()}
    assert pool.group is not None and np.bincount(pool.group[places]).max() <= 4
    assert STRATEGIES[name](pool, 3, 7).tolist() == places[:3].tolist()
    assert not len(STRATEGIES[name](pool, 0, 7))


@pytest.mark.parametrize("name", STRATEGIES)
def test_which_answer_stands_first_is_no_matter(name):
    pool = made(6)
    turned = dataclasses.replace(pool, pairs=pool.pairs[:, ::-1], labelled=pool.labelled[:, ::-1], label=1 - pool.label)
    assert STRATEGIES[name](pool, 5, 1).tolist() == STRATEGIES[name](turned, 5, 1).tolist()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_pool_without_labels_or_without_pairs_is_no_fault(name):
    pool = made(7, labelled=0)
    assert len(STRATEGIES[name](pool, 4, 0)) == 4
    assert not len(STRATEGIES[name](dataclasses.replace(pool, pairs=np.zeros((0, 2), np.int64)), 4, 0))


def test_chance_is_the_seeds_and_even():
    pool = made(labelled=0)
    assert choosing.random(pool, 9, 1).tolist() != choosing.random(pool, 9, 2).tolist()
    first = np.bincount([choosing.random(pool, 1, seed)[0] for seed in range(3600)], minlength=36)
    assert first.min() > 60 and first.max() < 140


def test_every_strategy_says_what_it_reads():
    assert READS.keys() == STRATEGIES.keys()
    for name, reads in READS.items():
        bare = dataclasses.replace(
            made(), **{other: None for other in ("features", "scores") if other != reads}, group=None
        )
        assert len(STRATEGIES[name](bare, 2, 0)) == 2


def test_the_clearest_are_those_of_the_largest_margin():
    pool = made(8, answers=12)
    margin = np.abs(pool.differences(pool.pairs) @ pool.head().mean)
    left = choosing.clearest(pool, 0.25)
    assert set(choosing.random(left, 99).tolist()) == set(np.argsort(-margin)[: round(len(margin) / 4)].tolist())
    assert choosing.clearest(pool, 1.0) is pool
    nothing = made(8, labelled=0)
    assert len(choosing.random(choosing.clearest(nothing, 0.1), 99)) == len(nothing.pairs)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            choosing.clearest(pool, share)


def test_standardised_differences_have_a_mean_square_of_one():
    pool = made(9)
    assert pool.features is not None
    features = np.concatenate([pool.features * [1, 100, 1e-3], np.full((9, 1), 5.0)], axis=1)
    x = np.diff(choosing.standardised(features, pool.pairs)[pool.pairs], axis=1)[:, 0]
    np.testing.assert_allclose((x**2).mean(axis=0), [1, 1, 1, 0], atol=1e-12)
    default = dataclasses.replace(pool, prior=None, labelled=np.zeros((0, 2), int), label=np.zeros(0))
    np.testing.assert_allclose(default.head().precision, 3 / choosing.SPREAD**2 * np.eye(3))


# Budget


@pytest.mark.parametrize(
    ("money", "hours", "price", "seconds", "labels"),
    [
        (10.0, 1.0, 0.5, 60.0, 20),
        (100.0, 1.0, 0.5, 60.0, 60),
        (0.3, None, 0.1, 60.0, 3),
        (0.29, None, 0.1, 60.0, 2),
        (None, 0.1, 5.0, 36.0, 10),
        (None, None, 1.0, 1.0, None),
        (10.0, None, 0.0, 1.0, None),
        (0.0, None, 1.0, 1.0, 0),
    ],
)
def test_a_budget_pays_the_smaller_number_of_labels(money, hours, price, seconds, labels):
    assert Budget(money, hours).labels_for(price, seconds) == labels


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_a_budget_that_is_none_is_one_sentence(wrong):
    for name in ("money", "hours"):
        with pytest.raises(UserError, match=f"a budget of {name}={wrong} is not allowed; it must be finite"):
            Budget(**{name: wrong})
    for name in ("price", "seconds"):
        with pytest.raises(UserError, match=f"a label of {name}={wrong} is not allowed; it must be finite"):
            Budget(money=1.0).labels_for(**({"price": 1.0, "seconds": 1.0} | {name: wrong}))
