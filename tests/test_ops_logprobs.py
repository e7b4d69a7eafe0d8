"""The vocabulary primitive against an oracle in float64, and the laws that hold for any chunks and any mesh."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import Head, Stat, TokenStats, token_logprobs
from rlhf_jax.sharding import MeshShape, make_mesh

WANT: tuple[Stat, ...] = ("logprobs", "entropy", "logsumexp", "log_sum_sq")
LEARNT = ("hidden", "kernel", "bias")
B, T, D, V = 8, 6, 5, 12
few = settings(max_examples=15, deadline=None)
masks = hnp.arrays(np.bool_, (B, T))
seeds = st.integers(0, 2**32 - 1)


class Problem(NamedTuple):
    """A call of `token_logprobs`, and what a loss weighs its results with; numpy or JAX arrays."""

    hidden: Any
    kernel: Any
    bias: Any
    targets: Any
    mask: Any
    weights: Any  # [4, B, T], in the order of WANT


def draw(seed: int = 0, sizes: tuple[int, int, int, int] = (B, T, D, V), mask: np.ndarray | None = None) -> Problem:
    """Logits with a standard deviation of 2, so that no softmax is flat and a cap of 2 or 3 bends them."""
    rng = np.random.default_rng(seed)
    rows, length, width, vocab = sizes
    real = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return Problem(
        hidden=real(rows, length, width),
        kernel=2 * real(vocab, width) / np.float32(width**0.5),
        bias=real(vocab),
        targets=rng.integers(0, vocab, (rows, length), np.int32),
        mask=rng.random((rows, length)) < 0.7 if mask is None else mask,
        weights=real(len(WANT), rows, length),
    )


# ---- the oracle: plain numpy, float64, all logits at once


def oracle(
    p: Problem, *, temperature: float = 1.0, soft_cap: float | None = None, with_bias: bool = True
) -> dict[str, np.ndarray]:
    z = np.asarray(p.hidden, np.float64) @ np.asarray(p.kernel, np.float64).T
    z = z + p.bias if with_bias else z
    z = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
    z = z / temperature
    top = z.max(-1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(-1, keepdims=True))
    log_p = z - lse
    found = {
        "logprobs": np.take_along_axis(log_p, p.targets[..., None], -1)[..., 0],
        "entropy": -(np.exp(log_p) * log_p).sum(-1),
        "logsumexp": lse[..., 0],
        "log_sum_sq": np.log(np.square(np.exp(log_p)).sum(-1)),
    }
    return {name: np.where(p.mask, value, 0) for name, value in found.items()}


def weighed(p: Problem, **how: Any) -> float:
    """The scalar whose gradient is asked for: the results times the weights, summed."""
    found = oracle(p, **how)
    return sum(float((weight * found[name]).sum()) for name, weight in zip(WANT, p.weights, strict=True))


def numeric_gradient(p: Problem, field: str, **how: Any) -> np.ndarray:
    """Central differences of `weighed` in float64, one coordinate after the other."""
    start = getattr(p, field).astype(np.float64)
    gradient, step = np.zeros_like(start), 1e-5
    for index in np.ndindex(start.shape):
        ends = []
        for sign in (1, -1):
            moved = start.copy()
            moved[index] += sign * step
            ends.append(weighed(p._replace(**{field: moved}), **how))
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


# ---- what is tested


STATIC = ("soft_cap", "with_bias", "want", "chunk", "layout")


@functools.partial(jax.jit, static_argnames=STATIC)
def values(p: Problem, *, with_bias: bool = True, want: tuple[Stat, ...] = WANT, chunk: int = 16, **how) -> TokenStats:
    head = Head(p.kernel, p.bias if with_bias else None)
    return token_logprobs(p.hidden, head, p.targets, p.mask, want=want, chunk=chunk, **how)


@functools.partial(jax.jit, static_argnames=STATIC)
def gradients(p: Problem, **how) -> dict[str, jax.Array]:
    """The gradient of `weighed` at what is learnt."""

    def loss(learnt: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(p.weights * jnp.stack(list(values(p._replace(**learnt), **how))))

    return jax.grad(loss)({name: getattr(p, name) for name in LEARNT})


def close(got: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal to `tolerance` of the size of the largest number."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def all_close(got: Any, expected: Any, tolerance: float = 2e-5) -> None:
    got, expected = (dict(x._asdict() if isinstance(x, TokenStats) else x) for x in (got, expected))
    for name, value in got.items():
        close(value, expected[name], tolerance)


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"with_bias": False},
    "temperature": {"temperature": 0.6},
    "soft cap": {"soft_cap": 3.0},
    "all": {"temperature": 1.7, "soft_cap": 2.0},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_values_and_gradients_are_the_oracles(how: dict[str, Any]) -> None:
    p = draw(1, sizes=(2, 5, 3, 7))
    got = values(p, chunk=4, **how)
    assert all(x is not None and x.dtype == jnp.float32 and x.shape == (2, 5) for x in got)
    all_close(got, oracle(p, **how))
    learnt = LEARNT if how.get("with_bias", True) else LEARNT[:2]
    slopes = gradients(p, chunk=4, **how)
    all_close({name: slopes[name] for name in learnt}, {name: numeric_gradient(p, name, **how) for name in learnt})


@pytest.mark.parametrize("name", WANT)
def test_each_statistic_alone(name: Stat) -> None:
    """Its own gradient, so that errors of two statistics cannot cancel, and nothing that was not asked for."""
    p = draw(2, sizes=(2, 4, 3, 5))
    p = p._replace(weights=p.weights * (np.array(WANT) == name)[:, None, None])
    got = values(p, want=(name,))._asdict()
    assert {key for key, value in got.items() if value is not None} == {name}
    close(got[name], oracle(p)[name])
    all_close(gradients(p), {field: numeric_gradient(p, field) for field in LEARNT})


def test_large_logits_stay_finite() -> None:
    """A softmax that is a point: logits of some hundreds, probabilities below the smallest float32."""
    p = draw(3)
    p = p._replace(hidden=200 * p.hidden)
    all_close(values(p), oracle(p))
    assert all(np.isfinite(np.asarray(slope)).all() for slope in gradients(p).values())


def test_temperature_gets_no_gradient() -> None:
    p = draw(4)
    slope = jax.grad(lambda t: jnp.sum(jnp.stack(list(values(p, temperature=t)))))(1.3)
    assert slope == 0


@few
@given(seeds, masks, st.sampled_from([1, 8, 17, 40, 10_000]))
def test_the_chunk_changes_nothing(seed: int, mask: np.ndarray, chunk: int) -> None:
    """Also chunks that do not divide the row, of less than a token a row and of more than the whole batch."""
    p = draw(seed, mask=mask)
    all_close(values(p, chunk=chunk), values(p, chunk=24), 1e-6)
    all_close(gradients(p, chunk=chunk), gradients(p, chunk=24), 1e-6)


@few
@given(seeds, masks, st.sampled_from([np.nan, np.inf, -np.inf, 1e30]), st.sampled_from([-1, V, 2**31 - 1, -(2**31)]))
def test_nothing_leaks_from_under_the_mask(seed: int, mask: np.ndarray, poison: float, target: int) -> None:
    """Hidden states, targets and cotangents of unmasked positions may be anything."""
    p = draw(seed, mask=mask)
    hidden = np.where(mask[..., None], p.hidden, np.float32(poison))
    bad = p._replace(hidden=hidden, targets=np.where(mask, p.targets, target).astype(np.int32))
    got = values(bad)
    for clean, dirty in zip(values(p), got, strict=True):
        np.testing.assert_array_equal(clean, dirty)
        assert not np.asarray(dirty)[~mask].any()
    slopes = gradients(bad)
    assert not np.asarray(slopes["hidden"])[~mask].any()
    for name, clean in gradients(p).items():
        np.testing.assert_array_equal(clean, slopes[name])
    weights = np.where(mask, p.weights, np.float32(poison))
    for name, dirty in gradients(bad._replace(weights=weights)).items():
        np.testing.assert_array_equal(dirty, slopes[name])


def test_a_batch_without_a_wanted_token_is_zero() -> None:
    p = draw(5, mask=np.zeros((B, T), bool))
    for part in (*values(p), *gradients(p).values()):
        np.testing.assert_array_equal(part, np.zeros(part.shape))


@few
@given(seeds, masks, st.permutations(range(B)), st.permutations(range(T)))
def test_order_changes_nothing(seed: int, mask: np.ndarray, rows: list[int], columns: list[int]) -> None:
    """Rows, and tokens within them, can be anywhere."""
    p = draw(seed, mask=mask)
    turn = lambda x: x[..., rows, :][..., columns]  # noqa: E731
    hidden = np.moveaxis(turn(np.moveaxis(p.hidden, -1, 0)), 0, -1)
    turned = Problem(hidden, p.kernel, p.bias, turn(p.targets), turn(p.mask), turn(p.weights))
    expected = TokenStats(*(turn(np.asarray(x)) for x in values(p)))
    all_close(values(turned), expected, 1e-6)
    slopes, got = gradients(p), gradients(turned)
    slopes["hidden"] = np.moveaxis(turn(np.moveaxis(np.asarray(slopes["hidden"]), -1, 0)), 0, -1)
    all_close(got, slopes, 2e-6)


@few
@given(seeds)
def test_the_probabilities_of_all_targets_sum_to_one(seed: int) -> None:
    """And the other statistics are the sums over them that they claim to be."""
    p = draw(seed, sizes=(2, V, D, V), mask=np.ones((2, V), bool))
    p = p._replace(hidden=np.repeat(p.hidden[:, :1], V, axis=1), targets=np.tile(np.arange(V, dtype=np.int32), (2, 1)))
    got = values(p)
    log_p = np.asarray(got.logprobs, np.float64)
    close(np.exp(log_p).sum(-1), np.ones(2))
    close(got.entropy, np.repeat(-(np.exp(log_p) * log_p).sum(-1)[:, None], V, 1))
    close(got.log_sum_sq, np.repeat(np.log(np.exp(2 * log_p).sum(-1))[:, None], V, 1))


# ---- on a mesh


@functools.cache
def layout(*sizes: int) -> Layout:
    return Layout(make_mesh(MeshShape(*sizes)))


def placed(p: Problem, layout: Layout) -> Problem:
    """Rows over data and fsdp; the head as a checkpoint's is, over tensor and fsdp where that divides."""
    assert layout.mesh is not None
    put = lambda x, *axes: jax.device_put(x, NamedSharding(layout.mesh, PartitionSpec(*axes)))  # noqa: E731
    rows = ("data", "fsdp")
    return Problem(
        put(p.hidden, rows), put(p.kernel, "tensor", "fsdp"), put(p.bias), put(p.targets, rows),
        put(p.mask, rows), put(p.weights, None, rows),
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4), (8, 1, 1)])
def test_every_mesh_gives_the_same(sizes: tuple[int, ...]) -> None:
    p, mesh = draw(6, sizes=(16, 5, 4, 8)), layout(*sizes)
    how: dict[str, Any] = {"chunk": 7, "soft_cap": 4.0, "temperature": 0.8}
    all_close(values(placed(p, mesh), layout=mesh, **how), values(p, **how), 1e-6)
    all_close(gradients(placed(p, mesh), layout=mesh, **how), gradients(p, **how), 2e-6)


def test_rows_that_the_mesh_does_not_divide() -> None:
    p, mesh = draw(7, sizes=(3, 5, 4, 8)), layout(2, 2, 2)
    all_close(values(p, layout=mesh), values(p), 1e-6)
    all_close(gradients(p, layout=mesh), gradients(p), 2e-6)


# ---- dtypes


def halved(p: Problem) -> tuple[Problem, Problem]:
    """The problem in bfloat16, and with the same rounded numbers in float32."""
    half = {name: jnp.asarray(getattr(p, name), jnp.bfloat16) for name in LEARNT}
    full = {name: np.asarray(x, np.float32) for name, x in half.items()}
    return p._replace(**half), p._replace(**full)


def test_bfloat16_inputs_give_float32_results() -> None:
    """Rounding of a logit to bfloat16 would show as an error of about 1e-2."""
    half, full = halved(draw(8, sizes=(4, 8, 64, 32)))
    got = values(half)
    assert all(x is not None and x.dtype == jnp.float32 for x in got)
    all_close(got, oracle(full))
    slopes = gradients(half)
    assert all(slopes[name].dtype == jnp.bfloat16 for name in LEARNT)
    all_close(slopes, gradients(full), tolerance=2e-2)


@pytest.mark.parametrize("chunk", [8, 4096])
def test_bfloat16_gradients_accumulate_in_float32(chunk: int) -> None:
    """2,048 equal contributions: a sum that is itself bfloat16 stops growing at 256 of them."""
    p = draw(9, sizes=(8, 256, 4, 3), mask=np.ones((8, 256), bool))
    p = p._replace(
        hidden=np.ones_like(p.hidden), targets=np.zeros_like(p.targets), weights=np.ones_like(p.weights)
    )
    half, full = halved(p)
    got, expected = gradients(half, chunk=chunk), gradients(full)
    for name in ("kernel", "bias"):
        close(got[name], expected[name], tolerance=1e-2)
