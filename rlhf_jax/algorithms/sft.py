"""Supervised fine-tuning: make the demonstrated completions likely."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.step import Batch, Mean, Objective, Term, TrainState, flat_rows
from rlhf_jax.losses.supervised import SUPERVISED, Tokens
from rlhf_jax.models.decoder import Model

LOSSES: Mapping[str, Callable[..., Array]] = SUPERVISED
READS = {Tokens: "demonstration"}  # what a loss takes decides what a row is


def make_objective(model: Model, loss: Callable[..., Array], reads: str, options: Mapping[str, Any]) -> Objective:
    """The mean loss over trained tokens of the global batch.

    Args:
      loss: one of `losses.supervised`, called with hyper["loss"] and `options` (its non-numeric arguments).
    """

    def objective(params, frozen, hyper, batch, key):
        rows = flat_rows(batch)
        stats = model.token_stats(params, rows, want=("logprobs", "logsumexp"))
        # A segment's first token is predicted from nothing, so it is never trained.
        weight = jnp.repeat(batch["weight"], batch["tokens"].shape[1])
        used = (rows["mask"] & (rows["positions"] > 0)) * weight[:, None]
        per_token = loss(Tokens(stats.logprobs, stats.logsumexp), **hyper["loss"], **options)
        count = jnp.sum(used)
        total = jnp.sum(jnp.where(used > 0, per_token * used, 0))
        return {"loss": Term(1.0, total, count)}, {"nll": Mean(-jnp.sum(stats.logprobs * used), count)}

    return objective


def make_prepare(model: Model, reads: str, reference: Any) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """Demonstrations need nothing frozen: the rows are the batch."""

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        yield rows

    return prepare
