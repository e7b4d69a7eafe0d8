"""The distribution that a token is drawn from, and the draw.

Every number is an array: another temperature or filter is the same compiled program. The order is that of
transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.errors import UserError

BLOCK = 64  # entries of a row whose sum is looked up first when a token is drawn


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    temperature: Annotated[float, "divides the logits; 0: always the likeliest token"] = 1.0
    top_k: Annotated[int, "draw from this many of the likeliest tokens; 0: from all"] = 0
    top_p: Annotated[float, "draw from the likeliest tokens that together reach this probability, above 0 to 1"] = 1.0
    min_p: Annotated[float, "leave out tokens below this share of the likeliest one's probability, 0 to 1"] = 0.0
    repetition_penalty: Annotated[
        float, "above 1: makes tokens that stand in the prompt or the completion less likely; 1: no change"
    ] = 1.0
    max_new_tokens: Annotated[int, "most tokens of a completion"] = 128


class Knobs(NamedTuple):
    """`Sampling` and the tokens that end a row, as arrays."""

    temperature: Array  # float32 []
    top_k: Array  # int32 []
    top_p: Array  # float32 []
    min_p: Array  # float32 []
    penalty: Array  # float32 []
    stop_ids: Array  # int32 [some], filled up with -1


ALLOWED = {
    "temperature": ("at least 0", lambda x: 0 <= x < math.inf),
    "top_k": ("at least 0", lambda x: x >= 0),
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("above 0", lambda x: 0 < x < math.inf),
    "max_new_tokens": ("at least 1", lambda x: x >= 1),
}


def check(sampling: Sampling, flag: str = "--sampling.") -> None:
    """Errors: UserError naming the first number that means nothing; `flag` is what its flags begin with."""
    for name, (allowed, test) in ALLOWED.items():
        value = getattr(sampling, name)
        if not test(value):
            raise UserError(f"{flag}{name}={value} is not allowed; it must be {allowed}.")


def knobs(sampling: Sampling, stop_ids: tuple[int, ...]) -> Knobs:
    """The arrays of a `Sampling`; their shapes are the same for up to eight tokens that end a row."""
    room = -(-max(1, len(stop_ids)) // 8) * 8
    ids = jnp.full(room, -1, jnp.int32).at[: len(stop_ids)].set(jnp.asarray(stop_ids, jnp.int32))
    return Knobs(
        jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p),
        jnp.float32(sampling.min_p), jnp.float32(sampling.repetition_penalty), ids,
    )  # fmt: skip


class Drawn(NamedTuple):
    """One token a row and what was thought of it, [B] each."""

    token: Array  # int32
    logprob: Array  # nats, of the whole softmax at the temperature (1 if that is 0), no filter, no penalty
    behaviour: Array  # nats, of the distribution that the token was drawn from


def draw(logits: Array, seen: Array, uniform: Array, knobs: Knobs) -> Drawn:
    """Draws a token a row.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, tokens that the repetition penalty is for.
      uniform: [B] float32 in [0, 1), one random number a row.
    """
    temperature = jnp.where(knobs.temperature > 0, knobs.temperature, 1.0)
    scaled = logits / temperature
    log_norm = jax.nn.logsumexp(scaled, axis=-1)
    penalised = jax.lax.cond(knobs.penalty != 1, lambda: _penalise(logits, seen, knobs.penalty), lambda: logits)
    kept = filtered(penalised / temperature, knobs)
    kept_norm = jax.nn.logsumexp(kept, axis=-1)
    greedy = knobs.temperature == 0
    token = jax.lax.cond(
        greedy,
        lambda: jnp.argmax(kept, axis=-1).astype(jnp.int32),
        lambda: _invert(jnp.exp(kept - jnp.max(kept, axis=-1, keepdims=True)), uniform),
    )
    at = lambda x: jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]
    behaviour = jnp.where(greedy, 0.0, at(kept) - kept_norm)
    return Drawn(token, at(scaled) - log_norm, behaviour)


def _penalise(logits: Array, seen: Array, penalty: Array) -> Array:
    """Keskar et al. 2019, arXiv:1909.05858, sec. 4.1, with the sign taken care of as in transformers."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Array, knobs: Knobs) -> Array:
    """Logits [B, V] with -inf in the place of tokens that top-k, top-p or min-p leave out.

    Top-p counts over what top-k kept (Holtzman et al. 2020, arXiv:1904.09751); min-p is relative to the
    likeliest token (Nguyen et al. 2024, arXiv:2407.01082). Tokens as likely as the last one kept are kept.
    """
    vocab = logits.shape[-1]
    sorts = ((knobs.top_k > 0) & (knobs.top_k < vocab)) | (knobs.top_p < 1)
    lowest = jax.lax.cond(
        sorts, lambda: _lowest_kept(logits, knobs), lambda: jnp.full(logits.shape[:1], -jnp.inf, logits.dtype)
    )
    lowest = jnp.maximum(lowest, jnp.max(logits, axis=-1) + jnp.log(knobs.min_p))
    return jnp.where(logits >= lowest[:, None], logits, -jnp.inf)


def _lowest_kept(logits: Array, knobs: Knobs) -> Array:
    """The smallest logit that top-k and top-p keep, [B]."""
    vocab = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    count = jnp.where(knobs.top_k > 0, jnp.minimum(knobs.top_k, vocab), vocab)
    ordered = jnp.where(jnp.arange(vocab)[None] < count, ordered, -jnp.inf)
    p = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    # The likeliest token stays whatever top_p is; rounding must not drop the last ones of an open filter.
    kept = (before < knobs.top_p) | (knobs.top_p >= 1)
    return jnp.min(jnp.where(kept & (ordered > -jnp.inf), ordered, jnp.inf), axis=-1)


def _invert(weights: Array, uniform: Array) -> Array:
    """The token at `uniform` of the cumulated weights [B, V] >= 0, int32 [B]; never one of weight 0.

    In two levels, blocks and then the entries of one: a pass over the weights instead of a long cumulation,
    and one random number instead of one a token.
    """
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)
    sums = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target = uniform * sums[:, -1]
    block, target = _first_above(sums, target)
    entries = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    entry, _ = _first_above(jnp.cumsum(entries, axis=-1), target)
    return (block * BLOCK + entry).astype(jnp.int32)


def _first_above(sums: Array, target: Array) -> tuple[Array, Array]:
    """The first entry of the rising sums [B, N] that is above the target, and the target less the sum before it.

    A target that rounding has put at or past the end means the last entry that adds something.
    """
    target = jnp.minimum(target, jnp.nextafter(sums[:, -1], 0.0))
    place = jnp.sum(sums <= target[:, None], axis=-1)
    before = jnp.where(place > 0, jnp.take_along_axis(sums, jnp.maximum(place - 1, 0)[:, None], axis=1)[:, 0], 0)
    return place, target - before
