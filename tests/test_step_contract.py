"""The step's contract on a problem small enough to do by hand: counts, carry, frozen, clipping, keys."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.optimizers import sgd
from rlhf_jax.algorithms.step import STEP, Mean, Optimizer, Term, TrainState, make_state, make_step, ratio

OPTIMIZER = Optimizer(sgd, optax.constant_schedule(1.0))
X = np.asarray([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], np.float32)


def objective(params: Any, frozen: Any, hyper: Any, batch: Any, key: Any):
    """The mean over rows of scale * w x, and 2 times the sum of base w x over tokens divided by their count."""
    wx = params["w"] * batch["x"] * batch["weight"]
    tokens = jnp.sum(batch["segments"] * batch["weight"][:, None])
    terms = {
        "rows": Term(1.0, hyper["loss"]["scale"] * jnp.sum(wx), jnp.sum(batch["weight"])),
        "tokens": Term(2.0, frozen["base"] * jnp.sum(wx), tokens),
    }
    return terms, {"x": Mean(jnp.sum(batch["x"] * batch["weight"]), jnp.sum(batch["weight"]))}


def rows(weight: Any = 1.0) -> dict[str, jax.Array]:
    weight = np.broadcast_to(np.float32(weight), X.shape)
    segments = np.tri(8, dtype=np.int32)  # row i has i + 1 tokens
    return {"x": jnp.asarray(X), "weight": jnp.asarray(weight), "segments": jnp.asarray(segments)}


def start(clip: float = np.inf, scale: float = 3.0) -> TrainState:
    hyper = {"loss": {"scale": scale}, "optimizer": {"learning_rate": 0.1, "momentum": 0.0, "clip_norm": clip}}
    params, frozen = {"w": jnp.float32(0.5)}, {"base": jnp.float32(10.0)}
    return make_state(params, hyper, OPTIMIZER, jax.random.PRNGKey(0), carry=jnp.float32(0), frozen=frozen)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_each_term_has_its_own_denominator_whatever_the_microbatches(parts):
    state, metrics = make_step(objective, OPTIMIZER, microbatches=parts)(start(), rows())
    slope = 3.0 * X.mean() + 2 * 10.0 * X.sum() / 36  # 36 tokens in all
    np.testing.assert_allclose(metrics["grad_norm"], slope, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 0.5 * slope, rtol=1e-6)
    np.testing.assert_allclose(metrics["x"], X.mean(), rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], 0.5 - 0.1 * slope, rtol=1e-6)
    assert metrics["tokens"] == 36 and state.step == 1 and state.frozen["base"] == 10.0


@pytest.mark.parametrize("parts", [1, 4])
def test_padding_rows_change_nothing_and_an_empty_batch_gives_zero(parts):
    step = make_step(objective, OPTIMIZER, microbatches=parts)
    state, metrics = step(start(), rows(np.arange(8) < 3))
    np.testing.assert_allclose(metrics["loss"], 0.5 * (3.0 * 2 + 20 * 6 / 6), rtol=1e-6)
    state, metrics = step(start(), rows(0.0))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and state.params["w"] == 0.5


def test_clipping_scales_the_step_and_reports_the_norm_before_it():
    state, metrics = make_step(objective, OPTIMIZER)(start(clip=2.0), rows())
    assert metrics["grad_norm"] > 2
    np.testing.assert_allclose(state.params["w"], 0.5 - 0.1 * 2.0, rtol=1e-6)


def test_the_carry_is_a_function_of_the_new_state_the_batch_and_the_metrics():
    advance = lambda state, batch, metrics: 0.9 * state.carry + 0.1 * metrics["x"] + state.step * jnp.max(batch["x"])
    step = make_step(objective, OPTIMIZER, advance=advance)
    state = start()
    for _ in range(2):
        state, _ = step(state, rows())
    mean = 0.1 * X.mean()
    np.testing.assert_allclose(state.carry, 0.9 * (mean + 8) + mean + 2 * 8, rtol=1e-6)  # the step after the update


def test_hyper_parameters_are_data_so_that_a_sweep_is_one_leading_axis():
    state = jax.tree.map(lambda *x: jnp.stack(x), *(start(scale=scale) for scale in (0.0, 1.0, 2.0)))
    step = jax.vmap(make_step(objective, OPTIMIZER), in_axes=(0, None))
    _, metrics = step(state, rows())
    np.testing.assert_allclose(np.diff(metrics["loss"]), 0.5 * X.mean(), rtol=1e-5)


def test_the_key_of_a_step_depends_on_the_seed_and_the_step_alone():
    seen = []

    def noisy(params, frozen, hyper, batch, key):
        seen.append(key)
        return objective(params, frozen, hyper, batch, key)

    state, _ = make_step(noisy, OPTIMIZER)(start(), rows())
    make_step(noisy, OPTIMIZER)(state, rows(0.0))
    fold = lambda step: jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(0), STEP), step)
    np.testing.assert_array_equal(seen[0], fold(0))
    np.testing.assert_array_equal(seen[-1], fold(1))


def test_a_vector_mean_is_the_sum_of_its_ratios():
    np.testing.assert_allclose(ratio(jnp.array([6.0, -4.0, 5.0]), jnp.array([2.0, 4.0, 0.0])), 2.0)
