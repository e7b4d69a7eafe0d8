"""What a set asks, whoever is asked it, and what was found: the parts that readers, measures and models share."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlhf_jax.data.rows import Refusal
from rlhf_jax.evaluate.intervals import Estimate, wilson
from rlhf_jax.evaluate.resampling import mean
from rlhf_jax.feedback.judges import Judge, Pair, Verdict


class Asked(NamedTuple):
    """A text to answer, in both its forms, and one answer to it; "" where the answer is to be written."""

    prompt: str  # as the user's message of a model with a chat template
    plain: str  # as a model without one reads it; the answer stands behind it
    option: str = ""


class Item(NamedTuple):
    """One question of a set.

    Attributes:
      where: file and line.
      prompt: as `Asked`; plain: "" where it is the same.
      options: answers that are weighed, without white space around them.
      right: places of those that count, such as the right one, or the one that a user's opinion asks for.
      few: places of the options that the reading with a single right one has; (): all.
      group: a part of the set, such as a subject.
      unit: items of one unit are resampled together; "": this item alone.
      twin: the same question in another form, with the same options.
      columns: what a check reads beside the answer.
    """

    where: str
    prompt: str
    plain: str = ""
    options: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    few: tuple[int, ...] = ()
    group: str = ""
    unit: str = ""
    twin: "Item | None" = None
    columns: Mapping[str, Any] = {}

    def asked(self, option: str = "") -> Asked:
        return Asked(self.prompt, self.plain or self.prompt, option)


class Examinee(Protocol):
    """What is asked of a model; everything below it is the model's own affair.

    A refusal in the place of a number or a text says why there is none: it is too long, or can't be rendered.
    """

    name: str
    writes: bool  # whether it has likelihoods and answers; a reward model has scores

    def likelihoods(self, asked: Sequence[Asked]) -> list[float | Refusal]:
        """The log-probability of each option behind its text, nats."""
        ...

    def answers(self, asked: Sequence[Asked]) -> list[str | Refusal]:
        """What it writes behind each text."""
        ...

    def scores(self, asked: Sequence[Asked]) -> list[float | Refusal]:
        """A reward model's score of each option behind its text."""
        ...

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """As a judge, each pair in both orders."""
        ...


def finite(value: float, what: str) -> float | Refusal:
    """A number of a model, or why it is none: a diverged model's is NaN, which no comparison would notice."""
    return value if math.isfinite(value) else Refusal(f"its {what} is not a number")


def unjudged(verdict: Verdict) -> str | None:
    """Why a verdict says nothing; None where it says something."""
    if verdict.probability is None:
        return verdict.why
    numbers = (verdict.probability, verdict.ahead, verdict.behind)
    return None if all(x is None or math.isfinite(x) for x in numbers) else "its probability is not a number"


class Against(NamedTuple):
    """What win rates need: the model that answers are held against, with its answers, and who judges."""

    name: str
    answers: Callable[[Sequence[Asked]], list[str | Refusal]]
    judge: Judge


class Figure(NamedTuple):
    """A figure of a model on a set.

    Attributes:
      count: items that it is of.
      chance: what guessing has; None: it isn't known.
      values: of each item, by where it stands, what the figure is the mean of; {} where it is no mean of items.
      units: of each item, alike, what it is resampled with; one that isn't there stands alone.
      groups: the same figure of each group, where there are several.
    """

    name: str
    estimate: Estimate
    count: int
    chance: float | None
    values: Mapping[str, float] = {}
    groups: Mapping[str, tuple[Estimate, int]] = {}
    units: Mapping[str, str] = {}


class Found(NamedTuple):
    """A model on a set: the figures, a line for every item that counts, and why others were left out, by where.

    `note` is what must be known to read the figures; "": nothing.
    """

    figures: list[Figure]
    samples: list[dict[str, Any]]
    left: dict[str, str]
    note: str = ""


Measure = Callable[[Sequence[Item], Examinee, int, Against | None], Found]


def estimated(items: Sequence[Item], values: Sequence[float], seed: int = 0, share: bool = True) -> Estimate:
    """The mean over items, at least one, with its 95% interval.

    Wilson's for a share of items that stand alone; where several items are one unit, and for a mean that isn't a share,
    a bootstrap over units. Half points count in a share as what they are.
    """
    units = [item.unit or item.where for item in items]
    numbers = np.asarray(values, np.float64)
    if share and len(set(units)) == len(units):
        part = float(numbers.mean())
        return Estimate(part, *wilson(part, len(numbers)))
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    return mean(numbers, np.asarray([places[unit] for unit in units]), seed=seed)


def figure(
    name: str,
    items: Sequence[Item],
    values: Sequence[float],
    chance: float | None = None,
    *,
    seed: int = 0,
    share: bool = True,
) -> list[Figure]:
    """The figure of these items with those of their groups; none where there is no item.

    Args: share: whether the values are from 0 to 1 and their mean is a share of items.
    """
    if not items:
        return []
    by: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        by.setdefault(item.group, []).append(place)
    some = lambda places: estimated([items[i] for i in places], [values[i] for i in places], seed, share)
    groups = {group: (some(places), len(places)) for group, places in sorted(by.items())} if len(by) > 1 else {}
    own = {item.where: float(value) for item, value in zip(items, values, strict=True)}
    units = {item.where: item.unit or item.where for item in items}
    return [Figure(name, estimated(items, values, seed, share), len(items), chance, own, groups, units)]
