"""The train state and the one step that every algorithm shares.

A batch carries everything frozen; the step differentiates everything that is not. An objective returns terms
and means as sums with their counts, so that the step, not the objective, divides: by counts of the whole
global batch. Microbatches, padding rows and the shape of the mesh therefore change nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhf_jax.models.decoder import Model
from rlhf_jax.models.lora import join
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import Stat, TokenStats

STEP = 1  # purposes that keys are folded with
INIT = 2
ADAPTER = 3
SCORE = 4


class Term(NamedTuple):
    """A part of the loss: weight * total / count, the count summed over the global batch.

    `total` is a sum over rows or tokens and is differentiated; `count` depends on the batch alone.
    """

    weight: float | Array
    total: Array
    count: Array


class Mean(NamedTuple):
    """A metric, total / count over the global batch. A vector is the sum of its entries' ratios."""

    total: Array
    count: Array


class Reads(NamedTuple):
    """What a loss asks of the data, by what it takes."""

    form: str  # what a row is: demonstration, pair, ranking or labelled
    reference: bool = False  # whether another model's log-probabilities are columns of the batch
    mismatched: bool = False  # whether each row comes with a completion of another prompt


Batch = dict[str, Any]
Objective = Callable[[Any, Any, Any, Batch, Array], tuple[dict[str, Term], dict[str, Mean]]]
Judge = Callable[[Any, Any, Any, Batch, Array], tuple[dict[str, Term], dict[str, Mean], dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is, as data: what a checkpoint holds and the step maps to its next value."""

    params: Any  # differentiated
    frozen: Any  # used by the objective, no gradient
    opt_state: Any
    step: Array  # updates done, int32
    key: Array  # uint32 [2], the run's; never changes
    carry: Any  # the algorithm's own small state
    hyper: Any  # every numeric hyper-parameter, as arrays: {"loss": {...}, "optimizer": {...}}


class Taught(NamedTuple):
    """What is frozen where a teacher is asked at each step; without one it is the base alone."""

    base: Any  # what an adapter adapts; None without one
    teacher: Any  # all parameters of another model


class Optimizer(NamedTuple):
    """What the step needs of an optimiser; hyper["optimizer"] holds its numbers."""

    make: Callable[..., optax.GradientTransformation]  # from learning_rate and its other arguments
    schedule: optax.Schedule  # the share of the peak rate at a step

    def transform(self, hyper: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
        """The transformation whose numbers live in its state, where the step sets them."""
        numbers = {name: value for name, value in hyper.items() if name != "clip_norm"}
        return optax.inject_hyperparams(self.make)(**numbers)


def ratio(total: Array, count: Array) -> Array:
    """sum(total / count), and 0 where a count is 0: an empty batch gives 0, not NaN."""
    some = count > 0
    return jnp.sum(jnp.where(some, total / jnp.where(some, count, 1), 0))


def make_state(
    params: Any, hyper: Any, optimizer: Optimizer, key: Array, *, carry: Any = None, frozen: Any = None
) -> TrainState:
    """The state before the first update; jit it with out_shardings from `sharding.state_shardings`."""
    hyper = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hyper)
    opt_state = optimizer.transform(hyper["optimizer"]).init(params)
    return TrainState(params, frozen, opt_state, jnp.zeros((), jnp.int32), key, carry, hyper)


def split_rows(batch: Batch, parts: int, layout: Layout) -> Batch:
    """[B, ...] -> [parts, B / parts, ...] with every part spread over all row shards."""

    def split(x: Array) -> Array:
        x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
        return layout.constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)


def by_pieces(function: Callable[[Batch], Any], batch: Batch, parts: int, layout: Layout) -> Any:
    """What a function says of each row of a batch, [B, ...], asked for a piece of the rows at a time to save memory.

    Args: parts: a divisor of B, so that the mesh's row shards divide a piece.
    """
    if parts == 1:
        return function(batch)

    def join(x: Array) -> Array:
        x = jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
        return layout.constrain(x, "rows", *(None,) * (x.ndim - 1))

    return jax.tree.map(join, jax.lax.map(function, split_rows(batch, parts, layout)))


def flat_rows(batch: Batch) -> dict[str, Array]:
    """A batch's token columns [B, K, T] as [B K, T]: K completions of a row become rows of their own."""
    names = ("tokens", "mask", "segments", "positions")
    return {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in names}


def by_example(values: Array, segments: Array, most: int) -> Array:
    """Sums over each completion of what is said of its tokens: [B, K, T] to [N, K], N = B most.

    Args:
      segments: int [B, K, T], the number of a token's example in its row, from 1; 0: none.
      most: examples a row may hold. A row's examples stand together in N, those it lacks are 0.
    """
    numbers = jnp.arange(1, most + 1)[:, None, None]  # an example an entry of the second axis
    sums = jnp.sum(jnp.where(segments[:, None] == numbers[None], values[:, None], 0), axis=-1)
    return sums.reshape(-1, values.shape[1])


def token_weight(batch: Batch, of: Array | None = None) -> Array:
    """The weight of each token's example, float32 [B, K, T]; 0 for padding.

    Args:
      of: [B, K] or packed [B, M, K], a factor of each completion; None: 1.
    """
    segments = batch["segments"]
    rows, lanes, _ = segments.shape
    weight = batch["weight"].reshape(rows, -1, 1) * (1 if of is None else of.reshape(rows, -1, lanes))
    weight = jnp.broadcast_to(weight, (*weight.shape[:2], lanes)).swapaxes(1, 2)  # [B, K, M]
    found = jnp.take_along_axis(weight, jnp.maximum(segments - 1, 0), axis=2)
    return jnp.where(segments > 0, found, 0)


def whole(params: Any, frozen: Any) -> Any:
    """All parameters of a model: those that are trained, with the frozen base that they adapt if there is one."""
    base = frozen.base if isinstance(frozen, Taught) else frozen
    return params if base is None else join(params, base)


def wanted(model: Model, *stats: Stat) -> tuple[Stat, ...]:
    """What an objective asks of `Model.token_stats`: these, and how evenly its experts are used if it has some."""
    return stats if model.shape.experts is None else (*stats, "balance")


def balance_term(
    model: Model, stats: TokenStats, batch: Batch, hyper: Any, terms: dict[str, Term], means: dict[str, Mean]
) -> tuple[dict[str, Term], dict[str, Mean]]:
    """`terms` and `means`, for a mixture of experts with its load-balancing term; its count is all real tokens."""
    if model.shape.experts is None:
        return terms, means
    used = token_weight(batch).reshape(stats.balance.shape)
    total, count = jnp.sum(stats.balance * used), jnp.sum(used)
    mean = Mean(jax.lax.stop_gradient(total), count)
    return terms | {"balance": Term(hyper["balance"], total, count)}, means | {"balance": mean}


def _accumulate(
    objective: Objective, state: TrainState, batch: Batch, key: Array, parts: int, dtype: str, layout: Layout
) -> tuple[Any, Array, dict[str, Mean]]:
    """Gradient, loss and summed means of the global batch, one microbatch at a time."""
    args = (state.frozen, state.hyper)
    # Only the counts are used of this pass and they need no parameters: the compiler drops the rest.
    terms, _ = objective(state.params, *args, batch, key)
    counts = {name: term.count for name, term in terms.items()}

    def loss_of(params: Any, rows: Batch) -> tuple[Array, dict[str, Mean]]:
        terms, means = objective(params, *args, rows, key)
        parts = [term.weight * ratio(term.total, counts[name]) for name, term in terms.items()]
        return sum(parts, jnp.zeros(())), means

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    widen = lambda grads: jax.tree.map(lambda x: x.astype(dtype), grads)
    if parts == 1:
        (loss, means), grads = differentiate(state.params, batch)
        return widen(grads), loss, means

    def add(sums: Any, rows: Batch) -> tuple[Any, None]:
        (loss, means), grads = differentiate(state.params, rows)
        return jax.tree.map(jnp.add, sums, (widen(grads), loss, means)), None

    pieces = split_rows(batch, parts, layout)
    first = jax.tree.map(lambda x: x[0], pieces)
    (_, means), _ = jax.eval_shape(differentiate, state.params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), means)
    start = (jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), state.params), jnp.zeros(()), zeros)
    (grads, loss, means), _ = jax.lax.scan(add, start, pieces)
    return grads, loss, means


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    microbatches: int = 1,
    reduce_dtype: str = "float32",
    layout: Layout = Layout(),
    advance: Callable[[TrainState, Batch, dict[str, Array]], Any] | None = None,
    skip: Callable[[TrainState, Batch], Array] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure train step: (state, batch) -> (state, metrics); jit it with donated state.

    Args:
      microbatches: pieces that the batch is differentiated in, each a divisor's share of its rows.
      reduce_dtype: of summed gradients.
      advance: the next `carry` from (the state after the update with the old carry, batch, metrics); None leaves it.
      skip: bool, from (the state before the update, batch); where True params and opt_state stay as they are and the
        rate is 0, while the step and the carry go on. None: never.
    Returns: metrics are float32 scalars: loss and the objective's means at the parameters before the update,
      grad_norm before clipping, learning_rate of this update; and tokens, int32, those that are not padding.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, STEP), state.step)
        grads, loss, means = _accumulate(objective, state, batch, key, microbatches, reduce_dtype, layout)
        norm = optax.tree.norm(grads)
        numbers = dict(state.hyper["optimizer"])
        clip = numbers.pop("clip_norm")
        scale = jnp.where(norm > clip, clip / norm, 1.0)
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.params)
        numbers["learning_rate"] = numbers["learning_rate"] * optimizer.schedule(state.step)
        opt_state = state.opt_state._replace(hyperparams={**state.opt_state.hyperparams, **numbers})
        transform = optimizer.transform(state.hyper["optimizer"])
        updates, opt_state = transform.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = numbers["learning_rate"]
        if skip is not None:
            stays = skip(state, batch)
            before, after = (state.params, state.opt_state), (params, opt_state)
            params, opt_state = jax.tree.map(lambda old, new: jnp.where(stays, old, new), before, after)
            rate = jnp.where(stays, 0, rate)
        metrics = {name: ratio(*mean) for name, mean in means.items()}
        metrics |= {"loss": loss, "grad_norm": norm, "learning_rate": rate}
        metrics["tokens"] = jnp.sum(batch["segments"] > 0)
        state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
        carry = state.carry if advance is None else advance(state, batch, metrics)
        return dataclasses.replace(state, carry=carry), metrics

    return step
