"""A rollout with its scores, in rounds: a prompt whose completions all earn the same gives its place to another."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import sharding
from rlhf_jax.algorithms.rollouts import Around, score_columns
from rlhf_jax.algorithms.step import Batch
from rlhf_jax.ops.layout import Layout


def drawn_in_rounds(
    around: Around, draw: Callable[[Batch, int], Batch], rows: Batch, rounds: int, layout: Layout
) -> Batch:
    """A rollout with its scores, see `scored`; K rows a group, padding behind the last one.

    With several rounds the prompts are drawn in as many parts, one after the other and only while groups are missing.
    Of each part those groups stay whose rewards, weighted and summed, aren't all equal: what the score functions gave,
    before an overlong reward or the KL's. `draw` gets the number of the round too: a prompt that stands in two of them
    is answered twice. All processes decide alike, by arrays that all of them have.
    Returns: with several rounds also kept, [B] of one value: the share of the drawn groups that differ.
    References: Yu et al. 2025, arXiv:2503.14476, Eq. 11 (DAPO).
    """
    if rounds == 1:
        return scored(around, draw(rows, 0))[0]
    size = jax.tree.leaves(rows)[0].shape[0]
    if size % rounds:
        raise ValueError(f"{size} prompts don't divide into {rounds} rounds")
    groups, samples = size // rounds, around.rollout.samples
    held, have, seen, differ = None, 0, 0, 0
    for number in range(rounds):
        found, real, differs = scored(around, draw(_part(rows, np.int32(number), parts=rounds, layout=layout), number))
        new = np.flatnonzero(differs)[: groups - have]
        missing = np.full(groups - have - len(new), -1)
        take = np.concatenate([np.arange(have), groups + new, missing])[:, None]
        take = np.where(take < 0, -1, take * samples + np.arange(samples)).reshape(-1).astype(np.int32)
        held = _chosen(found if held is None else held, found, take, layout=layout)
        have, seen, differ = have + len(new), seen + int(real.sum()), differ + int(differs.sum())
        if have == groups:
            break
    assert held is not None
    return held | {"kept": np.full(groups * samples, differ / max(seen, 1), np.float32)}


def scored(around: Around, drawn: Batch) -> tuple[Batch, Any, Any]:
    """Rollouts with what they earned; which groups are no padding, and which of them differ, bool [G] each.

    The batch has the columns of `score_columns` and table: given, weights, float32, and applied, bool, [B, R] each;
    nothing applies to padding.
    Errors: UserError as those.
    """
    scores, samples = around.score(drawn), around.rollout.samples
    columns = score_columns(scores, drawn)
    real = sharding.fetch(jnp.asarray(drawn["weight"])) > 0
    applied = scores.applies & real[:, None]
    given, weights = np.where(applied, scores.rewards, 0), np.broadcast_to(scores.weights, applied.shape)
    table = {"given": given.astype(np.float32), "applied": applied, "weights": weights.astype(np.float32)}
    present, totals = applied.any(axis=1).reshape(-1, samples), scores.total.reshape(-1, samples)
    top = np.max(totals, axis=1, where=present, initial=-np.inf)
    differs = top > np.min(totals, axis=1, where=present, initial=np.inf)
    return drawn | columns | {"table": table}, np.any(real.reshape(-1, samples), axis=1), differs


@functools.partial(jax.jit, static_argnames=("parts", "layout"))
def _part(rows: Batch, number: Array, *, parts: int, layout: Layout) -> Batch:
    """One of as many equal parts of the rows, in their order."""

    def cut(x: Array) -> Array:
        size = x.shape[0] // parts
        piece = jax.lax.dynamic_slice_in_dim(x, number * size, size)
        return layout.constrain(piece, None if size % layout.shards else "rows", *(None,) * (x.ndim - 1))

    return jax.tree.map(cut, rows)


@functools.partial(jax.jit, static_argnames="layout")
def _chosen(one: Batch, other: Batch, take: Array, *, layout: Layout) -> Batch:
    """Rows of two batches of B rows, by their numbers when `other` stands behind `one`; int32 [B], -1: padding."""

    def choose(name: str) -> Callable[[Array, Array], Array]:
        def column(x: Array, y: Array) -> Array:
            real = (take >= 0).reshape(-1, *(1,) * (x.ndim - 1))
            rows = jnp.concatenate([x, y])[jnp.maximum(take, 0)]
            chosen = jnp.where(real, rows, jnp.asarray(-1 if name == "index" else 0, x.dtype))
            return layout.constrain(chosen, "rows", *(None,) * (x.ndim - 1))

        return column

    return {name: jax.tree.map(choose(name), one[name], other[name]) for name in other}
