"""Direct preference optimisation and its kin: learn from pairs or labels, most against a fixed reference."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
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
    by_example,
    flat_rows,
    ratio,
    wanted,
    whole,
)
from rlhf_jax.losses.preference import PREFERENCE, MeanPair, Pair, PolicyPair
from rlhf_jax.losses.ranked import RANKED, Ranked
from rlhf_jax.losses.unpaired import UNPAIRED, Answer
from rlhf_jax.models.decoder import Model

LOSSES: Mapping[str, Callable[..., Array]] = {**PREFERENCE, **RANKED, **UNPAIRED}
# What a loss takes decides what a row is, and whether a reference is asked.
READS = {
    Pair: Reads("pair", reference=True),
    PolicyPair: Reads("pair", reference=False),
    MeanPair: Reads("pair", reference=False),
    Ranked: Reads("ranking", reference=True),
    Answer: Reads("labelled", reference=True),
}


class Said(NamedTuple):
    """What a batch says of its N examples, each of K completions; those of a packed row stand together."""

    weight: Array  # [N]
    labels: Array  # [N, K] float32, 1 desirable; of a group those of the best rank are
    ranks: Array  # [N, K] float32, the smaller the better
    present: Array  # [N, K] bool, whether the example has this completion
    logprob: Array  # [N, K] nats, by the policy
    length: Array  # [N, K] completion tokens; 1 where an example has none
    ref_logprob: Array  # [N, K] nats, 0 without a reference
    baseline: Array  # [N] nats, 0 for pairs


def completion_logprobs(
    model: Model, params: Any, rows: Batch, most: int, want: tuple[Any, ...] = ("logprobs",)
) -> tuple[Array, Array, Any]:
    """Log-probability of each completion, nats, and its length in tokens, float32 [N, K]; and the token statistics.

    Args:
      rows: tokens, mask, segments, positions [B, K, T].
      most: examples a row may hold; N = B most.
    """
    stats = model.token_stats(params, flat_rows(rows), want=want)
    logprobs = stats.logprobs.reshape(rows["tokens"].shape)
    length = by_example(rows["mask"].astype(jnp.float32), rows["segments"], most)
    return by_example(logprobs, rows["segments"], most), length, stats


def _most(batch: Batch) -> int:
    """Examples a row of the batch may hold: 1 if it isn't packed."""
    return batch["weight"].size // len(batch["weight"])


def _said(batch: Batch, logprob: Array, length: Array) -> Said:
    weight, nothing = batch["weight"].reshape(-1), jnp.zeros_like(logprob)
    column = lambda name: batch[name].reshape(logprob.shape) if name in batch else nothing
    baseline = batch["baseline"].reshape(-1) if "baseline" in batch else jnp.zeros_like(weight)
    present = length > 0
    if "ranks" in batch:
        ranks = column("ranks")
        labels = ranks == jnp.min(jnp.where(present, ranks, jnp.inf), axis=1, keepdims=True)
    else:
        labels = column("labels")
        ranks = 1.0 - labels
    return Said(
        weight, labels.astype(jnp.float32), ranks, present, logprob, jnp.maximum(length, 1), column("ref_logprob"),
        baseline,
    )  # fmt: skip


# How each kind of loss is asked, and what its reward is before beta: [N] and [N, K].


def _pair(loss: Callable[..., Array], said: Said) -> tuple[Array, Array]:
    columns = (*said.logprob.T, *said.ref_logprob.T, *said.length.T)
    return loss(Pair(*columns)), said.logprob - said.ref_logprob


def _policy_pair(loss: Callable[..., Array], said: Said) -> tuple[Array, Array]:
    return loss(PolicyPair(*said.logprob.T, *said.length.T)), said.logprob


def _mean_pair(loss: Callable[..., Array], said: Said) -> tuple[Array, Array]:
    means = said.logprob / said.length
    return loss(MeanPair(*means.T)), means


def _ranked(loss: Callable[..., Array], said: Said) -> tuple[Array, Array]:
    return loss(Ranked(said.logprob, said.ref_logprob, said.ranks, said.present)), said.logprob - said.ref_logprob


def _answer(loss: Callable[..., Array], said: Said) -> tuple[Array, Array]:
    """The loss of an example's K answers is their mean."""
    baseline = jnp.repeat(said.baseline[:, None], said.logprob.shape[1], axis=1)
    columns = (said.logprob, said.ref_logprob, said.labels > 0, baseline)
    losses = loss(Answer(*(x.reshape(-1) for x in columns))).reshape(baseline.shape)
    return jnp.mean(losses, axis=1), said.logprob - said.ref_logprob


ASKED: Mapping[type, Callable[[Callable[..., Array], Said], tuple[Array, Array]]] = {
    Pair: _pair,
    PolicyPair: _policy_pair,
    MeanPair: _mean_pair,
    Ranked: _ranked,
    Answer: _answer,
}


def _metrics(said: Said, rewards: Array, beta: Array) -> dict[str, Mean]:
    """What is plotted of a preference run; a tie counts as half right."""
    weight = said.weight[:, None] * said.present
    good, bad = weight * said.labels, weight * (1 - said.labels)
    mean = lambda x, w: Mean(jnp.sum(x * w), jnp.sum(w))
    chosen, rejected = mean(rewards, good), mean(rewards, bad)
    if said.labels.shape[1] == 1:
        margin, compared = (rewards - beta * said.baseline[:, None]) * (2 * said.labels - 1), weight
    else:  # every two completions of unlike rank
        margin = rewards[:, :, None] - rewards[:, None, :]
        better = said.ranks[:, :, None] < said.ranks[:, None, :]
        compared = better * weight[:, :, None] * said.present[:, None, :]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": Mean(jnp.stack([chosen.total, -rejected.total]), jnp.stack([chosen.count, rejected.count])),
        "rewards/accuracies": mean((margin > 0) + 0.5 * (margin == 0), compared),
        "logps/chosen": mean(jax.lax.stop_gradient(said.logprob), good),
        "logps/rejected": mean(jax.lax.stop_gradient(said.logprob), bad),
    }


def make_objective(model: Model, loss: Callable[..., Array], takes: type, options: Mapping[str, Any]) -> Objective:
    """The mean over examples of a preference loss, and the experts' balance if the model has some.

    Args:
      loss: one of `losses.preference`, `losses.ranked` or `losses.unpaired`, called with hyper["loss"] (which must
        hold beta) and `options` (its non-numeric arguments).
      takes: what it takes, a key of `READS`.
    A batch has tokens, mask, segments, positions [B, K, T], labels [B, K], or ranks for groups, and weight [B]; with
    a reference ref_logprob [B, K], and for losses of single answers baseline [B] from `make_prepare`. K is 2 for
    pairs. In a packed batch these are [B, M, K] and [B, M].
    """

    def objective(params, frozen, hyper, batch, key):
        params = whole(params, frozen)
        logprob, length, stats = completion_logprobs(model, params, batch, _most(batch), wanted(model, "logprobs"))
        said = _said(batch, logprob, length)
        per_row, rewards = ASKED[takes](lambda columns: loss(columns, **hyper["loss"], **options), said)
        total = jnp.sum(jnp.where(said.weight > 0, per_row * said.weight, 0))
        beta = hyper["loss"]["beta"]
        means = _metrics(said, beta * jax.lax.stop_gradient(rewards), beta)
        if READS[takes].form == "labelled":
            means["kl"] = Mean(jnp.sum(said.baseline * said.weight), jnp.sum(said.weight))
        terms = {"loss": Term(1.0, total, jnp.sum(said.weight))}
        return balance_term(model, stats, batch, hyper, terms, means)

    return objective


def make_reference_pass(model: Model) -> Callable[[Any, Batch], Array]:
    """(params, batch) -> log-probability of each completion, float32 [N, K]: the reference's columns."""
    return lambda params, batch: completion_logprobs(model, params, batch, _most(batch))[0]


def make_prepare(
    model: Model, takes: type, reference: tuple[Model, Any] | None
) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """Pairs come with their reference columns; single answers also get KTO's baseline, made live.

    The baseline is k = max(0, mean over the global batch of log pi - log ref of mismatched completions), one
    number for all rows, under the parameters that are about to be updated.

    Args:
      reference: the reference and its parameters; None: those of the state's frozen base, which an adapter
        leaves as they were. Used for losses of single answers alone.
    """
    fixed_model = model.without_adapter() if reference is None else reference[0]

    def baseline(params: Any, frozen: Any, fixed: Any, mismatched: Batch, weight: Array) -> Array:
        most = weight.size // len(weight)
        policy = completion_logprobs(model, whole(params, frozen), mismatched, most)[0]
        before = completion_logprobs(fixed_model, fixed, mismatched, most)[0]
        flat = weight.reshape(-1, 1)
        moved = ratio(jnp.sum(jnp.where(flat > 0, policy - before, 0) * flat), jnp.sum(flat) * policy.shape[1])
        return jnp.full_like(weight, jnp.maximum(moved, 0))

    measure = jax.jit(baseline, out_shardings=model.layout.sharding("rows"))

    def labelled(state: TrainState, rows: Batch) -> Iterator[Batch]:
        kept = {name: column for name, column in rows.items() if name != "mismatched"}
        fixed = state.frozen if reference is None else reference[1]
        measured = measure(state.params, state.frozen, fixed, rows["mismatched"], rows["weight"])
        yield kept | {"baseline": measured}

    def pair(state: TrainState, rows: Batch) -> Iterator[Batch]:
        yield rows

    return labelled if READS[takes].form == "labelled" else pair
