"""What a config asks to minimise: its losses resolved and checked, with their numbers; nothing is compiled."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import registry
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.completions import ASKED
from rlhf_jax.algorithms.parts import COLUMNS, TOKENS, Part
from rlhf_jax.algorithms.preference import SORTED, SYNC_MIX
from rlhf_jax.algorithms.step import Reads
from rlhf_jax.config import Config
from rlhf_jax.errors import UserError
from rlhf_jax.losses import LOSSES, SUMS
from rlhf_jax.losses.reward import ScoreGroup
from rlhf_jax.registry import PER_ROW

# What an argument of one loss may be, beyond what `build.ALLOWED` says of the field.
LIMITS: dict[tuple[str, str], tuple[str, Callable[[float], bool]]] = {
    ("exo", "label_smoothing"): ("above 0 and below 1", lambda x: bool(0 < np.float32(x) < 1)),
}
ROWS = {
    "pair": "pairs", "ranking": "rankings", "labelled": "single answers with a label", "stepwise": "steps",
    "prompt": "prompts",
}  # fmt: skip


class Chosen(NamedTuple):
    """The losses of a run."""

    parts: tuple[Part, ...]
    reads: Reads  # what they ask of the data together
    hyper: dict[str, Any]  # their numbers: "loss", "weights" and, if changed, those of the algorithm's section


def choose(config: Config) -> Chosen:
    """Errors: UserError for a loss that there isn't, that the algorithm can't run, or that would ignore a setting."""
    weights = _weights(config)
    losses = {name: registry.resolve(LOSSES, name, "loss") for name in weights}
    takes = {name: _takes(config, name, loss, weights) for name, loss in losses.items()}
    reads = _reads(config, takes)
    values = registry.arguments_of("loss", losses, config.loss)
    _check_values(config, values)
    by_row = _by_row(config, losses, reads.form)
    parts, numbers = [], {}
    for name, loss in losses.items():
        numbers[name] = {n: v for n, v in values[name].items() if _is_number(v) and n not in by_row[name]}
        options = {n: v for n, v in values[name].items() if not _is_number(v)}
        if takes[name] in ASKED and "beta" not in numbers[name]:
            raise UserError(f"the preference loss {name!r} must take beta: the rewards are scaled by it.")
        parts.append(Part(name, loss, takes[name], options, by_row[name]))
    changes = _changes(config, takes, reads)
    return Chosen(tuple(parts), reads, {"loss": numbers, "weights": weights, **changes})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weights(config: Config) -> dict[str, float]:
    """The losses by name, each with its weight in the sum."""
    name, given = config.loss.name, config.loss.weights
    if name in SUMS:
        weights = SUMS[name]
    else:
        names = name.split("+")
        if len(set(names)) < len(names):
            raise UserError(f"--config.loss.name={name} names a loss twice; name each once, and weigh it by weights.")
        weights = dict.fromkeys(names, 1.0)
    if not given:
        return dict(weights)
    if len(weights) == 1:
        raise UserError(
            f"--config.loss.weights is for sums of losses, such as dpo+nll, and {name!r} is one; drop the flag."
        )
    if len(given) != len(weights):
        raise UserError(
            f"--config.loss.weights has {len(given)} numbers for {len(weights)} losses, {', '.join(weights)}; give one "
            "each."
        )
    return dict(zip(weights, given, strict=True))


def _takes(config: Config, name: str, loss: Callable[..., Any], names: Mapping[str, float]) -> type:
    """The type of a loss's first argument, one that the algorithm has columns for."""
    algorithm = ALGORITHMS[config.algorithm]
    first = next(iter(inspect.signature(loss).parameters), "")
    columns = typing.get_type_hints(loss).get(first)
    ours = name in algorithm.LOSSES or name not in LOSSES  # or one from outside
    if (columns in algorithm.READS and ours) or (columns in algorithm.BESIDE and len(names) > 1):
        return typing.cast(type, columns)
    home = [o for o, module in ALGORITHMS.items() if columns in module.READS and (name in module.LOSSES or ours)]
    wanted = " or ".join(f"{taken.__module__}.{taken.__name__}" for taken in algorithm.READS)
    hint = f"use --config.algorithm={home[0]}" if home else f"annotate its first argument {first} with {wanted}"
    raise UserError(
        f"algorithm {config.algorithm!r} can't run the loss {name!r}; choose --config.loss.name from "
        f"{', '.join(algorithm.LOSSES)}, or {hint}."
    )


def _reads(config: Config, takes: Mapping[str, type]) -> Reads:
    """What all losses together ask of the data."""
    known = ALGORITHMS[config.algorithm].READS
    asked = {name: known[kind] for name, kind in takes.items() if kind in known}
    forms: dict[str, str] = {}  # with the first loss of each
    for name, reads in asked.items():
        forms.setdefault(reads.form, name)
    if not asked:
        raise UserError(
            f"--config.loss.name={config.loss.name} has only losses of single tokens; use --config.algorithm=sft, or "
            "add one of preferences."
        )
    if len(forms) > 1:
        told = " and ".join(f"{name} takes {ROWS.get(form, form)}" for form, name in forms.items())
        raise UserError(f"--config.loss.name={config.loss.name}: {told}; add up losses of the same rows.")
    form = next(iter(forms))
    if form == "ranking" and config.data.ties and not any(kind is ScoreGroup for kind in takes.values()):
        raise UserError(
            f"loss {config.loss.name!r} would ignore --config.data.ties: it compares no answers of equal rank; drop it "
            "or use --config.algorithm=reward --config.loss.name=all_pairs."
        )
    if form == "prompt" and len(takes) > 1:
        raise UserError(
            f"--config.loss.name={config.loss.name}: what learns from rollouts has one loss of its policy; give one."
        )
    if form == "ranking" and len(takes) > len(asked):
        raise UserError(
            f"--config.loss.name={config.loss.name}: a loss of single tokens is that of chosen answers, and a ranking "
            "has none; drop it or use pairs."
        )
    every = asked.values()
    return Reads(form, any(reads.reference for reads in every), any(reads.mismatched for reads in every))


def _check_values(config: Config, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Holds each loss's arguments to its own limits, and refuses one that another argument switches off."""
    for name, arguments in values.items():
        for argument, value in arguments.items():
            says, allowed = LIMITS.get((name, argument), ("", lambda _: True))
            if not allowed(value):
                raise UserError(
                    f"--config.loss.{argument}={value} is not allowed for the loss {name!r}; it must be {says}."
                )
    alphas = [arguments for arguments in values.values() if "divergence_alpha" in arguments]
    if config.loss.divergence_alpha is not None and all(a.get("divergence", "alpha") != "alpha" for a in alphas):
        raise UserError(
            f"divergence {alphas[0]['divergence']!r} would ignore divergence_alpha; drop "
            "--config.loss.divergence_alpha or give --config.loss.divergence=alpha."
        )


def _by_row(config: Config, losses: Mapping[str, Callable[..., Any]], form: str) -> dict[str, tuple[str, ...]]:
    """For each loss, which of its arguments columns of the data give."""
    asked = {argument: column for argument, column in COLUMNS.items() if getattr(config.data, column) is not None}
    if form == "pair":  # these make soft labels of what rows say
        asked |= {"label_smoothing": "merge"} if config.data.merge else {}
        asked |= {"label_smoothing": "ties"} if config.data.ties else {}
    for argument, source in asked.items():
        flag = f"--config.data.{source}"
        if form == "prompt":
            raise UserError(
                f"algorithm {config.algorithm!r} would ignore {flag}, which is said of written answers; drop the flag."
            )
        if not any(_takes_rows(loss, argument) for loss in losses.values()):
            own = ALGORITHMS[config.algorithm].LOSSES.items()
            able = ", ".join(name for name, loss in own if _takes_rows(loss, argument)) or "those of another algorithm"
            raise UserError(
                f"loss {config.loss.name!r} would ignore {flag}: it takes no {argument} row by row; drop the flag or "
                f"choose --config.loss.name from {able}."
            )
        if getattr(config.loss, argument) is not None:
            raise UserError(f"{flag} and --config.loss.{argument} say the same; give one of them.")
    return {name: tuple(a for a in asked if _takes_rows(loss, a)) for name, loss in losses.items()}


def _takes_rows(loss: Callable[..., Any], argument: str) -> bool:
    hint = typing.get_type_hints(loss, include_extras=True).get(argument)
    return PER_ROW in getattr(hint, "__metadata__", ())


def _check_sections(config: Config, reads: Reads) -> None:
    """Errors: UserError for a section of another algorithm that is not as it comes."""
    for name in ("rollout", "rewards", *(name for name in ALGORITHMS if hasattr(config, name))):
        given, default = getattr(config, name), getattr(Config(), name)
        changed = [field for field, value in vars(default).items() if getattr(given, field) != value]
        read = reads.form == "prompt" if name in ("rollout", "rewards") else config.algorithm == name
        if changed and not read:
            raise UserError(f"algorithm {config.algorithm!r} would ignore --config.{name}.{changed[0]}; drop it.")


def _changes(config: Config, takes: Mapping[str, type], reads: Reads) -> dict[str, Any]:
    """The numbers of `config.preference`, whose fields must all be of use."""
    section, known = config.preference, ALGORITHMS[config.algorithm].READS
    kinds = {name: kind for name, kind in takes.items() if kind in known and kind not in TOKENS}
    _check_sections(config, reads)
    if reads.form == "prompt":
        own = getattr(config, config.algorithm)
        return {config.algorithm: own.numbers, "rollout": {"temperature": config.rollout.temperature}}
    if config.reward.demonstrations and reads.form not in ("pair", "ranking"):
        raise UserError(
            f"--config.reward.demonstrations moves scores, and those of the loss {config.loss.name!r} are the log-odds "
            "of being right; drop it."
        )

    def refuse(field: str, why: str) -> None:
        raise UserError(
            f"loss {config.loss.name!r} can't use --config.preference.{field}: {why}; drop it or choose another "
            "--config.loss.name."
        )

    for name, kind in kinds.items():
        if section.length_alpha is not None and not (known[kind].form == "pair" and known[kind].reference):
            refuse("length_alpha", f"it shortens pairs that are held against a reference, and {name} has none of them")
        if section.weighting is not None and (known[kind].form != "pair" or kind in SORTED):
            refuse("weighting", f"it weighs whole pairs, and {name} has none that stay together")
    if section.sync_every is not None and not reads.reference:
        refuse("sync_every", "it moves the reference, and this loss has none")
    if section.sync_mix is not None and section.sync_every is None:
        raise UserError("--config.preference.sync_mix is read with --config.preference.sync_every alone; give both.")
    numbers = {}
    if section.length_alpha is not None:
        numbers["length_alpha"] = section.length_alpha
    if section.sync_every is not None:
        numbers["sync_mix"] = SYNC_MIX if section.sync_mix is None else section.sync_mix
    return {"preference": numbers} if numbers else {}
