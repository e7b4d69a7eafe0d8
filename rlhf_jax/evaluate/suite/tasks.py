"""The public sets: which files they are, how their rows are read, what is measured and what guessing has."""

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from etils import epath

from rlhf_jax.data import sources
from rlhf_jax.data.rows import Refusal
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.suite import choice, generated, ifbench, preferred, refused, sets, shots, wins
from rlhf_jax.evaluate.suite.items import Item, Measure
from rlhf_jax.feedback import ifeval
from rlhf_jax.fields import nearest

About = Literal["capability", "preference", "refusal", "over-refusal", "sycophancy", "behaviour"]
Needs = Literal["likelihoods", "answers", "pairs", "judge"]


class Task(NamedTuple):
    """A set.

    Attributes:
      files: below the folder of the data; * stands for any name.
      reader: see `sets`.
      measure: what is asked of a model, and its figures.
      figures: the figures that are reported, with what each is about; None: one a group, named after it.
      needs: what it asks of a model; a reward model can only give pairs.
      shots: where worked examples are, and how they are read; None: there are none.
    """

    files: tuple[str, ...]
    reader: Callable[[sets.Columns, str, str], Item | None]
    measure: Measure
    figures: Mapping[str, About] | None
    needs: Needs
    shots: tuple[str, Callable[[str, int], Mapping[str, str]]] | None = None


PREFERRED: Mapping[str, About] = dict.fromkeys((*preferred.WRITTEN, preferred.SCORED), "preference")
KEPT: Mapping[str, About] = dict.fromkeys(("prompts", "constraints"), "capability")
TASKS: dict[str, Task] = {
    "mmlu": Task(
        ("mmlu/test.jsonl",), sets.mmlu, choice.accuracy, {"accuracy": "capability"}, "likelihoods",
        ("mmlu/dev.jsonl", shots.by_subject),
    ),
    "truthfulqa": Task(
        ("truthfulqa/mc_task.jsonl",), sets.truthfulqa, choice.truthful,
        {"mc1": "capability", "mc1_per_byte": "capability", "mc2": "capability"}, "likelihoods", ("", shots.primer),
    ),
    "bbh": Task(
        ("bbh/bbh.jsonl",), sets.bbh, choice.accuracy, {"accuracy": "capability", "per_byte": "capability"},
        "likelihoods",
    ),
    "bbh_numbers": Task(
        ("bbh/bbh.jsonl",), sets.bbh_numbers, generated.numbers, {"accuracy": "capability"}, "answers"
    ),
    "gsm8k": Task(
        ("gsm8k/test.jsonl",), sets.gsm8k, generated.numbers, {"accuracy": "capability"}, "answers",
        ("gsm8k/train.jsonl", shots.solved),
    ),
    "math500": Task(
        ("math500/math500.jsonl",), sets.math500, generated.mathematics, {"accuracy": "capability"}, "answers"
    ),
    "ifeval": Task(
        ("ifeval/input_data.jsonl",), functools.partial(sets.constrained, ifeval.share), generated.constraints, KEPT,
        "answers",
    ),
    "ifbench": Task(
        ("ifbench/IFBench_test.jsonl",), functools.partial(sets.constrained, ifbench.share),
        generated.other_constraints, KEPT, "answers",
    ),
    "hhh": Task(("hhh-alignment/hhh_alignment_eval.jsonl",), sets.hhh, preferred.preferred, PREFERRED, "pairs"),
    "llmbar": Task(("llmbar/*.jsonl",), sets.llmbar, preferred.preferred, PREFERRED, "pairs"),
    "evals": Task(("anthropic-model-written-evals/*.jsonl",), sets.evals, choice.behaviours, None, "likelihoods"),
    "sycophancy": Task(
        ("sycophancy/*.jsonl",), sets.sycophancy, choice.sycophancy,
        dict.fromkeys(("biased", "neutral", "shift"), "sycophancy"), "likelihoods",
    ),
    "xstest": Task(
        ("xstest/xstest_prompts.jsonl",), sets.xstest, refused.refusals,
        {"refused_unsafe": "refusal", "refused_safe": "over-refusal"}, "answers",
    ),
    "wins": Task(
        ("arena-hard-prompts/question.jsonl",), sets.prompts, wins.wins,
        dict.fromkeys(("win_rate", "length_controlled"), "preference"), "judge",
    ),
}  # fmt: skip


class Read(NamedTuple):
    """The items of a set, and why other rows can't be used, by where they stand."""

    items: list[Item]
    refused: dict[str, str]


def chosen(names: Sequence[str]) -> list[str]:
    """The tasks of these names, in the order of TASKS. Errors: UserError for a name that there isn't."""
    for name in names:
        if name not in TASKS:
            raise UserError(
                f"there is no task {name!r}; the nearest is {nearest(name, TASKS)!r}. Choose --tasks of "
                f"{', '.join(TASKS)}."
            )
    return [name for name in TASKS if name in names]


def check(names: Sequence[str], count: int) -> None:
    """Errors: UserError for worked examples that none of the tasks has, and a package that a check needs."""
    if count and not any(TASKS[name].shots for name in names):
        having = [name for name, task in TASKS.items() if task.shots]
        raise UserError(f"--shots={count} is of {', '.join(having)}, and --tasks has none of them; drop it.")
    if "math500" in names and importlib.util.find_spec("math_verify") is None:
        raise UserError("the task math500 needs the package math-verify; run: pip install 'rlhf_jax[verify]'.")


def read(name: str, data: str, own: str | None = None, count: int = 0, most: int | None = None) -> Read:
    """The items of a task.

    Args:
      data: the folder of all sets; own: this set's file or folder in the place of those below it.
      count: worked examples before each question, where the task has some.
      most: items, taken from all over the set; None: all.
    Errors: UserError for files that aren't there, or hold no row that can be used.
    """
    task = TASKS[name]
    before: Mapping[str, str] = {}
    if task.shots is not None and count:
        path, how = task.shots
        before = how(os.path.join(data, path), count)
    items, refusals = [], {}
    for record in itertools.chain.from_iterable(sources.read(path, flag="--data") for path in _paths(name, data, own)):
        try:
            if isinstance(record, sources.Refused):
                raise Refusal(record.reason)
            group = record.columns.get("subject", "")
            if before and "" not in before and group not in before:
                raise Refusal(f"there is no worked example of {str(group)[:40]!r}")
            item = task.reader(record.columns, record.where, before.get(group, before.get("", "")))
        except Refusal as refusal:
            refusals[record.where] = str(refusal)
            continue
        if item is not None:
            items.append(item)
    if not items:
        where, why = next(iter(refusals.items()), (name, "no row of it"))
        raise UserError(f"there is no row for the task {name} ({where}: {why}); check --data.")
    if most is not None and most < len(items):
        items = [items[i * len(items) // most] for i in range(most)]
    return Read(items, refusals)


def _paths(name: str, data: str, own: str | None) -> list[str]:
    if own is not None:
        return [own]
    found = []
    for pattern in TASKS[name].files:
        folder = epath.Path(os.path.expanduser(data))
        here = sorted(folder.glob(pattern))
        if not here:
            raise UserError(
                f"there is no {folder / pattern} for the task {name}; give --data=FOLDER that holds it, or "
                f"--data=FOLDER,{name}=FILE."
            )
        found += [os.fspath(path) for path in here]
    return found


def figures_of(name: str, items: Sequence[Item]) -> dict[str, About]:
    """The figures of a task with what each is about."""
    figures = TASKS[name].figures
    return dict(figures) if figures is not None else dict.fromkeys(sorted({i.group for i in items}), "behaviour")
