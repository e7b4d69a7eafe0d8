"""Constitutional AI where harm is known exactly: harm by round, and the last model against the helpful-only one.

    python -m benchmarks.constitutional_world --out=FOLDER [--seeds=0,1,2] [--picture=FILE.png]

Runs configs/constitutional.py:tiny with every seed in FOLDER/seed=N, on the start world:frank, of which there is one; a
seed that is finished is not run again. Prints every seed, means with t intervals over the seeds, and how often ordinary
prompts are answered rightly and refused. Harm is 1 less the scorer `harmless`: the share of answers that tell a code or
are rude.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs.constitutional import get_config
from experiments.constitutional import run_all
from rlhf_jax import fields, run
from rlhf_jax.data import world, world_secrets
from rlhf_jax.evaluate.intervals import student

ONLY = "helpful only"
COLOURS = ("#1f6f8b", "#d1495b", "#66a182")


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and what its 95% t interval reaches to both sides; infinity with one seed."""
    told = student(values)
    return told.mean, told.high - told.mean


def harm_of(found: Mapping[str, Any], name: str) -> float:
    """The share of a model's answers that do harm."""
    return 1 - found["harmless"]["score"][name]["mean"]


def help_of(found: Mapping[str, Any], name: str) -> float:
    """The gold reward of its answers to ordinary prompts."""
    return found["helpful"]["score"][name]["mean"]


def rows_of(results: Mapping[int, Mapping[str, Any]]) -> list[list[str]]:
    """A row a model: harm and gold of every seed, then their means."""
    made = []
    for name in next(iter(results.values()))["harmless"]["score"]:
        row = [name]
        for of in (harm_of, help_of):
            values = [of(found, name) for found in results.values()]
            mean, reach = over_seeds(values)
            row += [", ".join(f"{value:.3f}" for value in values), f"{mean:.3f} ± {reach:.3f}"]
        made.append(row)
    return made


def differences(results: Mapping[int, Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """A row a pair of models: what the first has above the other, of each seed with its interval over prompts."""
    made = []
    for name, other in pairs:
        for side, sign in (("harmless", -1), ("helpful", 1)):
            told = [next(one for one in found[side]["above"] if (one["model"], one["other"]) == (name, other))
                    for found in results.values()]  # fmt: skip
            ends = [sorted((sign * one["low"], sign * one["high"])) for one in told]
            own = ", ".join(
                f"{sign * one['mean']:.3f} ({a:.3f} to {b:.3f})" for one, (a, b) in zip(told, ends, strict=True)
            )
            mean, reach = over_seeds([sign * one["mean"] for one in told])
            what = "harm" if sign < 0 else "gold"
            made.append([f"{name} above {other}", what, own, f"{mean:.3f} ± {reach:.3f}"])
    return made


def ordinary(file: pathlib.Path) -> dict[str, dict[str, float]]:
    """Of each model's answers to ordinary prompts: how often they are right, and refuse what needs no refusal.

    Args:
      file: answers.jsonl of a run.
    """
    said: dict[str, dict[str, list[float]]] = {}
    for row in map(json.loads, file.read_text().splitlines()):
        if row["side"] == "helpful":
            own = said.setdefault(row["model"], {"right": [], "refused": []})
            own["right"].append(world.judge(row["prompt"], row["completion"]).correct)
            own["refused"].append(float(world_secrets.refuses(row["completion"])))
    return {name: {part: float(np.mean(values)) for part, values in parts.items()} for name, parts in said.items()}


def draw(results: Mapping[int, Mapping[str, Any]], file: pathlib.Path) -> None:
    """Harm by round, and harm against gold, every seed a point."""
    figure = Figure(figsize=(9.6, 4.0), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = [*next(iter(results.values()))["harmless"]["score"]]
    rounds = ["helpful", *(name for name in names if name.startswith("round "))]
    at = np.arange(len(rounds))
    for number, ((seed, found), colour) in enumerate(zip(results.items(), itertools.cycle(COLOURS), strict=False)):
        told = [found["harmless"]["score"][name] for name in rounds]
        # Harm is 1 less the score, so its lower end is the score's upper one.
        ends = [[t["high"] - t["mean"] for t in told], [t["mean"] - t["low"] for t in told]]
        look = {"color": colour, "marker": "o", "capsize": 3, "lw": 1.4, "label": f"seed {seed}"}
        aside = 0.06 * (number - (len(results) - 1) / 2)
        left.errorbar(at + aside, [1 - t["mean"] for t in told], yerr=ends, **look)
    left.set(xlabel="round of critique and revision", ylabel="share of answers that do harm", xticks=at, ylim=(0, None))
    left.legend(fontsize=8, frameon=False)
    left.set_title("Harm after each round, by seed", fontsize=11)
    for name, marker in zip(names, "osD^vPX*", strict=False):
        spots = [(help_of(found, name), harm_of(found, name)) for found in results.values()]
        right.scatter(
            *zip(*spots, strict=True),
            marker=marker,
            s=46,
            alpha=0.8,
            label=f"final ({name})" if name == results[min(results)]["final"] else name,
        )
    right.set(
        xlabel="gold reward on ordinary prompts (helpfulness)",
        ylabel="share of answers that do harm",
        ylim=(-0.02, None),
    )
    right.set_title("Harm against helpfulness, every seed", fontsize=11)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


def main() -> None:
    """Runs what isn't finished, and tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--picture", type=pathlib.Path)
    parser.add_argument("--cache", default=get_config().cache)
    given = parser.parse_args()
    run.use_compile_cache()
    results = {}
    for seed in map(int, given.seeds.split(",")):
        whole = fields.replace(get_config("tiny"), {"seed": seed, "cache": given.cache})
        results[seed] = run_all(whole, str(given.out / f"seed={seed}"), "python -m benchmarks.constitutional_world")
    final = next(iter(results.values()))["final"]
    seeds = ", ".join(map(str, results))
    print(table(["answers of", f"harm, seeds {seeds}", "mean", f"gold, seeds {seeds}", "mean"], rows_of(results)))
    rounds = [name for name in next(iter(results.values()))["harmless"]["score"] if name.startswith("round ")]
    pairs = [(b, a) for a, b in zip(["helpful", *rounds], rounds, strict=False)]
    pairs += [(final, "helpful"), (final, ONLY)]
    print(table(["", "", f"seeds {seeds}, 95% over prompts", "mean, 95% over seeds"], differences(results, pairs)))
    told = [ordinary(given.out / f"seed={seed}" / "answers.jsonl") for seed in results]
    for part in ("right", "refused"):
        rows = [[name, ", ".join(f"{one[name][part]:.3f}" for one in told)] for name in told[0]]
        print(table([f"{part}, of answers to ordinary prompts", f"seeds {seeds}"], rows))
    for seed, found in results.items():
        print(f"seed {seed}: {found['human']} human labels, {found['labels']} of a model, right {found['agrees']}")
    if given.picture:
        draw(results, given.picture)
        print(f"wrote {given.picture}")


if __name__ == "__main__":
    main()
