"""The vocabulary primitive against an oracle in float64, and the laws that hold for any chunks and any mesh."""

import functools
from collections.abc import Mapping
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
from rlhf_jax.ops.logprobs import Head, HeadStat, token_logprobs
from rlhf_jax.sharding import MeshShape, make_mesh

WANT: tuple[HeadStat, ...] = ("logprobs", "entropy", "logsumexp", "log_sum_sq", "mean_logprobs", "greedy")
LEARNT = ("hidden", "kernel", "bias")
B, T, D, V = 8, 6, 4, 12  # one shape for nearly all tests, so that they share what was compiled
few = settings(max_examples=10, deadline=None)
masks = hnp.arrays(np.bool_, (B, T))
QUICK = {"xla_backend_optimization_level": 0}  # the compiler would take most of the time
seeds = st.integers(0, 2**32 - 1)


class Problem(NamedTuple):
    """A call of `token_logprobs`, and what a loss weighs its results with; numpy or JAX arrays."""

    hidden: Any
    kernel: Any
    bias: Any
    targets: Any
    mask: Any
    weights: Any  # [6, B, T], in the order of WANT


def draw(seed: int = 0, sizes: tuple[int, int, int, int] = (B, T, D, V), mask: np.ndarray | None = None) -> Problem:
    """Logits with a standard deviation of 2, so that no softmax is flat and a cap of 2 or 3 bends them."""
    rng = np.random.default_rng(seed)
    rows, length, width, vocab = sizes
    real = lambda *shape: rng.standard_normal(shape).astype(np.float32)
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
        "mean_logprobs": log_p.mean(-1),
        "greedy": z.argmax(-1) == p.targets,
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


@functools.partial(jax.jit, static_argnames=STATIC, compiler_options=QUICK)
def run(
    p: Problem, *, with_bias: bool = True, want: tuple[HeadStat, ...] = WANT, chunk: int = 16, **how
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was asked for, and the gradient of `weighed` at what is learnt."""

    def loss(learnt: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        head = Head(learnt["kernel"], learnt["bias"] if with_bias else None)
        stats = token_logprobs(learnt["hidden"], head, p.targets, p.mask, want=want, chunk=chunk, **how)
        found = {name: value for name, value in stats._asdict().items() if value is not None}
        return sum(
            (jnp.sum(w * found[n]) for n, w in zip(WANT, p.weights, strict=True) if n in found), jnp.zeros(())
        ), found

    slopes, found = jax.grad(loss, has_aux=True)({name: getattr(p, name) for name in LEARNT})
    return found, slopes


def close(got: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal to `tolerance` of the size of the largest number."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def all_close(got: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 2e-5) -> None:
    assert got.keys() <= expected.keys()
    for name, value in got.items():
        close(value, expected[name], tolerance)


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"with_bias": False},
    "temperature and soft cap": {"temperature": 0.6, "soft_cap": 3.0},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_values_and_gradients_are_the_oracles(how: dict[str, Any]) -> None:
    p = draw(1)
    found, slopes = run(p, **how)
    assert all(x.dtype == jnp.float32 and x.shape == (B, T) for x in found.values())
    all_close(found, oracle(p, **how))
    learnt = LEARNT if how.get("with_bias", True) else LEARNT[:2]
    all_close({name: slopes[name] for name in learnt}, {name: numeric_gradient(p, name, **how) for name in learnt})


@pytest.mark.parametrize("name", WANT)
def test_each_statistic_alone(name: HeadStat) -> None:
    """Its own gradient, so that errors of two statistics cannot cancel, and nothing that was not asked for."""
    p = draw(2)
    p = p._replace(weights=p.weights * (np.array(WANT) == name)[:, None, None])
    found, slopes = run(p, want=(name,), soft_cap=2.0)
    assert found.keys() == {name}
    close(found[name], oracle(p, soft_cap=2.0)[name])
    all_close(slopes, {field: numeric_gradient(p, field, soft_cap=2.0) for field in LEARNT})


def test_large_logits_keep_their_precision() -> None:
    """Logits of some hundreds, where a softmax is a point: the entropy is small and never their rounding."""
    p = draw(3)
    p = p._replace(hidden=200 * p.hidden)
    found, slopes = run(p)
    expected = oracle(p)
    close(found["logprobs"], expected["logprobs"])
    close(found["logsumexp"], expected["logsumexp"])
    close(found["mean_logprobs"], expected["mean_logprobs"])
    for name in ("entropy", "log_sum_sq"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-3)
    assert (np.asarray(found["entropy"]) >= 0).all()
    assert all(np.isfinite(np.asarray(slope)).all() for slope in slopes.values())


def test_of_equally_likely_tokens_the_first_is_the_greedy_one() -> None:
    """As argmax has it, and so the sampler at temperature 0."""
    p = draw(11, mask=np.ones((B, T), bool))
    kernel = np.repeat(p.kernel[: V // 2], 2, axis=0)  # each token has a twin behind it
    targets = np.arange(B * T, dtype=np.int32).reshape(B, T) % V
    hidden = np.broadcast_to(p.hidden[:1, :1], p.hidden.shape)
    found, _ = run(p._replace(hidden=hidden, kernel=kernel, targets=targets), with_bias=False, want=("greedy",))
    greedy = np.asarray(found["greedy"]).reshape(-1)[:V]
    assert greedy.sum() == 1 and greedy.argmax() == 2 * int((p.kernel[: V // 2] @ p.hidden[0, 0]).argmax())


def test_temperature_gets_no_gradient() -> None:
    p = draw(4)

    def total(temperature: jax.Array) -> jax.Array:
        stats = token_logprobs(p.hidden, Head(p.kernel), p.targets, p.mask, temperature=temperature)
        assert stats.logprobs is not None
        return jnp.sum(stats.logprobs)

    assert jax.jit(jax.grad(total))(1.3) == 0


@few
@given(seeds, masks, st.sampled_from([1, 40, 10_000]))
def test_the_chunk_changes_nothing(seed: int, mask: np.ndarray, chunk: int) -> None:
    """Also chunks of less than a token a row, and of more than the batch, and those that do not divide a row."""
    p = draw(seed, mask=mask)
    for got, expected in zip(run(p, chunk=chunk), run(p), strict=True):
        all_close(got, expected, 2e-6)


@few
@given(seeds, masks, st.sampled_from([np.nan, np.inf, -np.inf, 1e30]), st.sampled_from([-1, V, 2**31 - 1, -(2**31)]))
def test_nothing_leaks_from_under_the_mask(seed: int, mask: np.ndarray, poison: float, target: int) -> None:
    """Hidden states, targets and cotangents of unmasked positions may be anything."""
    p = draw(seed, mask=mask)
    bad = p._replace(
        hidden=np.where(mask[..., None], p.hidden, np.float32(poison)),
        targets=np.where(mask, p.targets, target).astype(np.int32),
        weights=np.where(mask, p.weights, np.float32(poison)),
    )
    (clean, slopes), (found, dirty) = run(p), run(bad)
    for name, value in found.items():
        np.testing.assert_array_equal(value, clean[name])
        assert not np.asarray(value)[~mask].any()
    for name, slope in dirty.items():
        np.testing.assert_array_equal(slope, slopes[name])
    assert not np.asarray(dirty["hidden"])[~mask].any()


def test_a_batch_without_a_wanted_token_is_zero() -> None:
    found, slopes = run(draw(5, mask=np.zeros((B, T), bool)))
    for part in (*found.values(), *slopes.values()):
        np.testing.assert_array_equal(part, np.zeros(part.shape))


def moved(x: Any, rows: list[int], columns: list[int]) -> np.ndarray:
    """[B, T, ...] with its rows, and the tokens of each, in another order."""
    return np.asarray(x)[rows][:, columns]


@few
@given(seeds, masks, st.permutations(range(B)), st.permutations(range(T)))
def test_order_changes_nothing(seed: int, mask: np.ndarray, rows: list[int], columns: list[int]) -> None:
    p = draw(seed, mask=mask)
    turn = functools.partial(moved, rows=rows, columns=columns)
    turned = Problem(
        turn(p.hidden), p.kernel, p.bias, turn(p.targets), turn(p.mask), np.stack([turn(w) for w in p.weights])
    )
    (found, slopes), (got, after) = run(p), run(turned)
    all_close(got, {name: turn(x) for name, x in found.items()}, 1e-6)
    all_close(after, slopes | {"hidden": turn(slopes["hidden"])}, 2e-6)


def test_the_probabilities_of_all_targets_sum_to_one() -> None:
    """And the other statistics are the sums over them that they claim to be."""
    p = draw(10, mask=np.ones((B, T), bool))
    targets = np.arange(B * T, dtype=np.int32).reshape(B, T) % V
    found, _ = run(p._replace(hidden=np.broadcast_to(p.hidden[:1, :1], p.hidden.shape), targets=targets))
    log_p = np.asarray(found["logprobs"], np.float64).reshape(-1)[:V]
    close(np.exp(log_p).sum(), 1)
    close(found["entropy"], np.full((B, T), -(np.exp(log_p) * log_p).sum()))
    close(found["log_sum_sq"], np.full((B, T), np.log(np.exp(2 * log_p).sum())))
    close(found["mean_logprobs"], np.full((B, T), log_p.mean()))


# ---- on a mesh


def placed(p: Problem, layout: Layout) -> Problem:
    """Rows over data and fsdp, the head's kernel as the rules of `sharding` have it."""
    assert layout.mesh is not None
    mesh = layout.mesh
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    rows = ("data", "fsdp")
    return Problem(
        put(p.hidden, rows), put(p.kernel, "tensor", "fsdp"), put(p.bias), put(p.targets, rows),
        put(p.mask, rows), put(p.weights, None, rows),
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4), (8, 1, 1)])
def test_every_mesh_gives_the_same(sizes: tuple[int, ...]) -> None:
    p, layout = draw(6), Layout(make_mesh(MeshShape(*sizes)))
    for got, expected in zip(run(placed(p, layout), layout=layout, chunk=5), run(p), strict=True):
        all_close(got, expected, 2e-6)


def test_rows_that_the_mesh_does_not_divide() -> None:
    p, layout = draw(7), Layout(make_mesh(MeshShape(3, 1, 2)))
    for got, expected in zip(run(p, layout=layout), run(p), strict=True):
        all_close(got, expected, 2e-6)


# ---- dtypes


def halved(p: Problem) -> tuple[Problem, Problem]:
    """The problem in bfloat16, and with the same rounded numbers in float32."""
    half = {name: jnp.asarray(getattr(p, name), jnp.bfloat16) for name in LEARNT}
    full = {name: np.asarray(x, np.float32) for name, x in half.items()}
    return p._replace(**half), p._replace(**full)


def test_bfloat16_inputs_give_float32_results() -> None:
    """A logit that is rounded to bfloat16 would show as an error of about 1e-2."""
    half, full = halved(draw(8))
    (found, slopes), (_, expected) = run(half), run(full)
    assert all(x.dtype == jnp.float32 for x in found.values())
    all_close(found, oracle(full))
    assert all(slope.dtype == jnp.bfloat16 for slope in slopes.values())
    all_close(slopes, expected, tolerance=1e-2)


def test_bfloat16_gradients_accumulate_in_float32() -> None:
    """2,048 equal contributions in 256 chunks: a sum that is itself bfloat16 stops growing at 256 of them."""
    p = draw(9, sizes=(8, 256, D, V), mask=np.ones((8, 256), bool))
    p = p._replace(hidden=np.ones_like(p.hidden), targets=np.zeros_like(p.targets), weights=np.ones_like(p.weights))
    half, full = halved(p)
    _, slopes = run(half, want=("logprobs",), chunk=8)
    z = full.kernel.sum(-1) + full.bias
    slope = 2048 * ((np.arange(V) == 0) - np.exp(z) / np.exp(z).sum())
    close(slopes["bias"], slope, tolerance=1e-2)
    close(slopes["kernel"], np.tile(slope[:, None], D), tolerance=1e-2)
