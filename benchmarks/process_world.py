"""What labels of steps are worth: the best of n solutions by a process model, an outcome model and the majority.

    python -m benchmarks.process_world --out=FOLDER

Models of four layers learn sums as people solve them, step by step, from nothing. After a few updates one is the
policy, which errs in most of its solutions; after more another knows the sums, and both reward models start from it.
They see the same of the policy's solutions to training prompts: one the label of each step, the other whether the
result is right. Then the policy draws N solutions to held-out prompts, and each of the three picks among n of them, n
= 1, 2, 4, ... N: the mean over all subsets (of the majority: over 200 drawn ones). Every seed draws other prompts,
models, solutions and orders. What a run in the folder has finished is not done again. Writes results.json and a table.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from rlhf_jax import run, worlds
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data import world, world_rows
from rlhf_jax.data.config import Data
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.data.world import Manner
from rlhf_jax.evaluate.answers import Subject, answer
from rlhf_jax.evaluate.best_of import best_of
from rlhf_jax.evaluate.process import judge_steps, majority_of, solution_score
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.metrics import LogConfig
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.workdir import open_rewards

HOW = ("product", "minimum", "last")
# The most tokens of a sum with its solution. The policy may say more, and is then cut off.
LENGTH, SAMPLING = 32, Sampling(max_new_tokens=20)


def solved(prompt: str, text: str) -> tuple[list[str], list[bool], str | None]:
    """The steps of a solution as they are written, whether each is right, and the result that it gives.

    The rest of the text, behind the last step that is written out, is a step of its own: it gives the result.
    """
    steps, labels, rest = [], [], text
    for said, right in world.steps(prompt, text):
        end = rest.find(said) + len(said)
        if end < len(said):
            break
        end += rest[end : end + 1] in (",", ".")
        steps.append(rest[:end])
        labels.append(right)
        rest = rest[end:]
    numbers = {word.strip(".,!") for word in rest.split() if word.strip(".,!").isdigit()}
    result = numbers.pop() if len(numbers) == 1 else None
    if rest.strip():
        whole = world.judge(prompt, text).correct == 1
        steps, labels = [*steps, rest], [*labels, whole]
    return steps, labels, result


def rows_of(prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Rows of steps; a solution that comes up twice for one prompt stands there once."""
    rows = []
    for prompt, several in zip(prompts, texts, strict=True):
        for text in dict.fromkeys(several):
            steps, labels, result = solved(prompt, text)
            if steps and all(step.strip() for step in steps):
                right = result == world.parse(prompt).right
                rows.append({"prompt": prompt, "completions": steps, "labels": labels, "right": right})
    return rows


def outcomes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same solutions, each with one label."""
    return [{"prompt": row["prompt"], "completion": "".join(row["completions"]), "label": row["right"]} for row in rows]


def config_of(model: str, file: pathlib.Path, loss: str, seed: int, steps: int, rate: float = 1e-3) -> Config:
    """One model, on all rows of a file."""
    return Config(
        algorithm="reward",
        seed=seed,
        model=ModelConfig(path=model),
        data=Data(
            path=(str(file),), eval_share=0.0, length=LENGTH, buckets=(LENGTH,), too_long="refuse", max_refused=1
        ),
        loss=Loss(name=loss),
        optimizer=OptimizerConfig(learning_rate=rate, schedule="cosine", warmup=20),
        train=Train(steps=steps, batch_size=32),
        evaluate=Evaluate(every=0),
        checkpoint=CheckpointConfig(every=0, keep_last=1),
        log=LogConfig(tensorboard=False, progress=False),
    )


def base(args: argparse.Namespace, out: pathlib.Path, seed: int) -> tuple[str, pathlib.Path]:
    """A model without weights with its tokenizer, and a file of sums, solved in as many words as needed."""
    asked = [row["prompt"] for row in world_rows.prompts(args.tuned, seed, kinds=("sum",))]
    plain = Manner(right=1.0, polite=0.0, rude=0.0, padded=0.0)
    solutions = world_rows.answers(asked, seed, plain)
    rows = [{"prompt": prompt, "completion": text} for prompt, text in zip(asked, solutions, strict=True)]
    file, folder = out / f"sums-{seed}.jsonl", out / f"base-{seed}"
    if not folder.exists():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        size = {"num_hidden_layers": args.layers, "hidden_size": args.width, "intermediate_size": 3 * args.width}
        texts = [row["prompt"] + row["completion"] for row in rows]
        worlds.write_model(epath.Path(folder), texts, worlds.SHAPE | size | {"vocab_size": 320})
    return str(folder), file


def tuned(args: argparse.Namespace, out: pathlib.Path, seed: int, steps: int) -> str:
    """The model after so many updates on solved sums, from random weights."""
    model, file = base(args, out, seed)
    work = out / f"tuned-{steps}-{seed}"
    config = config_of(model, file, "nll", seed, steps, rate=3e-3)
    config = dataclasses.replace(config, algorithm="sft", model=ModelConfig(path=model, init="random"))
    run.train(config, str(work), resume=True)
    return str(worlds.export(str(work), epath.Path(out / f"{work.name}-model")))


def drawn(subject: Subject, prompts: list[str], samples: int, seed: int) -> list[list[str]]:
    """The policy's solutions."""
    sampler = Sampler(subject.model, samples=samples)
    return answer(subject, Encoder(subject.tokenizer), sampler, prompts, SAMPLING, seed).texts


def one_seed(args: argparse.Namespace, out: pathlib.Path, seed: int) -> dict[str, Any]:
    """Trains both models and holds them against the majority."""
    policy, start = (tuned(args, out, seed, steps) for steps in (args.tuning, args.start_tuning))
    subject = worlds.open_subject("policy", policy)
    asked = lambda count, split: [row["prompt"] for row in world_rows.prompts(count, seed, split, kinds=("sum",))]
    train, held = asked(args.train, "train"), asked(args.prompts, "held_out")
    rows = rows_of(train, drawn(subject, train, args.each, seed))
    models = {}
    for name, loss, made in (("process", "process", rows), ("outcome", "outcome", outcomes(rows))):
        file = out / f"{name}-{seed}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        work = out / f"{name}-{seed}"
        run.train(config_of(start, file, loss, seed, args.steps), str(work), resume=True)
        members = [Subject(name, p.model, p.params, p.tokenizer) for p in open_rewards(str(work))]
        models[name] = Rewards(name, members)
    texts = drawn(subject, held, args.samples, seed + 1000)
    flat = [(prompt, text) for prompt, several in zip(held, texts, strict=True) for text in several]
    # A text that is empty has no step: nothing speaks for it.
    parts = [solved(prompt, text) if text.strip() else (["."], [False], None) for prompt, text in flat]
    steps = [said for said, _, _ in parts]
    right = [world.parse(prompt).right for prompt in held]
    shape = len(held), args.samples
    answers = np.asarray([result for _, _, result in parts], object).reshape(shape)
    correct = (answers == np.asarray(right, object)[:, None]).astype(float)
    process = models["process"]
    told = [row[0] for row in process.step_scores(process.encode_steps([prompt for prompt, _ in flat], steps))]
    ranked = {how: np.asarray([solution_score(row, how) for row in told]).reshape(shape) for how in HOW}
    ranked["outcome"] = np.asarray(models["outcome"]([p for p, _ in flat], [t or "." for _, t in flat])).reshape(shape)
    sizes = [2**i for i in range(args.samples.bit_length()) if 2**i <= args.samples]
    found = {name: [float(best_of(correct, n, by=scores).mean()) for n in sizes] for name, scores in ranked.items()}
    found["majority"] = [float(majority_of(answers.tolist(), right, n, seed=seed).mean()) for n in sizes]
    judged = judge_steps(told, [labels for _, labels, _ in parts])
    return {
        "seed": seed, "rows": len(rows), "right": float(np.mean([row["right"] for row in rows])), "n": sizes,
        "accuracy": found, "steps": judged.accuracy, "majority_of_steps": judged.majority,
    }  # fmt: skip


def main() -> None:
    """Measures and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--layers", type=int, default=4, help="of all models")
    flags.add_argument("--width", type=int, default=64, help="of all models")
    flags.add_argument("--tuned", type=int, default=2800, help="prompts to fine-tune on; the world has few more")
    flags.add_argument("--tuning", type=int, default=150, help="updates of the policy")
    flags.add_argument("--start_tuning", type=int, default=800, help="updates of what both start from")
    flags.add_argument("--train", type=int, default=2800, help="prompts whose solutions are labelled")
    flags.add_argument("--each", type=int, default=4, help="solutions to each of them")
    flags.add_argument("--steps", type=int, default=2000, help="updates of each model")
    flags.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    flags.add_argument("--samples", type=int, default=16, help="solutions to each of them")
    flags.add_argument("--seeds", type=int, default=3, help="how often")
    flags.add_argument("--out", required=True, help="folder to write")
    args = flags.parse_args()
    run.use_compile_cache()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in range(args.seeds):
        row = one_seed(args, out, seed)
        found.append(row)
        (out / "results.json").write_text(json.dumps({"args": vars(args), "seeds": found}, indent=2) + "\n")
        print(f"seed {seed}: {row['rows']} solutions, {row['right']:.0%} right; steps {row['steps'].mean:.3f}")
        for name, shares in row["accuracy"].items():
            print(f"  {name:10}" + "".join(f"{share:8.3f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
