"""PPO with a reward at each step against one at the end, on sums whose steps a program can verify.

    python -m benchmarks.step_rewards --out=FOLDER

Policy and reward models are those of benchmarks/process_world.py: a policy that errs in most of its solutions to sums
such as "What is 3 + 4 - 2?", and a model that knows the sums, from which the reward models start. They learn from the
same solutions of the policy: one of steps, by a verifier's labels; one of steps, by labels from 4 rollouts behind each
of them and the result that they come to; one of outcomes, whether the result is right. Then PPO from that policy, with
the same numbers:

- outcome: the outcome model's score, at the end;
- process_end: the step model's score of the whole, the log chance of the least likely step, at the end;
- process_step: the same score, each step earning its part of it where it ends;
- rollout_step: as process_step, by the model from rollouts;
- verified: 1 for a solution that is right, 0 for another, at the end;
- verified_place: 0 and -1 in their place, and -1 is paid at the first wrong step;
- verified_model: as verified, and the step model's score beside it, paid at the steps.

A reward of a model counts a fifth, beside a verified one a tenth, so that rewards of all arms are about as large.
Told of each: the share of 8 solutions to each of 200 held-out sums that are right, steps too, and the share of right
steps. What an earlier call has finished is not done again. Writes results.json and prints a table.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from benchmarks.process_world import SAMPLING, config_of, drawn, outcomes, rows_of, tuned
from rlhf_jax import fields, run, worlds
from rlhf_jax.data import world, world_rows
from rlhf_jax.data.steps import cut, ends_of, step_pattern
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.intervals import paired
from rlhf_jax.evaluate.step_labels import rolled_out, verified, world_steps
from rlhf_jax.feedback.rewards import RewardFunctions

STEP_END, ROLLOUTS, SAMPLES, EACH = "[,.]", 4, 8, 4
LEARNT = {"rewards.model_weight": 0.2}
STEPS = LEARNT | {"rewards.model": "process", "rewards.step_end": STEP_END}
ARMS: dict[str, dict[str, Any]] = {
    "outcome": LEARNT | {"rewards.model": "outcome"},
    "process_end": STEPS | {"ppo.credit": "end"},
    "process_step": STEPS,
    "rollout_step": STEPS | {"rewards.model": "rollout"},
    "verified": {"rewards.functions": ("right",)},
    "verified_place": {"rewards.verifier": "world", "rewards.step_end": STEP_END},
    "verified_model": STEPS | {"rewards.functions": ("right",), "rewards.model_weight": 0.1},
}
Row = dict[str, Any]


def steps_of(text: str) -> list[str]:
    """A solution's steps; one without text is a single step."""
    return cut(text, ends_of(text, step_pattern(STEP_END, "STEP_END"))) if text.strip() else ["."]


def write(file: pathlib.Path, rows: Sequence[Row]) -> str:
    """The rows as JSON lines; the path."""
    worlds.write(epath.Path(file), list(rows))
    return str(file)


def from_rollouts(policy: str, rows: Sequence[Row], seed: int) -> list[Row]:
    """The same solutions, a step being right if any of the rollouts behind it ends right."""
    subject, asked = worlds.open_subject("policy", policy), [row["prompt"] for row in rows]
    chances = rolled_out(
        subject, Encoder(subject.tokenizer), asked, [row["completions"] for row in rows], {},
        RewardFunctions.named(("right",)), samples=ROLLOUTS, sampling=SAMPLING, seed=seed + 1,
    )  # fmt: skip
    return [
        row | {"labels": [bool(share > 0) for share in one.shares]}
        for row, one in zip(rows, chances, strict=True)
        if one is not None
    ]


def judges(args: argparse.Namespace, out: pathlib.Path, policy: str, start: str, asked: list[str], seed: int) -> None:
    """Trains the reward models that the arms need."""
    wanted = {ARMS[arm].get("rewards.model") for arm in args.arms}
    rows = rows_of(asked, drawn(worlds.open_subject("policy", policy), asked, EACH, seed))
    made = {
        "process": ("process", lambda: rows),
        "rollout": ("process", lambda: from_rollouts(policy, rows, seed)),
        "outcome": ("outcome", lambda: outcomes(rows)),
    }
    for name, (loss, label) in made.items():
        file = out / f"{name}-{seed}.jsonl"
        if name in wanted:
            if not file.exists():
                write(file, label())
            run.train(config_of(start, file, loss, seed, args.steps), str(out / f"{name}-{seed}"), resume=True)


def ppo(args: argparse.Namespace, out: pathlib.Path, policy: str, prompts: pathlib.Path, arm: str, seed: int) -> str:
    """One run; its folder."""
    given: dict[str, Any] = {
        "algorithm": "ppo", "loss.name": "ppo", "data.length": None, "data.buckets": (),
        "rollout.max_new_tokens": SAMPLING.max_new_tokens, "rollout.epochs": 2, "rollout.minibatches": 2,
        "rollout.slots": 128, "ppo.value": "head", "ppo.missing_end": "subtract", "ppo.missing_end_score": 1.0,
        "ppo.kl": args.kl, "ppo.lam": args.lam, "train.steps": 4 * args.rollouts,
        "train.batch_size": 128,
    }  # fmt: skip
    given |= ARMS[arm]
    if "rewards.model" in given:
        given["rewards.model"] = str(out / f"{given['rewards.model']}-{seed}")
    if "rewards.model" in given and "rewards.step_end" in given:
        given["rewards.step_score"] = args.score
    config = fields.replace(config_of(policy, prompts, "nll", seed, 1, rate=args.rate), given)
    place = out / f"{arm}-{seed}-ppo"
    run.train(config, str(place), resume=True)
    return str(place)


def worth(path: str, prompts: list[str], seed: int) -> dict[str, np.ndarray]:
    """What a policy's solutions to held-out sums are worth, [prompts] each."""
    texts = drawn(worlds.open_subject("policy", path), prompts, SAMPLES, 1000 + seed)
    right, steps, count = [], [], []
    for prompt, several in zip(prompts, texts, strict=True):
        marks = verified(world_steps, [prompt] * SAMPLES, [steps_of(text) for text in several], {})
        right.append(np.mean(world.right([prompt] * SAMPLES, several)))
        steps.append(np.mean([mark for one in marks for mark in one]))
        count.append(np.mean([len(one) for one in marks]))
    return {"right": np.asarray(right), "steps": np.asarray(steps), "count": np.asarray(count)}


def one_seed(args: argparse.Namespace, out: pathlib.Path, seed: int) -> Row:
    """All arms."""
    policy, start = (tuned(args, out, seed, steps) for steps in (args.tuning, args.start_tuning))
    sums = lambda count, split: [row["prompt"] for row in world_rows.prompts(count, seed, split, kinds=("sum",))]
    asked, held = sums(args.train, "train"), sums(args.prompts, "held_out")
    judges(args, out, policy, start, asked, seed)
    write(out / f"prompts-{seed}.jsonl", [{"prompt": prompt} for prompt in asked])
    before = worth(policy, held, seed)
    told: Row = {"seed": seed, "start": {name: float(value.mean()) for name, value in before.items()}, "arms": {}}
    print(f"seed {seed}: start {told['start']}", flush=True)
    for arm in args.arms:
        began = time.time()
        place = ppo(args, out, policy, out / f"prompts-{seed}.jsonl", arm, seed)
        after = worth(place, held, seed)
        gain = paired({"gain": after["right"] - before["right"]}, seed=seed)["gain"]
        last = json.loads((pathlib.Path(place) / "metrics.jsonl").read_text().splitlines()[-1])
        one = {name: float(value.mean()) for name, value in after.items()} | {"gain": list(gain)}
        one |= {"kl": last["objective/kl"], "score": last["objective/score"]}
        told["arms"][arm] = one
        print(
            f"  {arm:13} right {one['right']:.3f}, steps right {one['steps']:.3f} of {one['count']:.2f}, KL "
            f"{one['kl']:.1f}, score {one['score']:.2f}; {time.time() - began:.0f} s", flush=True,
        )  # fmt: skip
    return told


def main() -> None:
    """Measures and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", required=True, help="folder to write")
    flags.add_argument("--seeds", default="0,1,2", help="with commas between")
    flags.add_argument("--arms", default=",".join(ARMS), help="some of them, with commas between")
    flags.add_argument("--steps", type=int, default=1000, help="updates of each reward model")
    flags.add_argument("--rollouts", type=int, default=25, help="of PPO, 256 completions each")
    flags.add_argument("--rate", type=float, default=3e-4, help="learning rate of PPO")
    flags.add_argument("--kl", type=float, default=0.02, help="price of the KL, reward units a nat")
    flags.add_argument("--lam", type=float, default=0.95, help="of the advantages")
    flags.add_argument("--score", default="minimum", help="of the step model: product, minimum or last")
    sizes = {"layers": 4, "width": 64, "tuned": 2800, "tuning": 150, "start_tuning": 800, "train": 2800, "prompts": 200}
    for name, value in sizes.items():
        flags.add_argument(f"--{name}", type=int, default=value, help="as of benchmarks.process_world")
    args = flags.parse_args()
    args.arms = args.arms.split(",")
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    run.use_compile_cache()
    found = []
    for seed in map(int, args.seeds.split(",")):
        found.append(one_seed(args, out, seed))
        (out / "results.json").write_text(json.dumps({"args": vars(args), "seeds": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
