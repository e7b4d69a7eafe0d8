"""Direct preference optimisation and its kin: learn from pairs or labels against a fixed reference."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.step import Batch, Mean, Objective, Term, TrainState, flat_rows, ratio
from rlhf_jax.losses.preference import PREFERENCE, Pair
from rlhf_jax.losses.unpaired import UNPAIRED, Answer
from rlhf_jax.models.decoder import Model

LOSSES: Mapping[str, Callable[..., Array]] = {**PREFERENCE, **UNPAIRED}
READS = {Pair: "pair", Answer: "labelled"}  # what a loss takes decides what a row is


def completion_logprobs(model: Model, params: Any, batch: Batch) -> tuple[Array, Array]:
    """Log-probability of each completion, nats, and its length in tokens, float32 [B, K] each."""
    rows = flat_rows(batch)
    shape = batch["tokens"].shape[:2]
    logprob = jnp.sum(model.token_stats(params, rows).logprobs, axis=-1)
    return logprob.reshape(shape), jnp.sum(batch["mask"], axis=-1).astype(jnp.float32)


def _pair_terms(loss: Callable[..., Array], batch: Batch, logprob: Array, length: Array) -> Array:
    """The loss of each pair, [B]."""
    columns = (logprob, batch["ref_logprob"], length)
    (chosen, rejected), (ref_chosen, ref_rejected), lengths = (column.T for column in columns)
    return loss(Pair(chosen, rejected, ref_chosen, ref_rejected, *lengths))


def _answer_terms(loss: Callable[..., Array], batch: Batch, logprob: Array, length: Array) -> Array:
    """The loss of each row's answers, averaged over the K of them, [B]."""
    baseline = jnp.repeat(batch["baseline"][:, None], logprob.shape[1], axis=1)
    columns = (logprob, batch["ref_logprob"], batch["labels"], baseline)
    return jnp.mean(loss(Answer(*(x.reshape(-1) for x in columns))).reshape(logprob.shape), axis=1)


ROW_LOSS = {"pair": _pair_terms, "labelled": _answer_terms}


def _metrics(batch: Batch, logprob: Array, beta: Array, baseline: Array | float) -> dict[str, Mean]:
    """What is plotted of a preference run; a tie counts as half right."""
    labels = batch["labels"].astype(jnp.float32)
    weight = jnp.broadcast_to(batch["weight"][:, None], labels.shape)
    rewards = beta * jax.lax.stop_gradient(logprob - batch["ref_logprob"])
    good, bad = weight * labels, weight * (1 - labels)
    mean = lambda x, w: Mean(jnp.sum(x * w), jnp.sum(w))
    chosen, rejected = mean(rewards, good), mean(rewards, bad)
    if labels.shape[1] == 2:
        margin, row = rewards[:, 0] - rewards[:, 1], batch["weight"]
    else:
        margin, row = ((rewards - beta * baseline) * (2 * labels - 1))[:, 0], batch["weight"]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": Mean(jnp.stack([chosen.total, -rejected.total]), jnp.stack([chosen.count, rejected.count])),
        "rewards/accuracies": mean((margin > 0) + 0.5 * (margin == 0), row),
        "logps/chosen": mean(jax.lax.stop_gradient(logprob), good),
        "logps/rejected": mean(jax.lax.stop_gradient(logprob), bad),
    }


def make_objective(model: Model, loss: Callable[..., Array], reads: str, options: Mapping[str, Any]) -> Objective:
    """The mean over rows of a preference loss.

    Args:
      loss: one of `losses.preference` or `losses.unpaired`, called with hyper["loss"] (which must hold beta)
        and `options` (its non-numeric arguments).
      reads: the value of `READS` for this loss.
    A batch has tokens, mask, segments, positions [B, K, T], labels and ref_logprob [B, K], weight [B] and,
    for losses of single answers, baseline [B] from `make_prepare`. K is 2 for pairs.
    """

    def objective(params, frozen, hyper, batch, key):
        logprob, length = completion_logprobs(model, params, batch)
        bound = lambda columns: loss(columns, **hyper["loss"], **options)
        per_row = ROW_LOSS[reads](bound, batch, logprob, length)
        total = jnp.sum(jnp.where(batch["weight"] > 0, per_row * batch["weight"], 0))
        baseline = batch["baseline"][:, None] if reads == "labelled" else 0.0
        means = _metrics(batch, logprob, hyper["loss"]["beta"], baseline)
        if reads == "labelled":
            means["kl"] = Mean(jnp.sum(batch["baseline"] * batch["weight"]), jnp.sum(batch["weight"]))
        return {"loss": Term(1.0, total, jnp.sum(batch["weight"]))}, means

    return objective


def make_reference_pass(model: Model) -> Callable[[Any, Batch], Array]:
    """(params, batch) -> log-probability of each completion, float32 [B, K]: the reference's columns."""
    return lambda params, batch: completion_logprobs(model, params, batch)[0]


def make_prepare(model: Model, reads: str, reference: Any) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """Pairs come with their reference columns; single answers also get KTO's baseline, made live.

    The baseline is k = max(0, mean over the global batch of log pi - log ref of mismatched completions), one
    number for all rows, under the parameters that are about to be updated.

    Args:
      reference: the reference's parameters; used for losses of single answers alone.
    """

    def baseline(params: Any, reference: Any, mismatched: Batch, weight: Array) -> Array:
        policy, _ = completion_logprobs(model, params, mismatched)
        fixed, _ = completion_logprobs(model, reference, mismatched)
        count = jnp.sum(weight) * policy.shape[1]
        moved = ratio(jnp.sum(jnp.where(weight[:, None] > 0, policy - fixed, 0) * weight[:, None]), count)
        return jnp.full_like(weight, jnp.maximum(moved, 0))

    measure = jax.jit(baseline, out_shardings=model.layout.sharding("rows"))

    def labelled(state: TrainState, rows: Batch) -> Iterator[Batch]:
        kept = {name: column for name, column in rows.items() if name != "mismatched"}
        yield kept | {"baseline": measure(state.params, reference, rows["mismatched"], rows["weight"])}

    def pair(state: TrainState, rows: Batch) -> Iterator[Batch]:
        yield rows

    return {"pair": pair, "labelled": labelled}[reads]
