"""Supervised fine-tuning: make the demonstrated completions likely."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.step import (
    Batch,
    Mean,
    Objective,
    Reads,
    Term,
    TrainState,
    balance_term,
    flat_rows,
    token_weight,
    wanted,
    whole,
)
from rlhf_jax.losses.supervised import SUPERVISED, Tokens
from rlhf_jax.models.decoder import Model

LOSSES: Mapping[str, Callable[..., Array]] = SUPERVISED
READS = {Tokens: Reads("demonstration", reference=False)}


def make_objective(model: Model, loss: Callable[..., Array], takes: type, options: Mapping[str, Any]) -> Objective:
    """The mean loss over trained tokens of the global batch, and the experts' balance if the model has some.

    Args:
      loss: one of `losses.supervised`, called with hyper["loss"] and `options` (its non-numeric arguments).
    """

    def objective(params, frozen, hyper, batch, key):
        rows = flat_rows(batch)
        want = wanted(model, "logprobs", "logsumexp")
        stats = model.token_stats(whole(params, frozen), rows, want=want)
        # A segment's first token is predicted from nothing, so it is never trained.
        used = (rows["mask"] & (rows["positions"] > 0)) * token_weight(batch).reshape(rows["mask"].shape)
        per_token = loss(Tokens(stats.logprobs, stats.logsumexp), **hyper["loss"], **options)
        count = jnp.sum(used)
        total = jnp.sum(jnp.where(used > 0, per_token * used, 0))
        terms = {"loss": Term(1.0, total, count)}
        return balance_term(model, stats, batch, hyper, terms, {"nll": Mean(-jnp.sum(stats.logprobs * used), count)})

    return objective


def make_prepare(
    model: Model, takes: type, reference: tuple[Model, Any] | None
) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """Demonstrations need nothing frozen: the rows are the batch."""

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        yield rows

    return prepare
