"""The distillation primitive against golden values and an oracle in float64, and its laws for any chunks and mesh."""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import Head
from rlhf_jax.ops.token_divergence import token_divergence
from rlhf_jax.sharding import MeshShape, make_mesh
from tests.test_no_dense_logits import sizes

LEARNT = ("hidden", "kernel", "bias")
TAUGHT = ("teacher_hidden", "teacher_kernel", "teacher_bias")
B, T, D, E, V = 8, 6, 4, 5, 12  # one shape for nearly all tests, so that they share what was compiled
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}  # the compiler would take most of the time
few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**32 - 1)
betas = st.sampled_from(BETAS)


class Problem(NamedTuple):
    """A call of `token_divergence`, and what a loss weighs its results with; numpy or JAX arrays."""

    hidden: Any
    kernel: Any
    bias: Any
    teacher_hidden: Any
    teacher_kernel: Any
    teacher_bias: Any
    mask: Any
    weights: Any  # [B, T]


def draw(seed: int = 0, widths: tuple[int, int] = (D, E), mask: np.ndarray | None = None) -> Problem:
    """Logits with a standard deviation of 2, so that no softmax is flat and a cap of 2 or 3 bends them."""
    rng = np.random.default_rng(seed)
    real = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    heads = [(real(B, T, width), 2 * real(V, width) / np.float32(width**0.5), real(V)) for width in widths]
    return Problem(*heads[0], *heads[1], rng.random((B, T)) < 0.7 if mask is None else mask, real(B, T))


# ---- the oracle: python loops over tokens and over the vocabulary, float64


def softmax64(raw: list[float], cap: float | None, temperature: float) -> list[float]:
    z = [(x if cap is None else cap * math.tanh(x / cap)) / temperature for x in raw]
    total = sum(math.exp(x - max(z)) for x in z)
    return [math.exp(x - max(z)) / total for x in z]


def kl64(p: list[float], m: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, m, strict=True))


def token64(
    raw: list[float], teacher: list[float], beta: float, temperature: float = 1.0, soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
) -> float:  # fmt: skip
    """Of one token, from both models' hidden @ kernel.T + bias."""
    s, t = softmax64(raw, soft_cap, temperature), softmax64(teacher, teacher_soft_cap, temperature)
    if beta in (0, 1):
        return kl64(t, s) if beta == 0 else kl64(s, t)
    m = [beta * a + (1 - beta) * b for a, b in zip(t, s, strict=True)]
    return beta * kl64(t, m) + (1 - beta) * kl64(s, m)


def slope64(raw: list[float], *how: Any, **more: Any) -> list[float]:
    """Central differences of `token64` by what the student's head gives."""
    slope, step = [], 1e-5
    for v in range(len(raw)):
        up, down = ([x + sign * step * (v == i) for i, x in enumerate(raw)] for sign in (1, -1))
        slope.append((token64(up, *how, **more) - token64(down, *how, **more)) / (2 * step))
    return slope


def oracle(p: Problem, beta: float, *, with_bias: bool = True, **how: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The divergence, and the gradient of its sum times the weights at what is learnt."""
    wide = [np.asarray(x, np.float64) for x in p[:6]]
    raw, teacher = (h @ k.T + (b if with_bias else 0) for h, k, b in (wide[:3], wide[3:]))
    found, slopes = np.zeros(p.mask.shape), np.zeros(raw.shape)
    for at in zip(*np.nonzero(p.mask), strict=True):
        pair = raw[at].tolist(), teacher[at].tolist()
        found[at] = token64(*pair, beta, **how)
        slopes[at] = p.weights[at] * np.asarray(slope64(*pair, beta, **how))
    # The head is linear, so that the rest of the chain is exact.
    kernel = np.einsum("btv,btd->vd", slopes, wide[0])
    return found, {"hidden": slopes @ wide[1], "kernel": kernel, "bias": slopes.sum((0, 1))}


# ---- what is tested


def divergence(p: Problem, beta: Any, *, with_bias: bool = True, **how: Any) -> jax.Array:
    heads = [Head(k, b if with_bias else None) for k, b in ((p.kernel, p.bias), (p.teacher_kernel, p.teacher_bias))]
    return token_divergence(p.hidden, heads[0], p.teacher_hidden, heads[1], p.mask, beta=beta, **how)


STATIC = ("soft_cap", "teacher_soft_cap", "with_bias", "chunk", "layout")


@functools.partial(jax.jit, static_argnames=STATIC, compiler_options=QUICK)
def run(
    p: Problem, beta: Any, temperature: Any = 1.0, *, chunk: int = B * T, **how: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The divergence, and the gradient of its sum times the weights at all that is of floats."""

    def loss(floats: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        numbers = {name: floats[name] for name in ("beta", "temperature")}
        q = p._replace(**{name: floats[name] for name in LEARNT + TAUGHT})
        found = divergence(q, chunk=chunk, **numbers, **how)
        return jnp.sum(p.weights * found), found

    floats = {name: getattr(p, name) for name in LEARNT + TAUGHT}
    floats |= {"beta": jnp.asarray(beta, jnp.float32), "temperature": jnp.asarray(temperature, jnp.float32)}
    slopes, found = jax.grad(loss, has_aux=True)(floats)
    return found, slopes


def close(got: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal to `tolerance` of the size of the largest number."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def same(got: tuple[Any, Mapping[str, Any]], expected: tuple[Any, Mapping[str, Any]], tolerance: float = 2e-6) -> None:
    close(got[0], expected[0], tolerance)
    for name in LEARNT:
        close(got[1][name], expected[1][name], tolerance)


def f32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


GOLDEN = {"beta=0,T=1.0": 0.0, "beta=0.5,T=1.0": 0.5, "beta=0.9,T=1.0": 0.9, "beta=1,T=1.0": 1.0, "beta=.5 masked": 0.5}


def test_golden_values(shared) -> None:
    """Of the field's reference implementation: sums over the positions; the logits are hidden states here."""
    golden = json.loads((shared / "golden/reference_values.json").read_text())["values"]["gkd_jsd"]
    assert golden.keys() == GOLDEN.keys()
    student, teacher = f32([[[1, 2, 0], [0.5, -1, 0.2]]]), f32([[[0, 1.5, 1], [2, 0, -1]]])
    head = Head(jnp.eye(3))
    value = jax.jit(lambda mask, beta: jnp.sum(token_divergence(student, head, teacher, head, mask, beta=beta)))
    for name, beta in GOLDEN.items():
        found = value(jnp.array([[True, "masked" not in name]]), beta)
        np.testing.assert_allclose(found, golden[name], rtol=0, atol=1e-6)


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias, hot": {"with_bias": False, "temperature": 2.5},
    "temperature and soft caps": {"temperature": 0.6, "soft_cap": 3.0, "teacher_soft_cap": 2.0},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_values_and_gradients_are_the_oracles(how: dict[str, Any]) -> None:
    for seed, beta in enumerate(BETAS):
        p = draw(seed)
        found, slopes = run(p, beta, **how)
        assert found.dtype == jnp.float32 and found.shape == (B, T)
        expected, gradient = oracle(p, beta, **how)
        close(found, expected, 2e-6)
        for name in LEARNT if how.get("with_bias", True) else LEARNT[:2]:
            close(slopes[name], gradient[name], 2e-6)


def test_only_the_student_learns() -> None:
    for beta in BETAS:
        _, slopes = run(draw(10), beta)
        for name in (*TAUGHT, "beta", "temperature"):
            assert not np.asarray(slopes[name]).any(), name
        assert all(np.asarray(slopes[name]).any() for name in LEARNT)


def test_a_sweep_over_beta_compiles_once() -> None:
    """One after the other, and as an axis of the same program."""
    p, traced = draw(11), []

    def gradient(beta: jax.Array) -> jax.Array:
        traced.append(beta)
        return jax.grad(lambda hidden: jnp.sum(divergence(p._replace(hidden=hidden), beta)))(p.hidden)

    one = jax.jit(gradient, compiler_options=QUICK)
    alone = [one(f32(beta)) for beta in BETAS]
    assert len(traced) == 1
    close(jax.jit(jax.vmap(gradient), compiler_options=QUICK)(f32(BETAS)), np.stack(alone), 1e-6)


# ---- laws


def alike(p: Problem) -> Problem:
    """The student is the teacher."""
    return p._replace(**{name: getattr(p, f"teacher_{name}") for name in LEARNT})


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    p = alike(draw(12, widths=(E, E)))
    for beta in BETAS:
        found, slopes = run(p, beta)
        close(found, np.zeros((B, T)), 1e-12)
        for name in LEARNT:
            close(slopes[name], np.zeros(slopes[name].shape), 1e-6)


def test_a_small_divergence_keeps_its_digits() -> None:
    """About 1e-8 nats, less than the rounding of a log-probability."""
    p = draw(13, widths=(E, E), mask=np.ones((B, T), bool))
    p = alike(p)._replace(teacher_hidden=p.teacher_hidden * np.float32(1 + 2.0**-13))
    for beta in BETAS:
        found, expected = run(p, beta)[0], oracle(p, beta)[0]
        assert np.median(expected) < 1e-7
        np.testing.assert_allclose(found, expected, rtol=0.05, atol=1e-12)


@few
@given(seeds, st.sampled_from([0.0, 0.3, 0.5]))
def test_student_and_teacher_change_places(seed: int, beta: float) -> None:
    """And beta becomes 1 - beta: forward becomes reverse, and at 1/2 nothing changes."""
    p = draw(seed, widths=(E, E))
    turned = Problem(*p[3:6], *p[:3], *p[6:])
    close(run(p, beta)[0], run(turned, 1 - beta)[0], 1e-6)


@few
@given(seeds, st.floats(0, 1, width=32), st.sampled_from([1, 30, 1000]))
def test_it_is_bounded(seed: int, beta: float, scale: int) -> None:
    """By 0, and by the entropy of beta, log 2 at 1/2: M tells at most from which of the two a token is."""
    p = draw(seed)
    p = p._replace(hidden=scale * p.hidden, teacher_hidden=scale * p.teacher_hidden)
    (found, slopes), (half, _) = run(p, beta), run(p, 0.5)
    assert (np.asarray(found) >= 0).all() and np.isfinite(np.asarray(found)).all()
    assert all(np.isfinite(np.asarray(slope)).all() for slope in slopes.values())
    assert (np.asarray(half) <= math.log(2) + 1e-6).all()
    if 0 < beta < 1:
        bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        assert (np.asarray(found) <= bound + 1e-6).all()


def test_the_ends_are_limits_by_their_share() -> None:
    """Also where 1 - beta is 1 in float32."""
    p = draw(14)
    for end, beta in ((0.0, 2.0**-30), (0.0, 1e-20), (1.0, 1 - 2.0**-24)):
        near, at = run(p, beta), run(p, end)
        share = np.float32(abs(end - beta))
        same((near[0] / share, {name: near[1][name] / share for name in LEARNT}), at, 1e-3)


@few
@given(seeds, betas, st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_nothing_leaks_from_under_the_mask(seed: int, beta: float, poison: float) -> None:
    p = draw(seed)
    spoil = lambda x: np.where(p.mask.reshape(B, T, *[1] * (x.ndim - 2)), x, np.float32(poison))
    bad = p._replace(
        hidden=spoil(p.hidden), teacher_hidden=spoil(p.teacher_hidden), weights=spoil(p.weights)
    )  # fmt: skip
    (clean, slopes), (found, dirty) = run(p, beta), run(bad, beta)
    np.testing.assert_array_equal(found, clean)
    assert not np.asarray(found)[~p.mask].any() and not np.asarray(dirty["hidden"])[~p.mask].any()
    for name, slope in dirty.items():
        np.testing.assert_array_equal(slope, slopes[name])


def test_a_batch_without_a_wanted_token_is_zero() -> None:
    for beta in BETAS:
        found, slopes = run(draw(15, mask=np.zeros((B, T), bool)), beta)
        for part in (found, *slopes.values()):
            np.testing.assert_array_equal(part, np.zeros(part.shape))


@pytest.mark.parametrize("chunk", [1, 24, 40])
def test_the_chunk_changes_nothing(chunk: int) -> None:
    """1, 3 and 5 tokens of each row at a time, or all of them; some chunks have no wanted token."""
    for seed, beta in enumerate(BETAS):
        p = draw(seed, mask=np.random.default_rng(seed).random((B, T)) < 0.3)
        same(run(p, beta, chunk=chunk), run(p, beta))


# ---- on a mesh


def placed(p: Problem, layout: Layout) -> Problem:
    """Rows over data and fsdp, the heads' kernels as the rules of `sharding` have them."""
    assert layout.mesh is not None
    mesh = layout.mesh
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    rows = ("data", "fsdp")
    return Problem(
        put(p.hidden, rows), put(p.kernel, "tensor", "fsdp"), put(p.bias), put(p.teacher_hidden, rows),
        put(p.teacher_kernel, "tensor"), put(p.teacher_bias), put(p.mask, rows), put(p.weights, rows),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_every_mesh_gives_the_same(shape: tuple[int, ...]) -> None:
    layout = Layout(make_mesh(MeshShape(*shape)))
    for seed, beta in enumerate(BETAS):
        p = draw(seed)
        same(run(placed(p, layout), beta, layout=layout, chunk=5), run(p, beta))


# ---- dtypes, memory and what is refused


def test_bfloat16_inputs_give_float32_results() -> None:
    """A logit that is rounded to bfloat16 would show as an error of about 1e-2."""
    p = draw(16)
    half = p._replace(**{name: jnp.asarray(getattr(p, name), jnp.bfloat16) for name in LEARNT + TAUGHT})
    full = p._replace(**{name: np.asarray(getattr(half, name), np.float32) for name in LEARNT + TAUGHT})
    (found, slopes), (expected, gradient) = run(half, 0.5), run(full, 0.5)
    assert found.dtype == jnp.float32 and all(slopes[name].dtype == jnp.bfloat16 for name in LEARNT)
    close(found, expected, 2e-6)
    same((found, slopes), (expected, gradient), 1e-2)


def dense(student: jax.Array, head: Head, teacher: jax.Array, teacher_head: Head, mask: jax.Array) -> jax.Array:
    """What must not be: both models' logits at once."""
    s, t = (jax.nn.log_softmax(h @ k.kernel.T) for h, k in ((student, head), (teacher, teacher_head)))
    m = jnp.logaddexp(s, t) - math.log(2)
    return jnp.where(mask, jnp.sum(jnp.exp(t) * (t - m) + jnp.exp(s) * (s - m), axis=-1) / 2, 0)


ROWS, LENGTH, WIDE, CHUNK = 8, 256, 32_768, 64
WHOLE = ROWS * LENGTH * WIDE  # numbers in one model's logits of the batch: 32 chunks of them
SHARE = 2 * CHUNK * WIDE  # a kernel is [WIDE, 16], a quarter of a chunk


def compiled(divergence: Any) -> jax.stages.Compiled:
    """The value and the gradient with a large vocabulary, which is not to be run."""
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)

    def loss(student, kernel, teacher, teacher_kernel, mask):
        return jnp.sum(divergence(student, Head(kernel), teacher, Head(teacher_kernel), mask))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(
        array(ROWS, LENGTH, 16), array(WIDE, 16), array(ROWS, LENGTH, 8), array(WIDE, 8),
        array(ROWS, LENGTH, dtype=jnp.bool_),
    ).compile(QUICK)  # fmt: skip


@pytest.mark.parametrize("tensor", [1, 2])
def test_no_program_holds_the_logits_of_its_batch(tensor: int) -> None:
    """And no device more of a chunk than its part of the vocabulary."""
    layout = Layout(make_mesh(MeshShape(1, tensor, tensor)))
    made = compiled(functools.partial(token_divergence, beta=0.5, chunk=CHUNK, layout=layout))
    found, memory = sizes(made.as_text() or "").values(), made.memory_analysis()
    assert CHUNK * WIDE // tensor in found and max(found) <= SHARE // tensor
    assert memory is not None and memory.temp_size_in_bytes < 10 * CHUNK * WIDE * 4 < WHOLE * 4 / 3


def test_a_dense_program_is_found_out() -> None:
    assert max(sizes(compiled(dense).as_text() or "").values()) >= WHOLE


def test_what_can_not_be_is_refused() -> None:
    p = draw(17)
    with pytest.raises(ValueError, match="vocabulary of 12 tokens and the teacher one of 11"):
        divergence(p._replace(teacher_kernel=p.teacher_kernel[:-1], teacher_bias=p.teacher_bias[:-1]), 0.5)
    for beta in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="beta"):
            divergence(p, beta)
