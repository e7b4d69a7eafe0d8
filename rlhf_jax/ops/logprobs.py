"""The vocabulary primitive: log-probabilities of tokens without their logits in memory.

Every objective and every evaluation of one model reads the output head through `token_logprobs`. It keeps the
logits of one chunk of tokens alive at a time, forward and backward, so no program ever holds [B, T, V].
"""

import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.chunks import Chunks, backward, before_cap, cut, forward, logits_of
from rlhf_jax.ops.layout import Layout

HeadStat = Literal["logprobs", "entropy", "logsumexp", "log_sum_sq", "mean_logprobs", "greedy"]
Stat = HeadStat | Literal["balance", "score"]  # of the layers, or another head: `token_logprobs` can't give them


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
    greedy: Array = None  # pyright: ignore[reportAssignmentType] 1 where the target is argmax z, the first of equals
    balance: Array = None  # pyright: ignore[reportAssignmentType] of the experts, over all tokens but padding
    score: Array = None  # pyright: ignore[reportAssignmentType] of a second head, in the state before the token


class _Static(NamedTuple):
    want: tuple[HeadStat, ...]
    soft_cap: float | None
    chunks: Chunks


def ahead(rows: dict[str, Array]) -> tuple[Array, Array]:
    """What each position is to predict, int [B, T], and whether that is asked, bool [B, T]; never across segments.

    Args: rows: tokens, segments [B, T] int and mask [B, T] bool, True on tokens that are asked.
    """
    after = lambda x: jnp.roll(x, -1, axis=1)
    same = (after(rows["segments"]) == rows["segments"]).at[:, -1].set(False)
    return after(rows["tokens"]), after(rows["mask"]) & same


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
    """Log-probability, entropy, log-sum-exp, log sum p^2, mean log p of each target token, or if it is the likeliest.

    With z = cap(hidden @ kernel.T + bias) / temperature and cap(x) = c tanh(x / c) if `soft_cap` is c:
    logprob = z[target] - logsumexp(z); entropy = logsumexp(z) - sum p z; log_sum_sq = logsumexp(2 z) -
    2 logsumexp(z); mean_logprobs = mean z - logsumexp(z); greedy = [target = argmax z]. The wanted tokens of each row
    are moved to its front, so that the head never runs on a chunk without one: prompts and padding cost nothing.
    Gradients flow to `hidden` and `head`, never to `temperature`; the backward pass makes each chunk's logits again.

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
    static = _Static(tuple(want), soft_cap, cut(mask, chunk, layout))
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    kernel = layout.constrain(head.kernel, "vocab", None)  # gathered once here, not in every chunk
    stats: Any = _stats(static, hidden, kernel, head.bias, targets, mask, temperature)
    return TokenStats(**dict(zip(static.want, stats, strict=True)))


def _hit(logits: Array, targets: Array) -> Array:
    # A comparison and not a gather: it stays local when the vocabulary is split over devices.
    return jnp.arange(logits.shape[-1])[None, None] == targets[..., None]


def _is_first(logits: Array, targets: Array) -> Array:
    """Whether no token is likelier, and none before it as likely, bool [B, C]; local like `_hit`."""
    own = jnp.sum(jnp.where(_hit(logits, targets), logits, 0), axis=-1)[..., None]
    before = jnp.arange(logits.shape[-1])[None, None] < targets[..., None]
    return ~jnp.any((logits > own) | ((logits == own) & before), axis=-1)


def _chunk_stats(static: _Static, logits: Array, targets: Array) -> tuple[Array, ...]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    find = {
        "logprobs": lambda: jnp.sum(jnp.where(_hit(logits, targets), logits, 0), axis=-1) - lse,
        "entropy": lambda: -jnp.sum(jnp.exp(logits - lse[..., None]) * (logits - lse[..., None]), axis=-1),
        "logsumexp": lambda: lse,
        "log_sum_sq": lambda: jax.nn.logsumexp(2 * logits, axis=-1) - 2 * lse,
        "mean_logprobs": lambda: jnp.mean(logits - lse[..., None], axis=-1),
        "greedy": lambda: _is_first(logits, targets).astype(jnp.float32),
    }
    return tuple(find[name]() for name in static.want)


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
        "greedy": lambda: jnp.zeros_like(logits),
    }
    return sum(
        (g[..., None] * find[name]() for name, g in zip(static.want, cotangents, strict=True)),
        start=jnp.zeros_like(logits),
    )


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
    def compute(h: Array, t: Array) -> tuple[Array, ...]:
        return _chunk_stats(static, logits_of(static.chunks.layout, h, kernel, bias, static.soft_cap, temperature), t)

    return forward(static.chunks, compute, (hidden, targets), mask, len(static.want))


def _stats_forward(static, hidden, kernel, bias, targets, mask, temperature):
    residuals = (hidden, kernel, bias, targets, mask, temperature)
    return _stats(static, *residuals), residuals


def _stats_backward(static: _Static, residuals: tuple, cotangents: tuple[Array, ...]) -> tuple:
    hidden, kernel, bias, targets, mask, temperature = residuals

    def slope(h: Array, t: Array, *gs: Array) -> Array:
        logits = logits_of(static.chunks.layout, h, kernel, bias, static.soft_cap, temperature)
        return before_cap(_chunk_gradient(static, logits, t, gs), logits, static.soft_cap, temperature)

    columns = (hidden, targets, *cotangents)
    return *backward(static.chunks, slope, kernel, bias, columns, mask), None, None, None


_stats.defvjp(_stats_forward, _stats_backward)
