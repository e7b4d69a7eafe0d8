"""A reward model of a real language model, where the best possible accuracy is known: three seeds.

stories260K writes 64 tokens to the beginnings of stories; an answer is worth the number of its happy words less that of
its sad ones, and of each two answers one is preferred with the chance sigmoid(2 x difference), a coin flip for a tie.
Nobody can foretell those labels better than that chance does: held-out accuracy has a ceiling, on the same pairs.

    python -m benchmarks.reward_stories --model=FOLDER --text=FILE

FOLDER holds stories260K as a Hugging Face checkpoint, FILE stories as plain text, of which the beginnings are taken. It
samples, trains three members of an ensemble and evaluates them: some minutes on two cores. The last line of the output
is JSON; the exit status is 1 if a seed stays more than 0.05 below the ceiling.
"""

import argparse
import json
import pathlib
import re
import sys
import tempfile
from typing import Any

import numpy as np

from rlhf_jax import sweep
from rlhf_jax.algorithms.reward import RewardConfig
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.answers import answer
from rlhf_jax.metrics import LogConfig
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.worlds import open_subject

HAPPY = (
    "happy happily smile smiled smiling love loved loves laugh laughed laughing fun joy hug hugged glad excited proud "
    "yay wonderful"
).split()
SAD = "sad sadly cry cried crying scared hurt afraid angry mad lost upset worried sorry bad mean".split()
PROMPTS, PROMPT, NEW = 70, 19, 64  # to train on and as many others, and tokens
TRAINED, HELD_OUT = 4000, 4400  # pairs
SLOPE = 2.0
SEEDS = (0, 1, 2)
BATCH, EPOCHS = 32, 4


def gold(text: str) -> int:
    """Happy words less sad words."""
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in HAPPY for word in words) - sum(word in SAD for word in words)


def beginnings(file: pathlib.Path, encoder: Encoder) -> list[str]:
    """The first 19 tokens of sentences from all over a text, as text."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", file.read_text())
    texts = []
    for sentence, following in zip(sentences, sentences[1:], strict=False):
        (ids,) = encoder.prompts([f"{sentence} {following}"])
        assert not isinstance(ids, Exception)
        if len(ids) > PROMPT:
            cut = f"{sentence} {following}"
            while len(encoder.prompts([cut])[0]) > PROMPT:  # pyright: ignore[reportArgumentType]
                cut = cut[: cut.rindex(" ")] if " " in cut else cut[:-1]
            texts.append(cut)
    step = len(texts) / (2 * PROMPTS)
    return [texts[int(i * step)] for i in range(2 * PROMPTS)]


def labelled(prompts: list[str], texts: list[list[str]], count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of different answers, none in two pairs, with noisy labels."""
    rng, rows = np.random.default_rng(seed), []
    order = [(p, *pair) for p, answers in enumerate(texts) for pair in rng.permutation(len(answers)).reshape(-1, 2)]
    for p, a, b in (order[i] for i in rng.permutation(len(order))):
        first, second = texts[p][a], texts[p][b]
        chance = 1 / (1 + np.exp(-SLOPE * (gold(first) - gold(second))))
        if first.strip() and second.strip() and first != second:
            pair = (first, second) if rng.random() < chance else (second, first)
            rows.append({"prompt": prompts[p], "chosen": pair[0], "rejected": pair[1], "best": max(chance, 1 - chance)})
    assert len(rows) >= count
    return rows[:count]


def write_rows(model: str, text: pathlib.Path, folder: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Pairs to train on and held-out ones with other prompts, as files NAME.jsonl and as rows."""
    subject = open_subject("stories", model)
    encoder = Encoder(subject.tokenizer)
    prompts = beginnings(text, encoder)
    sampler = Sampler(subject.model, samples=2 * -(-HELD_OUT * 21 // (20 * PROMPTS)))  # a few more than are needed
    drawn = answer(subject, encoder, sampler, prompts, Sampling(max_new_tokens=NEW), 0)
    made = {}
    for name, first, count in (("train", 0, TRAINED), ("held_out", 1, HELD_OUT)):
        made[name] = labelled(prompts[first::2], drawn.texts[first::2], count, first)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made[name]))
    return made


def config_of(model: str, folder: pathlib.Path) -> Config:
    """Three members on the rows of a folder."""
    length = PROMPT + NEW + 13  # a text need not be tokenised as it was drawn
    rows = [(str(folder / f"{name}.jsonl"),) for name in ("train", "held_out")]
    return Config(
        algorithm="reward",
        model=ModelConfig(path=model),
        data=Data(path=rows[0], eval_path=rows[1], length=length, buckets=(length,)),
        loss=Loss(name="bradley_terry"),
        reward=RewardConfig(members=len(SEEDS)),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup=20),
        train=Train(steps=EPOCHS * TRAINED // BATCH, batch_size=BATCH),
        evaluate=Evaluate(every=0, rows=None),
        checkpoint=CheckpointConfig(every=0, keep_last=1),
        log=LogConfig(tensorboard=False),
    )


def main() -> None:
    """Measures and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", required=True, help="folder of stories260K")
    flags.add_argument("--text", required=True, help="file of stories")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        pairs = write_rows(args.model, pathlib.Path(args.text), folder)["held_out"]
        sweep.train_ensemble(config_of(args.model, folder), str(folder / "run"))
        lines = [(folder / f"run/members/seed={seed}/eval.jsonl").read_text().splitlines() for seed in SEEDS]
        found = [json.loads(several[-1]) for several in lines]
    # What the chances that labels were drawn with could reach, and what they did reach on these labels.
    margins = [gold(pair["chosen"]) - gold(pair["rejected"]) for pair in pairs]
    said = {
        "held_out": len(pairs),
        "ties": float(np.mean(np.equal(margins, 0))),
        "ceiling": float(np.mean([pair["best"] for pair in pairs])),
        "gold": float(np.mean([(m > 0) + 0.5 * (m == 0) for m in margins])),
        "accuracies": [[row[f"eval/rewards/accuracies{end}"] for end in ("", "_low", "_high")] for row in found],
    }
    print(json.dumps(said))
    sys.exit(any(said["ceiling"] - share > 0.05 for share, *_ in said["accuracies"]))


if __name__ == "__main__":
    main()
