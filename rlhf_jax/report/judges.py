"""What judges of pairs are worth, as tables."""

from collections.abc import Mapping

from rlhf_jax.evaluate.judges import Figures, Leaning, Together
from rlhf_jax.report.blocks import Table
from rlhf_jax.report.rewards import INTERVALS, percent

NONE = "none"


def tables(judges: Mapping[str, Figures], together: Together | None) -> list[Table]:
    """All figures that there are, by the names of the judges."""
    made = [verdicts(judges), position(judges), agreement(judges), length(judges), models(judges)]
    return [table for table in [*made, None if together is None else between(together)] if table is not None]


def verdicts(judges: Mapping[str, Figures]) -> Table:
    """How many pairs were judged, and why others were not."""
    rows = [
        (name, f"{found.judged:,} of {found.count:,}", "; ".join(f"{n:,}: {why}" for why, n in found.failed.items()))
        for name, found in judges.items()
    ]
    return Table("Verdicts", ("judge", "pairs judged", "not judged"), rows)


def position(judges: Mapping[str, Figures]) -> Table | None:
    """What the order of the answers does."""
    rows = [
        (name, f"{p.count:,}", percent(p.flips), percent(p.first))
        for name, found in judges.items()
        for p in (found.position,)
        if p is not None
    ]
    note = (
        "Flips: share of pairs whose verdict is another one when the answers change places. Shown first: mean chance "
        f"of the answer that is shown first; 50 without a preference. {INTERVALS}"
    )
    return Table("Position", ("judge", "pairs", "flips, %", "shown first, %"), rows, note) if rows else None


def agreement(judges: Mapping[str, Figures]) -> Table | None:
    """How often a judge says what people said."""
    rows = [
        (name, part, f"{one.count:,} of {one.prompts:,}", percent(one.accuracy))
        for name, found in judges.items()
        for part, one in found.agreement.items()
    ]
    note = (
        "Share of labelled pairs whose better answer is the judge's as well; equal chances of a judge count a half, "
        f"and pairs that the labels hold for equal are left out. A coin has 50. {INTERVALS}"
    )
    columns = "judge", "rows", "pairs of prompts", "agrees with the labels, %"
    return Table("Agreement with the labels", columns, rows, note) if rows else None


def length(judges: Mapping[str, Figures]) -> Table | None:
    """How often the longer answer is preferred."""
    rows = [(name, *_leaning(found.longer)) for name, found in judges.items() if found.longer is not None]
    note = (
        "Share of pairs in which the answer with more characters is preferred, by the judge and by the labels, and the "
        f"judge's share less theirs on labelled pairs. {INTERVALS}"
    )
    return Table("Length", ("judge", "pairs", *COLUMNS), rows, note) if rows else None


def models(judges: Mapping[str, Figures]) -> Table | None:
    """How often the answers of each model are preferred."""
    rows = [
        (name, f"{model} (its own)" if model == name else model, *_leaning(one))
        for name, found in judges.items()
        for model, one in found.models.items()
    ]
    note = (
        "Share of pairs in which the model's answer is preferred to another's. A judge that favours its own has a "
        f"difference above 0 there: name it as its answers are named, with --names. {INTERVALS}"
    )
    return Table("Models", ("judge", "answers of", "pairs", *COLUMNS), rows, note) if rows else None


COLUMNS = "judge, %", "labels, %", "difference, points"


def _leaning(found: Leaning) -> tuple[str, str, str, str]:
    told = [NONE if one is None else percent(one) for one in (found.people, found.gap)]
    return f"{found.count:,}", percent(found.judge), told[0], told[1]


def between(found: Together) -> Table:
    """How far judges say the same."""
    rows = [(f"{first}, {second}", percent(share)) for (first, second), share in found.pairs.items()]
    if len(rows) > 1:
        rows.append(("all", percent(found.alike)))
    note = (
        f"Share of the {found.count:,} pairs that all judged of which both hold the same answer for the better one. "
        f"On {found.differ:,} pairs they don't all say the same. {INTERVALS}"
    )
    return Table("Judges among themselves", ("judges", "say the same, %"), rows, note)
