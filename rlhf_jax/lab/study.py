"""What a study is: a question, what one seed measures, and the claims that its seeds are held to."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rlhf_jax.lab.ground import Ground
from rlhf_jax.report.blocks import Frontier, Lines

Figures = Mapping[str, Mapping[str, float]]  # condition -> measure -> value
Curve = Mapping[str, Sequence[float]]  # "x" and "y"
Sign = Literal[-1, 0, 1]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one seed measured. A condition may lack a measure; a number that isn't finite counts as lacking."""

    figures: Figures
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)  # by name, for pictures


@dataclasses.dataclass(frozen=True)
class Seen:
    """A seed that is finished."""

    seed: int
    seconds: float  # that it took, the making of its start left out
    figures: Figures
    curves: Mapping[str, Curve]
    processor: float | None = None  # seconds of it, which don't depend on what else the machine does

    def value(self, condition: str, measure: str) -> float | None:
        """A figure; None where the seed has none."""
        return self.figures.get(condition, {}).get(measure)


@dataclasses.dataclass(frozen=True)
class Claim:
    """`measure` of `condition`, less that of `than`, has the sign `sign` on the mean over seeds."""

    says: str  # the claim as a sentence without a full stop
    measure: str
    condition: str
    than: str | None = None  # another condition; None: nothing is taken off
    sign: Sign = 1  # 0: the claim is a question, whose answer may be either


@dataclasses.dataclass(frozen=True)
class Remedy:
    """What is said to mend the failure: what it does to the condition that fails, and what it costs there."""

    condition: str  # with the remedy
    than: str  # without it
    measure: str
    sign: Sign  # of what mends it
    does: str  # what the remedy is, in a few words
    prices: tuple[str, ...] = ()  # measures that it may cost


@dataclasses.dataclass(frozen=True)
class Study:
    """One study; docs/lab.md says how to write one.

    `measure` trains and measures one seed; what it trains lies in the ground's folder, so that a seed that was
    interrupted goes on. `knobs` is an instance of a frozen dataclass with annotated fields, the settings that users may
    change.
    """

    name: str
    title: str
    question: str
    setup: Sequence[str]  # paragraphs, in Markdown
    knobs: Any
    measure: Callable[[Ground, Any], Measured]
    measures: Mapping[str, str]  # each measure that pages show, with what it is
    conditions: Mapping[str, str]  # each condition that pages show, with what it is
    phenomena: Sequence[Claim]
    remedies: Sequence[Remedy] = ()
    pictures: Callable[[Sequence[Seen]], Mapping[str, Lines | Frontier]] = lambda seeds: {}
    notes: Sequence[str] = ()  # what a reader must know besides, and what did not work
    start: str = "tiny"  # the start of the world that a seed stands on, world:START@SEED
    references: Sequence[str] = ()
