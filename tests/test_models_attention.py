"""Attention back ends against each other and an oracle, and what the whole decoder must not see."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.models.attention import BACKENDS, BLOCK, Form
from rlhf_jax.models.decoder import Block, Context, Model, Numerics, Params
from rlhf_jax.models.rope import angles
from rlhf_jax.models.shape import Shape
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sharding import MeshShape, make_mesh

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
LENGTH = BLOCK + 8  # one block and a bit: one shape for nearly all tests, so that they share what was compiled
few = settings(max_examples=10, deadline=None)
QUICK = {"xla_backend_optimization_level": 0}  # the compiler would take most of the time


def draw(rows: int, length: int, heads: int, groups: int, size: int, seed: int = 0) -> Arrays:
    """q, k, v and segments: several texts a row and padding at its end; scores far from uniform."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((rows, length, h, size), np.float32) for h in (heads, groups, groups))
    cuts = np.sort(rng.integers(0, length + 1, (rows, 3)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)
    return 2 * q, k, v, np.where(segments > 3, 0, segments).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("backend", "layout", "form"), compiler_options=QUICK)
def attend(
    q: Any, k: Any, v: Any, segments: Any, *, backend: str, layout: Layout = Layout(), form: Form = Form()
) -> jax.Array:
    return BACKENDS[backend](q, k, v, segments, layout, form)


@functools.partial(jax.jit, static_argnames=("backend", "layout", "form"), compiler_options=QUICK)
def slopes(
    parts: Any, weights: Any, *, backend: str, layout: Layout = Layout(), form: Form = Form()
) -> tuple[jax.Array, Any]:
    """The output, and the gradient of its weighed sum at q, k and v."""

    def loss(qkv: Any) -> tuple[jax.Array, jax.Array]:
        out = BACKENDS[backend](qkv[0], qkv[1], qkv[2], parts[3], layout, form)
        return jnp.sum(weights * out), out

    gradient, out = jax.grad(loss, has_aux=True)(tuple(parts[:3]))
    return out, gradient


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Leaf by leaf, to `tolerance` of the largest number of the leaf."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray, form: Form = Form()) -> np.ndarray:
    """One query after the other in float64; query head h reads key-value head h // (H / G)."""
    out = np.zeros(q.shape)
    share, scale = q.shape[2] // k.shape[2], form.scale or q.shape[3] ** -0.5
    for b, t, h in np.ndindex(q.shape[:3]):
        first = 0 if form.window is None else max(0, t - form.window + 1)
        seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
        scores = np.array([q[b, t, h].astype(np.float64) @ k[b, s, h // share] for s in seen]) * scale
        if form.soft_cap is not None:
            scores = form.soft_cap * np.tanh(scores / form.soft_cap)
        p = np.exp(scores - scores.max())
        out[b, t, h] = sum(w * v[b, s, h // share] for w, s in zip(p / p.sum(), seen, strict=True))
    return out


def test_dense_is_the_oracle() -> None:
    parts = draw(2, 12, heads=6, groups=2, size=4)
    close(attend(*parts, backend="dense"), oracle(*parts))


@pytest.mark.parametrize("form", [Form(window=3), Form(0.7, 1.5, 1), Form(0.2, 0.5, 12)])
def test_dense_has_the_oracles_form(form: Form) -> None:
    """Windows of one token, of some and of the whole row."""
    parts = draw(2, 12, heads=6, groups=2, size=4)
    close(attend(*parts, backend="dense", form=form), oracle(*parts, form=form))


@pytest.mark.parametrize("window", [5, BLOCK + 3])
def test_blocked_is_dense_in_a_window(window: int) -> None:
    """Value and gradient, where the window is within a block and where it reaches into the one before."""
    parts, form = draw(2, 3 * BLOCK + 7, heads=4, groups=2, size=4), Form(0.7, 1.5, window)
    weights = np.random.default_rng(1).standard_normal(parts[0].shape, np.float32)
    close(slopes(parts, weights, backend="blocked", form=form), slopes(parts, weights, backend="dense", form=form))


@pytest.mark.parametrize("length", [1, BLOCK, LENGTH, 3 * BLOCK + 7])
def test_blocked_is_dense(length: int) -> None:
    """Value and gradient, also of rows shorter than a block and of no multiple of it."""
    parts = draw(4, length, heads=4, groups=2, size=4, seed=length)
    weights = np.random.default_rng(1).standard_normal(parts[0].shape, np.float32)
    close(slopes(parts, weights, backend="blocked"), slopes(parts, weights, backend="dense"))


def test_long_rows_have_longer_blocks() -> None:
    """17 blocks' worth of tokens, where there are never more than 16."""
    parts = draw(1, 17 * BLOCK, heads=2, groups=1, size=4)
    close(attend(*parts, backend="blocked"), attend(*parts, backend="dense"))


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (3, 3)])
def test_blocked_is_dense_for_one_group_and_for_as_many_as_heads(heads: int, groups: int) -> None:
    parts = draw(4, LENGTH, heads, groups, size=4)
    close(attend(*parts, backend="blocked"), attend(*parts, backend="dense"))


def test_scores_beyond_any_exponential() -> None:
    """Scores of thousands are a maximum, not an overflow."""
    q, k, v, segments = draw(4, LENGTH, heads=4, groups=2, size=4)
    for backend in ("dense", "blocked"):
        out, gradient = slopes((1e4 * q, k, v, segments), np.ones_like(q), backend=backend)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, gradient)))
    close(out, oracle(1e4 * q, k, v, segments), 1e-4)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
@few
@given(place=st.integers(0, LENGTH - 1), seed=st.integers(0, 99))
def test_only_the_past_of_the_same_segment_is_seen(backend: str, place: int, seed: int) -> None:
    """Another key and value at one place move the later tokens of its segment and not one bit of the others."""
    q, k, v, segments = draw(4, LENGTH, heads=4, groups=2, size=4, seed=seed)
    k2, v2 = k.copy(), v.copy()
    k2[:, place], v2[:, place] = 1 - k[:, place], 1 - v[:, place]
    before, after = (np.asarray(attend(q, *kv, segments, backend=backend)) for kv in ((k, v), (k2, v2)))
    changed = (before != after).any(axis=(2, 3))
    reached = (np.arange(LENGTH) >= place)[None] & (segments == segments[:, [place]])
    np.testing.assert_array_equal(changed & ~reached, False)
    assert changed[:, place].all()


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_every_mesh_attends_the_same(backend: str) -> None:
    """Rows over data and fsdp, heads over tensor."""
    parts = draw(4, LENGTH, heads=4, groups=2, size=4)
    layout = Layout(make_mesh(MeshShape(2, 2, 2)))
    weights = np.ones_like(parts[0])
    axes = [("rows", None, "heads", None)] * 3 + [("rows", None)]
    placed = tuple(jax.device_put(x, layout.sharding(*names)) for x, names in zip(parts, axes, strict=True))
    close(slopes(placed, weights, backend=backend, layout=layout), slopes(parts, weights, backend=backend))


def test_bfloat16_keeps_its_sums_in_float32() -> None:
    """The weighted mean of 200 equal values is that value: a bfloat16 sum of the weights would be off by more."""
    q, k, v = (np.zeros((1, 200, 1, 4), np.float32) for _ in range(3))
    parts = (*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v + 1)), np.ones((1, 200), np.int32))
    for backend in ("dense", "blocked"):
        out = attend(*parts, backend=backend)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, np.ones((1, 200, 1, 4)))


def test_auto_takes_a_back_end_that_runs_here() -> None:
    for length in (BLOCK, LENGTH):
        parts = draw(4, length, heads=4, groups=2, size=4)
        chosen = "dense" if length <= BLOCK else "blocked"
        np.testing.assert_array_equal(attend(*parts, backend="auto"), attend(*parts, backend=chosen))


# ---- the TPU's kernel, interpreted


@pytest.mark.parametrize("form", [Form(), Form(0.7, 1.5, 9)], ids=["plain", "windowed and capped"])
def test_splash_is_dense(monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    """Value and gradient, its length and head size padded to the kernel's; tests/test_tpu.py compiles it."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    interpreted = functools.partial(kernels.make_splash_mqa_single_device, interpret=True)
    monkeypatch.setattr(kernels, "make_splash_mqa_single_device", interpreted)
    parts = draw(2, 150, heads=4, groups=2, size=16)
    weights = np.random.default_rng(1).standard_normal(parts[0].shape, np.float32)
    got, expected = (slopes(parts, weights, backend=name, form=form) for name in ("splash", "dense"))
    close(got, expected, 2e-5)


# ---- the whole decoder

SHAPE = Shape(
    vocab=40, width=16, layers=2, heads=4, groups=2, head_dim=8, mlp_width=24, length=256,
    qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
Rows = dict[str, Any]  # of arrays


@functools.cache
def params_of(shape: Shape = SHAPE) -> Params:
    """Every weight, bias and norm random, and large enough that attention is far from uniform."""
    shapes = jax.eval_shape(Model(shape).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape, np.float32) + 0.2, shapes)


TEXTS = [np.random.default_rng(n).integers(0, SHAPE.vocab, size) for n, size in enumerate((20, 1, 13))]
WIDTH = 37  # of rows that hold each text, or all of them


def rows_of(length: int = WIDTH, packed: bool = False, seed: int = 0) -> Rows:
    """TEXTS as rows of their own, or after each other in the first; padding has any tokens and positions."""
    rng = np.random.default_rng(seed)
    sizes = len(TEXTS), length
    tokens, positions, segments = rng.integers(0, SHAPE.vocab, sizes), rng.integers(0, 200, sizes), np.zeros(sizes, int)
    start = 0
    for number, text in enumerate(TEXTS):
        at = (0, slice(start, start + len(text))) if packed else (number, slice(len(text)))
        tokens[at], positions[at], segments[at] = text, np.arange(len(text)), number + 1
        start += len(text)
    columns = {"tokens": tokens, "positions": positions, "segments": segments}
    return {name: x.astype(np.int32) for name, x in columns.items()} | {"mask": segments > 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def say(model: Model, params: Params, rows: Rows) -> tuple[jax.Array, Params]:
    """The log-probability of each token, and the gradient of their sum of squares."""

    def total(params: Params) -> tuple[jax.Array, jax.Array]:
        logprobs: Any = model.token_stats(params, rows).logprobs
        return jnp.sum(jnp.square(logprobs)), logprobs

    gradient, logprobs = jax.grad(total, has_aux=True)(params)
    return logprobs, gradient


def test_padding_changes_nothing() -> None:
    """Nor what it holds, nor that longer rows take another back end."""
    model, params = Model(SHAPE), params_of()
    logprobs, gradient = say(model, params, rows_of())
    assert not np.asarray(logprobs)[:, 0].any()
    for length in (WIDTH, LENGTH):
        longer, slope = say(model, params, rows_of(length, seed=1))
        close(longer, np.pad(logprobs, ((0, 0), (0, length - WIDTH))))
        close(slope, gradient)


def test_packed_texts_are_rows_of_their_own() -> None:
    model, params = Model(SHAPE), params_of()
    (apart, gradient), (packed, slope) = (say(model, params, rows_of(packed=packed)) for packed in (False, True))
    alone = np.concatenate([np.asarray(row)[: len(text)] for row, text in zip(apart, TEXTS, strict=True)])
    close(packed[0, : len(alone)], alone)
    close(slope, gradient)


def test_what_comes_later_is_not_seen() -> None:
    """Other tokens from place 11 on do not move one bit of what was said before them."""
    model, params, rows = Model(SHAPE), params_of(), rows_of()
    tokens = np.where(np.arange(WIDTH)[None] < 11, rows["tokens"], 39 - rows["tokens"])
    before, after = (np.asarray(say(model, params, rows | {"tokens": x})[0]) for x in (rows["tokens"], tokens))
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert (before[0, 11:20] != after[0, 11:20]).all()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat: Any) -> None:
    params, rows = params_of(), rows_of()
    close(say(Model(SHAPE, Numerics(remat=remat)), params, rows), say(Model(SHAPE), params, rows))


@functools.partial(jax.jit, static_argnums=0)
def run_block(model: Model, layer: Params, x: jax.Array, context: Context) -> jax.Array:
    block = Block(model.shape, model.numerics, model.layout)
    return block.apply({"params": layer}, x, None, None, context)[0]  # type: ignore[index]


def test_the_scan_runs_the_layers_in_order() -> None:
    """The stack against its layers one after the other."""
    model, params, rows = Model(SHAPE), params_of(), rows_of()
    tokens, segments, positions = (jnp.asarray(rows[name]) for name in ("tokens", "segments", "positions"))
    got = jax.jit(model.apply)(params, tokens, segments, positions)
    x, rope = params["embedding"][tokens], SHAPE.kinds[0].rope
    assert rope is not None
    context = Context(segments, angles(rope, SHAPE.head_dim, positions))
    for i in range(SHAPE.layers):
        layer = jax.tree.map(lambda stack, i=i: stack[i], params["layers"])
        x = run_block(model, layer, x, context)
    x = np.asarray(x, np.float64)
    close(got, x / np.sqrt(np.square(x).mean(-1, keepdims=True) + SHAPE.norm_eps) * params["final_norm"])
