"""What the record says of those who label: how much, how fast, how right, how alike, and what it cost."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rlhf_jax.feedback import exchange, rankings
from rlhf_jax.feedback.judgement import FLAGS, LABELS, Judgement, Task, right
from rlhf_jax.feedback.record import Record

WINDOW = 10  # tests that a point of the drift is the mean of
IDLE = 600.0  # seconds after which a look at a task was a pause, and is paid no longer


def overview(record: Record, cost_per_hour: float | None = None) -> dict[str, Any]:
    """The figures of the dashboard, as JSON has them: null where a figure is not defined.

    Args:
      cost_per_hour: what an hour of a labeller costs, in any currency.
    Returns: tasks (all, complete, tests), judgements, hours, cost, cost_per_label, agreement (of any two people) and
      labellers, a row each:
        name, judgements, unsure (shares that can't judge), taken_back, seconds (median), hours, cost;
        accuracy (share of gold found), tests (how many), drift (the mean over the last tests, at each test),
        change (accuracy in the second half of the tests less that in the first);
        agreement (how often others say the same of the same two answers); flags (how often each was raised).
    """
    said, all_said = record.judgements(), record.judgements(all=True)
    tasks = record.tasks()  # after these: whoever adds judgements meanwhile adds their tasks too
    rows = exchange.rankings(record)
    complete = _complete(tasks, said)
    people = [_person(name, tasks, said, all_said, rows, cost_per_hour) for name in record.labellers()]
    hours = math.fsum(one["hours"] for one in people)
    cost = None if cost_per_hour is None else cost_per_hour * hours
    useful = sum(1 for one in said if one.kind != "unsure" and tasks[one.task].gold is None)
    return {
        "tasks": {
            "all": sum(task.gold is None for task in tasks.values()),
            "complete": complete,
            "tests": sum(task.gold is not None for task in tasks.values()),
        },
        "judgements": len(said),
        "hours": hours,
        "cost": cost,
        "cost_per_label": cost / useful if cost is not None and useful else None,
        "agreement": _known(rankings.agreement(rows)),
        "labellers": people,
    }


def _complete(tasks: dict[str, Task], said: Sequence[Judgement]) -> int:
    count: dict[str, int] = {}
    for one in said:
        count[one.task] = count.get(one.task, 0) + (one.kind != "unsure")
    return sum(task.gold is None and count.get(id, 0) >= (task.labels or LABELS) for id, task in tasks.items())


def _person(
    name: str,
    tasks: dict[str, Task],
    said: Sequence[Judgement],
    all_said: Sequence[Judgement],
    rows: Sequence[rankings.Row],
    cost_per_hour: float | None,
) -> dict[str, Any]:
    own = [one for one in said if one.labeller == name]
    # What was taken back took its time too.
    times = [min(one.seconds, IDLE) for one in all_said if one.labeller == name and one.seconds is not None]
    hours = math.fsum(times) / 3600
    found = [right(one, tasks[one.task]) for one in own if tasks[one.task].gold is not None]
    shares = [some / count for some, count in found if count]
    drift = [statistics.fmean(shares[max(0, end - WINDOW) : end]) for end in range(1, len(shares) + 1)]
    half = len(shares) // 2
    return {
        "name": name,
        "judgements": len(own),
        "unsure": sum(one.kind == "unsure" for one in own) / len(own) if own else None,
        "taken_back": sum(one.labeller == name and one.kind == "undo" for one in all_said),
        "seconds": statistics.median(times) if times else None,
        "hours": hours,
        "cost": None if cost_per_hour is None else cost_per_hour * hours,
        "tests": len(shares),
        "accuracy": statistics.fmean(shares) if shares else None,
        "drift": drift,
        "change": statistics.fmean(shares[-half:]) - statistics.fmean(shares[:half]) if half else None,
        "agreement": agreement_with_others(name, rows),
        "flags": {flag: sum(flag in some for one in own for some in one.flags) for flag in FLAGS},
    }


def agreement_with_others(name: str, rows: Sequence[rankings.Row]) -> float | None:
    """How often one person and another say the same of the same two answers; None if nobody else judged theirs."""
    # Of two with the same name nothing is compared: so all the others get one.
    return _known(rankings.agreement([{**row, "labeller": row["labeller"] == name} for row in rows]))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
