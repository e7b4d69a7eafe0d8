"""The shapes of published sets whose labels judge the steps of solutions, or whole solutions.

Adapters as in `published`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.formats.values import (
    Columns,
    asked,
    entries,
    fields,
    label,
    number,
    perhaps,
    reply,
    string,
    whole,
)
from rlhf_jax.data.rows import Labelled, Left, Refusal, Stepwise, Text


def _stepwise(question: Text, steps: Sequence[str], labels: Sequence[float], chat: bool) -> Stepwise:
    """Steps that stand on lines of their own."""
    if not steps or not all(step.strip() for step in steps):
        raise Refusal("the solution has no step, or an empty one")
    lines = [f"{step}\n" for step in steps[:-1]] + [steps[-1]]
    return Stepwise(question, tuple(reply(line, chat) for line in lines), tuple(labels))


def _until(first_wrong: int, steps: Any, name: str, question: Text, chat: bool) -> Stepwise:
    """Right before the first wrong step, counted from 0, and wrong from it on: what follows builds on it."""
    texts = [string(step, name) for step in entries(steps, name)]
    if not 0 <= first_wrong <= len(texts):
        raise Refusal(f"the first wrong step is no step of the {len(texts)} in {name!r}")
    return _stepwise(question, texts, [float(place < first_wrong) for place in range(len(texts))], chat)


def first_error(columns: Columns, chat: bool) -> Stepwise:
    """A wrong solution with its first wrong step, counted from 1. MR-GSM8K, arXiv:2312.17080."""
    place = whole(columns["model_output_solution_first_error_step"], "model_output_solution_first_error_step")
    if place < 1:
        raise Refusal("the first wrong step is counted from 1")
    question = asked(string(columns["question"], "question"), chat)
    return _until(place - 1, columns["model_output_steps"], "model_output_steps", question, chat)


def mistake_index(columns: Columns, chat: bool) -> Stepwise:
    """Steps with the first wrong one, counted from 0; null if all are right. BIG-Bench Mistake, arXiv:2311.08516."""
    steps = entries(columns["steps"], "steps")
    place = whole(columns.get("mistake_index", len(steps)), "mistake_index")
    return _until(place, steps, "steps", asked(string(columns["input"], "input"), chat), chat)


def prm800k(columns: Columns, chat: bool) -> tuple[Stepwise, ...]:
    """The solution that was walked, and one that ends with each step that was rated and not taken.

    A rating of -1 is wrong, 0 neutral and 1 right; steps that people wrote are right. Lightman et al. 2023,
    arXiv:2305.20050.
    """
    question = asked(string(fields(columns["question"], "question").get("problem"), "question.problem"), chat)
    walked: list[tuple[str, float]] = []
    ways = []
    for step in entries(fields(columns["label"], "label").get("steps"), "label.steps"):
        rated = [
            fields(one, "completions") for one in perhaps(fields(step, "label.steps").get("completions"), "completions")
        ]
        taken = step.get("chosen_completion")
        ways += [[*walked, _rated(one)] for i, one in enumerate(rated) if i != taken and one.get("rating") is not None]
        if taken is not None and 0 <= whole(taken, "chosen_completion") < len(rated):
            walked.append(_rated(rated[taken]))
        elif step.get("human_completion"):
            walked.append((string(fields(step["human_completion"], "human_completion").get("text"), "text"), 1.0))
        else:  # nobody went on from here
            break
    else:
        ways.append(walked)
    if not ways:
        raise Left("no step is rated")
    return tuple(_stepwise(question, *zip(*way, strict=True), chat=chat) for way in ways)


def _rated(one: Columns) -> tuple[str, float]:
    rating = number(one.get("rating"), "completions.rating")
    return string(one.get("text"), "completions.text"), 0.5 if rating == 0 else float(rating > 0)


def is_rated_solution(columns: Columns) -> bool:
    return isinstance(columns.get("question"), Mapping) and isinstance(columns.get("label"), Mapping)


def solutions(columns: Columns, chat: bool) -> tuple[Labelled, ...]:
    """Solutions of several models, right or wrong, one in each column that says so. Cobbe et al. 2021."""
    question = asked(string(columns["question"], "question"), chat)
    judged = _judged(columns)
    if not judged:
        raise Refusal("no column holds a solution with is_correct")
    texts = {name: string(v["solution"], f"{name}.solution") for name, v in judged.items()}
    rows = [
        Labelled(question, reply(text, chat), label(judged[name]["is_correct"], f"{name}.is_correct"))
        for name, text in texts.items()
        if text.strip()
    ]
    if not rows:
        raise Left("all solutions are empty")
    return tuple(rows)


def are_judged(columns: Columns) -> bool:
    return bool(_judged(columns))


def _judged(columns: Columns) -> dict[str, Columns]:
    return {n: v for n, v in columns.items() if isinstance(v, Mapping) and {"solution", "is_correct"} <= v.keys()}
