"""How the tensors of a Hugging Face checkpoint and our parameters are made from each other."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.models.shape import Shape

Path = tuple[str, ...]
# What a part of a weight's name counts; each is a leading axis of our leaves, in this order.
COUNTS: dict[str, Callable[[Shape], int]] = {
    "i": lambda shape: shape.layers,
    "e": lambda shape: shape.experts.count if shape.experts else 0,
}


class Map(NamedTuple):
    """The way of one tensor of theirs to those of ours that it holds, without their leading axes, and back."""

    load: Callable[[np.ndarray, Shape], tuple[np.ndarray, ...]]
    save: Callable[[tuple[np.ndarray, ...], Shape], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weight:
    """Tensors of theirs of one name and the leaves of ours that they hold: one, or several that they join.

    {i} in the name is the layer and {e} the expert: our leaves are stacks over these, layers first.
    """

    theirs: str
    ours: tuple[Path, ...]
    map: Map

    @property
    def axes(self) -> tuple[str, ...]:
        """The leading axes of our leaves, by what counts them in the name."""
        return tuple(axis for axis in COUNTS if f"{{{axis}}}" in self.theirs)

    def indices(self, shape: Shape) -> Iterator[tuple[int, ...]]:
        """Where in the leading axes each tensor stands."""
        return itertools.product(*(range(COUNTS[axis](shape)) for axis in self.axes))

    def name(self, index: tuple[int, ...]) -> str:
        """Their name of the tensor that stands there."""
        return self.theirs.format(**dict(zip(self.axes, index, strict=True)))


@dataclasses.dataclass(frozen=True)
class Family:
    """A reader of configs and a table of weights, all but those of a score.

    `stem` begins the names of its classes in transformers. `prefix` begins the names of all weights but the head's;
    checkpoints of the bare decoder leave it out. `token`: it has a class for token classification, whose head is
    called `classifier`.
    """

    shape: Callable[[Mapping[str, Any]], Shape]
    weights: Callable[[Shape], tuple[Weight, ...]]
    stem: str
    prefix: str = "model."
    head: str = "lm_head.weight"
    classifier: str = "score"
    token: bool = True


def _single(load: Callable[[np.ndarray, Shape], np.ndarray], save: Callable[[np.ndarray, Shape], np.ndarray]) -> Map:
    return Map(lambda x, shape: (load(x, shape),), lambda parts, shape: save(parts[0], shape))


def _split(x: np.ndarray, shape: Shape) -> np.ndarray:
    heads = x.reshape(-1, shape.head_dim, *x.shape[1:])
    return np.moveaxis(heads, -1, 0) if x.ndim == 2 else heads


def _join(x: np.ndarray, shape: Shape) -> np.ndarray:
    x = np.moveaxis(x, 0, -1) if x.ndim == 3 else x
    return x.reshape(-1, *x.shape[2:])


SAME = _single(lambda x, shape: x, lambda x, shape: x)
# A matrix of torch's Linear, [out, in], or a bias, which stays as it is.
TURN = _single(lambda x, shape: x.T, lambda x, shape: x.T)
# [heads * head_dim, D] and [D, heads, head_dim]; of a bias [heads * head_dim] and [heads, head_dim].
HEADS = _single(_split, _join)
# [D, heads * head_dim] and [heads, head_dim, D].
OUT = _single(
    lambda x, shape: x.T.reshape(-1, shape.head_dim, x.shape[0]), lambda x, shape: x.reshape(-1, x.shape[-1]).T
)


def turned(inner: Map) -> Map:
    """`inner` of matrices that GPT-2's Conv1D keeps as [in, out]."""
    return Map(lambda x, shape: inner.load(x.T, shape), lambda parts, shape: inner.save(parts, shape).T)


def under(part: Map, rows: Callable[[Shape], Sequence[int]]) -> Map:
    """Several of ours, each by `part`, one under the other in theirs; `rows`: how many each has there."""

    def load(x: np.ndarray, shape: Shape) -> tuple[np.ndarray, ...]:
        pieces = np.split(x, np.cumsum(rows(shape))[:-1])
        return tuple(part.load(piece, shape)[0] for piece in pieces)

    def save(parts: tuple[np.ndarray, ...], shape: Shape) -> np.ndarray:
        return np.concatenate([part.save((one,), shape) for one in parts])

    return Map(load, save)


def _deal(x: np.ndarray, shape: Shape) -> tuple[np.ndarray, ...]:
    heads = x.reshape(shape.heads, 3, shape.head_dim, *x.shape[1:])
    return tuple(_split(heads[:, n].reshape(-1, *x.shape[1:]), shape) for n in range(3))


def _gather(parts: tuple[np.ndarray, ...], shape: Shape) -> np.ndarray:
    flat = [_join(part, shape) for part in parts]
    heads = [x.reshape(shape.heads, shape.head_dim, *x.shape[1:]) for x in flat]
    return np.stack(heads, axis=1).reshape(-1, *flat[0].shape[1:])


# GPT-NeoX: query, key and value of a head after each other, then those of the next.
INTERLEAVED = Map(_deal, _gather)


def plain(theirs: str, *ours: str) -> Weight:
    """A tensor that is the same on both sides."""
    return Weight(theirs, (ours,), SAME)


def linear(theirs: str, ours: str | tuple[str, ...], bias: bool, kernel: Map, bias_map: Map = SAME) -> list[Weight]:
    """A layer's kernel and, if there is one, its bias; `ours` names one linear map or those that theirs joins."""
    names = (ours,) if isinstance(ours, str) else ours
    paths = lambda leaf: tuple(("layers", name, leaf) for name in names)
    out = [Weight(f"{theirs}.weight", paths("kernel"), kernel)]
    return [*out, Weight(f"{theirs}.bias", paths("bias"), bias_map)] if bias else out
