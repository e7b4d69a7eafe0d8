"""What reward models are worth, as tables and pictures of a page."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlhf_jax.evaluate.calibration import Calibration
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.judgements import Agreement, Group, Judged
from rlhf_jax.evaluate.process import JudgedSteps
from rlhf_jax.evaluate.proxies import GOLD, Point
from rlhf_jax.report.blocks import Block, Lines, Table
from rlhf_jax.report.wording import number

LABELLERS = 30  # most that a table lists
INTERVALS = "In brackets 95% bootstrap intervals that resample prompts."


class View(NamedTuple):
    """A score, such as a model's or one that an ensemble's members make together, on some rows."""

    score: str
    rows: str
    judged: Judged
    calibration: Calibration


class Together(NamedTuple):
    """The members of an ensemble on some rows."""

    model: str
    rows: str
    agreement: Agreement


class Picked(NamedTuple):
    """The best of n of a policy's answers by one score."""

    score: str
    points: Sequence[Point]


class Steps(NamedTuple):
    """A model of steps on some rows."""

    model: str
    rows: str
    judged: JudgedSteps


def said(estimate: Estimate | None) -> str:
    """An estimate as text, its interval in brackets."""
    if estimate is None:
        return "none"
    mean, low, high = map(number, estimate)
    return f"{mean} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"


def percent(estimate: Estimate | None) -> str:
    """A share as text, in percent, its interval in brackets.

    >>> percent(Estimate(0.5, 0.25, 0.754)).replace("\N{NO-BREAK SPACE}", " ")
    '50.0 (25.0 to 75.4)'
    """
    if estimate is None:
        return "none"
    mean, low, high = (f"{100 * x:.1f}" for x in estimate)
    return f"{mean} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"


def tables(
    views: Sequence[View], together: Sequence[Together], picked: Sequence[Picked], steps: Sequence[Steps]
) -> list[Table]:
    """All figures, those that there are."""
    made = []
    if views:
        made += [accuracy(views), calibration(views), length(views), *by_labeller(views)]
    if together:
        made.append(agreement(together))
    if picked:
        made += best_of(picked)
    if steps:
        made.append(of_steps(steps))
    return made


def accuracy(views: Sequence[View]) -> Table:
    """How often the better answer scores higher."""
    golden = any(view.judged.ceiling is not None for view in views)
    rows = []
    for view in views:
        overall, longer = view.judged.overall, view.judged.by["longer"]
        sides = [percent(longer[side].accuracy) if side in longer else "none" for side in ("better", "worse")]
        ceiling = [percent(view.judged.ceiling)] if golden else []
        of = f"{overall.count:,} of {overall.prompts:,}"
        rows.append((view.score, view.rows, of, percent(overall.accuracy), *ceiling, *sides))
    columns = ["score", "rows", "pairs of prompts", "accuracy, %", "better longer, %", "better shorter, %"]
    note = f"Share of comparisons whose better answer scores higher; equal scores count a half. {INTERVALS}"
    if golden:
        columns.insert(4, "ceiling, %")
        note += " Ceiling: the same of the known reward's own order."
    return Table("Accuracy", columns, rows, note)


def calibration(views: Sequence[View]) -> Table:
    """Chances against shares of labels."""
    rows = [
        (v.score, v.rows, said(c.ece), number(c.floor), said(c.brier), said(c.log_loss))
        for v in views
        for c in (v.calibration,)
    ]
    note = (
        "Chances sig(difference of scores) against labels. Floor: the calibration error that a model of just these "
        f"chances would have if they were right. {INTERVALS}"
    )
    return Table("Calibration", ("score", "rows", "calibration error", "floor", "Brier score", "log loss"), rows, note)


def length(views: Sequence[View]) -> Table:
    """Score against length."""
    names = list(views[0].judged.length)
    rows = [(view.score, view.rows, *(said(view.judged.length[name]) for name in names)) for view in views]
    note = f"Correlation of the score with the tokens of an answer, over answers. {INTERVALS}"
    return Table("Length", ("score", "rows", *names), rows, note)


def by_labeller(views: Sequence[View]) -> list[Table]:
    """One table, if labellers are named."""
    rows = []
    for view in views:
        groups = sorted(view.judged.by["labeller"].items(), key=lambda one: -one[1].count)
        rows += [(view.score, view.rows, name, g.count, percent(g.accuracy)) for name, g in groups[:LABELLERS]]
    note = f"At most {LABELLERS} labellers, those of the most comparisons. {INTERVALS}"
    columns = ("score", "rows", "labeller", "comparisons", "accuracy, %")
    return [Table("Accuracy by labeller", columns, rows, note)] if rows else []


def agreement(together: Sequence[Together]) -> Table:
    """Members of ensembles."""
    rows = [
        (one.model, one.rows, percent(a.all), percent(a.pairs), said(a.spread), said(a.relative))
        for one in together
        for a in (one.agreement,)
    ]
    note = (
        "Share of comparisons that all members, or two of them, order alike; the standard deviation over members of "
        f"the score difference, and that over the size of the mean difference. {INTERVALS}"
    )
    columns = ("model", "rows", "all agree, %", "two agree, %", "spread", "relative")
    return Table("Members of ensembles", columns, rows, note)


def best_of(picked: Sequence[Picked]) -> list[Table]:
    """By the known reward, if there is one, and by the score that picks; a column for each n."""
    sizes = [point.n for point in picked[0].points]
    note = (
        f"The best of n answers, mean over all subsets of those drawn; KL log n - (n - 1) / n, nats: "
        f"{', '.join(number(point.kl) for point in picked[0].points)}. {INTERVALS}"
    )
    made = []
    own = [one for one in picked if one.score != GOLD]  # its own score is the known reward
    ways = (("known reward", lambda p: p.gold, picked), ("the score that picks", lambda p: p.proxy, own))
    for title, pick, shown in ways:
        rows = [(one.score, *(said(pick(point)) for point in one.points)) for one in shown if pick(one.points[0])]
        if rows:
            made.append(Table(f"Best of n: {title}", ("picked by", *(f"n {n}" for n in sizes)), rows, note))
    return made


def of_steps(steps: Sequence[Steps]) -> Table:
    """Models of steps."""
    rows = []
    for one in steps:
        j = one.judged
        figures = (j.accuracy, j.majority, j.first_wrong, j.of_wrong, j.of_right)
        rows.append((one.model, one.rows, f"{j.steps:,} of {j.solutions:,}", *map(percent, figures)))
    columns = (
        "model", "rows", "steps of solutions", "right, %", "majority, %", "first wrong found, %", "of wrong, %",
        "of right, %",
    )  # fmt: skip
    note = (
        "Right: steps whose score has the sign of their label. Majority: the same of always saying the more frequent "
        "label. First wrong found: solutions whose first step with a score below 0 is the first wrong one, or that "
        "have neither; also of those with a wrong step, and of those without. Neutral steps are not counted. In "
        "brackets 95% bootstrap intervals that resample solutions."
    )
    return Table("Steps", columns, rows, note)


def pictures(views: Sequence[View], picked: Sequence[Picked]) -> list[Block]:
    """Reliability, accuracy by margin, score against length, and what picking gains; of the rows that stand first."""
    blocks: list[Block] = []
    shown = [view for view in views if view.rows == views[0].rows]
    if shown:
        rows, more = shown[0].rows, "Bands are 95% bootstrap intervals that resample prompts."
        bins = {v.score: [(b.confidence, b.share) for b in v.calibration.bins] for v in shown}
        ideal = {"as it should be": ([0.5, 1.0], [0.5, 1.0])}
        confidence, agree = "confidence", "share of labels that agree"
        blocks.append(_banded(f"Reliability on {rows}", confidence, agree, bins, more, ideal))
        margins = {view.score: _along(view.judged.by["margin"]) for view in shown}
        label = "size of the score difference"
        blocks.append(_banded(f"Accuracy by margin on {rows}", label, "accuracy", margins, more))
        golden = {v.score: _along(v.judged.by["gold margin"]) for v in shown if "gold margin" in v.judged.by}
        if golden:
            label = "size of the known reward's difference"
            blocks.append(_banded(f"Accuracy by known margin on {rows}", label, "accuracy", golden, more))
        lengths = {view.score: view.judged.lengths for view in shown}
        blocks.append(_banded(f"Score against length on {rows}", "tokens of an answer", "mean score", lengths, more))
    golden = {one.score: [(p.kl, p.gold) for p in one.points if p.gold is not None] for one in picked}
    own = {one.score: [(p.kl, p.proxy) for p in one.points] for one in picked if one.score != GOLD}
    for title, curves in (("known reward", golden), ("the score that picks", own)):
        if any(curves.values()):
            note = "Bands are 95% bootstrap intervals that resample prompts."
            blocks.append(_banded(f"Best of n: {title}", "KL log n - (n - 1) / n, nats", title, curves, note))
    return blocks


def _along(groups: Mapping[str, Group]) -> list[tuple[float, Estimate]]:
    return [(group.at, group.accuracy) for group in groups.values() if group.at is not None]


def _banded(
    title: str,
    x: str,
    y: str,
    curves: Mapping[str, Sequence[tuple[float, Estimate]]],
    note: str,
    others: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Lines:
    """Curves with the intervals of their points, and others without."""
    there = {name: curve for name, curve in curves.items() if curve}
    series = {name: ([at for at, _ in curve], [e.mean for _, e in curve]) for name, curve in there.items()}
    bands = {name: ([e.low for _, e in curve], [e.high for _, e in curve]) for name, curve in there.items()}
    return Lines(title, x, y, {**series, **(others or {})}, note, bands=bands)
