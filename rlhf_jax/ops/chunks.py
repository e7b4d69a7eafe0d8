"""The loop over chunks of tokens that reads an output head: one chunk's logits are alive at a time.

`forward` and `backward` are the halves of a custom gradient of anything that a token's logits decide. Both move
the wanted tokens of each row to its front, so that no head runs on a chunk without one, and zero all else, so that
what lies under the mask (NaN included) reaches nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.layout import Layout


class Chunks(NamedTuple):
    """How a batch is cut. Hashable: an argument that a program is compiled for."""

    positions: int  # of each row in one chunk
    layout: Layout


def cut(mask: Array, chunk: int, layout: Layout) -> Chunks:
    """`chunk` tokens of each data shard at a time, and at least one of each row."""
    rows, length = mask.shape
    return Chunks(max(1, min(length, chunk * layout.shards // max(rows, 1))), layout)


def logits_of(
    layout: Layout, hidden: Array, kernel: Array, bias: Array | None, soft_cap: float | None, temperature: Array
) -> Array:
    """Logits of one chunk, float32 [B, C, V], after the soft cap and the temperature."""
    logits = jnp.einsum("bcd,vd->bcv", hidden, kernel, preferred_element_type=jnp.float32)
    logits = layout.constrain(logits, "rows", None, "vocab")
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, None]
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return logits / temperature


def before_cap(slope: Array, logits: Array, soft_cap: float | None, temperature: Array) -> Array:
    """The gradient at hidden @ kernel.T + bias, from that at the logits which `logits_of` makes of it."""
    slope = slope / temperature
    return slope if soft_cap is None else slope * (1 - jnp.square(logits * temperature / soft_cap))


def forward(
    chunks: Chunks, compute: Callable[..., tuple[Array, ...]], columns: tuple[Array, ...], mask: Array, results: int
) -> tuple[Array, ...]:
    """What `compute` finds for each wanted token, float32 [B, T], and 0 for the others.

    Args:
      compute: the columns of one chunk, each [B, C, ...] -> `results` arrays [B, C].
      columns: [B, T, ...] each.
    """
    parts, used, order = _prepare(chunks, columns, mask)

    def wanted(used: Array, *parts: Array) -> tuple[Array, ...]:
        return tuple(jnp.where(used, result, 0) for result in compute(*parts))

    def skip(used: Array, *parts: Array) -> tuple[Array, ...]:
        return tuple(jnp.zeros(used.shape, jnp.float32) for _ in range(results))

    def body(carry: None, chunk: tuple[Array, ...]) -> tuple[None, tuple[Array, ...]]:
        return carry, jax.lax.cond(jnp.any(chunk[0]), wanted, skip, *chunk)

    _, found = jax.lax.scan(body, None, (used, *parts))
    back = jnp.argsort(order, axis=1)
    return tuple(_gather(_from_chunks(result, mask.shape[1]), back) for result in found)


def backward(
    chunks: Chunks,
    slope: Callable[..., Array],
    kernel: Array,
    bias: Array | None,
    columns: tuple[Array, ...],
    mask: Array,
) -> tuple[Array, Array, Array | None]:
    """The gradient at the hidden states, the kernel and the bias, each of its own dtype; sums are float32.

    Args:
      slope: the columns of one chunk -> the gradient at hidden @ kernel.T + bias, float32 [B, C, V].
      columns: the hidden states [B, T, D] first; the cotangents are columns too.
    """
    parts, used, order = _prepare(chunks, columns, mask)
    layout = chunks.layout
    shards = layout.shards if mask.shape[0] % layout.shards == 0 else 1
    split = lambda x: x.reshape(shards, -1, *x.shape[1:])

    def compute(sums: tuple, h: Array, *rest: Array) -> tuple[tuple, Array]:
        d = slope(h, *rest)
        small = d.astype(h.dtype)
        dh = jnp.einsum("bcv,vd->bcd", small, kernel, preferred_element_type=jnp.float32)
        # Each data shard adds to a sum of its own, so that devices talk once and not once a chunk.
        dk = jnp.einsum("sbcv,sbcd->svd", split(small), split(h), preferred_element_type=jnp.float32)
        db = None if bias is None else jnp.sum(split(d), axis=(1, 2))
        return jax.tree.map(jnp.add, sums, (dk, db)), dh.astype(h.dtype)

    def body(sums: tuple, chunk: tuple[Array, ...]) -> tuple[tuple, Array]:
        skip = lambda sums, h, *rest: (sums, jnp.zeros_like(h))
        return jax.lax.cond(jnp.any(chunk[0]), compute, skip, sums, *chunk[1:])

    zeros = layout.constrain(
        jnp.zeros((shards, *kernel.shape), jnp.float32), *(("rows" if shards > 1 else None), "vocab", None)
    )
    sums = (zeros, None if bias is None else jnp.zeros((shards, *bias.shape), jnp.float32))
    (dk, db), dh = jax.lax.scan(body, sums, (used, *parts))  # db stays None without a bias
    dh = _gather(_from_chunks(dh, mask.shape[1]), jnp.argsort(order, axis=1))
    db = None if bias is None or db is None else jnp.sum(db, axis=0).astype(bias.dtype)
    return dh, jnp.sum(dk, axis=0).astype(kernel.dtype), db


def _prepare(chunks: Chunks, columns: tuple[Array, ...], mask: Array) -> tuple[tuple[Array, ...], Array, Array]:
    """Wanted tokens first in each row, all else zero, then cut: the columns, which are used, and the order taken."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    used = _gather(mask, order)
    front = (jnp.where(_like(used, x), _gather(x, order), 0) for x in columns)
    return tuple(_to_chunks(x, chunks.positions) for x in front), _to_chunks(used, chunks.positions), order


def _like(x: Array, other: Array) -> Array:
    """[B, T] with as many dimensions as [B, T, ...]."""
    return x.reshape(x.shape + (1,) * (other.ndim - 2))


def _gather(x: Array, order: Array) -> Array:
    return jnp.take_along_axis(x, _like(order, x), axis=1)


def _to_chunks(x: Array, positions: int) -> Array:
    """[B, T, ...] -> [chunks, B, positions, ...], the tail filled with zeros."""
    rows, length = x.shape[:2]
    chunks = -(-length // positions)
    x = jnp.pad(x, ((0, 0), (0, chunks * positions - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, chunks, positions, *x.shape[2:]), 1, 0)


def _from_chunks(x: Array, length: int) -> Array:
    chunks, rows, positions = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * positions, *x.shape[3:])[:, :length]
