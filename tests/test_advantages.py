"""Advantages by token and by group: values of the field, float64 oracles, and the laws that they obey."""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.ops import advantages as ops
from rlhf_jax.ops.advantages import BASELINES, Group
from rlhf_jax.ops.kl import ESTIMATORS
from rlhf_jax.registry import generated
from tests.policy_oracles import BASELINES64, gae64, returns64, token_rewards64, whiten64

RNG = np.random.default_rng(0)
# Compiled once for all examples of a shape, their numbers traced.
gae, returns_to_go, token_rewards = (jax.jit(f) for f in (ops.gae, ops.returns_to_go, ops.token_rewards))
whiten, masked_mean = jax.jit(ops.whiten, static_argnames="shift"), jax.jit(ops.masked_mean, static_argnames="axis")
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def f32(*columns: Any) -> list[jax.Array]:
    return [jnp.asarray(column, jnp.float32) for column in columns]


def dyadic(low: float, high: float, *shape: int) -> np.ndarray:
    return np.round(RNG.uniform(low, high, shape) * 64) / 64


# Completions right, left and in the middle, whole, with holes, of one token, and none.
MASK = (
    np.asarray([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 1, 1], [1] * 6, [0, 0, 1, 0, 0, 0], [0] * 6]) > 0
)
REWARDS, VALUES, KL = dyadic(-2, 2, 3, *MASK.shape)
SCORE = dyadic(-3, 3, len(MASK))
POISONS = [np.nan, np.inf, -np.inf, 1e30]


def poisoned(x: np.ndarray, poison: float = np.nan, mask: np.ndarray = MASK) -> jax.Array:
    return f32(np.where(mask, x, poison))[0]


# ---- by token


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_gae_and_returns_are_the_oracles(gamma, lam):
    found = gae(*f32(REWARDS, VALUES), jnp.asarray(MASK), gamma=gamma, lam=lam)
    np.testing.assert_allclose(found, gae64(REWARDS, VALUES, MASK, gamma, lam), rtol=1e-5, atol=1e-6)
    found = returns_to_go(*f32(REWARDS), jnp.asarray(MASK), gamma=gamma)
    np.testing.assert_allclose(found, returns64(REWARDS, MASK, gamma), rtol=1e-5, atol=1e-6)


def test_token_rewards_are_the_oracles():
    found = token_rewards(*f32(SCORE, KL), jnp.asarray(MASK), coefficient=0.3)
    np.testing.assert_allclose(found, token_rewards64(SCORE, KL, MASK, 0.3), rtol=1e-6, atol=1e-6)
    free = token_rewards(*f32(SCORE, KL), jnp.asarray(MASK), coefficient=0.0)
    np.testing.assert_array_equal(free.sum(axis=1), np.where(MASK.any(axis=1), SCORE, 0))  # once, or not at all


def test_what_steps_earn_is_taken_from_the_score_at_the_end():
    steps = np.where(MASK, REWARDS, np.nan)
    found = token_rewards(*f32(SCORE, KL), jnp.asarray(MASK), coefficient=0.3, steps=jnp.asarray(steps, jnp.float32))
    rest = SCORE - np.where(MASK, REWARDS, 0).sum(axis=1)
    expected = token_rewards64(rest, KL, MASK, 0.3) + np.where(MASK, REWARDS, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("mask", [MASK, MASK & (np.cumsum(MASK.ravel()).reshape(MASK.shape) < 2), MASK & False])
def test_whitening_is_the_oracles(mask, shift):
    """Also of one entry and of none."""
    found = whiten(*f32(REWARDS), jnp.asarray(mask), shift=shift)
    np.testing.assert_allclose(found, whiten64(REWARDS, mask, shift), rtol=1e-5, atol=1e-6)


def test_means_are_over_the_mask():
    found = masked_mean(*f32(REWARDS), jnp.asarray(MASK), axis=1)
    expected = [row[counts].mean() if counts.any() else 0 for row, counts in zip(REWARDS, MASK, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(masked_mean(*f32(REWARDS), jnp.asarray(MASK)), REWARDS[MASK].mean(), rtol=1e-6)


@pytest.mark.parametrize("poison", POISONS)
def test_what_stands_under_the_mask_changes_nothing(poison):
    mask, rewards, values, kl = jnp.asarray(MASK), *(poisoned(x, poison) for x in (REWARDS, VALUES, KL))
    score = jnp.where(mask.any(axis=1), f32(SCORE)[0], poison)
    pairs = [
        (gae(rewards, values, mask, gamma=0.9, lam=0.9), gae(*f32(REWARDS, VALUES), mask, gamma=0.9, lam=0.9)),
        (returns_to_go(rewards, mask, gamma=0.9), returns_to_go(*f32(REWARDS), mask, gamma=0.9)),
        (token_rewards(score, kl, mask, coefficient=0.1), token_rewards(*f32(SCORE, KL), mask, coefficient=0.1)),
        (whiten(rewards, mask), whiten(*f32(REWARDS), mask)),
        (whiten(rewards, mask, shift=False), whiten(*f32(REWARDS), mask, shift=False)),
    ]
    for found, expected in pairs:
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.asarray(found)[~MASK], 0)
    np.testing.assert_array_equal(masked_mean(rewards, mask, axis=1), masked_mean(*f32(REWARDS), mask, axis=1))


def test_dropping_the_tokens_between_changes_nothing():
    """A completion with a tool's tokens in it is the completion without them, whichever side the padding is on."""
    row, counts = 2, MASK[2]
    whole = gae(*f32(REWARDS, VALUES), jnp.asarray(MASK), gamma=0.9, lam=0.8)[row, counts]
    for before, after in [(0, 0), (2, 1), (0, 4)]:
        pad = lambda x, before=before, after=after: np.pad(x[row, counts][None], ((0, 0), (before, after)))
        short = gae(*f32(pad(REWARDS), pad(VALUES)), jnp.asarray(pad(MASK)), gamma=0.9, lam=0.8)
        np.testing.assert_allclose(short[0][pad(MASK)[0]], whole, rtol=1e-6)


def test_without_discount_and_trade_off_gae_is_the_returns_less_the_values():
    mask = jnp.asarray(MASK)
    found = gae(*f32(REWARDS, VALUES), mask, gamma=1.0, lam=1.0)
    expected = returns_to_go(*f32(REWARDS), mask, gamma=1.0) - jnp.where(mask, f32(VALUES)[0], 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_gae_is_the_weighted_mean_of_the_n_step_advantages():
    """(1 - lam) times the sum of lam^(n-1) A^(n), where the last n takes all the weight that is left."""
    steps, gamma, lam = MASK.shape[1], 0.9, 0.7
    rewards, values = REWARDS[3], np.append(VALUES[3], 0)
    n_step = lambda t, n: sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * values[t + n] - values[t]
    expected = []
    for t in range(steps):
        last = steps - t
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, last)] + [lam ** (last - 1)]
        expected.append(sum(w * n_step(t, n) for n, w in enumerate(weights, start=1)))
    found = gae(*f32(REWARDS[3:4], VALUES[3:4]), jnp.asarray(MASK[3:4]), gamma=gamma, lam=lam)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)


def test_whitening_a_large_constant_loses_no_digits():
    x = 4096 + dyadic(-1, 1, 2, 64)
    np.testing.assert_allclose(whiten(*f32(x), jnp.ones(x.shape, bool)), whiten64(x, x == x), rtol=1e-5, atol=1e-5)


# ---- by group


def draw(seed: int = 0, groups: int = 4, samples: int = 5) -> list[np.ndarray]:
    """Rewards, applies and weights: a group of equal rewards, one with a single sample, and one of none."""
    rng = np.random.default_rng(seed)
    rewards = np.round(rng.normal(0, 1, (groups, samples, 3)) * 64) / 64
    applies = rng.random(rewards.shape) < 0.8
    rewards[0], applies[0] = [0.1, 0.7, -0.3], True
    applies[1, 1:], applies[1, 0] = False, True
    return [rewards, applies, np.asarray([1.0, 0.5, 2.0])]


def group_of(p: list[np.ndarray], dtype: Any = jnp.float32) -> Group:
    return Group(jnp.asarray(p[0], dtype), jnp.asarray(p[1]), jnp.asarray(p[2], dtype))


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"scale": "group"}), "grpo batch": ("grpo", {"scale": "batch"}),
    "grpo none": ("grpo", {"scale": "none"}), "rloo": ("rloo", {}), "dr_grpo": ("dr_grpo", {}), "gdpo": ("gdpo", {}),
    "reinforce_pp": ("reinforce_pp", {"baseline": False}), "reinforce_pp mean": ("reinforce_pp", {"baseline": True}),
}  # fmt: skip
BY_GROUP = [way for way in WAYS if way != "reinforce_pp"]  # those that take the mean of the group away


@functools.cache
def compiled(way: str) -> Callable[[Group], jax.Array]:
    name, numbers = WAYS[way]
    return jax.jit(functools.partial(BASELINES[name], **numbers))


def advantages(way: str, group: Group) -> jax.Array:
    return compiled(way)(group)


def test_every_baseline_has_an_oracle_and_flags():
    assert {name for name, _ in WAYS.values()} == set(BASELINES) == set(BASELINES64)

    @generated(BASELINES)
    class Baseline:
        name: str = "grpo"

    assert Baseline(scale="batch", baseline=True).name == "grpo"


@pytest.mark.parametrize("way", WAYS)
def test_advantages_are_the_oracles(way):
    name, numbers = WAYS[way]
    for seed in range(3):
        p = draw(seed)
        expected = BASELINES64[name](p, **numbers)
        np.testing.assert_allclose(advantages(way, group_of(p)), expected, rtol=2e-5, atol=2e-6)
        with jax.enable_x64(True):
            np.testing.assert_allclose(advantages(way, group_of(p, jnp.float64)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("way", BY_GROUP)
def test_a_group_of_equal_rewards_has_exactly_nothing(way):
    for samples in (5, 7):
        found = advantages(way, group_of(draw(samples=samples)))
        np.testing.assert_array_equal(found[:2], 0)  # and so has a sample that is alone


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("poison", POISONS)
def test_what_an_absent_reward_holds_changes_nothing(way, poison):
    p = draw()
    filled = [np.where(p[1], p[0], poison), *p[1:]]
    found = advantages(way, group_of(filled))
    np.testing.assert_array_equal(found, advantages(way, group_of(p)))
    np.testing.assert_array_equal(np.asarray(found)[~p[1].any(axis=2)], 0)
    nothing = advantages(way, group_of([np.full_like(p[0], poison), p[1] & False, p[2]]))
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize("way", WAYS)
@few
@given(seeds, st.permutations(range(5)), st.permutations(range(4)))
def test_permuting_samples_and_groups_permutes_the_advantages(way, seed, samples, groups):
    turn = lambda x: np.asarray(x)[list(groups)][:, list(samples)]
    p = draw(seed)
    found = advantages(way, group_of([turn(p[0]), turn(p[1]), p[2]]))
    np.testing.assert_allclose(found, turn(advantages(way, group_of(p))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@few
@given(seeds, st.integers(-64, 64))
def test_a_constant_added_to_rewards_changes_no_advantage(way, seed, eighths):
    """Another constant a group too, where the mean of the group goes; here where one reward applies to all."""
    rng = np.random.default_rng(seed)
    rewards = np.round(rng.normal(0, 1, (4, 5, 1)) * 64) / 64
    constant = eighths / 8 * (rng.integers(-3, 4, (4, 1, 1)) if way in BY_GROUP and way != "grpo batch" else 1)
    found, moved = (group_of([r, rewards == rewards, np.ones(1)]) for r in (rewards, rewards + constant))
    np.testing.assert_allclose(advantages(way, moved), advantages(way, found), rtol=1e-5, atol=1e-6)


@few
@given(seeds)
def test_leave_one_out_is_the_mean_taken_away_and_scaled(seed):
    p = draw(seed)
    count = p[1].any(axis=2).sum(axis=1, keepdims=True)
    expected = count / np.maximum(count - 1, 1) * np.asarray(advantages("dr_grpo", group_of(p)))
    np.testing.assert_allclose(advantages("rloo", group_of(p)), expected, rtol=1e-5, atol=1e-6)


# ---- values of the field's reference implementation


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Any]:
    return json.loads((shared / "golden/reference_values.json").read_text())["values"]


def agrees(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


N = np.nan
TWO_REWARDS = np.asarray([[[1, 0], [0, 1], [1, 1], [0, 0]], [[1, 0], [1, 0], [1, N], [N, N]]])
SCALES = {"group": "grpo", "batch": "grpo batch", "none": "grpo none", "normalize_then_sum": "gdpo"}


@pytest.mark.parametrize("entry", SCALES)
def test_group_advantages_have_the_reference_values(golden, entry):
    group = group_of([TWO_REWARDS, ~np.isnan(TWO_REWARDS), np.asarray([1.0, 0.5])])
    agrees(advantages(SCALES[entry], group).ravel(), golden["grpo_adv"][entry])
    assert set(SCALES) == set(golden["grpo_adv"])


LOGPROBS = np.asarray([[-1, -2, -0.5, -1.5], [-0.7, -1.2, N, N]])
REF = np.asarray([[-1.1, -1.9, -0.6, -1.4], [-0.9, -1.0, N, N]])
PPO_VALUES = np.asarray([[0.1, 0.2, 0.3, 0.4], [0.05, 0.15, 0.25, N]])
COMPLETION = np.asarray([[1, 1, 1, 1], [1, 1, 0, 0]]) > 0
LATER = np.asarray([[1, 1, 1, 1], [1, 1, 1, 0]]) > 0  # the reference's score is a token after the last


def of_ppo(entry: str, mask: np.ndarray) -> dict[str, jax.Array]:
    name, _, whitened = entry.partition(" ")
    counts, tokens = jnp.asarray(mask), jnp.asarray(COMPLETION)
    logprobs, ref, values, score = f32(LOGPROBS, REF, PPO_VALUES, [1, -0.5])
    kl = ESTIMATORS[name](jnp.where(tokens, logprobs - ref, 0))
    rewards = token_rewards(score, kl, counts, coefficient=0.05)
    rewards = whiten(rewards, counts, shift=False) if whitened else rewards
    found = gae(rewards, values, counts, gamma=1.0, lam=0.95)
    return {
        "rewards": rewards,
        "advantages": whiten(found, tokens),
        "returns": jnp.where(counts, found + values, 0),
    }


@pytest.mark.parametrize("entry", ["k1", "k3", "k1 whiten_rewards"])
def test_ppo_has_the_reference_values_and_ours(golden, entry):
    found = of_ppo(entry, COMPLETION)
    for part, expected in golden["ppo_ours"][entry].items():
        agrees(found[part][COMPLETION], expected)
    found = of_ppo(entry, LATER)
    for part, expected in golden["ppo"][entry].items():
        agrees(found[part].ravel(), expected)
