"""What an objective is made of: one loss, or several in a weighted sum, each with its own denominator."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.step import Batch, Term, TrainState
from rlhf_jax.losses.supervised import SmoothTokens, Tokens
from rlhf_jax.ops.logprobs import TokenStats

TOKENS = (Tokens, SmoothTokens)  # what losses of single tokens take; their fields are statistics of the same names
# What a column of the data may say row by row in the place of a loss's argument of this name.
BY_ROW: Mapping[str, Callable[[Batch], Array]] = {
    "label_smoothing": lambda batch: 1 - batch["probability"],
    "margin": lambda batch: batch["margin"],
}
COLUMNS = {"label_smoothing": "probability", "margin": "margin"}  # and what that column is called


class Part(NamedTuple):
    """One loss of a sum; its numbers are hyper["loss"][name], its weight in the sum hyper["weights"][name]."""

    name: str
    loss: Callable[..., Array]
    takes: type  # of its first argument
    options: Mapping[str, Any]  # its arguments that are no numbers
    by_row: tuple[str, ...] = ()  # its arguments that columns of the batch give, keys of `BY_ROW`

    def numbers(self, hyper: Any, batch: Batch) -> dict[str, Any]:
        """The loss's arguments, numbers and others."""
        columns = {name: BY_ROW[name](batch).reshape(-1) for name in self.by_row}
        return {**hyper["loss"][self.name], **self.options, **columns}


def token_term(part: Part, stats: TokenStats, used: Array, hyper: Any, batch: Batch) -> Term:
    """The mean of a loss of single tokens over those of the global batch that are used.

    Args:
      used: [rows, T] float32, the weight of each token, 0 where it isn't trained.
    """
    tokens = part.takes(*(getattr(stats, name) for name in part.takes._fields))
    per_token = part.loss(tokens, **part.numbers(hyper, batch))
    total = jnp.sum(jnp.where(used > 0, per_token * used, 0))
    return Term(hyper["weights"][part.name], total, jnp.sum(used))


# What an algorithm is made of that freezes nothing and has no state of its own.


def rows_as_they_are(*_: Any) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """A make_prepare: the rows are the batch."""

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        yield rows

    return prepare


def nothing(*_: Any) -> None:
    """A make_carry, a make_advance and a make_skip."""
