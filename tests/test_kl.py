"""Estimators of KL(pi || ref): values, the gradients that they claim, and the coefficient that adapts."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.ops.kl import ESTIMATORS, adaptive
from tests.policy_oracles import ESTIMATORS64

RNG = np.random.default_rng(0)
D = np.round(RNG.uniform(-4, 4, 18) * 64) / 64
ACTIONS, SAMPLES = 5, 200_000
LOGITS, REF = RNG.normal(0, 1, (2, ACTIONS))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


PI, PI_REF = softmax(LOGITS), softmax(REF)
REVERSE = float(np.sum(PI * np.log(PI / PI_REF)))  # KL(pi || ref)
# Of the expected gradients, what each is of: with respect to the logits, by hand.
GRADIENTS = {
    "k1": np.zeros(ACTIONS),
    "k2": PI * (np.log(PI / PI_REF) - REVERSE),  # of KL(pi || ref)
    "k3": PI - PI_REF,  # of KL(ref || pi)
    "k3_plus": PI * (np.log(PI / PI_REF) - REVERSE),
}


@functools.cache
def by_action(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each action the estimate and its gradient with respect to the logits, [5] and [5, 5]."""
    with jax.enable_x64(True):
        ref = jax.nn.log_softmax(jnp.asarray(REF))
        estimate = lambda logits, a: ESTIMATORS[name](jax.nn.log_softmax(logits)[a] - ref[a])
        of_each = jax.jit(jax.vmap(jax.value_and_grad(estimate), in_axes=(None, 0)))
        both = of_each(jnp.asarray(LOGITS), jnp.arange(ACTIONS))
    return np.asarray(both[0]), np.asarray(both[1])


@functools.cache
def compiled(name: str) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Value and slope of every entry of [N]."""
    return jax.jit(jax.vmap(jax.value_and_grad(ESTIMATORS[name])))


def test_every_estimator_has_an_oracle():
    assert set(ESTIMATORS) == set(ESTIMATORS64) == set(GRADIENTS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_value_and_slope_are_the_oracles(name):
    value, slope = ESTIMATORS64[name]
    np.testing.assert_allclose(compiled(name)(jnp.asarray(D, jnp.float32))[0], value(D), rtol=2e-6, atol=2e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(compiled(name)(jnp.asarray(D))[1], slope(D), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_a_slope_is_that_of_the_value(name):
    value, slope = ESTIMATORS64[name]
    step = 1e-4
    numeric = (8 * (value(D + step) - value(D - step)) - (value(D + 2 * step) - value(D - 2 * step))) / (12 * step)
    np.testing.assert_allclose(slope(D), numeric, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["k1", "k3", "k3_plus"])
def test_the_unbiased_ones_are_the_divergence_in_expectation(name):
    np.testing.assert_allclose(PI @ by_action(name)[0], REVERSE, rtol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_sampled_gradient_is_what_the_docstring_claims(name):
    """Of samples of the policy itself, within four standard errors; and exactly, summed over the actions."""
    gradients = by_action(name)[1]
    np.testing.assert_allclose(PI @ gradients, GRADIENTS[name], atol=1e-12)
    actions = np.random.default_rng(1).choice(ACTIONS, SAMPLES, p=PI)
    drawn = gradients[actions]
    error = drawn.std(axis=0, ddof=1) / SAMPLES**0.5
    assert (np.abs(drawn.mean(axis=0) - GRADIENTS[name]) < 4 * error).all()
    others = [g for g in GRADIENTS.values() if not np.array_equal(g, GRADIENTS[name])]
    assert all((np.abs(drawn.mean(axis=0) - g) > 4 * error).any() for g in others)  # it tells them apart


@pytest.mark.parametrize("name", ESTIMATORS)
def test_at_the_reference_all_is_zero_and_far_from_it_nothing_is_infinite(name):
    value, slope = compiled(name)(jnp.array([0.0, -200.0, -90.0, 90.0, 200.0]))
    assert value[0] == 0 and slope[0] == (1.0 if name == "k1" else 0.0)
    assert np.isfinite(value).all() and np.isfinite(slope).all()


def test_k3_is_exact_near_the_reference():
    """Where exp(-d) - 1 + d, written as it stands, is wrong by an eighth."""
    d = np.asarray([2.0**-10, -(2.0**-10), 2.0**-7])
    value, slope = compiled("k3")(jnp.asarray(d, jnp.float32))
    np.testing.assert_allclose(value, np.expm1(-d) + d, rtol=1e-3)
    np.testing.assert_allclose(slope, -np.expm1(-d), atol=2e-7)


@settings(max_examples=25, deadline=None)
@given(st.floats(-50, 50, width=32))
def test_k3_is_never_negative(d):
    assert compiled("k3")(jnp.asarray([d], jnp.float32))[0][0] >= -1e-6


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.2), (6.6, 0.2 * 1.001), (60.0, 0.2 * 1.002), (0.0, 0.2 * 0.998), (5.4, 0.2 * 0.999)],
)
def test_the_coefficient_follows_the_divergence_and_at_most_by_a_fifth(kl, expected):
    found = adaptive(jnp.float32(0.2), jnp.float32(kl), jnp.float32(100), target=6.0, horizon=10_000.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_twice_as_many_completions_move_the_coefficient_twice_as_far():
    move = lambda count: adaptive(1.0, jnp.float32(9), count, target=6.0, horizon=1000.0) - 1
    np.testing.assert_allclose(move(200), 2 * move(100), rtol=1e-5)
    assert move(0) == 0
