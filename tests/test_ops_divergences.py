"""The maps of f-divergences: their definitions, what they share, and that no log-ratio makes them infinite or flat."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.ops.divergences import MAPS, STEEPEST, Divergence, box_cox, log_ratio_map

ALPHA = 0.7
# f of the divergence sum_y ref(y) f(pi(y) / ref(y)), float64.
F = {
    "reverse_kl": lambda t: t * np.log(t),
    "forward_kl": lambda t: -np.log(t),
    "js": lambda t: t * np.log(t) - (t + 1) * np.log((t + 1) / 2),
    "alpha": lambda t: (t**ALPHA - ALPHA * t + ALPHA - 1) / (ALPHA * (ALPHA - 1)),
}
SLOPE = {"reverse_kl": 1.0, "forward_kl": 1.0, "js": 0.5, "alpha": 1.0}
FAR = jnp.array([-200.0, -80.0, -STEEPEST, 0.0, STEEPEST, 80.0, 200.0])


def test_every_divergence_has_a_map_and_a_definition():
    assert set(MAPS) == set(get_args(Divergence)) == set(F)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_the_slope_of_its_f(name):
    """g(u) = f'(exp u) - f'(1), f' by central differences of the fourth order."""
    u = np.linspace(-3, 3, 13)

    def slope(t: np.ndarray) -> np.ndarray:
        h = 1e-3 * t
        f = F[name]
        return (8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))) / (12 * h)

    expected = slope(np.exp(u)) - slope(np.ones(1))
    with jax.enable_x64(True):
        np.testing.assert_allclose(log_ratio_map(jnp.asarray(u), name, ALPHA), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_zero_at_the_reference_and_increases(name):
    u = jnp.linspace(-30, 30, 241)
    g = functools.partial(log_ratio_map, divergence=name, alpha=ALPHA)
    assert g(jnp.zeros(())) == 0
    np.testing.assert_allclose(jax.grad(g)(0.0), SLOPE[name], rtol=1e-6)
    slopes = jax.vmap(jax.grad(g))(u)
    assert (slopes > 0).all()
    assert (jnp.diff(g(u)) >= 0).all()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_no_log_ratio_is_too_far(name, alpha):
    """Also squared, and for forward KL and alpha also with a slope: an example far away isn't lost."""
    squared = lambda u: jnp.square(log_ratio_map(u, name, alpha) / 2)
    value, slope = jax.vmap(jax.value_and_grad(squared))(FAR)
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    steep = jax.vmap(jax.grad(lambda u: log_ratio_map(u, "forward_kl")))(jnp.array([-200.0, -80.0]))
    assert (steep > 1e15).all()


@settings(max_examples=25, deadline=None)
@given(st.floats(-20, 20, width=32), st.floats(-1, 1, width=32, allow_subnormal=False))
def test_box_cox_has_the_float64_value_and_its_limit(u, power):
    x = float(power) * float(u)
    expected = float(u) if power == 0 else np.expm1(x) / float(power)
    found, slope = jax.value_and_grad(lambda u: box_cox(u, jnp.float32(power)))(jnp.float32(u))
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=1e-37)
    np.testing.assert_allclose(slope, np.exp(x), rtol=5e-6)
    at_power = jax.grad(lambda power: box_cox(jnp.float32(u), power))(jnp.float32(power))
    assert np.isfinite(at_power)


def test_the_known_members_of_the_alpha_family():
    u = jnp.linspace(-4, 4, 9)
    np.testing.assert_array_equal(log_ratio_map(u, "alpha", 1.0), u)
    np.testing.assert_array_equal(log_ratio_map(u, "alpha", 0.0), log_ratio_map(u, "forward_kl"))
    np.testing.assert_allclose(log_ratio_map(u, "alpha", 1 + 1e-5), u, rtol=1e-4)
    assert np.isfinite(jax.grad(lambda alpha: jnp.sum(log_ratio_map(u, "alpha", alpha)))(1.0))


def test_the_map_is_continued_by_its_tangent():
    """Value and slope agree from both sides of the place where the exponential ends."""
    g = lambda u: log_ratio_map(u, "forward_kl")
    (near, far), (steep, flat) = jax.vmap(jax.value_and_grad(g))(-STEEPEST + jnp.array([1e-3, -1e-3]))
    np.testing.assert_allclose(near - far, (steep + flat) / 2 * 2e-3, rtol=0.02)  # float32 has 8 steps of 1e-3 at 36
    np.testing.assert_allclose(steep, flat, rtol=2e-3)
