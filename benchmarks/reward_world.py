"""Reward models where the truth is known: data, size, rankings against pairs, and five members against one.

    python -m benchmarks.reward_world --out=FOLDER

On the start world:small, whose labellers err in 15% of their labels and like long answers. Every model is trained with
three seeds on the same rows, in one program. Four tables:

- rows: held-out accuracy by the number of pairs, and what no model can surpass: the chance of the likelier label;
- width: the same rows, from fine-tuned models of width 32, 64 and 96;
- rankings: three people's rankings of four answers a prompt as rows of their own (all_pairs, plackett_luce) and taken
  apart into pairs (bradley_terry), with as many answers in each step;
- members: five members on bootstrapped rows against each of them alone, where the shorter answer is really better.

Writes results.json and prints it.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax import fields, run, sweep, worlds
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data import labellers, world
from rlhf_jax.data.config import Data
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.answers import Subject, answer
from rlhf_jax.evaluate.best_of import best_of
from rlhf_jax.evaluate.rewards import Rewards, combine
from rlhf_jax.metrics import LogConfig
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.workdir import open_rewards

CACHE, SEEDS, MEMBERS = "~/.cache/rlhf_jax", 3, 5
ROWS = (250, 500, 1000, 2000)
WIDTHS = {"narrow": 32, "tiny": 64, "small": 96}
Row = dict[str, Any]


def config_of(start: pathlib.Path, rows: str, held_out: str, **changes: Any) -> Config:
    """Three seeds on rows of the start world:small; `changes` by dotted field, with __ for the dots."""
    config = Config(
        algorithm="reward",
        model=ModelConfig(path=str(start)),
        data=Data(path=(rows,), eval_path=(held_out,), **worlds.LENGTH),
        loss=Loss(name="bradley_terry"),
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup=10),
        train=Train(steps=120, batch_size=32),
        evaluate=Evaluate(every=0, rows=None),
        checkpoint=CheckpointConfig(every=0, keep_last=1),
        log=LogConfig(tensorboard=False, progress=False),
    )
    shared = {"reward.members": SEEDS}
    return fields.replace(config, shared | {name.replace("__", "."): value for name, value in changes.items()})


def trained(config: Config, work: pathlib.Path) -> list[list[Row]]:
    """The evaluations of each member; what an earlier call has finished is not done again."""
    sweep.train_ensemble(config, str(work), resume=True)
    folders = sorted((work / "members").iterdir())
    return [[json.loads(line) for line in (one / "eval.jsonl").read_text().splitlines()] for one in folders]


def accuracies(found: Sequence[Sequence[Row]], at: int = -1) -> list[float]:
    """Of each member, at one of its evaluations."""
    return [rows[at]["eval/rewards/accuracies"] for rows in found]


def ceiling(rows: Sequence[Row], config: Any) -> dict[str, float]:
    """Of the labels of pairs: the chance of the likelier one, and how often gold's order is the label's."""
    people = labellers.panel(1, 0, **{k: v for k, v in dataclasses.asdict(config.labeller).items() if k != "seed"})
    one = [people[0].probability(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    most = [p**2 * (3 - 2 * p) for p in one]  # of three labels
    gold = [row["gold_margin"] for row in rows]
    return {
        "ceiling": float(np.mean([max(p, 1 - p) for p in most])),
        "gold": float(np.mean([(g > 0) + 0.5 * (g == 0) for g in gold])),
    }


def by_rows(folder: pathlib.Path, out: pathlib.Path) -> dict[str, list[float]]:
    """Accuracy by the number of pairs, with as many steps."""
    lines = (folder / "answers.jsonl").read_text().splitlines()
    found = {}
    for count in (*(n for n in ROWS if n < len(lines)), len(lines)):
        file = out / f"answers-{count}.jsonl"
        file.write_text("\n".join(lines[:count]) + "\n")
        config = config_of(folder / "model", str(file), str(folder / "answers_held_out.jsonl"))
        found[str(count)] = accuracies(trained(config, out / f"rows-{count}"))
    return found


def by_width(folder: pathlib.Path, out: pathlib.Path) -> dict[str, list[float]]:
    """Accuracy by the width of the start, on the same rows; the narrower ones learnt less text before."""
    narrow = dataclasses.replace(worlds.RECIPES["tiny"], width=WIDTHS["narrow"])
    worlds.RECIPES["narrow"] = narrow  # of this process alone
    found = {}
    for name, width in WIDTHS.items():
        start = pathlib.Path(str(worlds.folder(name, CACHE, run.train))) / "model"
        rows, held_out = (str(folder / f"{file}.jsonl") for file in ("answers", "answers_held_out"))
        found[str(width)] = accuracies(trained(config_of(start, rows, held_out), out / f"width-{width}"))
    return found


def rankings(folder: pathlib.Path, out: pathlib.Path) -> dict[str, dict[str, list[float]]]:
    """Accuracy on pairs of held-out rankings by the steps done; each step sees 64 answers."""
    rows, held_out = (str(folder / f"{file}.jsonl") for file in ("rankings", "rankings_held_out"))
    ways = {
        "all_pairs, merged": {"loss__name": "all_pairs", "data__merge": True, "train__batch_size": 16},
        "all_pairs": {"loss__name": "all_pairs", "train__batch_size": 16},
        "plackett_luce": {"loss__name": "plackett_luce", "train__batch_size": 16},
        "pairs, merged": {"data__merge": True, "train__batch_size": 32},
        "pairs": {"train__batch_size": 32},
    }
    found = {}
    for way, changes in ways.items():
        config = config_of(
            folder / "model", rows, held_out, train__steps=120, evaluate__every=40, evaluate__rows=400, **changes
        )
        seen = trained(config, out / way.replace(", ", "-"))
        found[way] = {str(row["step"]): accuracies(seen, at) for at, row in enumerate(seen[0])}
    return found


def members(folder: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """What five members together and each alone make of the policy's answers to held-out prompts."""
    rows, held_out = (str(folder / f"{file}.jsonl") for file in ("answers", "answers_held_out"))
    config = config_of(
        folder / "model", rows, held_out, reward__members=MEMBERS, reward__head="normal", data__bootstrap=True
    )  # fmt: skip
    trained(config, out / "ensemble")
    subjects = [Subject("member", p.model, p.params, p.tokenizer) for p in open_rewards(str(out / "ensemble"))]
    rewards = Rewards("ensemble", subjects)
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts_held_out.jsonl").read_text().splitlines()]
    policy = worlds.open_subject("policy", str(folder / "model"))
    drawn = answer(policy, Encoder(policy.tokenizer), Sampler(policy.model, samples=16), prompts, worlds.SAMPLING, 7)
    texts = [[text.strip() or "." for text in row] for row in drawn.texts]
    flat = [(prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
    shape = len(prompts), 16
    gold = np.asarray([world.judge(p, t).total for p, t in flat]).reshape(shape)
    words = np.asarray([world.length(t) for _, t in flat], float).reshape(shape)
    scores = rewards.scores([row.ids for row in rewards.encode(*zip(*flat, strict=True))])
    ways = {f"member {i}": scores[i] for i in range(MEMBERS)}
    ways |= {how: combine(scores, how) for how in ("mean", "minimum", "mean_less_variance")}
    return {name: judged(told.reshape(shape), gold, words) for name, told in ways.items()}


def judged(score: np.ndarray, gold: np.ndarray, words: np.ndarray) -> dict[str, float]:
    """Of every two answers to a prompt of which one is better and they differ in words, the share ordered rightly."""
    pairs = [np.subtract(x[:, :, None], x[:, None, :]) for x in (score, gold, words)]
    by, better, longer = pairs
    right = (by > 0) + 0.5 * (by == 0)
    said = {}
    for name, here in (
        ("shorter is better", (better > 0) & (longer < 0)),
        ("longer is better", (better > 0) & (longer > 0)),
    ):
        said[name] = float(right[here].mean())
    said |= {"best of 16, gold": float(best_of(gold, 16, by=score).mean()), "gold of one": float(gold.mean())}
    return said | {"best of 16, words": float(best_of(words, 16, by=score).mean()), "words of one": float(words.mean())}


def main() -> None:
    """Measures and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", required=True, help="folder to write")
    args = flags.parse_args()
    run.use_compile_cache()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(str(worlds.folder("small", CACHE, run.train)))
    held_out = [json.loads(line) for line in (folder / "answers_held_out.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"held_out": len(held_out)} | ceiling(held_out, worlds.RECIPES["small"].world)
    for name, study in (("rows", by_rows), ("width", by_width), ("rankings", rankings), ("members", members)):
        found[name] = study(folder, out)
        (out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
