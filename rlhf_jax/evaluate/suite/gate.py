"""Set figures that a model must keep to: a TOML file, and a sentence for each that it doesn't.

A rule of a figure is one or several of at_least, at_most, and against another model drop_at_most and rise_at_most.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from etils import epath

from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.resampling import mean
from rlhf_jax.evaluate.suite.items import Figure
from rlhf_jax.fields import nearest

Bound = Literal["estimate", "interval"]
Limit = Literal["at_least", "at_most", "drop_at_most", "rise_at_most"]
LIMITS, CHANGES = get_args(Limit), ("drop_at_most", "rise_at_most")
Results = Mapping[str, Mapping[str, Mapping[str, Figure]]]  # by model, task and figure


class Rule(NamedTuple):
    task: str
    figure: str
    limit: Limit
    value: float

    def __str__(self) -> str:
        return f"{self.task}.{self.figure}"


class Gate(NamedTuple):
    """Rules, the model that changes are held against, and what a rule is held to.

    Attributes:
      against: name of one of the models, which is itself not held to anything; None: there is none.
      bound: "estimate": the figure itself; "interval": the end of its 95% interval that is worse for it, so that a
        figure that isn't known well enough fails.
    """

    rules: tuple[Rule, ...]
    against: str | None = None
    bound: Bound = "estimate"


def read(path: str) -> Gate:
    """A gate's file. Errors: UserError for one that isn't there, isn't TOML, or says what no rule is."""
    file = epath.Path(os.path.expanduser(path))
    if not file.is_file():
        raise UserError(f"there is no file {path}; check --gate.")
    try:
        given = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the gate {path} is not TOML ({error}); mend it.") from None
    against, bound = given.pop("against", None), given.pop("bound", "estimate")
    if not (against is None or isinstance(against, str)) or bound not in get_args(Bound):
        raise UserError(f"the gate {path}: against is a model's name, and bound one of {', '.join(get_args(Bound))}.")
    rules = tuple(_rules(path, given))
    if not rules:
        raise UserError(f"the gate {path} has no rule; write such as [mmlu] accuracy = {{at_least = 0.3}}.")
    if against is None and (changes := [rule for rule in rules if rule.limit in CHANGES]):
        raise UserError(f"the gate {path}: {changes[0].limit} of {changes[0]} needs against = MODEL at its top.")
    return Gate(rules, against, bound)


def _rules(path: str, given: Mapping[str, Any]) -> Iterator[Rule]:
    for task, figures in given.items():
        if not isinstance(figures, dict):
            raise UserError(f"the gate {path}: {task} is no table of a task; write [TASK] and its figures below.")
        for figure, limits in figures.items():
            if not isinstance(limits, dict) or not limits:
                raise UserError(f"the gate {path}: {task}.{figure} must be such as {{at_least = 0.3}}.")
            for limit, value in limits.items():
                if limit not in LIMITS:
                    raise UserError(
                        f"the gate {path}: {task}.{figure} has no limit {limit!r}; the nearest is "
                        f"{nearest(limit, LIMITS)!r}. Use one of {', '.join(LIMITS)}."
                    )
                if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
                    raise UserError(
                        f"the gate {path}: {task}.{figure}.{limit} is {value!r}, not a number from -1 to 1."
                    )
                yield Rule(task, figure, limit, float(value))


def check(gate: Gate, path: str, figures: Mapping[str, Sequence[str]], models: Sequence[str]) -> None:
    """Holds a gate to what is going to be measured.

    Args: figures: of each task that runs.
    Errors: UserError for a task that doesn't run, a figure that it hasn't, or a model that there isn't.
    """
    for rule in gate.rules:
        if rule.task not in figures:
            raise UserError(
                f"the gate {path} asks for {rule}, and the task {rule.task!r} isn't run (the nearest that is: "
                f"{nearest(rule.task, figures)!r}); add it to --tasks or mend the gate."
            )
        if rule.figure not in figures[rule.task]:
            raise UserError(
                f"the gate {path} asks for {rule}, and {rule.task} has no such figure; the nearest is "
                f"{nearest(rule.figure, figures[rule.task])!r}."
            )
    if gate.against is not None and gate.against not in models:
        raise UserError(
            f"the gate {path} holds models against {gate.against!r}, and the models are {', '.join(models)}; add it to "
            "--models or mend the gate."
        )
    if gate.against is not None and len(models) == 1:
        raise UserError(f"the gate {path} has no model to hold against {gate.against!r}; give another of --models.")


def failures(gate: Gate, results: Results, *, seed: int = 0) -> dict[str, list[str]]:
    """Of each model that is held to the gate a sentence for each figure that fails; an empty list passes.

    A model is held to the rules of the tasks that it was asked: a reward model to those of pairs, the baseline of win
    rates to no win rate. A figure that isn't there, because nothing could be measured, fails. A change is that over the
    items which both models have, paired, with a bootstrap over them.
    """
    made: dict[str, list[str]] = {}
    for model, asked in results.items():
        rules = [rule for rule in gate.rules if rule.task in asked]
        if model != gate.against and rules:
            made[model] = [said for rule in rules for said in _failed(gate, rule, model, results, seed)]
    return made


def _failed(gate: Gate, rule: Rule, model: str, results: Results, seed: int) -> Iterator[str]:
    own = results[model][rule.task].get(rule.figure)
    if own is None:
        yield f"{model}: {rule} was not measured, and the gate asks for it"
        return
    estimate, what = own.estimate, str(rule)
    if rule.limit in CHANGES:
        other = results[str(gate.against)].get(rule.task, {}).get(rule.figure)
        change = None if other is None else _change(own, other, seed)
        if change is None:
            yield f"{model}: {rule} and that of {gate.against} have no item in common, and the gate compares them"
            return
        fall = rule.limit == "drop_at_most"
        estimate = Estimate(-change.mean, -change.high, -change.low) if fall else change
        what = f"the {'drop' if fall else 'rise'} of {rule} against {gate.against}"
    least = rule.limit == "at_least"
    end = estimate.low if least else estimate.high
    value = end if gate.bound == "interval" else estimate.mean
    if value < rule.value if least else value > rule.value:
        of = f", the {'low' if least else 'high'} end of its interval," if gate.bound == "interval" else ""
        yield f"{model}: {what} is {value:.3f}{of} and must be {'at least' if least else 'at most'} {rule.value:g}"


def _change(own: Figure, other: Figure, seed: int) -> Estimate | None:
    """The one less the other over the items of both; of a figure that is no mean of items without an interval."""
    if not own.values or not other.values:
        change = own.estimate.mean - other.estimate.mean
        return Estimate(change, change, change) if not own.values and not other.values else None
    both = [where for where in own.values if where in other.values]
    if not both:
        return None
    differences = np.asarray([own.values[where] - other.values[where] for where in both])
    return mean(differences, np.arange(len(both)), seed=seed)
