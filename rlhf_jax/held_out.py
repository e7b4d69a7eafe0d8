"""What an evaluation on held-out rows leaves: figures, a line a row, some rollouts as they read."""

import json
import math
from typing import Any

import jax
import numpy as np

from rlhf_jax.algorithms.step import Batch
from rlhf_jax.build import Built
from rlhf_jax.evaluate.intervals import wilson

SHOWN, LINE = 3, 60  # rollouts that are printed, characters of each


def show(built: Built, step: int, batch: Batch) -> None:
    """Some held-out rollouts as they read: samples.jsonl, and the first of them on the terminal."""
    assert built.online is not None
    rows = built.online.score.shown(batch)
    if jax.process_index() > 0:
        return
    file = built.workdir / "samples.jsonl"
    before = file.read_text().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in before if json.loads(line)["step"] < step]  # a run that goes on says some steps again
    part = built.workdir / "samples.jsonl.part"
    part.write_text("".join([*kept, *(json.dumps({"step": step, **row}) + "\n" for row in rows)]))
    part.replace(file)
    for row in rows[:SHOWN]:
        score = f"{row['score']:8.3f} | " if "score" in row else ""
        print(f"  {score}{row['prompt'][-LINE:]!r} -> {row['completion'][:LINE]!r}", flush=True)


def write_rows(built: Built, rows: list[dict[str, np.ndarray]], index: list[np.ndarray]) -> None:
    """held_out.jsonl: what the last evaluation said of each held-out row, for comparing runs row by row."""
    where, lines = {example.index: example.where for example in built.held_out}, []
    for said, numbers in zip(rows, index, strict=True):
        # Of several completions of a prompt the mean.
        means = {name: np.mean(np.reshape(values, (numbers.size, -1)), axis=1) for name, values in said.items()}
        for place, number in enumerate(numbers.reshape(-1).tolist()):
            if number >= 0:
                told = {name: float(values[place]) for name, values in means.items()}
                figures = {name: x if math.isfinite(x) else None for name, x in told.items()}
                lines.append(json.dumps({"row": where[number], "index": number, **figures}))
    part = built.workdir / "held_out.jsonl.part"
    part.write_text("".join(line + "\n" for line in lines))
    part.replace(built.workdir / "held_out.jsonl")


def summarise(terms: list[dict[str, Any]], means: list[dict[str, Any]]) -> dict[str, float]:
    """Loss and metrics of many batches from their sums, in float64; shares get their 95% interval."""

    def add(sums: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray, float]:
        total, count = (np.sum([np.asarray(s[name][i], np.float64) for s in sums], axis=0) for i in (-2, -1))
        return total, count, float(np.sum(np.where(count > 0, total / np.where(count > 0, count, 1), 0)))

    loss = sum(float(terms[0][name].weight) * add(terms, name)[2] for name in terms[0])
    out = {"eval/loss": loss} | {f"eval/{name}": add(means, name)[2] for name in means[0]}
    if "rewards/accuracies" in means[0]:
        _, count, share = add(means, "rewards/accuracies")
        low, high = wilson(share, float(count))
        out |= {"eval/rewards/accuracies_low": low, "eval/rewards/accuracies_high": high}
    return out
