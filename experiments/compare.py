"""Puts finished runs side by side: python -m experiments.compare runs/dpo runs/ipo --out=runs/comparison.

What differs in their configs, what they came to, and what each run is above the first (or --baseline=NAME) over the
held-out rows and the prompts that both saw, with paired intervals. The folder of a sweep, which holds table.jsonl,
stands for all its members. Nothing is trained or sampled: docs/comparing.md says what is read.
"""

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath
from rich.markup import escape

from experiments.evaluate import tell
from rlhf_jax import flags, report
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.paired_runs import PROMPTS, Difference, Run, differences, mean, read, same_margins
from rlhf_jax.fields import nearest, text
from rlhf_jax.report.wording import number
from rlhf_jax.workdir import check_writable

WIDE = 5  # runs that stand in columns; more of them stand in rows
LAST = {"held-out loss": "eval/loss", "margin": "eval/rewards/margins", "accuracy": "eval/rewards/accuracies"}
MEANING = (
    "In brackets: 95% intervals, of an accuracy after Wilson, of what comes from answers by a bootstrap over prompts. "
    "Losses of different names, and margins of different losses, betas or references, are on different scales."
)
PAIRED = (
    "Each run less the baseline, row by row over what both have; in brackets 95% bootstrap intervals that resample "
    "these rows or prompts. They speak of other rows, not of another training run: for that, train several seeds."
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Puts finished runs side by side, and says what each is above the first of them."""

    runs: Annotated[tuple[str, ...], flags.WORDS, "workdirs of runs, or of sweeps, which stand for their members"] = ()
    baseline: Annotated[str | None, "name of the run that the others are held against; none: the first"] = None
    seed: Annotated[int, "of the resampling"] = 0
    out: Annotated[str | None, "folder for comparison.json and report.html; none: only print"] = None


def folders(words: Sequence[str]) -> list[epath.Path]:
    """The runs' folders, a sweep's members in its order."""
    found = []
    for word in words:
        folder = epath.Path(os.path.expanduser(word))
        table = folder / "table.jsonl"
        if not table.exists():
            found.append(folder)
            continue
        try:
            lines = [json.loads(line) for line in table.read_text().splitlines()]
            found += [folder / line.get("workdir", f"members/{line['member']}") for line in lines]
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{table} is not the table of a sweep; give the workdirs of runs or of sweeps.") from None
    return found


def named(found: Sequence[epath.Path]) -> list[str]:
    """What the runs are called: the last parts of their paths, as many as tell them apart."""
    parts = [os.path.abspath(os.fspath(folder)).strip("/").split("/") for folder in found]
    if len({tuple(each) for each in parts}) < len(parts):
        twice = next(name for name, count in Counter("/".join(each) for each in parts).items() if count > 1)
        raise UserError(f"the run {twice.rpartition('/')[2]!r} is given twice; give every run once.")
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(each[-length:]) for each, length in zip(parts, lengths, strict=True)]
        alike = {name for name, count in Counter(names).items() if count > 1}
        if not alike:
            return names
        lengths = [length + (name in alike) for length, name in zip(lengths, names, strict=True)]


def opened(program: Comparison) -> tuple[list[Run], Run]:
    """The runs and the baseline. Errors: UserError for fewer than two runs, and a baseline that is none of them."""
    found = folders(program.runs)
    if len(found) < 2:
        raise UserError(f"there {'is one run' if found else 'are no runs'} to compare; give at least two workdirs.")
    runs = [read(folder, name) for folder, name in zip(found, named(found), strict=True)]
    by_name = {run.name: run for run in runs}
    if program.baseline is not None and program.baseline not in by_name:
        near = nearest(program.baseline, by_name)
        raise UserError(f"--baseline={program.baseline} is none of the runs; the nearest is {near}.")
    return runs, by_name[program.baseline or runs[0].name]


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The fields of the configs that aren't alike, with each run's value as text."""
    paths = list(dict.fromkeys(path for run in runs for path in run.config))
    said = {path: [text(run.config[path]) if path in run.config else "absent" for run in runs] for path in paths}
    return {path: values for path, values in said.items() if len(set(values)) > 1}


def settings(runs: Sequence[Run]) -> report.Table | None:
    """What differs in the configs; None where nothing does."""
    fields, names = differing(runs), [run.name for run in runs]
    if not fields:
        return None
    if len(runs) <= WIDE:
        return report.Table("What differs", ["field", *names], [(path, *values) for path, values in fields.items()])
    columns = zip(names, *fields.values(), strict=True)
    return report.Table("What differs", ["run", *fields], list(columns))


def figures(run: Run, seed: int) -> dict[str, Any]:
    """What a run came to: numbers of its last evaluation, and estimates from its answers."""
    last = run.evaluations[-1] if run.evaluations else {}
    held = {name: last.get(key) for name, key in LAST.items()}
    ends = [f"{LAST['accuracy']}_{end}" for end in ("low", "high")]
    if held["accuracy"] is not None and all(end in last for end in ends):
        held["accuracy"] = Estimate(held["accuracy"], *(last[end] for end in ends))
    sampled = {name: mean((run.answers or {}).get(name, {}), seed=seed) for name in PROMPTS}
    return {"step": last.get("step"), **held, **sampled}


def last_figures(runs: Sequence[Run], seed: int) -> report.Table:
    """What all runs came to, a row each; a column that no run has is left out."""
    rows = [figures(run, seed) for run in runs]
    there = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    said = [(run.name, *(_shown(row[name]) for name in there)) for run, row in zip(runs, rows, strict=True)]
    return report.Table("Last figures", ["run", *there], said, MEANING)


def paired_table(found: Sequence[Difference], baseline: str) -> report.Table:
    """The differences, a row each."""
    columns = ["run", "figure", "rows", "run's", "baseline's", "difference"]
    rows = [
        (d.run, d.figure, f"{d.count:,}", number(d.ours.mean), number(d.baseline.mean), _shown(d.difference, "+"))
        for d in found
    ]
    return report.Table(f"Above {baseline}", columns, rows, PAIRED)


def missing(runs: Sequence[Run], baseline: Run, found: Sequence[Difference]) -> Iterator[str]:
    """A sentence for everything that could not be compared."""
    if without := [run.name for run in runs if run.rows is None]:
        yield (
            f"No held_out.jsonl, so neither margin nor accuracy is paired: {', '.join(without)}. Runs without held-out "
            "rows and those of older versions have none; train them again, with held-out rows, to pair them."
        )
    if 0 < sum(run.answers is None for run in runs) < len(runs):
        names = ", ".join(run.name for run in runs if run.answers is None)
        yield (
            f"No answers.jsonl, so score, KL and tokens are not paired: {names}. Let all models answer the same "
            "prompts with python -m experiments.evaluate."
        )
    others = [run for run in runs if run is not baseline]
    margins = lambda run: run.rows and run.rows["margin"]  # none of sft
    scales = [run.name for run in others if margins(run) and margins(baseline) and not same_margins(run, baseline)]
    if scales:
        yield (
            "Another loss, beta, preference.length_alpha or way of moving the reference than the baseline's, so "
            f"margins are not compared: {', '.join(scales)}."
        )
    paired_figures = {(d.run, d.figure) for d in found}
    for run in others:
        if run.rows and baseline.rows and (run.name, "accuracy") not in paired_figures:
            yield f"{run.name} and {baseline.name} have no ranked held-out row in common, so no accuracy is paired."


def as_json(runs: Sequence[Run], baseline: Run, found: Sequence[Difference], notes: Sequence[str], seed: int) -> Any:
    """Everything that is shown, for programs; what is not finite is null."""
    listed = [{"run": run.name, "workdir": os.fspath(run.folder), "figures": figures(run, seed)} for run in runs]
    compared = [d._asdict() for d in found]
    fields = {path: dict(zip([run.name for run in runs], v, strict=True)) for path, v in differing(runs).items()}
    return _plain(
        {"baseline": baseline.name, "differs": fields, "runs": listed, "differences": compared, "notes": list(notes)}
    )


def main(program: Comparison) -> None:
    """Runs it."""
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    runs, baseline = opened(program)
    others = [run for run in runs if run is not baseline]
    found = [each for run in others for each in differences(run, baseline, seed=program.seed)]
    notes = list(missing(runs, baseline, found))
    differs = settings(runs)
    tables = [*([] if differs is None else [differs]), last_figures(runs, program.seed)]
    tables += [paired_table(found, baseline.name)] if found else []
    if differs is None:
        notes.insert(0, "The configs of the runs are alike.")
    for table in tables:
        _tell(table)
    for note in notes:
        print(note)
    if program.out is not None:
        out = epath.Path(os.path.expanduser(program.out))
        check_writable(out, "out", "--out")
        said = as_json(runs, baseline, found, notes, program.seed)
        (out / "comparison.json").write_text(json.dumps(said, indent=2, allow_nan=False) + "\n")
        blocks: list[report.Block] = [*tables, *([report.Text("What is not compared", notes)] if notes else [])]
        blocks += _curves(runs)
        title = f"{len(runs)} runs side by side"
        print(f"wrote {report.write(out / 'report.html', title, blocks, f'Held against {baseline.name}.')}")


def _curves(runs: Sequence[Run]) -> list[report.Block]:
    """Held-out accuracy over steps, where there is one to draw."""
    series, key = {}, LAST["accuracy"]
    for run in runs:
        points = [(row["step"], row[key]) for row in run.evaluations if row.get(key) is not None]
        if points:
            series[run.name] = tuple(zip(*points, strict=True))
    return [report.Lines("Held-out accuracy", "step", "share of pairs", series)] if series else []


def _shown(value: Any, sign: str = "") -> str:
    """A number, or an estimate with its interval in brackets, as text."""
    if value is None:
        return ""
    if not isinstance(value, Estimate):
        return number(value)
    plus = sign if value.mean > 0 else ""
    return f"{plus}{number(value.mean)} ({number(value.low)}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{number(value.high)})"


def _tell(table: report.Table) -> None:
    """Prints a table whose cells are nobody's markup."""
    cells = [tuple(escape(str(cell)) for cell in row) for row in table.rows]
    tell(dataclasses.replace(table, title=escape(table.title), columns=list(map(escape, table.columns)), rows=cells))


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    flags.run(main, Comparison)
