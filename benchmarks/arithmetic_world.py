"""Learning arithmetic from a reward that a program verifies, on prompts that no training saw: three seeds.

    python -m benchmarks.arithmetic_world --out=FOLDER

On the start world:small. The prompts are its sums, such as "What is 3 + 4 - 2?"; a completion earns 1 if its steps and
its result are right, else 0 (the reward function `right`). GRPO, RLOO and rejection sampling fine-tuning learn from
8 completions of each training prompt; each is held against the start on the held-out sums: the share of 8 samples
that are right, paired by prompts, and the start's best of n by the same reward. What an earlier call has finished is
not done again. Writes results.json and prints it; the exit status is 1 unless GRPO and RLOO are better on every seed,
by their 95% interval.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

from rlhf_jax import fields, run, worlds
from rlhf_jax.algorithms.group import Baseline, GroupConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data import world
from rlhf_jax.data.config import Data
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.answers import answer
from rlhf_jax.evaluate.best_of import best_of
from rlhf_jax.evaluate.intervals import paired
from rlhf_jax.feedback.rewards import RewardsConfig
from rlhf_jax.metrics import LogConfig
from rlhf_jax.sampling.sampler import Sampler

CACHE, SEEDS, SAMPLES = "~/.cache/rlhf_jax", (0, 1, 2), 8
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "rloo": {"loss.name": "reinforce", "group.baseline.name": "rloo"},
    "rejection": {"algorithm": "rejection", "loss.name": "nll", "group.baseline.name": "grpo", "rejection.least": 1.0},
}


def sums(file: pathlib.Path) -> list[str]:
    """The sums among the prompts of a file, each once."""
    prompts = {row["prompt"] for row in map(json.loads, file.read_text().splitlines())}
    return sorted(prompt for prompt in prompts if world.parse(prompt).kind == "sum")


def config_of(start: pathlib.Path, rows: pathlib.Path, seed: int, **changes: Any) -> Config:
    """A run on the training sums."""
    config = Config(
        algorithm="group", seed=seed, loss=Loss(name="grpo"),
        model=ModelConfig(path=str(start)),
        data=Data(path=(str(rows),), eval_share=0.0),
        rollout=RolloutConfig(max_new_tokens=worlds.SAMPLING.max_new_tokens, samples=SAMPLES, slots=128),
        group=GroupConfig(baseline=Baseline(name="grpo")),
        rewards=RewardsConfig(functions=("right",)),
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="linear", warmup=5),
        train=Train(steps=150, batch_size=128),
        evaluate=Evaluate(every=0), checkpoint=CheckpointConfig(every=0, keep_last=1),
        log=LogConfig(tensorboard=False, progress=False),
    )  # fmt: skip
    return fields.replace(config, changes)


def accuracies(path: str, prompts: list[str], seed: int) -> np.ndarray:
    """Whether each of the samples is right, [prompts, samples]."""
    subject = worlds.open_subject("model", path)
    sampler = Sampler(subject.model, samples=SAMPLES)
    texts = answer(subject, Encoder(subject.tokenizer), sampler, prompts, worlds.SAMPLING, 1000 + seed).texts
    return np.asarray([world.right([prompt] * SAMPLES, row) for prompt, row in zip(prompts, texts, strict=True)])


def main() -> None:
    """Measures and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", required=True, help="folder to write")
    flags.add_argument("--methods", default=",".join(METHODS), help="some of them, with commas between")
    args = flags.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    run.use_compile_cache()
    start = pathlib.Path(worlds.folder("small", CACHE, run.train))
    rows = out / "sums.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in sums(start / "answers.jsonl")))
    prompts = sums(start / "prompts_held_out.jsonl")
    found: dict[str, Any] = {"held_out": len(prompts), "start": {}, "methods": {}}
    better = True
    for seed in SEEDS:
        before = accuracies(str(start / "model"), prompts, seed)
        picked = {f"best of {n}": float(best_of(before, n).mean()) for n in (1, 2, 4, SAMPLES)}
        found["start"][seed] = picked
        print(f"seed {seed}: start", picked, flush=True)
        for method in args.methods.split(","):
            place = out / f"{method}-{seed}"
            run.train(config_of(start / "model", rows, seed, **METHODS[method]), str(place), resume=True)
            after = accuracies(str(place), prompts, seed)
            gain = paired({"gain": after.mean(axis=1) - before.mean(axis=1)}, seed=seed)["gain"]
            found["methods"].setdefault(method, {})[seed] = {"accuracy": float(after.mean()), "gain": list(gain)}
            print(f"seed {seed}: {method} {after.mean():.3f}, gain {gain}", flush=True)
            better = better and (method == "rejection" or gain.low > 0)
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))
    sys.exit(not better)


if __name__ == "__main__":
    main()
