"""Supervised fine-tuning: make the demonstrated completions likely."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.completions import completion_sums
from rlhf_jax.algorithms.parts import TOKENS, Part, nothing, rows_as_they_are, token_term
from rlhf_jax.algorithms.step import (
    Judge,
    Mean,
    Objective,
    Reads,
    balance_term,
    flat_rows,
    token_weight,
    wanted,
    whole,
)
from rlhf_jax.losses.supervised import SUPERVISED
from rlhf_jax.models.decoder import Model

LOSSES: Mapping[str, Callable[..., Array]] = SUPERVISED
READS = {takes: Reads("demonstration") for takes in TOKENS}
BESIDE: tuple[type, ...] = ()
HEAD = "words"


def make_objective(model: Model, parts: Sequence[Part], config: Any = None) -> Objective:
    """The mean loss over trained tokens of the global batch, and the experts' balance if the model has some.

    Args:
      parts: of `losses.supervised`; several are added up with their weights.
    """
    judge = make_judge(model, parts, config)
    return lambda params, frozen, hyper, batch, key: judge(params, frozen, hyper, batch, key)[:2]


def make_judge(model: Model, parts: Sequence[Part], config: Any = None) -> Judge:
    """As `make_objective`; also the mean NLL of each example's trained tokens, nats, float32 [N]."""
    names: list[Any] = ["logprobs", *(name for part in parts for name in part.takes._fields)]
    want = wanted(model, *dict.fromkeys(names))

    def judge(params, frozen, hyper, batch, key):
        rows = flat_rows(batch)
        stats = model.token_stats(whole(params, frozen), rows, want=want)
        # A segment's first token is predicted from nothing, so it is never trained.
        trained = (rows["mask"] & (rows["positions"] > 0)).astype(jnp.float32)
        used = trained * token_weight(batch).reshape(trained.shape)
        terms = {part.name: token_term(part, stats, used, hyper, batch) for part in parts}
        total, count = (completion_sums(x, batch)[:, 0] for x in (stats.logprobs * trained, trained))
        nll = Mean(-jnp.sum(stats.logprobs * used), jnp.sum(used))
        of_rows = {"loss": -total / jnp.maximum(count, 1)}
        return *balance_term(model, stats, batch, hyper, terms, {"nll": nll}), of_rows

    return judge


make_prepare, make_carry, make_advance, make_skip = rows_as_they_are, nothing, nothing, nothing
