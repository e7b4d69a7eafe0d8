"""What a report can be made of. Each block has a title, and most a note that stands below it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import SupportsFloat, SupportsIndex

from rlhf_jax.errors import UserError

Cell = str | SupportsFloat | SupportsIndex  # numpy's numbers too
Curve = tuple[Sequence[float], Sequence[float]]
Spot = tuple[str, Sequence[tuple[float, float]]]  # what a point is called, and where each seed put it
Sample = tuple[str, Sequence[tuple[str, float | None]]]


def _something(block: "Block", content: object) -> None:
    if not content:
        raise UserError(f"{type(block).__name__} {block.title!r} has nothing to show; leave it out or give it content.")


def _of_length(block: "Block", what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"{type(block).__name__} {block.title!r}: {what} has {found} entries, not {wanted}")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of names and numbers; floats are shown to three digits, so give text where that is not wanted."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        _something(self, self.rows)
        for index, row in enumerate(self.rows):
            _of_length(self, f"row {index}", len(row), len(self.columns))


@dataclasses.dataclass(frozen=True)
class Lines:
    """Curves: for each name its x and its y. What can't be drawn is left out, and the page says so.

    `bands` are intervals of y, (low, high) at each x of a series.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Curve]
    note: str = ""
    log_y: bool = False
    bands: Mapping[str, Curve] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _something(self, self.series)
        for name, (x, y) in self.series.items():
            _of_length(self, f"the y of {name!r}", len(y), len(x))
            if not len(x):
                raise UserError(f"Lines {self.title!r}: the series {name!r} is empty; leave it out.")
        for name, (low, high) in self.bands.items():
            for what, ends in (("low", low), ("high", high)):
                _of_length(self, f"the {what} of {name!r}", len(ends), len(self.series[name][0]))


@dataclasses.dataclass(frozen=True)
class Points:
    """A few named points, (x, y) or, with the ends of an interval of y, (x, y, low, high)."""

    title: str
    x_label: str
    y_label: str
    points: Mapping[str, tuple[float, float] | tuple[float, float, float, float]]
    note: str = ""

    def __post_init__(self) -> None:
        _something(self, self.points)
        for name, point in self.points.items():
            _of_length(self, f"the point {name!r}", len(point), 4 if len(point) > 2 else 2)


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Curves through points that several seeds gave: for each name its points in order, (label, (x, y) a seed).

    A curve goes through the means over seeds. With `x_names` an x counts through these names.
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[Spot]]
    note: str = ""
    log_x: bool = False
    x_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        _something(self, self.curves)
        for name, spots in self.curves.items():
            if not any(seeds for _, seeds in spots):
                raise UserError(f"Frontier {self.title!r}: the curve {name!r} is empty; leave it out.")


@dataclasses.dataclass(frozen=True)
class Bars:
    """Means with the ends of their 95% intervals, (mean, low, high), from zero."""

    title: str
    y_label: str
    bars: Mapping[str, tuple[float, float, float]]
    note: str = ""

    def __post_init__(self) -> None:
        _something(self, self.bars)
        for name, bar in self.bars.items():
            _of_length(self, f"the bar {name!r}", len(bar), 3)


@dataclasses.dataclass(frozen=True)
class Samples:
    """What several models say to the same prompts: rows of (prompt, a (text, score or None) for each column)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sample]
    note: str = ""

    def __post_init__(self) -> None:
        _something(self, self.rows)
        for index, (_, texts) in enumerate(self.rows):
            _of_length(self, f"row {index}", len(texts), len(self.columns))


@dataclasses.dataclass(frozen=True)
class Text:
    """Paragraphs."""

    title: str
    paragraphs: Sequence[str]
    note: str = ""

    def __post_init__(self) -> None:
        _something(self, self.paragraphs)


@dataclasses.dataclass(frozen=True)
class Code:
    """Text in its own lines: a command, a config."""

    title: str
    text: str
    note: str = ""

    def __post_init__(self) -> None:
        _something(self, self.text)


Picture = Lines | Points | Frontier | Bars
Block = Table | Lines | Points | Frontier | Bars | Samples | Text | Code
