"""Rollouts: completions that the policy sampled, as a batch, and what every method that learns from them shares.

A batch of rollouts has one completion a row, from the left: tokens, segments and positions int32, mask bool, True on
completion tokens, the one that ended it too, [B, 1, T] each; weight float32, 1 or 0 for padding, index int32, -1 for
padding, and ended bool, whether a token and not the length ended it, [B] each. Methods add float32 columns, of tokens
[B, 1, T], of rows [B], and numbers of the whole rollout as [B] columns of one value.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.algorithms.parts import Part
from rlhf_jax.algorithms.step import Batch, Mean, Term, flat_rows
from rlhf_jax.losses.policy import PolicyTokens, clip_fractions
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.kl import k2, k3
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import TokenStats
from rlhf_jax.sampling.sampler import Completion

ROLLOUT, ORDER = 5, 6  # purposes that keys are folded with, beside those of step.py
CLIPS: Mapping[str, Any] = {  # of the losses with a clipped ratio, whose ratio it is
    "ppo": "token", "grpo": "token", "bnpo": "token", "dr_grpo": "token", "dapo": "token", "gspo": "row", "luspo": "row"
}  # fmt: skip


# ---- from prompts to batches


def place(
    prompts: Sequence[np.ndarray],
    completions: Sequence[Completion],
    length: int,
    *,
    rows: int | None = None,
    index: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """A batch of rollouts on the host, in the order of the completions.

    Args:
      prompts: token ids, int [n] each, at least one token; `Completion.row` says which of them a completion follows.
      length: T, tokens.
      rows: B; the rows after the completions are padding. None: as many as there are completions.
      index: the number of each prompt's row in the data; None: its place.
    Errors: ValueError for what doesn't fit.
    """
    size = len(completions) if rows is None else rows
    if len(completions) > size:
        raise ValueError(f"{len(completions)} completions are more than the {size} rows of their batch")
    tokens, segments = (np.zeros((size, 1, length), np.int32) for _ in range(2))
    mask, ended = np.zeros(tokens.shape, bool), np.zeros(size, bool)
    number = np.full(size, -1, np.int32)
    for row, completion in enumerate(completions):
        prompt = prompts[completion.row]
        start, end = len(prompt), len(prompt) + len(completion.tokens)
        if start < 1 or end > length:
            raise ValueError(f"a prompt of {start} tokens with its completion to {end} has no place in {length}")
        tokens[row, 0, :start], tokens[row, 0, start:end] = prompt, completion.tokens
        segments[row, 0, :end], mask[row, 0, start:end] = 1, True
        ended[row] = completion.stop == "end"
        number[row] = completion.row if index is None else index[completion.row]
    return {
        "tokens": tokens, "mask": mask, "segments": segments,
        "positions": np.arange(length, dtype=np.int32) * segments,
        "weight": (np.arange(size) < len(completions)).astype(np.float32), "index": number, "ended": ended,
    }  # fmt: skip


# ---- what is frozen in a batch


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
) -> Batch:
    """What policy, reference and value say of each completion token, float32 [B, 1, T], 0 elsewhere.

    All of it is read from whole rows in one program, not taken from the sampler: so at parameters that haven't moved
    ratios are 1, and where policy and reference are equal their KL is 0.

    Args:
      temperature: that of the sampler; it divides the logits of policy and reference alike.
    Returns: old_logprobs, and ref_logprobs and values if those are asked.
    """
    rows = flat_rows(batch)
    said = lambda of: of.model.token_stats(of.params, rows, temperature=temperature).logprobs
    columns = {"old_logprobs": said(policy)}
    if reference is not None:
        columns["ref_logprobs"] = said(reference)
    if value is not None:
        columns["values"] = token_values(value, rows)
    return {name: column.reshape(batch["mask"].shape) for name, column in columns.items()}


@jax.jit
def keys(key: Array, step: Array) -> tuple[Array, Array]:
    """The keys of a rollout, uint32 [2]: for its samples, and for the order of its minibatches.

    Args:
      key, step: of the train state, whose buffers the step donates: what is needed of them later is made here.
    """
    fold = lambda purpose: jax.random.fold_in(jax.random.fold_in(key, purpose), step)
    return fold(ROLLOUT), fold(ORDER)


def minibatches(batch: Batch, epochs: int, pieces: int, key: Array, layout: Layout = Layout()) -> Iterator[Batch]:
    """All rows once an epoch, in a new order of the whole global batch each time, in `pieces` batches.

    They depend on the arguments alone, and each is made when it is asked for.

    Args:
      key: uint32 [2], see `keys`.
      layout: the mesh that the rows are spread over.
    Returns: batches of B / pieces rows; `last`, bool [B / pieces], is True in the last one's.
    Errors: ValueError if the pieces don't divide the rows.
    """
    rows = batch["weight"].shape[0]
    if rows % pieces:
        raise ValueError(f"{rows} rollouts don't divide into {pieces} minibatches")
    for number in range(epochs * pieces):
        epoch, piece = (np.int32(x) for x in divmod(number, pieces))
        last = np.bool_(number == epochs * pieces - 1)
        yield _piece(batch, key, epoch, piece, last, pieces=pieces, layout=layout)


@functools.partial(jax.jit, static_argnames=("pieces", "layout"))
def _piece(batch: Batch, key: Array, epoch: Array, piece: Array, last: Array, *, pieces: int, layout: Layout) -> Batch:
    """One minibatch. Each makes the epoch's order anew, on every device alike: to keep it would save nothing."""
    rows = batch["weight"].shape[0]
    order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
    mine = jax.lax.dynamic_slice_in_dim(order, piece * (rows // pieces), rows // pieces)
    chosen = {name: column[mine] for name, column in batch.items()} | {"last": jnp.broadcast_to(last, mine.shape)}
    return {name: layout.constrain(x, "rows", *(None,) * (x.ndim - 1)) for name, x in chosen.items()}


# ---- what is differentiated


class Sampled(NamedTuple):
    """What the loss of a policy takes, and what else is told of the same tokens, [B, T] each."""

    tokens: PolicyTokens
    used: Array  # float32, the weight of each token, 0 where it isn't trained
    log_ratio: Array  # logprobs - old_logprobs, nats, 0 where it isn't used
    ref_ratio: Array  # logprobs - ref_logprobs, the same; 0 everywhere without a reference


def used_tokens(batch: Batch) -> Array:
    """The weight of each token, float32 [B, T]: its row's on completion tokens, else 0."""
    return batch["mask"][:, 0] * batch["weight"][:, None]


def sampled(logprobs: Array, batch: Batch) -> Sampled:
    """A batch as the current policy sees it.

    Args:
      logprobs: [B, T], of the policy that is differentiated.
      batch: old_logprobs and advantages, and ref_logprobs if there is a reference. What stands where no token is
        used, NaN included, reaches no value and no gradient.
    """
    used = used_tokens(batch)
    column = lambda name: jnp.where(used > 0, batch[name][:, 0], 0)
    logprobs = jnp.where(used > 0, logprobs, 0)
    old = column("old_logprobs")
    ref_ratio = logprobs - column("ref_logprobs") if "ref_logprobs" in batch else jnp.zeros_like(logprobs)
    tokens = PolicyTokens(logprobs, old, column("advantages"), used > 0)
    return Sampled(tokens, used, logprobs - old, ref_ratio)


def total(x: Array, weight: Array) -> Array:
    """The sum of x weighted, of entries that have a weight."""
    return jnp.sum(jnp.where(weight > 0, x * weight, 0))


def mean(x: Array, weight: Array) -> Mean:
    """A metric: the weighted mean of x, without a gradient."""
    return Mean(jax.lax.stop_gradient(total(x, weight)), jnp.sum(weight))


def policy_term(part: Part, said: Sampled, hyper: Any, batch: Batch) -> Term:
    """A loss of `losses.policy`: what it returns says whether it is a mean over rows, [B], or over tokens, [B, T]."""
    loss = part.loss(said.tokens, **part.numbers(hyper, batch))
    weight = said.used if loss.ndim == 2 else batch["weight"]
    return Term(hyper["weights"][part.name], total(loss, weight), jnp.sum(weight))


def policy_means(part: Part, said: Sampled, stats: TokenStats, hyper: Any, batch: Batch) -> dict[str, Mean]:
    """What is plotted of every policy that learns from rollouts.

    kl: k3 of policy and reference, nats a token; policy/approxkl: k2 of the sampling policy and this one, nats a
    token; policy/ratio: their mean ratio; clip_ratio/low and high: shares of tokens whose gradient the clip takes;
    entropy: nats a token; completions/length: tokens; completions/ended: share of them that the end token ended.
    """
    used, weight = said.used, batch["weight"]
    means = {
        "kl": mean(k3(said.ref_ratio), used),
        "policy/ratio": mean(jnp.exp(said.log_ratio), used),
        "policy/approxkl": mean(k2(said.log_ratio), used),
        "entropy": mean(stats.entropy, used),
        "completions/length": Mean(jnp.sum(used), jnp.sum(weight)),
        "completions/ended": mean(batch["ended"], weight),
    }
    if part.name in CLIPS:
        numbers = part.numbers(hyper, batch)
        bounds = {name: numbers[name] for name in ("clip_low", "clip_high")}
        low, high = clip_fractions(said.tokens, **bounds, level=CLIPS[part.name])
        means |= {"clip_ratio/low": mean(low, used), "clip_ratio/high": mean(high, used)}
    return means
