"""Policy losses: float64 oracles, finite differences, values of the field, and the laws that all of them obey."""

import functools
import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.errors import UserError
from rlhf_jax.losses.policy import POLICY, PolicyTokens, clip_fractions, value_loss
from rlhf_jax.ops.kl import ESTIMATORS
from rlhf_jax.registry import generated
from tests.policy_oracles import HELD, POLICY64, value64

few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**32 - 1)
# Whole, padded right and left, with a hole, of one token, and of none.
MASK = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 0, 0, 1], [0, 0, 0, 1, 0], [0] * 5]) > 0
SHAPE = MASK.shape
BY_ROW = {"grpo", "dr_grpo", "gspo", "sapo", "gmpo", "luspo", "reinforce"}  # the others are by token
SURROGATE, OF_ROWS = {"clip_low": 0.15, "clip_high": 0.3, "cap": 1.6}, {"clip_low": 0.05, "clip_high": 0.1, "cap": 1.15}
NUMBERS: dict[str, dict[str, float]] = {
    "ppo": SURROGATE, "grpo": SURROGATE, "bnpo": SURROGATE, "dapo": SURROGATE, "dr_grpo": SURROGATE | {"length": 7.0},
    "gspo": OF_ROWS, "luspo": OF_ROWS, "gmpo": {"clip_low": 0.25, "clip_high": 0.35}, "cispo": {"cap": 1.3},
    "sapo": {"temperature": 1.2, "temperature_negative": 1.7}, "reinforce": {},
    "vespo": {"power": 1.5, "decay": 2.5, "power_negative": 2.0, "decay_negative": 1.25},
}  # fmt: skip


def dyadic(rng: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    """Multiples of 1/64, which float32 and its differences hold exactly."""
    return np.round(rng.uniform(low, high, shape) * 64) / 64


def draw(seed: int = 0, spread: float = 0.8, shape: tuple[int, int] = SHAPE) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    old = dyadic(rng, -4, -1, *shape)
    return [old + dyadic(rng, -spread, spread, *shape), old, dyadic(rng, -2, 2, *shape), MASK]


def tokens_of(p: list[np.ndarray], dtype: Any = jnp.float32) -> PolicyTokens:
    logprobs, old, advantages = (jnp.asarray(x, dtype) for x in p[:3])
    return PolicyTokens(logprobs, old, advantages, jnp.asarray(p[3]))


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """The loss and the gradient of its sum with respect to all that could move, its numbers traced."""

    def both(tokens: PolicyTokens, numbers: dict[str, Any]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def total(moving: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            logprobs, old, advantages = moving
            loss = POLICY[name](PolicyTokens(logprobs, old, advantages, tokens.mask), **numbers)
            return jnp.sum(loss), loss

        (_, loss), slopes = jax.value_and_grad(total, has_aux=True)(tokens[:3])
        return loss, slopes

    return jax.jit(both)


def value_and_slope(name: str, tokens: PolicyTokens, **numbers: float) -> tuple[np.ndarray, np.ndarray]:
    loss, (slope, *fixed) = compiled(name)(tokens, numbers or NUMBERS[name])
    assert not any(np.asarray(x).any() for x in fixed), "old_logprobs or advantages have a gradient"
    return np.asarray(loss), np.asarray(slope)


def derivative(of: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """By every entry, by differences of the fourth order: exact to about 1e-9 at this step."""
    out, step = np.zeros(x.shape), 1e-4
    for place in np.ndindex(x.shape):
        way = np.zeros(x.shape)
        way[place] = step
        out[place] = (8 * (of(x + way) - of(x - way)) - (of(x + 2 * way) - of(x - 2 * way))) / (12 * step)
    return out


def test_every_loss_has_an_oracle_and_flags():
    assert set(POLICY) == set(POLICY64) == set(NUMBERS)
    for name, loss in POLICY.items():
        taken = [p for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert {argument.name for argument in taken} == set(NUMBERS[name])

    @generated(POLICY)
    class Loss:
        name: str = "ppo"

    assert Loss(clip_high=0.3, length=9.0).name == "ppo"


@pytest.mark.parametrize("name", POLICY)
def test_the_value_and_the_gradient_are_the_oracles(name):
    """The value in float32; the gradient in float64 against differences, a weight that is held fixed being fixed."""
    p, numbers = draw(), NUMBERS[name]
    found, slope = value_and_slope(name, tokens_of(p))
    assert found.shape == (SHAPE[:1] if name in BY_ROW else SHAPE)
    np.testing.assert_allclose(found, POLICY64[name](p, **numbers), rtol=2e-5, atol=1e-6)
    held = {"at": p[0]} if name in HELD else {}
    expected = derivative(lambda x: float(POLICY64[name]([x, *p[1:]], **numbers, **held).sum()), p[0])
    np.testing.assert_allclose(slope, expected, rtol=2e-5, atol=2e-6)
    with jax.enable_x64(True):
        _, slope = value_and_slope(name, tokens_of(p, jnp.float64))
    np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-9)
    assert not slope[~MASK].any()


def test_the_cases_reach_every_branch():
    """Tokens and rows on both sides of every clip and cap, with advantages of both signs."""
    p = draw()
    ratio = np.exp(p[0] - p[1])
    rows = [np.full(5, np.exp((p[0] - p[1])[i, MASK[i]].mean())) if MASK[i].any() else np.ones(5) for i in range(6)]
    for r, numbers in ((ratio, SURROGATE), (np.stack(rows), OF_ROWS)):
        for sign in (1, -1):
            there = r[MASK & (sign * p[2] > 0)]
            assert (there < 1 - numbers["clip_low"]).any() and (there > numbers["cap"]).any()


# ---- laws


@pytest.mark.parametrize("name", POLICY)
def test_on_policy_the_gradient_is_that_of_the_likelihood(name):
    """At ratio 1: -A over the loss's own denominator; and with its own defaults no clip and no cap is met."""
    p = draw()
    defaults = {k: v.default for k, v in inspect.signature(POLICY[name]).parameters.items() if k in NUMBERS[name]}
    numbers = defaults | ({"length": 7.0} if "length" in defaults else {})
    found, slope = value_and_slope(name, tokens_of([p[1], *p[1:]]), **numbers)
    count = np.maximum(MASK.sum(axis=1, keepdims=True), 1)
    over = {"grpo": count, "gspo": count, "sapo": count, "gmpo": count, "dr_grpo": 7.0}.get(name, 1)
    advantages = np.where(MASK, p[2], 0)
    # A row has one advantage in the losses that weigh it as a whole; where each token has its own, their mean.
    mean = advantages.sum(axis=1, keepdims=True) / count
    spread = np.where(MASK, mean, 0) if name in ("gspo", "luspo", "gmpo") else advantages
    np.testing.assert_allclose(slope, -spread / over, rtol=1e-5, atol=1e-6)
    if name in ("cispo", "vespo", "reinforce", "sapo"):
        return  # their value is the likelihood's, or half a gate
    expected = -advantages / over
    np.testing.assert_allclose(found, expected.sum(axis=1) if name in BY_ROW else expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_what_stands_under_the_mask_reaches_no_value_and_no_gradient(name, poison):
    p = draw()
    expected, slope = value_and_slope(name, tokens_of(p))
    found, other = value_and_slope(name, tokens_of([*(np.where(MASK, x, poison) for x in p[:3]), MASK]))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(other, slope)
    assert not other[~MASK].any() and not found[-1].any()  # the last row has no token
    assert name in BY_ROW or not found[~MASK].any()


@pytest.mark.parametrize("name", POLICY)
def test_neither_amount_nor_side_of_padding_matters(name):
    p = draw()
    expected, slope = value_and_slope(name, tokens_of(p))
    kept = (slice(None), slice(2, 2 + SHAPE[1]))
    padded = [np.pad(x, ((0, 0), (2, 3)), constant_values=fill) for x, fill in zip(p, (9, -9, 5, False), strict=True)]
    found, other = value_and_slope(name, tokens_of(padded))
    np.testing.assert_allclose(found if name in BY_ROW else found[kept], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(other[kept], slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", POLICY)
@few
@given(seeds, seeds, st.permutations(range(len(MASK))), st.integers(0, len(MASK) - 1))
def test_a_row_depends_on_itself_alone(name, seed, other, order, row):
    p, strange = draw(seed), draw(other)
    found, _ = value_and_slope(name, tokens_of(p))
    turned, _ = value_and_slope(name, tokens_of([x[list(order)] for x in p]))
    np.testing.assert_allclose(turned, found[list(order)], rtol=1e-6, atol=1e-7)
    mixed = [np.where(np.arange(len(x))[:, None] == row, y, x) for x, y in zip(p, strange, strict=True)]
    kept = np.arange(len(MASK)) != row
    np.testing.assert_array_equal(value_and_slope(name, tokens_of(mixed))[0][kept], found[kept])


@pytest.mark.parametrize("name", POLICY)
def test_nothing_is_infinite_far_from_the_policy_that_sampled(name):
    p = draw()
    far = np.resize([-200.0, 200.0, 90.0, -90.0, 40.0, 0.0, 200.0], SHAPE)
    for advantages in (p[2], 0 * p[2], -np.abs(p[2]), np.abs(p[2])):
        for at in (far, np.abs(far)):
            for numbers in (NUMBERS[name], NUMBERS[name] | ({"cap": 1e4} if "cap" in NUMBERS[name] else {})):
                found, slope = value_and_slope(name, tokens_of([p[1] + at, p[1], advantages, MASK]), **numbers)
                assert np.isfinite(found).all() and np.isfinite(slope).all()


@pytest.mark.parametrize("name", [name for name in POLICY if NUMBERS[name]])
def test_a_leading_axis_of_numbers_is_the_loop(name):
    """So the members of a sweep are one vmap, and no number is branched on."""
    tokens, scales = tokens_of(draw()), np.asarray([1.0, 1.25, 1.5], np.float32)
    members = {argument: jnp.asarray(scales * value) for argument, value in NUMBERS[name].items()}
    together = jax.jit(jax.vmap(lambda numbers: POLICY[name](tokens, **numbers)))(members)
    alone = [compiled(name)(tokens, {k: v * scale for k, v in NUMBERS[name].items()})[0] for scale in scales]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5, atol=1e-6)


def test_the_losses_that_differ_in_the_denominator_are_one_sum():
    tokens, count = tokens_of(draw()), np.maximum(MASK.sum(axis=1), 1)
    losses = {name: value_and_slope(name, tokens)[0] for name in POLICY}
    each = losses["ppo"]
    np.testing.assert_array_equal(losses["bnpo"], each)
    np.testing.assert_array_equal(losses["dapo"], each)
    np.testing.assert_allclose(losses["grpo"], each.sum(axis=1) / count, rtol=1e-6)
    np.testing.assert_allclose(losses["dr_grpo"], each.sum(axis=1) / 7, rtol=1e-6)
    np.testing.assert_allclose(losses["luspo"], losses["gspo"] * count, rtol=1e-5)


@few
@given(seeds)
def test_rows_of_one_token_need_no_whole(seed):
    """Then the row's ratio is the token's: gspo and luspo are grpo, and gmpo is its clip in nats."""
    p = draw(seed)[:3]
    p = [*p, np.eye(*SHAPE, dtype=bool)]
    both = {"clip_low": 0.15, "clip_high": 0.3}
    expected = value_and_slope("grpo", tokens_of(p), **both, cap=9.0)[0]
    for name in ("gspo", "luspo"):
        np.testing.assert_allclose(value_and_slope(name, tokens_of(p), **both, cap=9.0)[0], expected, rtol=1e-6)
    nats = {"clip_low": -math.log1p(-0.15), "clip_high": math.log1p(0.3)}
    np.testing.assert_allclose(value_and_slope("gmpo", tokens_of(p), **nats)[0], expected, rtol=1e-5, atol=1e-6)


def test_the_cap_is_the_dual_clip_and_takes_the_gradient_of_no_other_token():
    p = draw()
    open_, free = value_and_slope("ppo", tokens_of(p), clip_low=0.15, clip_high=0.3, cap=math.inf)
    dual, capped = value_and_slope("ppo", tokens_of(p))
    np.testing.assert_allclose(dual, np.where(p[2] < 0, np.minimum(open_, -1.6 * p[2]), open_), rtol=1e-6)
    held = MASK & (p[2] < 0) & (np.exp(p[0] - p[1]) > 1.6)
    assert held.any() and free[held].all()
    np.testing.assert_array_equal(capped, np.where(held, 0, free))


@pytest.mark.parametrize("name", [name for name in POLICY if "cap" in NUMBERS[name]])
def test_a_cap_that_holds_on_policy_tokens_is_refused(name):
    tokens, rest = tokens_of(draw()), {"length": 7.0} if name == "dr_grpo" else {}
    with pytest.raises(UserError, match="cap=0.2 is below 1"):
        POLICY[name](tokens, cap=0.2, **rest)
    POLICY[name](tokens, cap=jnp.float32(0.2), **rest)  # a traced one can't be looked at


# ---- beside the losses


@pytest.mark.parametrize("level", ["token", "row"])
def test_clip_fractions_are_the_tokens_whose_gradient_the_clip_takes(level):
    p, numbers = draw(), {"clip_low": 0.05, "clip_high": 0.1}
    low, high = clip_fractions(tokens_of(p), **numbers, level=level)
    assert low.shape == high.shape == SHAPE and low.any() and high.any()
    if level == "token":
        _, slope = value_and_slope("ppo", tokens_of(p), **numbers, cap=math.inf)
        np.testing.assert_array_equal((low + high) > 0, MASK & (slope == 0) & (p[2] != 0))
    log_ratio = np.where(MASK, p[0] - p[1], 0)
    if level == "row":
        count = np.maximum(MASK.sum(axis=1, keepdims=True), 1)
        log_ratio = np.broadcast_to(log_ratio.sum(axis=1, keepdims=True) / count, SHAPE)
    np.testing.assert_array_equal(low > 0, MASK & (np.exp(log_ratio) < 0.95) & (p[2] < 0))
    np.testing.assert_array_equal(high > 0, MASK & (np.exp(log_ratio) > 1.1) & (p[2] > 0))
    none = clip_fractions(tokens_of([p[1], *p[1:]]), **numbers, level=level)
    assert not np.asarray(none).any()


def test_the_value_loss_is_the_oracles_and_reads_nothing_under_the_mask():
    rng = np.random.default_rng(3)
    old, returns = dyadic(rng, -2, 2, 2, *SHAPE)
    values = old + dyadic(rng, -0.5, 0.5, *SHAPE)
    poisoned = [np.where(MASK, x, np.nan) for x in (values, old, returns)]
    loss = jax.jit(lambda v, old, returns: value_loss(v, old, returns, jnp.asarray(MASK), clip=0.2))
    with jax.enable_x64(True):
        columns = [jnp.asarray(x) for x in poisoned]
        slopes = jax.grad(lambda *columns: jnp.sum(loss(*columns)), argnums=(0, 1, 2))(*columns)
        found = loss(*columns)
    np.testing.assert_allclose(found, value64(values, old, returns, MASK, 0.2), rtol=1e-9, atol=1e-12)
    expected = derivative(lambda x: float(value64(x, old, returns, MASK, 0.2).sum()), values)
    np.testing.assert_allclose(slopes[0], expected, rtol=1e-7, atol=1e-9)
    assert not np.asarray(slopes[1:]).any()
    still = loss(*(jnp.asarray(x, jnp.float32) for x in (old, old, returns)))
    np.testing.assert_allclose(still, np.where(MASK, (old - returns) ** 2 / 2, 0), rtol=1e-6)


# ---- values of the field's reference implementation


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Any]:
    return json.loads((shared / "golden/reference_values.json").read_text())


CLIP = {"clip_low": 0.2, "clip_high": 0.2, "cap": math.inf}
ITEMS, LONGEST, BETA = 6, 8.0, 0.04
# Of each entry the loss, its numbers, and which KL term is added.
GOLDEN: dict[str, tuple[str, dict[str, float], str]] = {
    "grpo": ("grpo", CLIP, ""),
    "bnpo": ("bnpo", CLIP, ""),
    "dr_grpo": ("dr_grpo", CLIP | {"length": LONGEST}, ""),
    "dapo": ("dapo", CLIP, ""),
    "sapo": ("sapo", {"temperature": 1.0, "temperature_negative": 1.05}, ""),
    "vespo": ("vespo", {"power": 2.0, "decay": 3.0, "power_negative": 3.0, "decay_negative": 2.0}, ""),
    "cispo eps_high=5": ("cispo", {"cap": 5.0}, ""),
    "dapo eps .2/.28": ("dapo", CLIP | {"clip_high": 0.28}, ""),
    "dapo delta=1.3": ("dapo", CLIP | {"cap": 1.3}, ""),
    "grpo GSPO(sequence) eps .2": ("gspo", CLIP, ""),
    "luspo(sequence)": ("luspo", CLIP, ""),
    "dapo beta=.04": ("dapo", CLIP, "plain"),
    "dapo beta=.04 bias_corrected_kl": ("dapo", CLIP, "corrected"),
}


@pytest.mark.parametrize("entry", GOLDEN)
def test_the_losses_have_the_reference_values(golden, entry):
    """Value and gradient, in float32, with NaN where the reference has padding."""
    name, numbers, kl = GOLDEN[entry]
    inputs, expected = golden["inputs"]["grpo"], golden["values"]["grpo"][entry]
    logprobs, old, ref = (np.asarray(inputs[column], float) for column in ("logprobs", "old", "ref"))
    mask = ~np.isnan(logprobs)
    rows = np.asarray(inputs["advantages"])[:, None]
    tokens = tokens_of([logprobs, old, np.where(mask, rows, np.nan), mask])
    loss, slope = value_and_slope(name, tokens, **numbers)
    divided = len(mask) if name in BY_ROW else ITEMS
    value, slope = loss.sum() / divided, slope / divided
    if kl:

        def penalty(x: jax.Array) -> jax.Array:
            d, moved = (jnp.where(tokens.mask, x - jnp.asarray(y, jnp.float32), 0) for y in (ref, old))
            ratio = jnp.exp(moved) if kl == "corrected" else 1.0
            return BETA * jnp.sum(jnp.where(tokens.mask, ESTIMATORS["k3"](d) * ratio, 0)) / ITEMS

        more, steeper = jax.value_and_grad(penalty)(tokens.logprobs)
        value, slope = value + more, slope + np.asarray(steeper)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope.ravel(), expected["grad"], rtol=1e-6, atol=1e-6)


def test_the_defaults_are_the_published_numbers():
    published = {GOLDEN[entry][0]: GOLDEN[entry][1] for entry in GOLDEN if entry != "dapo eps .2/.28"}
    published |= {"dapo": CLIP | {"clip_high": 0.28}, "gmpo": {"clip_low": 0.4, "clip_high": 0.4}}
    published |= {"gspo": CLIP | {"clip_low": 3e-4, "clip_high": 4e-4}, "ppo": CLIP, "reinforce": {}}
    published |= {"luspo": CLIP | {"clip_low": 2e-3, "clip_high": 2.5e-3}}
    for name, loss in POLICY.items():
        defaults = {p.name: p.default for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert defaults == published[name] | ({"length": inspect.Parameter.empty} if name == "dr_grpo" else {})


def test_no_reference_value_is_left_out(golden):
    assert set(GOLDEN) == set(golden["values"]["grpo"])
