"""Set figures that a model must keep to: a TOML file, and a sentence for each that it doesn't.

A rule of a figure is one or several of at_least, at_most, and against another model drop_at_most and rise_at_most.
"""

import os
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from etils import epath

from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.resampling import mean
from rlhf_jax.evaluate.suite.items import Figure
from rlhf_jax.evaluate.suite.preferred import SCORED, WRITTEN
from rlhf_jax.fields import nearest

Bound = Literal["estimate", "interval"]
Limit = Literal["at_least", "at_most", "drop_at_most", "rise_at_most"]
LIMITS, CHANGES = get_args(Limit), ("drop_at_most", "rise_at_most")
UNPAIRED = ("constraints", "length_controlled")  # no mean of items: what changes are the estimates alone
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


def check(
    gate: Gate, path: str, figures: Mapping[str, Sequence[str]], models: Sequence[str], baseline: str | None = None
) -> None:
    """Holds a gate to what is going to be measured.

    Args:
      figures: of each task that runs.
      baseline: the model that wins are counted against, which has none itself; None: there is none.
    Errors: UserError for a task that doesn't run, a figure that it hasn't or whose change nobody can know, or a model
      that there isn't.
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
        if rule.limit in CHANGES and rule.figure in UNPAIRED and gate.bound == "interval":
            raise UserError(
                f"the gate {path}: {rule} is no mean of items, so {rule.limit} has no interval; set "
                'bound = "estimate", or use at_least or at_most.'
            )
        if rule.limit in CHANGES and rule.task == "wins" and gate.against == baseline:
            raise UserError(
                f"the gate {path}: {rule.limit} of {rule} needs the win rate of {baseline!r}, which is the baseline "
                "and has none; give another --baseline, or use at_least or at_most."
            )
    if gate.against is not None and gate.against not in models:
        raise UserError(
            f"the gate {path} holds models against {gate.against!r}, and the models are {', '.join(models)}; add it to "
            "--models or mend the gate."
        )
    if gate.against is not None and len(models) == 1:
        raise UserError(f"the gate {path} has no model to hold against {gate.against!r}; give another of --models.")


def check_kinds(gate: Gate, path: str, can: Mapping[str, Collection[str]], scorers: Collection[str]) -> None:
    """Holds a gate to the kinds of the models, which are known when they are open.

    Args: can: the tasks of each model; scorers: those that are reward models.
    Errors: UserError for a rule that no model can be held to, or a change from a model that can't have the figure.
    """
    for rule in gate.rules:
        having = [name for name, own in can.items() if rule.task in own and applies(rule, name in scorers)]
        if not set(having) - {gate.against}:
            kind = "reward" if rule.figure == SCORED else "language"
            raise UserError(
                f"the gate {path} asks for {rule}, which a {kind} model has, and none of the models that it is held to "
                "is one; give one of --models or drop the rule."
            )
        if rule.limit in CHANGES and gate.against not in having:
            raise UserError(
                f"the gate {path}: {rule.limit} of {rule} needs that of {gate.against!r}, which is a "
                f"{'reward' if gate.against in scorers else 'language'} model and can't have it; mend the gate."
            )


def applies(rule: Rule, scores: bool) -> bool:
    """Whether a model can have the figure of a rule: of pairs a reward model is scored, a language model asked."""
    return scores if rule.figure == SCORED else not (scores and rule.figure in WRITTEN)


def failures(gate: Gate, results: Results, *, scorers: Collection[str] = (), seed: int = 0) -> dict[str, list[str]]:
    """Of each model that is held to the gate a sentence for each figure that fails; an empty list passes.

    A model is held to the rules of the tasks that it was asked, and of pairs to those of its own kind: a reward model
    to what is scored, the baseline of win rates to no win rate. A figure that isn't there, because nothing could be
    measured, fails, and so does one that is no number. A change is that over the items which both models have, paired,
    with a bootstrap over their units.

    Args: scorers: the models that are reward models.
    """
    made: dict[str, list[str]] = {}
    for model, asked in results.items():
        rules = [rule for rule in gate.rules if rule.task in asked and applies(rule, model in scorers)]
        if model != gate.against and rules:
            made[model] = [said for rule in rules for said in _failed(gate, rule, model, results, seed)]
    return made


def _failed(gate: Gate, rule: Rule, model: str, results: Results, seed: int) -> Iterator[str]:
    own = results[model][rule.task].get(rule.figure)
    if own is None:
        yield f"{model}: {rule} was not measured, and the gate asks for it"
        return
    estimate, what, units = own.estimate, str(rule), len(set(own.units.values())) or own.count
    if rule.limit in CHANGES:
        other = results.get(str(gate.against), {}).get(rule.task, {}).get(rule.figure)
        if other is None:
            yield f"{model}: {rule} was not measured for {gate.against}, and the gate compares them"
            return
        change, units = _change(own, other, seed)
        if change is None:
            yield f"{model}: {rule} and that of {gate.against} have no item in common, and the gate compares them"
            return
        fall = rule.limit == "drop_at_most"
        estimate = Estimate(-change.mean, -change.high, -change.low) if fall else change
        what = f"the {'drop' if fall else 'rise'} of {rule} against {gate.against}"
    if gate.bound == "interval" and units < 2:  # resampled it is always the same
        yield f"{model}: {what} is of one question alone, so it is not known well enough"
        return
    least = rule.limit == "at_least"
    end = estimate.low if least else estimate.high
    value = end if gate.bound == "interval" else estimate.mean
    if not (value >= rule.value if least else value <= rule.value):  # so NaN fails
        of = f", the {'low' if least else 'high'} end of its interval," if gate.bound == "interval" else ""
        yield f"{model}: {what} is {value:.3f}{of} and must be {'at least' if least else 'at most'} {rule.value:g}"


def _change(own: Figure, other: Figure, seed: int) -> tuple[Estimate | None, int]:
    """The one less the other over the items of both, and the number of their units.

    Of a figure that is no mean of items it is that of the estimates, which has no interval.
    """
    if not own.values and not other.values:
        change = own.estimate.mean - other.estimate.mean
        return Estimate(change, change, change), min(own.count, other.count)
    both = [where for where in own.values if where in other.values]
    if not both:
        return None, 0
    differences = np.asarray([own.values[where] - other.values[where] for where in both])
    units = [own.units.get(where, where) for where in both]
    places = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    return mean(differences, np.asarray([places[unit] for unit in units]), seed=seed), len(places)
