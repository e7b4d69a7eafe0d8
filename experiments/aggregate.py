"""Weighs labels: python -m experiments.aggregate --rows=FILE,FILE --method=dawid_skene --out=FILE.jsonl.

How far labellers agree, what each of them tends to, and rows of pairs whose labels are soft: the chance that the
chosen answer is the better one. docs/aggregation.md says what each figure and method is.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from experiments.evaluate import tell
from experiments.rank import open_out
from rlhf_jax import flags, report
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.labelling import GRADES, MOST, TRAITS, Agreement, Habits, Weighed, agreements, duos, habits
from rlhf_jax.evaluate.labelling import METHODS as WAYS
from rlhf_jax.feedback import choices
from rlhf_jax.feedback.choices import Choices

Method = Literal["majority", "dawid_skene", "glad", "mace", "bradley_terry"]
SHOWN = 30  # labellers in the tables, those of the most choices
INTERVALS = "In brackets 95% intervals; prompts are resampled."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregate:
    """Reads labels of several people, prints how they agree and what they tend to, and writes soft-labelled pairs."""

    rows: Annotated[tuple[str, ...], "files of rankings, of pairs, or of sheets that name each annotator"]
    out: Annotated[str, "JSONL file to write; it must not exist"]
    method: Annotated[Method, "what the soft labels are made by"] = "dawid_skene"
    shown: Annotated[bool, "answers were shown in the order in which they stand in a row"] = True
    messages: Annotated[bool, "write prompts and answers of published sheets as messages, for chat templates"] = False
    seed: Annotated[int, "of the resampling, and of mace"] = 0


def told(value: Estimate | float | None) -> str:
    """A figure with its interval, two digits; a dash where it is undefined."""
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        return f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"
    return f"{value:.2f}"


def agreement_table(found: Sequence[Agreement], grades: int) -> report.Table:
    """Of all, and of each two. Where nobody tells more than two grades, all weights and levels say the same."""
    columns = ["same", "kappa", "weighted", "nominal", "ordinal", "interval"]
    shown = {"same": "same", "kappa": "kappa", "nominal": "alpha"}
    note = INTERVALS
    if grades > GRADES:
        note += f" Figures of grades are left out: there are {grades:,} different ones, more than {GRADES}."
    elif grades > 2:
        shown |= {"weighted": "weighted kappa", "ordinal": "alpha, ordinal", "interval": "alpha, interval"}
    rows = [
        (one.who, str(one.items), *(told(getattr(one, name)) for name in columns if name in shown)) for one in found
    ]
    return report.Table("Agreement", ["who", "pairs", *(shown[c] for c in columns if c in shown)], rows, note)


def habits_table(found: Sequence[Habits]) -> report.Table:
    """A row a labeller."""
    traits = [name for name in TRAITS if any(name in one.beyond for one in found)]
    columns = ["labeller", "choices", "ties", "same as others", "for the first", "for the longer"]
    columns += [f"{name}, beyond others" for name in traits] + ["triples without a circle"]
    rows = [
        (one.name, str(one.choices), f"{one.ties:.2f}", told(one.others), told(one.first), told(one.longer))
        + tuple(told(one.beyond[name]) for name in traits)
        + (told(one.consistent),)
        for one in found
    ]
    return report.Table("Labellers", columns, rows, INTERVALS)


def method_table(method: str, weighed: Weighed, names: Sequence[str]) -> report.Table:
    """What the method finds of each labeller."""
    columns = list(next(iter(weighed.people.values())))
    rows = [(name, *(told(weighed.people[name][column]) for column in columns)) for name in names]
    return report.Table(f"Labellers, by {method}", ["labeller", *columns], rows, weighed.note)


def as_json(value: Any) -> Any:
    """Figures as JSON has them, every estimate with its interval."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {name: as_json(one) for name, one in value.items()} if isinstance(value, dict) else value


def tables(
    program: Aggregate, made: Choices, agreed: list[Agreement], tends: list[Habits], weighed: Weighed
) -> list[report.Table]:
    """All that is printed."""
    names = [one.name for one in sorted(tends, key=lambda one: -one.choices)][:SHOWN]
    blocks = [
        agreement_table(agreed, len(set(made.grade.tolist()))),
        habits_table([one for one in tends if one.name in names]),
    ]
    return blocks + ([method_table(program.method, weighed, names)] if weighed.people else [])


def main(program: Aggregate) -> None:
    """Runs it."""
    if not program.rows or not program.out:
        raise UserError("--rows and --out name what is read and written; give --rows=FILE,FILE and --out=FILE.jsonl.")
    if len(set(program.rows)) < len(program.rows):
        raise UserError(f"--rows={','.join(program.rows)} names a file twice; leave one away.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    out = open_out(program.out)
    beside = out.parent / f"{out.stem}.labellers.json"
    if beside.exists():
        raise UserError(f"--out={program.out} would overwrite {beside}; give another name.")
    found = choices.read(program.rows, chat=program.messages, shown=program.shown)
    made = found.choices
    weighed = WAYS[program.method](made, program.seed)
    agreed, tends = agreements(made, seed=program.seed), habits(made, seed=program.seed)
    print(f"{len(made)} choices of {len(made.pairs)} pairs of answers by {len(made.people)} labellers", end="")
    print(f"; {found.read} rows, {len(found.refused)} of which can't be used")
    if found.refused:
        print(f"the first that can't be used is {': '.join(found.refused[0])}")
    for block in tables(program, made, agreed, tends, weighed):
        tell(block)
        if block.note:
            print(block.note)
    if len(duos(made)) > MOST:
        print(f"Of the pairs of labellers the {MOST} with the most in common are listed.")
    rows = choices.soft_rows(made, weighed.probability)
    figures = {"agreement": agreed, "labellers": tends, "method": program.method, "of_method": weighed.people}
    kept = {name: list(map(as_json, one)) if isinstance(one, list) else as_json(one) for name, one in figures.items()}
    beside.write_text(json.dumps(kept, indent=2) + "\n")
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {out} and {beside}; train with --config.data.path={out} --config.data.probability=probability")


if __name__ == "__main__":
    flags.run(main, Aggregate)
