"""The vocabulary primitive: log-probabilities of tokens without their logits in memory.

Every objective and every evaluation reads the output head through `token_logprobs`. It keeps the logits of
one chunk of tokens alive at a time, forward and backward, so no program ever holds [B, T, V].
"""

import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.layout import Layout

HeadStat = Literal["logprobs", "entropy", "logsumexp", "log_sum_sq", "mean_logprobs"]
Stat = HeadStat | Literal["balance"]  # of the layers, not of the head: `token_logprobs` can't give it


class Head(NamedTuple):
    """An output head: logits = hidden @ kernel.T + bias. A tied head is the embedding table itself."""

    kernel: Array  # [V, D]
    bias: Array | None = None  # [V]


class TokenStats(NamedTuple):
    """What was asked for of each token, float32 [B, T], 0 where the mask is False; None if not asked for."""

    # Typed as what callers get, who name the fields they want.
    logprobs: Array = None  # pyright: ignore[reportAssignmentType] log softmax(z)[target], nats
    entropy: Array = None  # pyright: ignore[reportAssignmentType] of softmax(z), nats
    logsumexp: Array = None  # pyright: ignore[reportAssignmentType] of z
    log_sum_sq: Array = None  # pyright: ignore[reportAssignmentType] log sum_v softmax(z)_v^2
    mean_logprobs: Array = None  # pyright: ignore[reportAssignmentType] mean over v of log softmax(z)_v, nats
    balance: Array = None  # pyright: ignore[reportAssignmentType] of the experts, over all tokens but padding


class _Static(NamedTuple):
    want: tuple[HeadStat, ...]
    positions: int  # of each row in one chunk
    soft_cap: float | None
    layout: Layout


def token_logprobs(
    hidden: Array,
    head: Head,
    targets: Array,
    mask: Array,
    *,
    temperature: float | Array = 1.0,
    soft_cap: float | None = None,
    want: tuple[HeadStat, ...] = ("logprobs",),
    chunk: int = 1024,
    layout: Layout = Layout(),
) -> TokenStats:
    """Log-probability, entropy, log-sum-exp, log sum p^2 or mean log p of each target token.

    With z = cap(hidden @ kernel.T + bias) / temperature and cap(x) = c tanh(x / c) if `soft_cap` is c:
    logprob = z[target] - logsumexp(z); entropy = logsumexp(z) - sum p z; log_sum_sq = logsumexp(2 z) -
    2 logsumexp(z); mean_logprobs = mean z - logsumexp(z). The wanted tokens of each row are moved to its front, so
    that the head never runs on a chunk without one: prompts and padding cost nothing. Gradients flow to `hidden`
    and `head`, never to `temperature`; the backward pass makes each chunk's logits again.

    Args:
      hidden: [B, T, D], any float dtype; products accumulate in float32.
      head: kernel [V, D] and bias [V] or None, of hidden's dtype.
      targets: [B, T] int, the token that each position is to predict.
      mask: [B, T] bool, True where the result is used. Elsewhere the result is 0 and so is the gradient,
        whatever `hidden` holds (NaN included).
      temperature: > 0, divides the logits.
      chunk: tokens of one data shard whose logits are alive at a time, >= 1.
      layout: the mesh; rows are split over data, fsdp and expert, the vocabulary over tensor.
    Returns: a TokenStats whose fields named in `want` are float32 [B, T].
    """
    chex.assert_rank([hidden, targets, mask, head.kernel], [3, 2, 2, 2])
    chex.assert_equal_shape([targets, mask])
    rows, length = targets.shape
    positions = max(1, min(length, chunk * layout.shards // max(rows, 1)))
    static = _Static(tuple(want), positions, soft_cap, layout)
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    kernel = layout.constrain(head.kernel, "vocab", None)  # gathered once here, not in every chunk
    stats: Any = _stats(static, hidden, kernel, head.bias, targets, mask, temperature)
    return TokenStats(**dict(zip(static.want, stats, strict=True)))


def _gather(x: Array, order: Array) -> Array:
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)


def _to_chunks(x: Array, positions: int) -> Array:
    """[B, T, ...] -> [chunks, B, positions, ...], the tail filled with zeros."""
    rows, length = x.shape[:2]
    chunks = -(-length // positions)
    x = jnp.pad(x, ((0, 0), (0, chunks * positions - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, chunks, positions, *x.shape[2:]), 1, 0)


def _from_chunks(x: Array, length: int) -> Array:
    chunks, rows, positions = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * positions, *x.shape[3:])[:, :length]


def _logits(static: _Static, hidden: Array, kernel: Array, bias: Array | None, temperature: Array) -> Array:
    """Logits of one chunk, float32 [B, C, V], after the soft cap and the temperature."""
    logits = jnp.einsum("bcd,vd->bcv", hidden, kernel, preferred_element_type=jnp.float32)
    logits = static.layout.constrain(logits, "rows", None, "vocab")
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, None]
    if static.soft_cap is not None:
        logits = static.soft_cap * jnp.tanh(logits / static.soft_cap)
    return logits / temperature


def _hit(logits: Array, targets: Array) -> Array:
    # A comparison and not a gather: it stays local when the vocabulary is split over devices.
    return jnp.arange(logits.shape[-1])[None, None] == targets[..., None]


def _chunk_stats(static: _Static, logits: Array, targets: Array, used: Array) -> tuple[Array, ...]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    find = {
        "logprobs": lambda: jnp.sum(jnp.where(_hit(logits, targets), logits, 0), axis=-1) - lse,
        "entropy": lambda: -jnp.sum(jnp.exp(logits - lse[..., None]) * (logits - lse[..., None]), axis=-1),
        "logsumexp": lambda: lse,
        "log_sum_sq": lambda: jax.nn.logsumexp(2 * logits, axis=-1) - 2 * lse,
        "mean_logprobs": lambda: jnp.mean(logits - lse[..., None], axis=-1),
    }
    return tuple(jnp.where(used, find[name](), 0) for name in static.want)


def _chunk_gradient(static: _Static, logits: Array, targets: Array, cotangents: tuple[Array, ...]) -> Array:
    """The gradient at the logits, before cap and temperature are undone, float32 [B, C, V]."""
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    p = jnp.exp(logits - lse)

    def entropy() -> Array:
        centred = logits - lse
        return -p * (centred - jnp.sum(p * centred, axis=-1, keepdims=True))

    find = {
        "logprobs": lambda: _hit(logits, targets) - p,
        "entropy": entropy,
        "logsumexp": lambda: p,
        "log_sum_sq": lambda: 2 * (jax.nn.softmax(2 * logits, axis=-1) - p),
        "mean_logprobs": lambda: 1 / logits.shape[-1] - p,
    }
    return sum(
        (g[..., None] * find[name]() for name, g in zip(static.want, cotangents, strict=True)),
        start=jnp.zeros_like(logits),
    )


def _prepare(static: _Static, hidden: Array, targets: Array, mask: Array) -> tuple[Array, ...]:
    """Wanted tokens first in each row, then cut into chunks: hidden, targets, used, and the order taken."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    used = _gather(mask, order)
    front = jnp.where(used[..., None], _gather(hidden, order), 0)
    parts = (front, _gather(targets, order), used)
    return *(_to_chunks(part, static.positions) for part in parts), order


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(
    static: _Static,
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    targets: Array,
    mask: Array,
    temperature: Array,
) -> tuple[Array, ...]:
    *chunks, order = _prepare(static, hidden, targets, mask)

    def compute(h: Array, t: Array, used: Array) -> tuple[Array, ...]:
        return _chunk_stats(static, _logits(static, h, kernel, bias, temperature), t, used)

    def skip(h: Array, t: Array, used: Array) -> tuple[Array, ...]:
        return tuple(jnp.zeros(t.shape, jnp.float32) for _ in static.want)

    def body(carry: None, chunk: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, ...]]:
        return carry, jax.lax.cond(jnp.any(chunk[2]), compute, skip, *chunk)

    _, stats = jax.lax.scan(body, None, (chunks[0], chunks[1], chunks[2]))
    back = jnp.argsort(order, axis=1)
    return tuple(_gather(_from_chunks(stat, mask.shape[1]), back) for stat in stats)


def _stats_forward(static, hidden, kernel, bias, targets, mask, temperature):
    residuals = (hidden, kernel, bias, targets, mask, temperature)
    return _stats(static, *residuals), residuals


def _stats_backward(static: _Static, residuals: tuple, cotangents: tuple[Array, ...]) -> tuple:
    hidden, kernel, bias, targets, mask, temperature = residuals
    *chunks, order = _prepare(static, hidden, targets, mask)
    grads = tuple(_to_chunks(_gather(jnp.where(mask, g, 0), order), static.positions) for g in cotangents)
    shards = static.layout.shards if mask.shape[0] % static.layout.shards == 0 else 1
    split = lambda x: x.reshape(shards, -1, *x.shape[1:])

    def compute(sums: tuple, h: Array, t: Array, gs: tuple[Array, ...]) -> tuple[tuple, Array]:
        logits = _logits(static, h, kernel, bias, temperature)
        d = _chunk_gradient(static, logits, t, gs) / temperature
        if static.soft_cap is not None:
            d *= 1 - jnp.square(logits * temperature / static.soft_cap)
        small = d.astype(h.dtype)
        dh = jnp.einsum("bcv,vd->bcd", small, kernel, preferred_element_type=jnp.float32)
        # Each data shard adds to a sum of its own, so that devices talk once and not once a chunk.
        dk = jnp.einsum("sbcv,sbcd->svd", split(small), split(h), preferred_element_type=jnp.float32)
        db = None if bias is None else jnp.sum(split(d), axis=(1, 2))
        return jax.tree.map(jnp.add, sums, (dk, db)), dh.astype(h.dtype)

    def body(sums: tuple, chunk: tuple) -> tuple[tuple, Array]:
        (h, t, used), gs = chunk
        skip = lambda sums, h, t, gs: (sums, jnp.zeros_like(h))
        return jax.lax.cond(jnp.any(used), compute, skip, sums, h, t, gs)

    zeros = static.layout.constrain(
        jnp.zeros((shards, *kernel.shape), jnp.float32), *(("rows" if shards > 1 else None), "vocab", None)
    )
    sums = (zeros, None if bias is None else jnp.zeros((shards, *bias.shape), jnp.float32))
    (dk, db), dh = jax.lax.scan(body, sums, (tuple(chunks), grads))  # db stays None without a bias
    dh = _gather(_from_chunks(dh, mask.shape[1]), jnp.argsort(order, axis=1))
    db = None if bias is None or db is None else jnp.sum(db, axis=0).astype(bias.dtype)
    return dh, jnp.sum(dk, axis=0).astype(kernel.dtype), db, None, None, None


_stats.defvjp(_stats_forward, _stats_backward)
