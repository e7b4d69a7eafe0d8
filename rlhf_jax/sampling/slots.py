"""The compiled half of the sampler: slots that each hold a row, filled and decoded in one program.

A slot's keys and values lie in P columns for its prompt and N for its completion. The completion's columns are
a ring that turns for all slots at once: the token of step g goes to column g mod N whatever the row, so that
writing is one slice and not a scatter, and a slot may be filled again at any step. No row has more than N
tokens, so nothing that is still seen is overwritten.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.layout import Layout
from rlhf_jax.sampling.distribution import Knobs, draw
from rlhf_jax.sampling.mixture import Drawable

# Why a row stopped, by the number in `Slots.stop`.
RUNNING, END, LENGTH, EMPTY = range(4)


class Slots(NamedTuple):
    """What decoding carries; B slots, P prompt columns, N ring columns, V tokens."""

    cache: Any  # [L, B, G, P + N, d], the keys and values of each model
    hidden: Any  # [B, D] of each model, from which the next token is predicted
    seen: Array  # [B, V] bool, tokens of the prompt and the completion
    prompt: Array  # [B] int32, prompt tokens
    count: Array  # [B] int32, completion tokens so far
    limit: Array  # [B] int32, most completion tokens
    stop: Array  # [B] int32, RUNNING or why not
    start: Array  # [B] int32, the step of the first completion token
    key: Array  # [B, 2] uint32, the row's own
    step: Array  # int32, of the ring
    tokens: Array  # [B, N] int32, in ring order
    logprobs: Array  # [B, N] float32
    behaviour: Array  # [B, N] float32


class Fresh(NamedTuple):
    """Rows to put into slots."""

    tokens: Array  # [F, P] int32, left-aligned prompts
    length: Array  # [F] int32
    source: Array  # [B] int32, the row that goes into each slot, -1: the slot stays as it is
    row: Array  # [B] int32, the number of the row, over all calls
    sample: Array  # [B] int32, which of its samples
    limit: Array  # [B] int32


def empty(model: Drawable, slots: int, prompt: int, new: int) -> Slots:
    """Slots without a row."""
    hidden, cache = model.blank(slots, prompt + new)
    number = jnp.zeros(slots, jnp.int32)
    ring = jnp.zeros((slots, new), jnp.float32)
    made = Slots(
        cache, hidden, jnp.zeros((slots, model.shape.vocab), jnp.bool_), number, number, number,
        jnp.full(slots, EMPTY, jnp.int32), number, jnp.zeros((slots, 2), jnp.uint32), jnp.int32(0),
        ring.astype(jnp.int32), ring, ring,
    )  # fmt: skip
    return made


def places(layout: Layout) -> Slots:
    """Where each part lies on the mesh, or all arrays of a part: rows over data, fsdp and expert, heads over tensor."""
    columns: Any = (None, "rows", "heads", None, None)
    rows, table = ("rows",), ("rows", None)
    axes: dict[str, Any] = {
        "cache": columns, "hidden": table, "seen": table, "prompt": rows, "count": rows, "limit": rows, "stop": rows,
        "start": rows, "key": table, "step": (), "tokens": table, "logprobs": table, "behaviour": table,
    }  # fmt: skip
    is_leaf = lambda x: type(x) is tuple
    return jax.tree.map(lambda names: layout.sharding(*names), Slots(**axes), is_leaf=is_leaf)


def pin(slots: Slots, layout: Layout) -> Slots:
    """Every part in its place."""
    return jax.lax.with_sharding_constraint(slots, places(layout))


def advance(
    model: Drawable, params: Any, slots: Slots, fresh: Fresh, knobs: Knobs, key: Array, steps: Array, enough: Array
) -> Slots:
    """Fills slots, then decodes until none runs, `enough` slots have stopped, or `steps` are done.

    Args:
      key: uint32 [2]; a token depends on it, its row's number, its sample's and its place in the completion.
    """
    layout = model.layout
    fill = lambda: _fill(model, params, slots, fresh, key)
    slots = pin(jax.lax.cond(jnp.any(fresh.source >= 0), fill, lambda: slots), layout)

    def goes_on(carry: tuple[Slots, Array]) -> Array:
        slots, done = carry
        running = jnp.sum(slots.stop == RUNNING)
        return (running > 0) & (slots.stop.size - running < enough) & (done < steps)

    def body(carry: tuple[Slots, Array]) -> tuple[Slots, Array]:
        slots, done = carry
        return pin(_decode(model, params, slots, knobs), layout), done + 1

    return jax.lax.while_loop(goes_on, body, (slots, jnp.int32(0)))[0]


def _fill(model: Drawable, params: Any, slots: Slots, fresh: Fresh, key: Array) -> Slots:
    """Runs the prompts once each and puts their keys and values into all slots that continue them."""
    layout, columns = model.layout, fresh.tokens.shape[1]
    tokens = layout.constrain(fresh.tokens, "rows", None)
    place = jnp.arange(columns)[None]
    real = place < fresh.length[:, None]
    hidden, cache = model.prefill(params, tokens, real.astype(jnp.int32), jnp.where(real, place, 0))
    last = lambda hidden: jnp.take_along_axis(hidden, (fresh.length - 1)[:, None, None], axis=1)[:, 0]
    rows = jnp.arange(tokens.shape[0])[:, None]
    seen = jnp.zeros((tokens.shape[0], model.shape.vocab), jnp.bool_).at[rows, tokens].max(real)
    taken, source = fresh.source >= 0, jnp.maximum(fresh.source, 0)

    def put(old: Array, new: Array) -> Array:
        return jnp.where(taken.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    def into(old: Array, new: Array) -> Array:
        """The prompt's columns of the cache; those of the ring are seen only once they are written."""
        chosen = taken[None, :, None, None, None]
        whole = jnp.where(chosen, jnp.take(new, source, axis=1), old[:, :, :, :columns])
        return jax.lax.dynamic_update_slice_in_dim(old, whole, 0, axis=3)

    fold = jax.vmap(lambda row, sample: jax.random.fold_in(jax.random.fold_in(key, row), sample))
    return slots._replace(
        cache=jax.tree.map(into, slots.cache, cache),
        hidden=jax.tree.map(lambda old, new: put(old, last(new)[source]), slots.hidden, hidden),
        seen=put(slots.seen, seen[source]),
        prompt=put(slots.prompt, fresh.length[source]),
        count=put(slots.count, jnp.zeros_like(slots.count)),
        limit=put(slots.limit, fresh.limit),
        stop=put(slots.stop, jnp.full_like(slots.stop, RUNNING)),
        start=put(slots.start, jnp.full_like(slots.start, slots.step)),
        key=put(slots.key, fold(fresh.row, fresh.sample)),
    )


def _decode(model: Drawable, params: Any, slots: Slots, knobs: Knobs) -> Slots:
    """One token in every slot that runs."""
    ring = slots.tokens.shape[1]
    column = slots.step % ring
    running = slots.stop == RUNNING
    logits = model.logits(params, jax.tree.map(lambda x: x[:, None], slots.hidden))[:, 0]
    logits = model.layout.constrain(logits, "rows", "vocab")
    uniform = jax.vmap(lambda key, count: jax.random.uniform(jax.random.fold_in(key, count)))(slots.key, slots.count)
    drawn = draw(logits, slots.seen, uniform, knobs)
    count = slots.count + running
    ended = jnp.any(drawn.token[:, None] == knobs.stop_ids[None], axis=1)
    stop = jnp.where(ended, END, jnp.where(count >= slots.limit, LENGTH, RUNNING))

    def write(old: Array, new: Array) -> Array:
        """One column; a row that has stopped keeps what it holds until it is fetched."""
        before = jax.lax.dynamic_slice_in_dim(old, column, 1, axis=1)
        new = jnp.where(running[:, None], new[:, None].astype(old.dtype), before)
        return jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=1)

    hidden, new = _feed(model, params, slots, drawn.token, count, column)
    rows = jnp.arange(running.size)
    at = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, old.shape[3] - ring + column, axis=3)
    return slots._replace(
        cache=jax.tree.map(at, slots.cache, new),
        hidden=hidden,
        seen=slots.seen.at[rows, drawn.token].max(running),
        count=count,
        stop=jnp.where(running, stop, slots.stop),
        step=slots.step + 1,
        tokens=write(slots.tokens, drawn.token),
        logprobs=write(slots.logprobs, drawn.logprob),
        behaviour=write(slots.behaviour, drawn.behaviour),
    )


def _feed(model: Drawable, params: Any, slots: Slots, token: Array, count: Array, column: Array) -> tuple[Any, Any]:
    """Hidden states behind the new token of each slot, and its keys and values; `count` has that token in."""
    ring = slots.tokens.shape[1]
    prompt = jax.tree.leaves(slots.cache)[0].shape[3] - ring
    position, place = slots.prompt + count - 1, jnp.arange(prompt)[None]
    age = ((column - jnp.arange(ring)) % ring)[None]  # how many steps ago a column was written; 0 is the new token's
    before = jnp.where(place < slots.prompt[:, None], position[:, None] - place, 0)
    distance = jnp.concatenate([before, jnp.where(age < count[:, None], age, 0)], axis=1)
    return model.decode(params, token, position, slots.cache, distance)
