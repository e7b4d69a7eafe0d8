"""Rollouts: completions that the policy sampled, as a batch, and what every method that learns from them shares.

A batch of rollouts has one completion a row, from the left: tokens, segments and positions int32, mask bool, True on
completion tokens, the one that ended it too, [B, 1, T] each; weight float32, 1 or 0 for padding, index int32, -1 for
padding, and ended bool, whether a token and not the length ended it, [B] each. Methods add float32 columns, of tokens
[B, 1, T], of rows [B], and numbers of the whole rollout as [B] columns of one value.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import sharding
from rlhf_jax.algorithms.parts import Part
from rlhf_jax.algorithms.step import Batch, Mean, Term
from rlhf_jax.errors import UserError
from rlhf_jax.losses.policy import PolicyTokens, clip_fractions
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.kl import k2, k3
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import TokenStats
from rlhf_jax.sampling.mixture import Both
from rlhf_jax.sampling.sampler import Completion

ROLLOUT, ORDER, HELD_OUT = 5, 6, 7  # purposes that keys are folded with, beside those of step.py
SHOWN = 16  # tokens of a completion in a message
CLIPS: Mapping[str, Any] = {  # of the losses with a clipped ratio, whose ratio it is
    "ppo": "token", "grpo": "token", "bnpo": "token", "dr_grpo": "token", "dapo": "token", "gspo": "row", "luspo": "row"
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What a rollout is, and how often it is learnt from: batch_size x minibatches completions."""

    max_new_tokens: Annotated[int, "most tokens of a completion"] = 128
    temperature: Annotated[float, "of sampling; it divides the logits of policy and reference everywhere"] = 1.0
    samples: Annotated[int, "completions of each prompt"] = 1
    epochs: Annotated[int, "times that a rollout is learnt from"] = 1
    minibatches: Annotated[int, "updates an epoch, of train.batch_size completions each"] = 1
    slots: Annotated[int, "completions that are decoded at a time"] = 64

    @property
    def updates(self) -> int:
        """Optimiser updates that a rollout gives."""
        return self.epochs * self.minibatches


@dataclasses.dataclass(frozen=True)
class EndConfig:
    """What a completion is worth that the length cut off."""

    missing_end: Annotated[
        Literal["replace", "subtract"], "what missing_end_score does to the score of a completion without an end"
    ] = "replace"
    missing_end_score: Annotated[float, "the score that it gets, or whose size is subtracted from its own"] = -1.0


class Scores(NamedTuple):
    """What each of B completions earns by each of R rewards, on the host, the same on every process."""

    rewards: np.ndarray  # [B, R] float32, 0 where a reward doesn't apply
    applies: np.ndarray  # [B, R] bool
    weights: np.ndarray  # [R] float32
    names: tuple[str, ...]  # of the R rewards
    steps: np.ndarray | None = None  # [B, T] float32: of a model of steps what each token adds to the total, else None

    @property
    def total(self) -> np.ndarray:
        """The weighted sum of those that apply, [B] float32; 0 where none does."""
        return np.where(self.applies, self.rewards * self.weights, 0).sum(axis=1).astype(np.float32)


class Around(NamedTuple):
    """What a method that learns from rollouts is given from below its place.

    Attributes:
      draw: (the policy's parameters, rows, key uint32 [2]) -> a batch of rollouts on the mesh, `rollout.samples`
        completions of each row's prompt, one behind the other in the order of the rows; padding rows give padding.
      score: that batch -> its scores; it may run on the host, and may take long.
      pretrain: the number of an update -> a batch of text of as many rows as the update has, [B, 1, T]; None: none.
      held_out: the rollouts are only looked at: a rollout is one batch, in the order of its rows, drawn with the same
        randomness whatever the step.
      pieces: that a rollout is read in where it is measured, to save memory; they divide its rows.
      mixed: as `draw`, of a mixture of the policy and its reference, whose parameters it takes; until it is called it
        costs nothing. None: nothing draws from one.
    """

    draw: Callable[[Any, Batch, Array], Batch]
    score: Callable[[Batch], Scores]
    rollout: RolloutConfig
    pretrain: Callable[[int], Batch] | None = None
    held_out: bool = False
    pieces: int = 1
    mixed: Callable[[Both, Batch, Array], Batch] | None = None


class Models(NamedTuple):
    """A policy and its value model; None: the value is a second head of the policy. And a teacher, if there is one."""

    policy: Model
    value: Model | None
    teacher: Model | None = None


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


@functools.partial(jax.jit, static_argnames="held_out")
def keys(key: Array, step: Array, held_out: bool = False) -> tuple[Array, Array]:
    """The keys of a rollout, uint32 [2]: for its samples, and for the order of its minibatches.

    Args:
      key, step: of the train state, whose buffers the step donates: what is needed of them later is made here.
      held_out: the samples are those of an evaluation, alike at every step.
    """
    fold = lambda purpose, step: jax.random.fold_in(jax.random.fold_in(key, purpose), step)
    return fold(HELD_OUT, 0) if held_out else fold(ROLLOUT, step), fold(ORDER, step)


def score_columns(scores: Scores, batch: Batch) -> Batch:
    """The scores of a rollout as columns, 0 for padding: score, float32 [B], and of several rewards each its own.

    Those are dicts rewards, float32 [B], and applies, bool [B], by their names.
    Errors: UserError naming the row of a score that isn't finite.
    """
    fetch = lambda name: sharding.fetch(jnp.asarray(batch[name]))
    real, total = fetch("weight") > 0, scores.total
    if total.shape != real.shape:
        raise ValueError(f"{real.shape} rollouts have scores of the shape {total.shape}")
    wrong = np.flatnonzero(real & ~np.isfinite(total))
    if wrong.size:
        row = int(wrong[0])
        ids = fetch("tokens")[row][fetch("mask")[row]].tolist()
        shown = ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")
        raise UserError(
            f"the score of a completion is {total[row]}: rollout {row}, row {int(fetch('index')[row])} of the data, "
            f"{len(ids)} tokens ({shown}); {wrong.size} of {int(real.sum())} scores aren't finite. Mend the reward."
        )
    columns: Batch = {"score": np.where(real, total, 0)}
    if len(scores.names) > 1:
        applies = scores.applies & real[:, None]
        columns["applies"] = dict(zip(scores.names, applies.T, strict=True))
        columns["rewards"] = dict(zip(scores.names, np.where(applies, scores.rewards, 0).T, strict=True))
    return columns


def step_columns(scores: Scores) -> Batch:
    """What tokens add to the score of a rollout as a column step_rewards, [B, 1, T]; {} where nobody scores steps."""
    return {} if scores.steps is None else {"step_rewards": scores.steps[:, None]}


def end_counts(config: EndConfig, missing: Array, batch: Batch) -> Array:
    """Scores as they count, [B], 0 for padding: `missing_end` says what one without an end has (Huang et al. 2024).

    Args:
      missing: `missing_end_score`.
    """
    given = batch["score"]
    without = {"replace": lambda: missing, "subtract": lambda: given - jnp.abs(missing)}[config.missing_end]()
    return jnp.where(batch["weight"] > 0, jnp.where(batch["ended"], given, without), 0)


def learnt(batch: Batch, around: Around, order: Array, first: int, layout: Layout) -> Iterator[Batch]:
    """What a rollout is learnt from: its minibatches, each with text of its own if there is some.

    Args:
      order: key of the minibatches' order.
      first: the number of the update that takes the first of them.
    """
    if around.held_out:
        yield batch
        return
    made = minibatches(batch, around.rollout.epochs, around.rollout.minibatches, order, layout)
    for number, piece in enumerate(made, start=first):
        yield piece if around.pretrain is None else piece | {"pretrain": around.pretrain(number)}


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
    chosen = jax.tree.map(lambda column: column[mine], batch) | {"last": jnp.broadcast_to(last, mine.shape)}
    return jax.tree.map(lambda x: layout.constrain(x, "rows", *(None,) * (x.ndim - 1)), chosen)


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
    means |= reward_means(batch)
    if part.name in CLIPS:
        numbers = part.numbers(hyper, batch)
        bounds = {name: numbers[name] for name in ("clip_low", "clip_high")}
        low, high = clip_fractions(said.tokens, **bounds, level=CLIPS[part.name])
        means |= {"clip_ratio/low": mean(low, used), "clip_ratio/high": mean(high, used)}
    return means


def reward_means(batch: Batch) -> dict[str, Mean]:
    """Of several rewards each one's mean over the completions to which it applies."""
    rewards = batch.get("rewards", {})
    return {
        f"rewards/{name}": mean(reward, batch["applies"][name] * batch["weight"]) for name, reward in rewards.items()
    }


def held_out_rows(earned: Array, batch: Batch) -> tuple[dict[str, Term], dict[str, Mean], dict[str, Array]]:
    """What is said of held-out rollouts: terms and means, and rows [B].

    Args:
      earned: [B], what each completion earned, less the price of its KL; the loss is -1 times it.
      batch: with score, sequence_kl and ended [B].
    """
    weight, length = batch["weight"], jnp.sum(used_tokens(batch), axis=1)
    rows = {"loss": -earned, "score": batch["score"], "kl": batch["sequence_kl"], "length": length}
    means = {"score": mean(batch["score"], weight), "kl": mean(batch["sequence_kl"], weight)}
    means |= {"completions/length": mean(length, weight), "completions/ended": mean(batch["ended"], weight)}
    return {"loss": Term(1.0, -total(earned, weight), jnp.sum(weight))}, means | reward_means(batch), rows
