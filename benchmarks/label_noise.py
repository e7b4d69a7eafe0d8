"""Reward models from labels of five people of different skill: weighing labels against counting them.

    python -m benchmarks.label_noise --out=FOLDER

On the pairs of answers of the start world:tiny, as many held out, of which the gold reward tells which is better. Five
simulated people turn labels round, on average 15% or 30% of them, one of them far more than the best; one likes long
answers and one likes to be agreed with. Three of them label each pair. On the same labels a reward model is trained on

- majority: the answer that most prefer, as if it were sure;
- share: the share of labels, as data.merge and data.probability make it of votes;
- dawid_skene, bradley_terry: the posterior of `experiments.aggregate`;
- gold: the better answer itself.

Each of --seeds draws who is asked, what they say, and the order of the training. Printed: the share of held-out pairs
that the model orders as gold does, and the share of training pairs whose likelier label is right. What an earlier call
has finished is not done again. Writes results.json and prints it.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from etils import epath

from rlhf_jax import run, worlds
from rlhf_jax.algorithms.reward import RewardConfig
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data import labellers, world
from rlhf_jax.data.config import Data
from rlhf_jax.data.formats.choices import Choice
from rlhf_jax.evaluate import labelling
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.feedback.choices import Choices, gather, soft_rows
from rlhf_jax.metrics import LogConfig
from rlhf_jax.workdir import open_rewards

CACHE, LABELS = "~/.cache/rlhf_jax", 3
NOISE = {"15%": (0.0, 0.05, 0.1, 0.2, 0.4), "30%": (0.05, 0.2, 0.35, 0.4, 0.5)}
TASTES = {1: {"length_bias": 0.3}, 2: {"agreeableness": 2.0}}  # whose tastes are not the usual ones
METHODS = ("majority", "dawid_skene", "bradley_terry")
STEPS, BATCH = 80, 32  # less than three passes: longer ones learn the noise by heart
Row = dict[str, Any]


def people(noise: tuple[float, ...], seed: int) -> list[labellers.Labeller]:
    """Five people of different skill."""
    usual = {"length_bias": 0.0}
    return [
        labellers.Labeller(seed=1000 * seed + place, noise=share, **(usual | TASTES.get(place, {})))
        for place, share in enumerate(noise)
    ]


def labelled(rows: list[Row], noise: tuple[float, ...], seed: int) -> Choices:
    """What people say of pairs of answers."""
    panel, said = people(noise, seed), []
    for row in rows:
        prompt, a, b = row["prompt"], *sorted((row["chosen"], row["rejected"]))
        for person, for_a in labellers.label(prompt, a, b, panel, LABELS, seed):
            said.append(Choice(prompt, a, b, float(for_a), str(person), shown=False))
    return gather(said)


def gold_of(choices: Choices) -> np.ndarray:
    """[pairs], by how much gold prefers the first answer."""
    gold = np.asarray([world.judge(str(prompt), str(answer)).total for prompt, _, answer in choices.texts])
    return gold[choices.pairs[:, 0]] - gold[choices.pairs[:, 1]]


def config_of(start: pathlib.Path, rows: pathlib.Path, seed: int, soft: bool) -> Config:
    """A reward model from pairs."""
    return Config(
        algorithm="reward",
        seed=seed,
        model=ModelConfig(path=str(start)),
        data=Data(path=(str(rows),), eval_share=0.0, probability="probability" if soft else None, **worlds.LENGTH),
        reward=RewardConfig(head="normal"),
        loss=Loss(name="bradley_terry"),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup=10),
        train=Train(steps=STEPS, batch_size=BATCH),
        evaluate=Evaluate(every=0),
        checkpoint=CheckpointConfig(every=0, keep_last=1),
        log=LogConfig(tensorboard=False, progress=False),
    )


def accuracy(work: pathlib.Path, held: list[Row]) -> float:
    """Share of held-out pairs, of different gold, that a reward model orders as gold does."""
    rewards = Rewards("reward", [Subject("reward", p.model, p.params, p.tokenizer) for p in open_rewards(str(work))])
    prompts = [row["prompt"] for row in held for _ in range(2)]
    texts = [row[name].strip() or "." for row in held for name in ("chosen", "rejected")]
    (scores,) = rewards.scores([row.ids for row in rewards.encode(prompts, texts)])
    by = (scores[::2] - scores[1::2]) * np.sign([row["gold_margin"] for row in held])
    return float(((by > 0) + 0.5 * (by == 0)).mean())


def one(folder: pathlib.Path, out: pathlib.Path, name: str, seed: int) -> dict[str, dict[str, float]]:
    """Every way of labelling the same labels."""
    rows, held = (worlds.read(epath.Path(folder / f"{part}.jsonl")) for part in ("answers", "answers_held_out"))
    held = [row for row in held if row["gold_margin"]]
    choices = labelled(rows, NOISE[name], seed)
    gold = gold_of(choices)
    chances = {method: labelling.METHODS[method](choices, seed).probability for method in METHODS}
    chances = {"majority": chances["majority"], "share": chances["majority"]} | chances
    chances["gold"] = (np.sign(gold) + 1) / 2
    found = {}
    for way, chance in chances.items():
        work = out / (f"gold-{seed}" if way == "gold" else f"{name.strip('%')}-{seed}-{way}")
        work.mkdir(parents=True, exist_ok=True)
        worlds.write(epath.Path(work / "rows.jsonl"), soft_rows(choices, chance))
        # Hard labels are the order of chosen and rejected; where votes are even it is the pair's own.
        run.train(config_of(folder / "model", work / "rows.jsonl", seed, way != "majority"), str(work / "run"), True)
        some = gold != 0
        right = np.where(chance == 0.5, 0.5, (chance > 0.5) == (gold > 0))[some]
        found[way] = {"accuracy": accuracy(work / "run", held), "labels right": float(right.mean())}
    return found


def summary(found: dict[str, list[dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """Mean over seeds, and the standard error of what is gained over the majority, seed by seed."""
    made: dict[str, Any] = {}
    for noise, seeds in found.items():
        for way in seeds[0]:
            value = np.asarray([seed[way]["accuracy"] for seed in seeds])
            gain = value - np.asarray([seed["majority"]["accuracy"] for seed in seeds])
            error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else float("nan")
            labels = float(np.mean([seed[way]["labels right"] for seed in seeds]))
            told = {"accuracy": value.mean(), "gain": gain.mean(), "error of the gain": error, "labels right": labels}
            made.setdefault(noise, {})[way] = {key: round(float(one), 4) for key, one in told.items()}
    return made


def main() -> None:
    """Measures and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    flags.add_argument("--noise", default=",".join(NOISE), help="which of them")
    flags.add_argument("--out", required=True, help="folder to write")
    args = flags.parse_args()
    run.use_compile_cache()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(str(worlds.folder("tiny", CACHE, run.train)))
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in args.noise.split(",")}
    told: dict[str, Any] = {}
    for seed in range(args.seeds):
        for name, done in found.items():
            done.append(one(folder, out, name, seed))
        told = {"seeds": found, "summary": summary(found)}
        (out / "results.json").write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told["summary"], indent=2))


if __name__ == "__main__":
    main()
