"""Examples before they are tokenised, and what rows of one prompt make together."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.config import Data
from rlhf_jax.data.conversions import NEEDS, Form, opening
from rlhf_jax.data.rows import Text
from rlhf_jax.errors import UserError

# Columns that reward functions can't be given: their own arguments have these names, or would have them.
ARGUMENTS = ("prompt", "prompts", "completion", "completions", "messages")
Shares = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """One example before tokenising; `conversions.Made` and `dataset.Example` say what is what.

    `preferred` is empty where the ranks say it.
    """

    prompt: Text
    completions: tuple[Text, ...]
    labels: tuple[bool, ...]
    ranks: tuple[float, ...]
    ends: tuple[int, ...]
    step_labels: tuple[float, ...]
    probability: float
    index: int
    source: int
    where: str
    tools: str
    margin: float = 0.0
    labeller: str = ""
    preferred: Shares = ()
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check(config: Data, form: Form) -> None:
    """Raises: UserError for labels of pairs that this form or another setting has no place for."""
    for name in ("probability", "margin"):
        if form == "prompt" and getattr(config, name) is not None:
            raise UserError(
                f"data.{name} names a column of pairs, and this loss needs {NEEDS[form]}; drop --config.data.{name}"
            )
    for name, does in (("merge", "makes soft labels of"), ("ties", "keeps ties of")):
        if getattr(config, name) and form not in ("pair", "ranking"):
            raise UserError(
                f"data.{name} {does} pairs and rankings, and this loss needs {NEEDS[form]}; drop --config.data.{name}"
            )
    if config.merge and config.margin is not None:
        raise UserError(
            f"data.merge can't make one margin of those of several rows (data.margin={config.margin}); "
            "drop --config.data.margin or --config.data.merge"
        )


def is_text(prompt: Text, completions: Sequence[Text]) -> bool:
    """Whether a row is one text without a prompt, such as a document, which may be cut anywhere."""
    return prompt == "" and len(completions) == 1


def prompt_text(item: Item) -> bytes:
    """What two rows of one prompt share: of a whole conversation, the turns before its first answer.

    Texts without a prompt share nothing unless they are the same.
    """
    text = item.prompt or next(iter(item.completions), "")
    if not item.prompt and not isinstance(text, str):
        text = opening(text)
    if not isinstance(text, str):  # a plain message has two entries, whatever a message may hold besides
        text = tuple(message if message.more else message[:2] for message in text)
    return json.dumps(text).encode()


# Prompts alone


def beside(columns: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says beside its prompt and its answer: what reward functions are given by name."""
    return {name: value for name, value in columns.items() if name not in ARGUMENTS}


def written(columns: Mapping[str, Any]) -> str:
    """Columns as JSON text: the same for the same values, in whatever order the record names them."""
    return json.dumps(columns, sort_keys=True, default=repr)  # a table may hold dates and bytes


def distinct(items: Iterable[Item], held_out: int) -> tuple[list[Item], list[str]]:
    """Prompts, of those that are the same in text, tools and columns the first; and where the others stood.

    Args:
      held_out: the first source that is held out; its prompts are never one with those that are trained.
    """
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        key = item.prompt, item.tools, written(item.columns), item.source >= held_out
        found.setdefault(key, []).append(item)
    return [same[0] for same in found.values()], _merged(found.values())


def _merged(found: Iterable[Sequence[Item]]) -> list[str]:
    """Where those stood that became one with the first of each group; a row is not merged with itself."""
    return [item.where for first, *others in found for item in others if item.where != first.where]


# Labels of several labellers


def preferred(ranks: Sequence[float], ties: bool = False) -> Shares:
    """Which completion one ranking puts above which: 1 or 0; of equal ranks 0.5 with `ties`, and else 0 either way.

    >>> preferred((1, 2, 2), ties=True)
    ((0.0, 1.0, 1.0), (0.0, 0.0, 0.5), (0.0, 0.5, 0.0))
    """
    even = 0.5 if ties else 0.0
    above = lambda i, j: 0.0 if i == j else even if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
    return tuple(tuple(above(i, j) for j in range(len(ranks))) for i in range(len(ranks)))


def with_ties(item: Item) -> Item:
    """The item with its ties as labels of their own."""
    return (
        item if item.preferred or not item.ranks else dataclasses.replace(item, preferred=preferred(item.ranks, True))
    )


def merge(items: Iterable[Item], held_out: int, ties: bool = False) -> tuple[list[Item], list[str]]:
    """Items of one prompt with the same answers as one, at the place of the first; and where the others stood.

    The labels of one are the mean over its rows: of pairs the probability, with the likelier answer as the chosen
    one (in doubt the first row's), of groups the share of rows that put an answer above another, and the mean rank.

    Args:
      held_out: the first source that is held out; its rows are never merged with rows that are trained.
      ties: see `preferred`.
    """
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        answers = frozenset(Counter(item.completions).items())
        found.setdefault((item.prompt, item.tools, answers, item.source >= held_out), []).append(item)
    made = [
        same[0] if len(same) == 1 else (_group(same, ties) if same[0].ranks else _pair(same)) for same in found.values()
    ]
    return made, _merged(found.values())


def _pair(same: Sequence[Item]) -> Item:
    first, *_ = same
    chances = [one.probability if one.completions == first.completions else 1 - one.probability for one in same]
    better = _mean(chances)
    if better >= 0.5:
        return dataclasses.replace(first, probability=better, labeller="")
    worse = _mean([1 - chance for chance in chances])  # as if the rows had come the other way round, to the bit
    return dataclasses.replace(first, completions=first.completions[::-1], probability=worse, labeller="")


def _group(same: Sequence[Item], ties: bool) -> Item:
    first, *_ = same
    places = _by_text(first)
    # The ranks of each row in the order of the first one's answers.
    aligned = [dict(zip(places, (one.ranks[i] for i in _by_text(one)), strict=True)) for one in same]
    ranks = [tuple(row[i] for i in range(len(places))) for row in aligned]
    votes = [preferred(row, ties) for row in ranks]
    shares = tuple(tuple(map(_mean, zip(*rows, strict=True))) for rows in zip(*votes, strict=True))
    means = tuple(map(_mean, zip(*ranks, strict=True)))
    return dataclasses.replace(first, ranks=means, preferred=shares, labeller="")


def _by_text(item: Item) -> list[int]:
    """The places of an item's answers by their text, those of one text by rank."""
    return sorted(range(len(item.ranks)), key=lambda i: (repr(item.completions[i]), item.ranks[i]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
