"""What a batch says of whole completions under policy and reference, and how each kind of loss is asked with it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.comparisons import labels_of
from rlhf_jax.algorithms.step import Batch, Reads, by_example, flat_rows
from rlhf_jax.losses.preference import MeanPair, Pair, PolicyPair, SortedMargins, SortedRatios
from rlhf_jax.losses.ranked import Ranked
from rlhf_jax.losses.unpaired import Answer, BareAnswer, ShiftedAnswer
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.logprobs import TokenStats

# What a loss takes decides what a row is, and whether a reference is asked.
READS = {
    Pair: Reads("pair", reference=True),
    SortedMargins: Reads("pair", reference=True),
    SortedRatios: Reads("pair", reference=True),
    PolicyPair: Reads("pair"),
    MeanPair: Reads("pair"),
    Ranked: Reads("ranking", reference=True),
    Answer: Reads("labelled", reference=True, mismatched=True),
    BareAnswer: Reads("labelled", reference=True),
    ShiftedAnswer: Reads("labelled", reference=True),
}
REFERENCE = ("ref_logprob", "ref_shared")  # columns that a reference gives, [B, K] or packed [B, M, K]


class Said(NamedTuple):
    """What a batch says of its N examples, each of K completions; those of a packed row stand together."""

    weight: Array  # [N]
    labels: Array  # [N, K] float32, 1 desirable; of a group those of the best rank are
    ranks: Array  # [N, K] float32, the smaller the better
    present: Array  # [N, K] bool, whether the example has this completion
    whole: Array  # [N, K] nats, log-probability by the policy
    length: Array  # [N, K] completion tokens; 1 where an example has none
    logprob: Array  # [N, K] nats, as the loss sees it: `whole`, or less of the tokens past the shared length
    ref_logprob: Array  # [N, K] nats, by the reference, as the loss sees it; 0 without a reference
    columns: dict[str, Array]  # [N] each: what `prepare` adds for some losses

    @property
    def ratio(self) -> Array:
        """logprob - ref_logprob, [N, K] nats."""
        return self.logprob - self.ref_logprob


def most(batch: Batch) -> int:
    """Examples a row of the batch may hold: 1 if it isn't packed."""
    return batch["weight"].size // len(batch["weight"])


def completion_sums(values: Array, batch: Batch, shared: bool = False) -> Array:
    """Sums over each completion's tokens of what is said of them, [N, K].

    Args:
      values: [B K, T] float32, 0 on prompts.
      batch: tokens, mask and segments [B, K, T], weight [B] or packed [B, M]; N = B M.
      shared: leave out the tokens behind the length that all completions of an example have.
    """
    values = values.reshape(batch["segments"].shape)
    if not shared:
        return by_example(values, batch["segments"], most(batch))
    numbers = jnp.arange(1, most(batch) + 1)[:, None, None]
    mine = (batch["segments"][:, None] == numbers[None]) & batch["mask"][:, None]  # [B, M, K, T]
    place = jnp.cumsum(mine, axis=-1)
    inside = mine & (place <= jnp.min(place[..., -1:], axis=2, keepdims=True))
    return jnp.sum(jnp.where(inside, values[:, None], 0), axis=-1).reshape(-1, values.shape[1])


def reference_columns(model: Model, params: Any, batch: Batch, shared: bool = False) -> dict[str, Array]:
    """Log-probability of each completion, nats, float32 [N, K]; with `shared` also that of its shared length.

    Args:
      batch: tokens, mask, segments and positions [B, K, T], weight [B] or packed [B, M].
    """
    logprobs = model.token_stats(params, flat_rows(batch)).logprobs
    kinds = (False, True) if shared else (False,)
    return {name: completion_sums(logprobs, batch, kind) for name, kind in zip(REFERENCE, kinds, strict=False)}


def say(stats: TokenStats, batch: Batch, length_alpha: Array | None = None) -> Said:
    """What a batch says under the policy that `stats` are of.

    Args:
      length_alpha: weight of the tokens past the shared length, from 0 to 1, in the log-probabilities that a loss
        sees (LD-DPO, Liu et al. 2024, arXiv:2409.06411); None: 1.
    """
    whole = completion_sums(stats.logprobs, batch)
    length = completion_sums(batch["mask"].reshape(-1, batch["mask"].shape[-1]).astype(jnp.float32), batch)
    per_lane = lambda name: batch[name].reshape(whole.shape) if name in batch else jnp.zeros_like(whole)
    given = labels_of(batch, length > 0)
    logprob, ref_logprob = whole, per_lane("ref_logprob")
    if length_alpha is not None:
        less = lambda all_of_it, shared: shared + length_alpha * (all_of_it - shared)
        logprob = less(whole, completion_sums(stats.logprobs, batch, shared=True))
        ref_logprob = less(ref_logprob, per_lane("ref_shared"))
    weight = batch["weight"]
    columns = {name: batch[name].reshape(-1) for name in batch if batch[name].shape == weight.shape}
    return Said(*given, whole, jnp.maximum(length, 1), logprob, ref_logprob, columns)


# How each kind of loss is asked, and what its reward is before beta: [N] and [N, K].

Ask = Callable[[Any], Array]


def _pair(ask: Ask, said: Said) -> tuple[Array, Array]:
    return ask(Pair(*said.logprob.T, *said.ref_logprob.T, *said.length.T)), said.ratio


def _sorted_margins(ask: Ask, said: Said) -> tuple[Array, Array]:
    margin = said.logprob[:, 0] - said.logprob[:, 1]
    return ask(SortedMargins(margin, said.columns["margin_partner"])), said.ratio


def _sorted_ratios(ask: Ask, said: Said) -> tuple[Array, Array]:
    chosen, rejected = said.ratio.T
    others = said.columns["chosen_partner"], said.columns["rejected_partner"]
    return ask(SortedRatios(chosen, rejected, *others)), said.ratio


def _policy_pair(ask: Ask, said: Said) -> tuple[Array, Array]:
    return ask(PolicyPair(*said.logprob.T, *said.length.T)), said.logprob


def _mean_pair(ask: Ask, said: Said) -> tuple[Array, Array]:
    means = said.logprob / said.length
    return ask(MeanPair(*means.T)), means


def _ranked(ask: Ask, said: Said) -> tuple[Array, Array]:
    return ask(Ranked(said.logprob, said.ref_logprob, said.ranks, said.present)), said.ratio


def _answers(takes: Callable[..., Any], *columns: str) -> Callable[[Ask, Said], tuple[Array, Array]]:
    """Losses of single answers; that of an example's K answers is their mean."""

    def asked(ask: Ask, said: Said) -> tuple[Array, Array]:
        wide = (jnp.repeat(said.columns[name], said.labels.shape[1]) for name in columns)
        flat = (x.reshape(-1) for x in (said.logprob, said.ref_logprob, said.labels > 0))
        return jnp.mean(ask(takes(*flat, *wide)).reshape(said.labels.shape), axis=1), said.ratio

    return asked


ASKED: Mapping[type, Callable[[Ask, Said], tuple[Array, Array]]] = {
    Pair: _pair,
    SortedMargins: _sorted_margins,
    SortedRatios: _sorted_ratios,
    PolicyPair: _policy_pair,
    MeanPair: _mean_pair,
    Ranked: _ranked,
    Answer: _answers(Answer, "baseline"),
    BareAnswer: _answers(BareAnswer),
    ShiftedAnswer: _answers(ShiftedAnswer, "shift"),
}
