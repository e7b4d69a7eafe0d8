"""A study written down: question, set-up, figures with every seed, claims and remedies with intervals."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from rlhf_jax import fields, report
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.lab import findings
from rlhf_jax.lab.study import Seen, Study
from rlhf_jax.report.blocks import Block, Code, Frontier, Lines, Spot, Table, Text
from rlhf_jax.report.figures import save
from rlhf_jax.report.markdown import markdown
from rlhf_jax.report.wording import number

OPENING = ("Question", "Command")  # what a page begins with, without headings: the command is of all that follows


class Results(NamedTuple):
    """All that a page is made of, besides the study itself."""

    command: str
    made: str  # on which machine, from which commit, with which versions
    knobs: Mapping[str, Any]
    seeds: Sequence[Seen]

    def to_json(self) -> str:
        """As it is kept; `from_json` reads it."""
        return json.dumps(self._asdict() | {"seeds": [vars(seed) for seed in self.seeds]}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """What `to_json` wrote."""
        told = json.loads(text)
        return cls(**told | {"seeds": [Seen(**seed) for seed in told["seeds"]]})


def write(study: Study, results: Results, folder: epath.Path) -> epath.Path:
    """NAME.md with its pictures NAME-PICTURE.png, NAME.html, and NAME.json, which they can be made from again.

    Returns: the Markdown page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = study.pictures(results.seeds)
    files = {block.title: f"{study.name}-{name}.png" for name, block in drawn.items()}
    for block in drawn.values():
        save(block, folder / files[block.title])
    blocks = blocks_of(study, results, [*drawn.values()])
    (folder / f"{study.name}.json").write_text(results.to_json())
    report.write(folder / f"{study.name}.html", study.title, blocks)
    (page := folder / f"{study.name}.md").write_text(markdown(study.title, blocks, files, OPENING))
    return page


def blocks_of(study: Study, results: Results, drawn: Sequence[Lines | Frontier]) -> list[Block]:
    """The page's parts in their order."""
    seeds = results.seeds
    own = ", ".join(str(seed.seed) for seed in seeds)
    took = f"{statistics.median(seed.seconds for seed in seeds):.0f} s"
    if used := [seed.processor for seed in seeds if seed.processor is not None]:
        took += f", of the processor {statistics.median(used):.0f} s"
    ran = f"Seeds {own}; a seed took {took} (the median), without the making of its start. {results.made}."
    return [
        Text("Question", [study.question]),
        Code("Command", results.command, ran),
        Text("Set-up", [*study.setup]),
        _knobs(study, results.knobs),
        *drawn,
        _claims(study, seeds),
        *_remedies(study, seeds),
        *([Text("Notes", ["\n".join(f"- {note}" for note in study.notes)])] if study.notes else []),
        _figures(study, seeds),
        *_each(study, seeds),
        *([Text("References", ["; ".join(study.references) + "."])] if study.references else []),
    ]


def told(estimate: Estimate | None) -> str:
    """A figure with its interval.

    >>> print(told(Estimate(0.5, 0.25, 0.75)), told(None), sep="; ")
    0.500 (0.250 to 0.750);
    """
    if estimate is None:
        return ""
    return f"{number(estimate.mean)} ({number(estimate.low)} to {number(estimate.high)})"


def _knobs(study: Study, knobs: Mapping[str, Any]) -> Table:
    meaning = {leaf.path: leaf.meaning for leaf in fields.leaves(study.knobs)}
    rows = [[name, fields.text(value), meaning[name]] for name, value in knobs.items()]
    return Table("Settings", ["--knobs", "value", "what it is"], rows)


def _measures(study: Study, seeds: Sequence[Seen], conditions: Iterable[str]) -> list[str]:
    there = {measure for seed in seeds for name in conditions for measure in seed.figures.get(name, {})}
    return [measure for measure in study.measures if measure in there]


def _figures(study: Study, seeds: Sequence[Seen]) -> Table:
    conditions = [name for name in study.conditions if any(name in seed.figures for seed in seeds)]
    shown = _measures(study, seeds, conditions)
    rows = [[name, *(told(findings.value(seeds, name, measure)) for measure in shown)] for name in conditions]
    what = [f"- `{name}`: {study.conditions[name]}." for name in conditions]
    what += [f"- {measure}: {study.measures[measure]}." for measure in shown]
    note = "Means over the seeds with 95% t intervals.\n\n" + "\n".join(what)
    return Table("Figures", ["", *shown], rows, note)


def _claims(study: Study, seeds: Sequence[Seen]) -> Table:
    rows = []
    for one in findings.found(study, seeds):
        claim = one.claim
        of = f"{claim.measure}, {claim.condition}" + (f" less {claim.than}" if claim.than else "")
        rows.append([claim.says, of, told(one.difference), one.verdict])
    note = (
        "Differences are of the same seed. Shown: the 95% t interval over the seeds lies on the claimed side of zero."
    )
    return Table("What happens", ["claim", "measured as", "difference", "verdict"], rows, note)


def _remedies(study: Study, seeds: Sequence[Seen]) -> list[Block]:
    if not study.remedies:
        return []
    mended = findings.mended(study, seeds)
    prices = list(dict.fromkeys(price for one in mended for price in one.prices))
    rows = []
    for one in mended:
        remedy = one.remedy
        rows.append(
            [f"`{remedy.condition}`: {remedy.does}", f"{remedy.measure}, against `{remedy.than}`", told(one.difference)]
            + [one.verdict, *(told(one.prices.get(price)) for price in prices)]
        )
    columns = ["remedy", "what it should mend", "changes it by", "verdict", *(f"price: {one}" for one in prices)]
    failed = [
        f"`{one.remedy.condition}` for {one.remedy.measure} ({one.verdict})"
        for one in mended
        if one.verdict != findings.HELPS["shown"]
    ]
    note = f"What did not help here: {'; '.join(dict.fromkeys(failed))}." if failed else "All of them helped here."
    return [Table("What mends it, and at what price", columns, rows, note)]


def _each(study: Study, seeds: Sequence[Seen]) -> list[Block]:
    rows = []
    for name in study.conditions:
        for measure in _measures(study, seeds, [name]):
            values = [seed.value(name, measure) for seed in seeds]
            rows.append([name, measure, ", ".join("none" if value is None else number(value) for value in values)])
    return [Table("Every seed", ["condition", "measure", f"seeds {', '.join(str(s.seed) for s in seeds)}"], rows)]


# Pictures that several studies draw


def compared(
    seeds: Sequence[Seen], title: str, measure: str, curves: Mapping[str, Mapping[str, str]], x_label: str = ""
) -> Frontier:
    """A measure by condition, every seed a point: for each curve, by the name below the axis, the condition."""
    names = list(dict.fromkeys(name for curve in curves.values() for name in curve))
    spots: dict[str, list[Spot]] = {}
    for curve, conditions in curves.items():
        for name, condition in conditions.items():
            points = [(float(names.index(name)), v) for s in seeds if (v := s.value(condition, measure)) is not None]
            spots.setdefault(curve, []).append(("", points))
    return Frontier(title, x_label, measure, spots, x_names=names)


def traded(seeds: Sequence[Seen], title: str, x: str, y: str, conditions: Iterable[str]) -> Frontier:
    """One measure against another: each condition a point of the name, every seed a small one beside it."""
    curves = {}
    for name in conditions:
        points = [(seed.value(name, x), seed.value(name, y)) for seed in seeds]
        curves[name] = [("", [(a, b) for a, b in points if a is not None and b is not None])]
    return Frontier(title, x, y, curves)
