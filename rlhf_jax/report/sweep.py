"""A sweep as a table and pictures: settings side by side, every one over its seeds.

A line of the sweep's table.jsonl is one member: its `sweep` values, its `seed`, its effective `loss`, the last row of
its `eval`, and, where its answers were scored, the estimates `score`, `gain`, `kl` and `tokens`.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from rlhf_jax.errors import UserError
from rlhf_jax.fields import text
from rlhf_jax.report import figures as pictures
from rlhf_jax.report.blocks import Frontier, Lines, Spot
from rlhf_jax.report.wording import number, visible

Line = Mapping[str, Any]
SEED = "seed"
MOST = 12  # curves of one picture that can still be told apart
# Columns of the table, where a line holds them, and how they are told.
FIGURES: dict[str, tuple[tuple[str, ...], str]] = {
    "score": (("score", "mean"), "of sampled answers to held-out prompts, the mean over prompts"),
    "KL, nats": (("kl", "mean"), "of an answer to the start model, summed over its tokens"),
    "tokens": (("tokens", "mean"), "of an answer"),
    "held-out margin": (("eval", "eval/rewards/margins"), "reward of the chosen less that of the rejected"),
    "held-out accuracy": (("eval", "eval/rewards/accuracies"), "share of pairs with a margin above zero"),
    "held-out loss": (("eval", "eval/loss"), "of the last evaluation"),
}


class Setting(NamedTuple):
    """What members share that differ in nothing but their seed."""

    values: dict[str, Any]  # of the swept fields, the seed left away
    members: list[Line]


def settings(lines: Sequence[Line]) -> list[Setting]:
    """The settings in the order of the sweep. Errors: UserError where there is no line."""
    if not lines:
        raise UserError("the sweep has no finished member; nothing can be shown of it.")
    found: dict[str, Setting] = {}
    for line in lines:
        values = {field: value for field, value in line["sweep"].items() if field != SEED}
        found.setdefault(json.dumps(values, sort_keys=True), Setting(values, [])).members.append(line)
    return list(found.values())


def markdown(lines: Sequence[Line]) -> str:
    """The sweep as a table in Markdown, a row a setting, with every seed's number, and a note that explains it."""
    rows, seeds = settings(lines), _seeds(lines)
    fields = _fields(rows)
    there = [name for name, (path, _) in FIGURES.items() if any(_at(line, *path) is not None for line in lines)]
    uneven = len({line.get("steps") for line in lines}) > 1
    head = [*fields, *(["steps"] if uneven else []), *there]
    table = [head, [*["---"] * len(fields), *["---:"] * (len(head) - len(fields))]]
    for row in rows:
        said = [text(row.values[field]) if field in row.values else "" for field in fields]
        steps = [", ".join(dict.fromkeys(text(line.get("steps")) for line in row.members))] if uneven else []
        table.append([*said, *steps, *(_cell(row.members, FIGURES[name][0], seeds) for name in there)])
    drawn = "\n".join("| " + " | ".join(_escaped(cell) for cell in cells) + " |" for cells in table)
    return f"{drawn}\n\n{_note(lines, there, seeds)}\n"


def figures(lines: Sequence[Line], folder: str | os.PathLike[str]) -> list[epath.Path]:
    """Draws what the members hold into the sweep's folder: frontier, margins, accuracies, length; returns the files.

    A picture without content is left away. A member without eval.jsonl is drawn by its first and last evaluation.
    """
    root = epath.Path(folder)
    rows = settings(lines)
    drawn: dict[str, Lines | Frontier | None] = {
        "frontier.png": _frontier(lines, rows, root),
        "margins.png": _steps(rows, root, "eval/rewards/margins", "Held-out margin", "reward, chosen less rejected"),
        "accuracies.png": _steps(rows, root, "eval/rewards/accuracies", "Held-out accuracy", "share of pairs"),
        "length.png": _length(lines, rows),
    }
    return [pictures.save(block, root / name) for name, block in drawn.items() if block is not None]


def write(lines: Sequence[Line], folder: str | os.PathLike[str]) -> list[epath.Path]:
    """Writes table.md and the pictures into the sweep's folder; returns the files."""
    root = epath.Path(folder)
    file, part = root / "table.md", root / "table.md.part"
    content = markdown(lines)
    root.mkdir(parents=True, exist_ok=True)
    part.write_text(content)
    part.replace(file)
    return [file, *figures(lines, root)]


def _at(line: Line, *path: str) -> float | None:
    """The number at a place of a line; None where there is none, nan where it wasn't finite."""
    value: Any = line
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _seeds(lines: Iterable[Line]) -> list[int]:
    return sorted({line[SEED] for line in lines})


def _fields(rows: Sequence[Setting]) -> list[str]:
    return list(dict.fromkeys(field for row in rows for field in row.values))


def _cell(members: Sequence[Line], path: tuple[str, ...], seeds: Sequence[int]) -> str:
    """Mean, deviation and, where the sweep has several seeds, each one's number in brackets."""
    of_seed = {line[SEED]: _at(line, *path) for line in members}
    good = [value for value in of_seed.values() if value is not None and math.isfinite(value)]
    said = number(statistics.fmean(good)) if good else ""
    if len(good) > 1:
        said += f" ± {_short(statistics.stdev(good))}"
    if len(seeds) > 1 and any(value is not None for value in of_seed.values()):
        each = (of_seed.get(seed) for seed in seeds)
        said += f" ({', '.join('none' if value is None else number(value) for value in each)})"
    elif not good and None not in of_seed.values():
        said = "nan"
    return said.strip()


def _short(deviation: float) -> str:
    """Two digits are all that a deviation over a few seeds knows."""
    return f"{deviation:#.2g}".rstrip(".") if 0.001 <= deviation < 99.5 else number(deviation)


def _escaped(cell: str) -> str:
    return " ".join(visible(cell).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _note(lines: Sequence[Line], there: Sequence[str], seeds: Sequence[int]) -> str:
    """What the numbers are."""
    if len(seeds) > 1:
        listed = ", ".join(map(str, seeds))
        said = (
            f"Mean over the seeds ± their standard deviation (n - 1); in brackets every seed: {listed}, in this order."
        )
        holes = [_at(line, *FIGURES[name][0]) for line in lines for name in there]
        if any(value is not None and not math.isfinite(value) for value in holes):
            said += " A number that is not finite counts towards neither mean nor deviation."
    else:
        said = f"One seed, {seeds[0]}: how far another would lie from it is not known."
    meanings = [f"{name}: {FIGURES[name][1]}." for name in there]
    losses = {line.get("loss", {}).get("name") for line in lines}
    apart = "Losses of different names are on different scales and can't be compared with each other"
    warning = f"{apart}; nor can margins where beta or the loss differ." if len(losses) > 1 else ""
    return " ".join(part for part in (said, *(m[0].upper() + m[1:] for m in meanings), warning) if part)


# Curves.


def _varied(rows: Sequence[Setting]) -> str | None:
    """The numeric field with the most values where all others are the same; None where no number is swept."""
    most: dict[str, int] = {}
    for field in _fields(rows):
        groups: dict[str, set[float]] = {}
        for row in rows:
            if (value := _value(row, field)) is not None:
                groups.setdefault(_method(rows, row, field), set()).add(value)
        most[field] = max(map(len, groups.values()), default=0)
    best = max(most, key=lambda field: most[field], default=None)
    return best if best is not None and most[best] > 1 else None


def _value(row: Setting, field: str) -> float | None:
    """What a setting has in a field, a number; where it was left at none, what the loss made of that."""
    value = row.values.get(field)
    if value is None and field.startswith("loss."):
        value = row.members[0].get("loss", {}).get(field.removeprefix("loss."))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _method(rows: Sequence[Setting], row: Setting, *without: str | None) -> str:
    """What a setting is called when some of its fields are left away."""
    constant = {field for field in _fields(rows) if len({json.dumps(r.values.get(field)) for r in rows}) == 1}
    away = constant | {*without}
    left = {field: value for field, value in row.values.items() if field not in away and value is not None}
    last = {field: field.rpartition(".")[2] for field in _fields(rows)}
    alike = {field for field in last if list(last.values()).count(last[field]) > 1}
    short = lambda field: field if field in alike else last[field]
    said = [text(v) if field == "loss.name" else f"{short(field)} {text(v)}" for field, v in left.items()]
    return ", ".join(said) or _loss_name(row)


def _loss_name(row: Setting) -> str:
    return str(row.members[0].get("loss", {}).get("name", "all"))


def _grouped(rows: Sequence[Setting], *finest: Callable[[Setting], str]) -> tuple[dict[str, list[Setting]], int]:
    """The settings by the first of these names that has few enough curves, and which that was."""
    for place, name in enumerate(finest):
        groups: dict[str, list[Setting]] = {}
        for row in rows:
            groups.setdefault(name(row), []).append(row)
        if len(groups) <= MOST or place == len(finest) - 1:
            return groups, place
    raise AssertionError("unreachable")


def _frontier(lines: Sequence[Line], rows: Sequence[Setting], root: epath.Path) -> Frontier | None:
    """Score against KL, a curve a method."""
    varied = _varied(rows)
    groups, coarse = _grouped(rows, lambda row: _method(rows, row, varied), _loss_name)
    curves: dict[str, list[Spot]] = {}
    for name, members in groups.items():
        spots = [(_value(row, varied or ""), _spot(row.members, _label(row, varied), _cost)) for row in members]
        kept = [(value, spot) for value, spot in spots if spot[1]]
        along = (lambda one: _mean_x(one[1])) if coarse else (lambda one: (one[0] is None, one[0] or 0.0))
        if kept:
            curves[name] = [spot for _, spot in sorted(kept, key=along)]
    if not curves:
        return None
    curves |= _best_of(root) | _start(lines)
    title = f"Score against the distance from the start: {_each(coarse)}"
    return Frontier(title, "KL to the start model, nats an answer", "score", curves, _over(lines, dots=True))


def _label(row: Setting, field: str | None) -> str:
    value = None if field is None else _value(row, field)
    return "" if field is None or value is None else f"{field.rpartition('.')[2]} {value:g}"


def _cost(line: Line) -> tuple[float | None, float | None]:
    return _at(line, "kl", "mean"), _at(line, "score", "mean")


def _spot(members: Iterable[Line], label: str, of: Callable[[Line], tuple[float | None, float | None]]) -> Spot:
    """A point of a frontier: the seeds that have both numbers."""
    pairs = [(x, y) for x, y in map(of, members) if x is not None and y is not None and math.isfinite(x + y)]
    return label, pairs


def _mean_x(spot: Spot) -> float:
    return statistics.fmean(x for x, _ in spot[1])


def _best_of(root: epath.Path) -> dict[str, list[Spot]]:
    """The curves of best_of.jsonl: what choosing among n answers gives, without training."""
    by_name: dict[str, dict[int, list[Line]]] = {}
    for row in _rows(root / "best_of.jsonl"):
        by_name.setdefault(row.get("name", "best of n"), {}).setdefault(row["n"], []).append(row)
    of = lambda row: (_at(row, "kl"), _at(row, "score", "mean"))
    curves = {name: [_spot(by_n[n], f"n {n}", of) for n in sorted(by_n)] for name, by_n in by_name.items()}
    kept = {name: [spot for spot in curve if spot[1]] for name, curve in curves.items()}
    return {name: curve for name, curve in kept.items() if curve}


def _start(lines: Sequence[Line]) -> dict[str, list[Spot]]:
    """The start model, which every member's gain was held against: one score a seed, at no distance."""
    scores: dict[int, list[float]] = {}
    for line in lines:
        score, gain = _at(line, "score", "mean"), _at(line, "gain", "mean")
        if score is not None and gain is not None and math.isfinite(score - gain):
            scores.setdefault(line[SEED], []).append(score - gain)
    seeds = [(0.0, statistics.fmean(scores[seed])) for seed in sorted(scores)]
    return {"start": [("", seeds)]} if seeds else {}


def _steps(rows: Sequence[Setting], root: epath.Path, metric: str, what: str, unit: str) -> Lines | None:
    """A figure of the evaluations over steps, as fine as the number of settings allows."""
    varied = _varied(rows)
    # Every field is named, those too that only some losses have.
    finest = (lambda row: _method(rows, row), lambda row: _method(rows, row, varied), _loss_name)
    groups, place = _grouped(rows, *finest)
    names = (
        "a line a setting",
        f"a line a method, mean over its values of {varied}",
        "a line a loss, mean over its settings",
    )
    series = {}
    for name, group in groups.items():
        if curve := _mean_curve([_evaluations(line, root) for row in group for line in row.members], metric):
            series[name] = curve
    lines = [line for row in rows for line in row.members]
    return Lines(f"{what}: {names[place]}", "step", unit, series, _over(lines)) if series else None


def _mean_curve(members: Sequence[Sequence[Line]], metric: str) -> tuple[list[float], list[float]] | None:
    """The mean at the steps that all members were evaluated at, or, where they share none, at every step."""
    found = [{row["step"]: value for row in rows if (value := _at(row, metric)) is not None} for rows in members]
    found = [curve for curve in found if curve]
    if not found:
        return None
    shared = set.intersection(*(set(curve) for curve in found)) or set[float]().union(*found)
    means = [(step, statistics.fmean(curve[step] for curve in found if step in curve)) for step in sorted(shared)]
    if not any(math.isfinite(mean) for _, mean in means):
        return None
    return [step for step, _ in means], [mean for _, mean in means]


def _evaluations(line: Line, root: epath.Path) -> list[Line]:
    rows = _rows(root / line.get("workdir", f"members/{line['member']}") / "eval.jsonl")
    return rows or [row for row in (line.get("first_eval"), line.get("eval")) if row and "step" in row]


def _rows(file: epath.Path) -> list[Line]:
    """The rows of a JSON lines file without one that a kill cut short; none where there is no file."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _length(lines: Sequence[Line], rows: Sequence[Setting]) -> Frontier | None:
    """Tokens of an answer against the field that varies most, or by setting where none is a number."""
    varied = _varied(rows)
    groups, coarse = _grouped(rows, lambda row: _method(rows, row, varied), _loss_name)
    names = [_method(rows, row) for row in rows] if varied is None else []
    curves: dict[str, list[Spot]] = {}
    for name, group in groups.items():
        at = [(float(rows.index(row)) if varied is None else _value(row, varied), row) for row in group]
        spots = [_spot(row.members, "", lambda line, x=x: (x, _at(line, "tokens", "mean"))) for x, row in at]
        if spots := sorted((spot for spot in spots if spot[1]), key=_mean_x):
            curves[name] = spots
    if not curves:
        return None
    xs = [x for curve in curves.values() for _, seeds in curve for x, _ in seeds]
    log_x = varied is not None and min(xs) > 0 and max(xs) >= 8 * min(xs)
    each = " by setting" if varied is None else f": {_each(coarse)}"
    title, note = f"Length of the answers{each}", _over(lines, dots=True)
    return Frontier(title, varied or "setting", "tokens an answer", curves, note, log_x, names)


def _each(coarse: int) -> str:
    return "a curve a loss, through all its settings" if coarse else "a curve a method"


def _over(lines: Sequence[Line], dots: bool = False) -> str:
    seeds = _seeds(lines)
    if len(seeds) == 1:
        return f"One seed, {seeds[0]}."
    return f"Means over seeds {', '.join(map(str, seeds))}{'; a small dot is one seed' if dots else ''}."
