"""Reward models where the truth is known: data, size, rankings against pairs, and five members against one.

    python -m benchmarks.reward_world --out=FOLDER
    python -m benchmarks.reward_world --studies=rankings,members --out=FOLDER

On the start world:small, of which three people, who err in 15% of their labels and like long answers, ranked four
answers to each of 2,991 prompts. Every model is trained with three seeds on the same rows, in one program, and judged
on each two answers that each held-out ranking tells apart. No model can surpass the ceiling, the mean chance of the
likelier order. Four studies:

- rows: accuracy by the number of prompts, with as many passes over each;
- size: the same rows, from models of three sizes that learnt the same text before;
- rankings: rankings as they are (all_pairs, plackett_luce) and taken apart into pairs (bradley_terry), with as many
  answers in each update;
- members: five members on bootstrapped rows against each of them alone, where the shorter answer is really better.

What an earlier call has finished is not done again. Writes results.json and prints it.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

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
PROMPTS, PASSES, RANKINGS = (187, 375, 750, 1500, None), 4, 16  # RANKINGS an update, of four answers each
SIZES = {"1 layer of 32": (1, 32), "2 layers of 64": (2, 64), "4 layers of 96": (4, 96)}
PRETRAIN = worlds.Stage(rate=4e-3, steps=600, patience=0, schedule="linear")
SFT = worlds.Stage(rate=1e-3, steps=200, patience=0, schedule="linear")
Row = dict[str, Any]


def config_of(start: pathlib.Path, rows: str, **changes: Any) -> Config:
    """Three seeds on merged rankings of the world; `changes` by dotted field, with __ for the dots."""
    config = Config(
        algorithm="reward",
        model=ModelConfig(path=str(start)),
        data=Data(path=(rows,), eval_share=0.0, merge=True, **worlds.LENGTH),
        loss=Loss(name="all_pairs"),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup=10),
        train=Train(steps=120, batch_size=RANKINGS),
        evaluate=Evaluate(every=0),
        checkpoint=CheckpointConfig(every=0, keep_last=1),
        log=LogConfig(tensorboard=False, progress=False),
    )
    shared = {"reward.members": SEEDS}
    return fields.replace(config, shared | {name.replace("__", "."): value for name, value in changes.items()})


@dataclasses.dataclass(frozen=True)
class Held:
    """Held-out rankings: for each two answers that one tells apart, which answers, and the chance of its order."""

    texts: list[tuple[str, str]]  # prompt and answer, each once
    better: np.ndarray  # of a comparison: the index of the text that is ranked above
    worse: np.ndarray
    chance: np.ndarray  # that the labeller ranks so
    gold: np.ndarray  # of each text

    @classmethod
    def of(cls, rows: Sequence[Row], person: labellers.Labeller) -> "Held":
        """From rows of rankings, of people who all judge as `person` does."""
        chance = functools.cache(person.probability)
        places: dict[tuple[str, str], int] = {}
        found = []
        for row in rows:
            here = [(row["prompt"], text) for text in row["completions"]]
            at = [places.setdefault(pair, len(places)) for pair in here]
            for i, above in enumerate(row["ranks"]):
                for j, below in enumerate(row["ranks"]):
                    if above < below:
                        found.append((at[i], at[j], chance(row["prompt"], here[i][1], here[j][1])))
        better, worse, chances = zip(*found, strict=True)
        gold = [world.judge(*pair).total for pair in places]
        return cls(list(places), *map(np.asarray, (better, worse, chances, gold)))

    def accuracy(self, scores: np.ndarray) -> float:
        """Share of comparisons that scores [texts] order as the ranking does; equal scores count a half."""
        by = scores[self.better] - scores[self.worse]
        return float(((by > 0) + 0.5 * (by == 0)).mean())

    def of_models(self, path: str) -> list[float]:
        """The accuracy of each member of a trained ensemble."""
        prompts, texts = zip(*self.texts, strict=True)
        rewards = opened(path)
        # An answer that is empty can't be scored: it ends at once, as a full stop does.
        scores = rewards.scores([row.ids for row in rewards.encode(prompts, [text.strip() or "." for text in texts])])
        return [self.accuracy(one) for one in scores]


def opened(path: str) -> Rewards:
    """The members of a trained ensemble."""
    return Rewards("ensemble", [Subject("member", p.model, p.params, p.tokenizer) for p in open_rewards(path)])


def trained(config: Config, work: pathlib.Path) -> str:
    """The folder of the members; what an earlier call has finished is not done again."""
    sweep.train_ensemble(config, str(work), resume=True)
    return str(work)


def first_prompts(folder: pathlib.Path, out: pathlib.Path, count: int | None) -> tuple[str, int]:
    """A file of the rankings of the first prompts, and how many they are."""
    rows = [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]
    asked = list(dict.fromkeys(row["prompt"] for row in rows))[:count]
    file = out / f"rankings-{len(asked)}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["prompt"] in set(asked)))
    return str(file), len(asked)


def updates(prompts: int) -> int:
    """How many pass over the rankings of so many prompts PASSES times."""
    return PASSES * prompts // RANKINGS


def by_rows(folder: pathlib.Path, out: pathlib.Path, held: Held) -> dict[str, list[float]]:
    """Accuracy by the number of prompts."""
    found = {}
    for count in PROMPTS:
        file, prompts = first_prompts(folder, out, count)
        config = config_of(folder / "model", file, train__steps=updates(prompts))
        found[str(prompts)] = held.of_models(trained(config, out / f"rows-{prompts}"))
    return found


def by_size(folder: pathlib.Path, out: pathlib.Path, held: Held) -> dict[str, list[float]]:
    """Accuracy by the size of the start, on all rows, with half of the passes."""
    file, prompts = first_prompts(folder, out, None)
    found = {}
    for name, size in SIZES.items():
        start = start_of(folder, out / name.replace(" ", "-"), *size)
        config = config_of(start, file, train__steps=updates(prompts) // 2)
        found[name] = held.of_models(trained(config, out / f"size-{start.parent.name}"))
    return found


def start_of(folder: pathlib.Path, out: pathlib.Path, layers: int, width: int) -> pathlib.Path:
    """A model of a size, from the same text and demonstrations as every other."""
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 3 * width}
    if not (out / "base").exists():
        texts = [row["completion"] for row in worlds.read(epath.Path(folder / "documents.jsonl"))]
        worlds.write_model(epath.Path(out / "base"), texts, worlds.SHAPE | shape)
    model = ModelConfig(path=str(out / "base"), init="random")
    for file, stage in (("documents", PRETRAIN), ("demonstrations", SFT)):
        config = dataclasses.replace(worlds.likelihood(epath.Path(folder), file, stage), model=model)
        run.train(config, str(out / file), resume=True)
        start = worlds.export(str(out / file), epath.Path(out / f"{file}-model"))
        model = ModelConfig(path=str(start))
    return pathlib.Path(start)


def rankings(folder: pathlib.Path, out: pathlib.Path, held: Held) -> dict[str, dict[str, list[float]]]:
    """Accuracy by the updates done; each update sees 64 answers."""
    whole, pairs = {"train__batch_size": RANKINGS}, {"loss__name": "bradley_terry", "train__batch_size": 2 * RANKINGS}
    ways = {
        "all_pairs, merged": whole,
        "all_pairs": whole | {"data__merge": False},
        "plackett_luce": whole | {"loss__name": "plackett_luce", "data__merge": False},
        "pairs, merged": pairs,
        "pairs": pairs | {"data__merge": False},
    }
    found: dict[str, dict[str, list[float]]] = {}
    for way, changes in ways.items():
        for steps in (50, 200):
            # A run of its own for each number of updates: a rate that falls to 0 belongs to it.
            config = config_of(folder / "model", str(folder / "rankings.jsonl"), train__steps=steps, **changes)
            work = trained(config, out / f"{way.replace(', ', '-')}-{steps}")
            found.setdefault(way, {})[str(steps)] = held.of_models(work)
    return found


def members(folder: pathlib.Path, out: pathlib.Path, held: Held) -> dict[str, Any]:
    """What five members together and each alone make of the policy's answers to held-out prompts."""
    file, count = first_prompts(folder, out, None)
    # Comparisons leave each member's zero free: a minimum would be whoever scores lowest throughout.
    demonstrations = (str(folder / "demonstrations_held_out.jsonl"),)
    config = config_of(
        folder / "model", file, train__steps=updates(count) // 2, reward__members=MEMBERS, reward__head="normal",
        reward__demonstrations=demonstrations, data__bootstrap=True,
    )  # fmt: skip
    work = trained(config, out / "ensemble")
    rewards = opened(work)
    prompts = [row["prompt"] for row in worlds.read(epath.Path(folder / "prompts_held_out.jsonl"))]
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
    found: dict[str, Any] = {name: judged(told.reshape(shape), gold, words) for name, told in ways.items()}
    return found | {"accuracies": held.of_models(work)}


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
    studies = {"rows": by_rows, "size": by_size, "rankings": rankings, "members": members}
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--studies", default=",".join(studies), help="which of them, in this order")
    flags.add_argument("--out", required=True, help="folder to write")
    args = flags.parse_args()
    run.use_compile_cache()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(str(worlds.folder("small", CACHE, run.train)))
    person = worlds.panel(worlds.RECIPES["small"].world, worlds.RECIPES["small"].world.seed)[0]
    held = Held.of(worlds.read(epath.Path(folder / "rankings_held_out.jsonl")), person)
    file = out / "results.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found |= {
        "comparisons": len(held.chance),
        "ceiling": float(np.maximum(held.chance, 1 - held.chance).mean()),
        "gold's order": held.accuracy(held.gold),
    }
    for name in args.studies.split(","):
        found[name] = studies[name](folder, out, held)
        file.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
