"""Finished runs held against one of them, over the held-out rows and the prompts that both saw.

A run's folder holds `held_out.jsonl`, its last evaluation a row a line, and, if it was sampled from, `answers.jsonl`,
a prompt a line. Both are read as they stand; nothing is computed by a model here.
"""

import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rlhf_jax.algorithms.preference import SYNC_MIX
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate, paired
from rlhf_jax.losses import LOSSES, SUMS

Key = tuple[Any, ...]
Column = dict[Key, float]  # a finite number for each row or prompt that has one
ROWS, PROMPTS = {"margin": "margin", "accuracy": "correct"}, {"score": "scores", "KL, nats": "kl", "tokens": "tokens"}


class Run(NamedTuple):
    """What a run's folder says about it."""

    name: str
    folder: epath.Path
    config: dict[str, Any]  # its leaves by dotted path
    evaluations: list[dict[str, Any]]
    rows: dict[str, Column] | None  # a column a figure of the held-out rows; None: the run has no held_out.jsonl
    answers: dict[str, Column] | None  # of the prompts; None: the run has no answers.jsonl


class Difference(NamedTuple):
    """One figure of a run and of the baseline over what both have, and the one less the other."""

    run: str
    figure: str
    count: int  # rows or prompts that both have
    ours: Estimate
    baseline: Estimate
    difference: Estimate


def read(folder: epath.Path, name: str) -> Run:
    """Reads a run. Errors: UserError for a folder that holds none, and a file with a line that isn't understood."""
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}; give the workdirs of runs.")
    try:
        config = json.loads(file.read_text()) if file.exists() else None
    except ValueError:
        config = None
    if not isinstance(config, dict) or "algorithm" not in config:
        raise UserError(f"{str(folder)!r} holds no run (no config.json of one); give the workdirs of runs.")
    rows = answers = None
    if (held := folder / "held_out.jsonl").exists():
        rows = _columns(held, ROWS, lambda row: (row["row"], row["index"]))
    if (said := folder / "answers.jsonl").exists():
        answers = _columns(said, PROMPTS, lambda row: (json.dumps(row["prompt"], sort_keys=True),))
    return Run(name, folder, dict(_leaves(config)), _lines(folder / "eval.jsonl"), rows, answers)


def scale_of(run: Run) -> dict[str, Any]:
    """What the unit of a run's margins depends on, as it ran: what was left at none has its own default.

    They are those of the first loss of a sum: beta times differences of log-ratios to the reference, or of what the
    loss has in their place, whatever map of them the loss takes after that.
    """
    asked = run.config.get
    name = str(asked("loss.name"))
    name = next(iter(SUMS[name])) if name in SUMS else name.partition("+")[0]
    beta, length_alpha, every, mix = (
        asked(path) for path in ("loss.beta", "preference.length_alpha", "preference.sync_every", "preference.sync_mix")
    )
    if beta is None and name in LOSSES:
        beta = getattr(inspect.signature(LOSSES[name]).parameters.get("beta"), "default", None)
    return {
        "loss": name,
        "beta": beta,
        "length_alpha": 1.0 if length_alpha is None else length_alpha,
        "reference": None if every is None else (every, SYNC_MIX if mix is None else mix),  # how it moves
    }


def same_margins(one: Run, other: Run) -> bool:
    """Whether the margins of two runs are in one unit."""
    return scale_of(one) == scale_of(other)


def differences(run: Run, baseline: Run, *, seed: int = 0) -> list[Difference]:
    """Each figure that both have, over their common rows or prompts, with paired 95% bootstrap intervals.

    The margin is left out where the two aren't in one unit.

    Args:
      seed: of the resampling.
    Errors: UserError for two runs that both have rows or prompts, but none in common.
    """
    found, shared = [], 0
    for ours, theirs in ((run.rows, baseline.rows), (run.answers, baseline.answers)):
        for figure in ours if ours is not None and theirs is not None else ():
            if theirs is None or ours is None or (figure == "margin" and not same_margins(run, baseline)):
                continue
            keys = [key for key in ours[figure] if key in theirs[figure]]
            shared += len(keys)
            if keys:
                found.append(_difference(run.name, figure, ours[figure], theirs[figure], keys, seed))
    if not shared and any(_both(a, b) for a, b in ((run.rows, baseline.rows), (run.answers, baseline.answers))):
        raise UserError(
            f"{run.name} and {baseline.name} have no held-out row and no prompt in common, so nothing can be paired; "
            "evaluate both on the same files."
        )
    return found


def mean(column: Column, *, seed: int = 0) -> Estimate | None:
    """The mean of a column with its interval; None for an empty one."""
    return paired({"mean": np.asarray([*column.values()])}, seed=seed)["mean"] if column else None


def _difference(name: str, figure: str, ours: Column, theirs: Column, keys: Sequence[Key], seed: int) -> Difference:
    a, b = (np.asarray([column[key] for key in keys]) for column in (ours, theirs))
    said = paired({"ours": a, "baseline": b, "difference": a - b}, seed=seed)
    return Difference(name, figure, len(keys), said["ours"], said["baseline"], said["difference"])


def _both(a: Mapping[str, Column] | None, b: Mapping[str, Column] | None) -> bool:
    """Whether both have numbers."""
    return bool(a and b and any(a.values()) and any(b.values()))


def _columns(file: epath.Path, figures: Mapping[str, str], key_of: Any) -> dict[str, Column]:
    """The file's figures by row; a list of samples counts as its mean, what is null or not finite is left out."""
    columns: dict[str, Column] = {figure: {} for figure in figures}
    seen: dict[Key, int] = {}
    for number, row in enumerate(_lines(file), 1):
        try:
            key = key_of(row)
            numbers = {figure: _number(row.get(field)) for figure, field in figures.items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{file}:{number} is not understood; it isn't a line that a run wrote.") from None
        seen[key] = seen.get(key, 0) + 1  # a prompt may stand there twice, and then each has its own partner
        for figure, value in numbers.items():
            if value is not None and math.isfinite(value):
                columns[figure][*key, seen[key]] = value
    return columns


def _number(value: Any) -> float | None:
    values = value if isinstance(value, list) else [value]
    return None if not values or None in values else float(np.mean([float(each) for each in values]))


def _lines(file: epath.Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file without a last one that a kill cut short; none where there is no file."""
    rows = []
    lines = file.read_text().splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{file}:{number} is not JSON; it isn't a line that a run wrote.") from None
    return rows


def _leaves(node: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + name, value
