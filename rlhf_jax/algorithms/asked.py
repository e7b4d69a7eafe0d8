"""What models are asked of the completions of a batch, see `rollouts`."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.step import Batch, by_pieces, flat_rows
from rlhf_jax.models.decoder import Model


class Asked(NamedTuple):
    """A model and all of its parameters."""

    model: Model
    params: Any


def token_values(value: Asked, rows: dict[str, Array]) -> Array:
    """The value of the state in which each token of the mask is chosen, reward units, float32 [B, T]; 0 elsewhere.

    It is the score read at the token before, which hasn't seen the chosen one.

    Args:
      rows: tokens, segments, positions, mask [B, T]; a row's first token is no completion's.
    """
    return jnp.where(rows["mask"], jnp.roll(value.model.score(value.params, rows), 1, axis=1), 0)


def measure(
    policy: Asked,
    batch: Batch,
    *,
    temperature: float | Array = 1.0,
    reference: Asked | None = None,
    value: Asked | None = None,
    second_head: bool = False,
    entropy: bool = False,
    pieces: int = 1,
) -> Batch:
    """What policy, reference and value say of each completion token, float32 [B, 1, T], 0 elsewhere.

    All of it is read from whole rows in one program, not taken from the sampler: so at parameters that haven't moved
    ratios are 1, and where policy and reference are equal their KL is 0.

    Args:
      temperature: that of the sampler; it divides the logits of policy and reference alike.
      second_head: the policy's parameters hold a score head too, which gives the values.
      pieces: that the rows are read in, as many at a time as a step differentiates; see `Around`.
    Returns: old_logprobs, and entropy, nats, ref_logprobs and values if those are asked.
    """
    told = functools.partial(
        _measured, policy, temperature=temperature, reference=reference, value=value, second_head=second_head,
        entropy=entropy,
    )  # fmt: skip
    columns = {name: batch[name] for name in ("tokens", "mask", "segments", "positions")}
    return by_pieces(told, columns, pieces, policy.model.layout)


def _measured(
    policy: Asked,
    batch: Batch,
    *,
    temperature: float | Array,
    reference: Asked | None,
    value: Asked | None,
    second_head: bool,
    entropy: bool,
) -> Batch:
    """`measure` of some rows."""
    rows = flat_rows(batch)
    said = lambda of, *want: of.model.token_stats(of.params, rows, temperature=temperature, want=("logprobs", *want))
    stats = said(policy, *(["score"] if second_head else []), *(["entropy"] if entropy else []))
    columns = {"old_logprobs": stats.logprobs} | ({"entropy": stats.entropy} if entropy else {})
    if second_head:
        columns["values"] = jnp.where(rows["mask"], stats.score, 0)
    if reference is not None:
        columns["ref_logprobs"] = said(reference).logprobs
    if value is not None:
        columns["values"] = token_values(value, rows)
    return {name: column.reshape(batch["mask"].shape) for name, column in columns.items()}
