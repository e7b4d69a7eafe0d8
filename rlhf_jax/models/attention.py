"""Causal attention within segments: one interface, a dict of back ends.

Each back end takes q [B, T, H, d], k and v [B, T, G, d] (H a multiple of G: grouped heads) and segments
[B, T] int, and returns [B, T, H, d]. A token sees the tokens before it, and itself, that carry its own
segment number: so packed rows and padding (segment 0) never leak, whatever the back end. With a window w it
sees of these the last w, itself among them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.layout import Layout

BLOCK = 64  # queries at a time: on a CPU their scores then stay in its cache
LANES = 128  # the TPU's kernel takes lengths and head sizes that are multiples of it


class Form(NamedTuple):
    """In what the attention of models differs; all of it static."""

    scale: float | None = None  # of the scores; None: d ** -0.5
    soft_cap: float | None = None  # scores s become soft_cap tanh(s / soft_cap): Gemma 2, arXiv:2408.00118
    window: int | None = None  # Beltagy et al. 2020, arXiv:2004.05150

    def scaled(self, q: Array) -> Array:
        """Queries whose products with the keys are the scores."""
        return q / q.shape[-1] ** 0.5 if self.scale is None else q * self.scale

    def capped(self, scores: Array) -> Array:
        """Scores as the softmax takes them."""
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)


def _by_group(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """q as [B, G, H / G, T, d]; k and v as [B, G, T, d]."""
    rows, length, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(rows, length, groups, heads // groups, size)
    return jnp.moveaxis(q, 1, 3), jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)


def _by_token(out: Array) -> Array:
    """[B, G, H / G, T, d] as [B, T, H, d]."""
    out = jnp.moveaxis(out, 3, 1)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def _attend(q: Array, k: Array, v: Array, visible: Array, form: Form) -> Array:
    """Softmax attention in float32, [B, G, H / G, T, d]; visible [B, T, S]: which keys a query may see.

    A group's heads are stacked as queries of one product, and the weights are divided by their sum only after
    they have met the values: both spare passes over the scores, which are what takes the time.
    """
    rows, groups, heads, length, size = q.shape
    q = q.reshape(rows, groups, heads * length, size)
    scores = jnp.einsum("bgtd,bgsd->bgts", q, k, preferred_element_type=jnp.float32)
    scores = form.capped(scores).reshape(rows, groups, heads, length, -1)
    scores += jnp.where(visible, 0.0, -1e30)[:, None, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    flat = weights.astype(v.dtype).reshape(rows, groups, heads * length, -1)
    out = jnp.einsum("bgts,bgsd->bgtd", flat, v, preferred_element_type=jnp.float32)
    return (out.reshape(q.shape[:2] + (heads, length, size)) / jnp.sum(weights, axis=-1)[..., None]).astype(v.dtype)


def _visible(segments: Array, queries: range, keys: range, window: int | None) -> Array:
    """Which of these keys these queries may see, bool [B, queries, keys]."""
    distance = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    cut = lambda places: segments[:, places.start : places.stop]
    return near[None] & (cut(queries)[:, :, None] == cut(keys)[:, None])


def dense(q: Array, k: Array, v: Array, segments: Array, layout: Layout, form: Form = Form()) -> Array:
    """All scores at once: the plainest form, for short rows and as the yardstick of the others."""
    every = range(q.shape[1])
    return _by_token(_attend(*_by_group(form.scaled(q), k, v), _visible(segments, every, every, form.window), form))


def blocked(q: Array, k: Array, v: Array, segments: Array, layout: Layout, form: Form = Form()) -> Array:
    """Queries in blocks, each against the keys that it can see: half the scores at most, a block in memory.

    The scores of a block are made again in the backward pass. At most 16 blocks, so that the program
    stays short for long rows.
    """
    length = q.shape[1]
    size = max(BLOCK, -(-length // 16))
    q, k, v = _by_group(form.scaled(q), k, v)

    def attend(start: int, stop: int, q: Array, k: Array, v: Array, segments: Array) -> Array:
        first = 0 if form.window is None else max(0, start - form.window + 1)
        visible = _visible(segments, range(start, stop), range(first, stop), form.window)
        queries = jax.lax.slice_in_dim(q, start, stop, axis=3)
        return _attend(queries, k[:, :, first:stop], v[:, :, first:stop], visible, form)

    # All arrays are given whole, so that the backward pass keeps them once and not a piece of them a block.
    attend = jax.checkpoint(attend, static_argnums=(0, 1))  # pyright: ignore[reportPrivateImportUsage]
    starts = range(0, length, size)
    parts = [attend(start, min(start + size, length), q, k, v, segments) for start in starts]
    return _by_token(jnp.concatenate(parts, axis=3))


def splash(q: Array, k: Array, v: Array, segments: Array, layout: Layout, form: Form = Form()) -> Array:
    """The TPU's flash attention kernel, run on each device's own rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, size = q.shape[1], q.shape[3]
    q = form.scaled(q)
    pad_length, pad_size = -length % LANES, -size % LANES

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        rows, heads, groups = q.shape[0], q.shape[2], k.shape[2]
        pads = ((0, 0), (0, pad_length), (0, 0), (0, pad_size))
        q, k, v = (jnp.moveaxis(jnp.pad(x, pads), 2, 1) for x in (q, k, v))
        q = q.reshape(rows, groups, heads // groups, *q.shape[2:])
        segments = jnp.pad(segments, ((0, 0), (0, pad_length)))
        sides = (q.shape[3], q.shape[3])
        mask = masks.CausalMask(sides) if form.window is None else masks.LocalMask(sides, (form.window - 1, 0), 0)
        every = masks.MultiHeadMask([mask] * (heads // groups))
        kernel = kernels.make_splash_mqa_single_device(every, attn_logits_soft_cap=form.soft_cap)
        ids = kernels.SegmentIds(segments, segments)
        over_groups = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        out: Any = jax.vmap(over_groups)(q, k, v, ids)
        out = jnp.moveaxis(out.reshape(rows, heads, *out.shape[3:]), 1, 2)
        return out[:, :length, :, :size].astype(v.dtype)

    spec = layout.spec("rows", None, "heads", None)
    run = layout.per_shard(local, inputs=(spec, spec, spec, layout.spec("rows", None)), output=spec)
    return run(q, k, v, segments)


def cached(q: Array, k: Array, v: Array, keys: Array, values: Array, distance: Array, form: Form = Form()) -> Array:
    """One new token a row, seeing itself and those of S earlier ones at a positive distance: what sampling runs.

    Args:
      q, k, v: [B, 1, H or G, d], of the new token.
      keys, values: [B, G, S, d], of the earlier ones.
      distance: [B, S] int, how many tokens before the new one each stands; 0 or less: it is not seen.
    Returns: [B, 1, H, d].
    """
    q, k, v = _by_group(form.scaled(q), k, v)
    q = q[..., 0, :]  # [B, G, H / G, d]
    earlier = form.capped(jnp.einsum("bghd,bgsd->bghs", q, keys, preferred_element_type=jnp.float32))
    earlier += jnp.where(distance > 0, 0.0, -1e30)[:, None, None]
    own = form.capped(jnp.einsum("bghd,bgsd->bghs", q, k, preferred_element_type=jnp.float32))
    highest = jnp.maximum(jnp.max(earlier, axis=-1, keepdims=True), own)
    weights, weight = jnp.exp(earlier - highest), jnp.exp(own - highest)
    out = jnp.einsum("bghs,bgsd->bghd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    out += weight * v.astype(jnp.float32)  # [B, G, 1, d]: the same for the heads of a group
    out /= jnp.sum(weights, axis=-1, keepdims=True) + weight
    return out.reshape(out.shape[0], 1, -1, out.shape[-1]).astype(v.dtype)


def auto(q: Array, k: Array, v: Array, segments: Array, layout: Layout, form: Form = Form()) -> Array:
    """splash on TPUs for rows that fill its lanes, else blocked for more than one block, else dense."""
    device = layout.mesh.devices.flat[0] if layout.mesh is not None else None
    platform = device.platform if device is not None else jax.default_backend()
    if platform == "tpu" and q.shape[1] >= LANES:
        return splash(q, k, v, segments, layout, form)
    return (blocked if q.shape[1] > BLOCK else dense)(q, k, v, segments, layout, form)


BACKENDS = {"auto": auto, "dense": dense, "blocked": blocked, "splash": splash}
