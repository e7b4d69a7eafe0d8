"""The seeds of a study, one after the other; one that is finished is not run again."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rlhf_jax import fields
from rlhf_jax.errors import UserError
from rlhf_jax.lab.ground import Ground
from rlhf_jax.lab.study import Measured, Seen, Study

KNOBS, FOUND = "knobs.json", "found.json"


def set_knobs(study: Study, text: str) -> Study:
    """The study with the settings of `FIELD=VALUE;FIELD=VALUE`; an empty text changes nothing.

    Errors: UserError for a field that there isn't, one given twice, and a value that it can't have.
    """
    leaves = {leaf.path: leaf for leaf in fields.leaves(study.knobs)}
    given: dict[str, Any] = {}
    for clause in filter(None, (part.strip() for part in text.split(";"))):
        path, equals, word = (part.strip() for part in clause.partition("="))
        if path not in leaves:
            near = fields.nearest(path, leaves)
            raise UserError(f"--knobs names {path!r}, which {study.name} hasn't; it has {', '.join(leaves)} ({near}?).")
        if path in given:
            raise UserError(f"--knobs names {path} twice; give it once.")
        try:
            given[path] = leaves[path].kind.attempt(leaves[path].kind.read, word if equals else "")
        except ValueError as error:
            raise UserError(f"--knobs gives {path} the value {word!r}, but {error}.") from None
    return dataclasses.replace(study, knobs=fields.replace(study.knobs, given))


def run_seeds(study: Study, folder: epath.Path, seeds: Sequence[int], cache: str) -> list[Seen]:
    """Measures the seeds that `folder` doesn't hold yet; prints a line each.

    Errors: UserError for a folder in which the study ran with other settings.
    """
    knobs = fields.to_dict(study.knobs)
    file = folder / KNOBS
    if file.exists() and (known := json.loads(file.read_text())) != json.loads(json.dumps(knobs)):
        other = next(name for name in {**knobs, **known} if knobs.get(name) != known.get(name))
        raise UserError(
            f"{os.fspath(folder)} holds {study.name} with other settings ({other} was {known.get(other)!r}); give them "
            "again or another --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(knobs, indent=1) + "\n")
    samplers: dict[Any, Any] = {}
    return [_one(study, folder / f"seed={seed}", seed, cache, samplers) for seed in seeds]


def _one(study: Study, folder: epath.Path, seed: int, cache: str, samplers: dict[Any, Any]) -> Seen:
    if (file := folder / FOUND).exists():
        print(f"{study.name}, seed {seed}: finished before", flush=True)
        return Seen(**json.loads(file.read_text()))
    ground = Ground(folder, seed, start=study.start, cache=cache, samplers=samplers)
    began, used = time.monotonic(), time.process_time()
    told = study.measure(ground, study.knobs)
    seconds, processor = round(time.monotonic() - began, 1), round(time.process_time() - used, 1)
    seen = Seen(seed, seconds, _figures(study, told), _curves(told), processor)
    (part := folder / f"{FOUND}.part").write_text(json.dumps(vars(seen), indent=1) + "\n")
    part.replace(file)
    print(f"{study.name}, seed {seed}: {seen.seconds:.0f} s", flush=True)
    return seen


def _figures(study: Study, told: Measured) -> Mapping[str, Mapping[str, float]]:
    """The figures that are finite, to six digits. Raises ValueError for one that the study doesn't declare."""
    found: dict[str, dict[str, float]] = {}
    for condition, figures in told.figures.items():
        if unknown := [name for name in (condition,) if name not in study.conditions] + [
            name for name in figures if name not in study.measures
        ]:
            raise ValueError(f"{study.name} measured {unknown[0]!r}, which it doesn't declare")
        found[condition] = {name: _rounded(value) for name, value in figures.items() if math.isfinite(value)}
    return found


def _curves(told: Measured) -> Mapping[str, Mapping[str, list[float]]]:
    return {name: {axis: [*map(_rounded, values)] for axis, values in one.items()} for name, one in told.curves.items()}


def _rounded(value: float) -> float:
    return float(np.format_float_scientific(value, precision=5)) if math.isfinite(value) else math.nan
