"""Accuracy against cost of each way of choosing which pairs people compare next, on the start world:tiny.

    python -m benchmarks.active_choice --out=FOLDER

To each of the 1000 prompts the fine-tuned model draws 8 answers; every two different answers to a prompt are a pair
that may be chosen. Simulated people (five, 15% of whose labels are turned round) label 20 pairs at random, once each,
then round after round 20 more that a strategy of `feedback.choosing` chooses, until the budget is spent. Behind each
round a linear head on the model's frozen hidden states (the mean over the answer) is fitted to what is labelled;
`disagreement` reads ten heads on resampled labels. Printed: the share of pairs of the 200 held-out prompts, of
different gold, that the head orders as gold does; the same of whole reward models trained on what was chosen, at
--reward_models labels; and at how many labels each strategy reaches what random choice has at the end.

A seed draws the answers, the people, what they say and the first pairs. Nothing that chooses sees gold, or a held-out
row. --tuning takes the last 200 training prompts in the place of the held-out ones, and seeds from 100: what is fixed
below was fixed there. Writes results.json and active-choice.png, and prints the first.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from benchmarks.label_noise import accuracy, config_of
from rlhf_jax import run, worlds
from rlhf_jax.config import Train
from rlhf_jax.data import labellers, world
from rlhf_jax.data.labellers import Labeller
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.answers import Subject, answer
from rlhf_jax.evaluate.intervals import student
from rlhf_jax.evaluate.states import states
from rlhf_jax.feedback import choosing
from rlhf_jax.feedback.choosing import Budget, Pool
from rlhf_jax.report import figures
from rlhf_jax.report.blocks import Lines
from rlhf_jax.sampling.sampler import Sampler

CACHE, START, ANSWERS = "~/.cache/rlhf_jax", "tiny", 8
FIRST, ROUND, MEMBERS = 20, 20, 10  # labels at random, labels a round, resampled heads
# Of each way its strategy, and the share of the pairs, those that the head finds clearest, that it chooses from.
WAYS = {
    "random": ("random", 1.0),
    "disagreement": ("disagreement", 1.0),
    "information": ("information", 1.0),
    "diversity": ("diversity", 1.0),
    "prediction": ("prediction", 1.0),
    "random, clear": ("random", 0.3),
    "information, clear": ("information", 0.3),
    "prediction, clear": ("prediction", 0.3),
}
TRAINED = ("random", "prediction, clear")  # on whose choices reward models are trained
PASSES, BATCH, LEAST = 3, 32, 20  # of a reward model; fewest updates
Row = dict[str, Any]


class Answered(NamedTuple):
    """Different answers to prompts, and every two of a prompt."""

    prompts: list[str]  # [answers]
    texts: list[str]
    gold: np.ndarray  # [answers]
    features: np.ndarray  # [answers, width]
    pairs: np.ndarray  # [pairs, 2]


def answered(subject: Subject, sampler: Sampler, prompts: Sequence[str], seed: int) -> Answered:
    """What the model answers."""
    drawn = answer(subject, Encoder(subject.tokenizer), sampler, prompts, worlds.SAMPLING, seed).texts
    asked, texts, pairs = [], [], []
    for prompt, said in zip(prompts, drawn, strict=True):
        different = list(dict.fromkeys(text.strip() for text in said if text.strip()))
        here = range(len(texts), len(texts) + len(different))
        pairs += [(i, j) for i in here for j in here if i < j]
        asked, texts = asked + [prompt] * len(different), texts + different
    gold = np.asarray([world.judge(prompt, text).total for prompt, text in zip(asked, texts, strict=True)])
    return Answered(asked, texts, gold, states(subject, asked, texts), np.asarray(pairs))


def said_of(made: Answered, panel: Sequence[Labeller], pair: np.ndarray, seed: int) -> float:
    """What one of the people says: 1 if the first answer is better."""
    (prompt, _), (a, b) = ([column[place] for place in pair.tolist()] for column in (made.prompts, made.texts))
    return float(labellers.label(prompt, a, b, panel, 1, seed)[0][1])


def resampled(pool: Pool, rng: np.random.Generator) -> np.ndarray:
    """Scores of heads on resampled labels, [members, answers]."""
    assert pool.features is not None
    scores = []
    for _ in range(MEMBERS):
        places = rng.integers(0, len(pool.label), len(pool.label))
        head = dataclasses.replace(pool, labelled=pool.labelled[places], label=pool.label[places]).head()
        scores.append(pool.features @ head.mean)
    return np.asarray(scores)


def simulate(way: str, train: Answered, held: Answered, panel: Sequence[Labeller], seed: int, most: int) -> Row:
    """Labels round after round. Gives the accuracies behind each, what was labelled, and what was said."""
    strategy, share = WAYS[way]
    rng = np.random.default_rng(seed)
    features = choosing.standardised(train.features, train.pairs)
    size = np.sqrt(np.square(np.diff(train.features[train.pairs], axis=1)).mean(axis=0))[0]
    ahead = np.diff((held.features / size)[held.pairs], axis=1)[:, 0]
    sign = np.sign(np.diff(held.gold[held.pairs], axis=1)[:, 0])
    chosen = rng.choice(len(train.pairs), FIRST, replace=False)
    label, curve = np.zeros(0), []
    while True:
        new = [said_of(train, panel, train.pairs[place], seed) for place in chosen[len(label) :]]
        label = np.concatenate([label, new])
        pool = Pool(train.pairs, features, labelled=train.pairs[chosen], label=label)
        by = (ahead @ pool.head().mean * sign)[sign != 0]
        curve.append(round(float(((by > 0) + 0.5 * (by == 0)).mean()), 4))
        if len(chosen) >= most:
            return {"accuracy": curve, "chosen": chosen, "label": label}
        if strategy == "disagreement":
            pool = dataclasses.replace(pool, scores=resampled(pool, rng))
        pool = choosing.clearest(pool, share)
        count = min(ROUND, most - len(chosen))
        chosen = np.concatenate([chosen, choosing.STRATEGIES[strategy](pool, count, int(rng.integers(2**32)))])


def whole_model(
    folder: pathlib.Path, work: pathlib.Path, train: Answered, held: list[Row], told: Row, labels: int, seed: int
) -> float:
    """The accuracy of a reward model trained on the first labels."""
    rows = []
    for place, first in zip(told["chosen"][:labels].tolist(), told["label"][:labels].tolist(), strict=True):
        i, j = train.pairs[place].tolist()[:: 1 if first else -1]
        rows.append({"prompt": train.prompts[i], "chosen": train.texts[i], "rejected": train.texts[j]})
    work.mkdir(parents=True, exist_ok=True)
    worlds.write(epath.Path(work / "rows.jsonl"), rows)
    steps = max(round(PASSES * labels / BATCH), LEAST)
    config = config_of(folder, work / "rows.jsonl", seed, soft=False)
    run.train(dataclasses.replace(config, train=Train(steps=steps, batch_size=BATCH)), str(work / "run"), True)
    return round(accuracy(work / "run", held), 4)


def reached(counts: np.ndarray, curve: np.ndarray, target: float) -> float:
    """At how many labels a curve first has an accuracy, between its points by a line; inf if never.

    >>> print(round(reached(np.array([20, 40, 60]), np.array([0.5, 0.6, 0.8]), 0.7), 6))
    50.0
    """
    there = np.flatnonzero(curve >= target)
    if not len(there):
        return float("inf")
    after = there[0]
    if not after:
        return float(counts[0])
    (x, x2), (y, y2) = counts[after - 1 : after + 1], curve[after - 1 : after + 1]
    return float(x + (target - y) / (y2 - y) * (x2 - x))


def interval(values: np.ndarray) -> list[float]:
    """Mean over seeds and the ends of its 95% interval; infinite ends of one seed.

    >>> print(interval(np.array([1.0, 2.0, 3.0])))
    [2.0, -0.484, 4.484]
    """
    return [round(value, 3) for value in student(values.tolist())]


def summary(curves: Mapping[str, np.ndarray], counts: np.ndarray) -> dict[str, Row]:
    """Of each way [seeds, rounds] the share of random's labels at which it has random's accuracy; null: it never has.

    At the end, and at a quarter, half and three quarters of it, along the mean curve; at the end also seed by seed,
    with the interval of their mean, in which a seed that never gets there counts as 1: it is of at least. `gap` is by
    how much its accuracy at 60% of the labels is above random's at the end, with the interval over seeds.
    """
    told: dict[str, Row] = {}
    part = lambda share: int(np.abs(counts - counts[-1] * share).argmin())
    finite = lambda value: round(value, 3) if np.isfinite(value) else None
    for way, curve in curves.items():
        mean, base = curve.mean(axis=0), curves["random"].mean(axis=0)
        ends = [part(share) for share in (0.25, 0.5, 0.75, 1)]
        each = [reached(counts, c, b[-1]) / counts[-1] for c, b in zip(curve, curves["random"], strict=True)]
        told[way] = {
            "share": {str(counts[end]): finite(reached(counts, mean, base[end]) / counts[end]) for end in ends},
            "by seed": [finite(value) for value in each],
            "interval": interval(np.minimum(each, 1)),
            "gap": interval(curve[:, part(0.6)] - curves["random"][:, -1]),
        }
    return told


SHOWN = ("random", "prediction, clear", "prediction", "disagreement", "information", "diversity")


def picture(curves: Mapping[str, np.ndarray], counts: np.ndarray, price: float) -> Lines:
    """Accuracy against money: means over seeds, with the lowest and the highest seed of the first two ways shown."""
    money = (counts * price).tolist()
    return Lines(
        title="Which pairs people label",
        x_label=f"money spent, {price:g} a label",
        y_label="held-out pairs in gold's order",
        series={way: (money, curves[way].mean(axis=0).tolist()) for way in SHOWN},
        bands={way: (curves[way].min(axis=0).tolist(), curves[way].max(axis=0).tolist()) for way in SHOWN[:2]},
        note="Lines: means over seeds; bands: from the lowest to the highest seed.",
    )


def main() -> None:
    """Measures, draws and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, default=5, help="how many")
    flags.add_argument("--tuning", action="store_true", help="on other seeds, without the held-out prompts")
    flags.add_argument("--money", type=float, default=120.0, help="the budget")
    flags.add_argument("--hours", type=float, default=5.0, help="the budget")
    flags.add_argument("--price", type=float, default=0.3, help="of a label")
    flags.add_argument("--seconds", type=float, default=45.0, help="of a label")
    flags.add_argument("--reward_models", default="200,400", help="labels of which whole ones are trained; '': none")
    flags.add_argument("--out", required=True, help="folder to write")
    args = flags.parse_args()
    run.use_compile_cache()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    most = Budget(args.money, args.hours).labels_for(args.price, args.seconds)
    assert most is not None and most > FIRST, "the budget must have an end, and pay more than the first labels"
    counts = np.minimum(np.arange(FIRST, most + ROUND, ROUND), most)
    start, made = (pathlib.Path(str(of(START, CACHE, run.train))) for of in (worlds.folder, worlds.pretrained))
    asked = [
        [row["prompt"] for row in worlds.read(epath.Path(made / f"{part}.jsonl"))]
        for part in ("prompts", "prompts_held_out")
    ]
    asked = [asked[0][:-200], asked[0][-200:]] if args.tuning else asked
    subject = worlds.open_subject("sft", str(start / "model"))
    sampler, sizes = Sampler(subject.model, samples=ANSWERS), [int(n) for n in args.reward_models.split(",") if n]
    seeds: list[Row] = []
    for seed in range(100 * args.tuning, 100 * args.tuning + args.seeds):
        train, held = (answered(subject, sampler, prompts, seed) for prompts in asked)
        margin = held.gold[held.pairs[:, 0]] - held.gold[held.pairs[:, 1]]
        rows = [
            {"prompt": held.prompts[i], "chosen": held.texts[i], "rejected": held.texts[j], "gold_margin": float(gap)}
            for (i, j), gap in zip(held.pairs.tolist(), margin, strict=True)
            if gap
        ]
        panel = worlds.panel(worlds.recipe_of(START).world, seed)
        told = {way: simulate(way, train, held, panel, seed, most) for way in WAYS}
        trained = {
            way: {
                str(n): whole_model(start / "model", out / f"{seed}-{way}-{n}", train, rows, told[way], n, seed)
                for n in sizes
                if n <= most
            }
            for way in TRAINED
        }
        seeds.append({"heads": {way: one["accuracy"] for way, one in told.items()}, "reward models": trained})
        curves = {way: np.asarray([one["heads"][way] for one in seeds]) for way in WAYS}
        found = {
            "labels": counts.tolist(),
            "pairs": len(train.pairs),
            "seeds": seeds,
            "summary": summary(curves, counts),
        }
        (out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
        print(f"seed {seed}: " + ", ".join(f"{way} {curve[-1, -1]:.3f}" for way, curve in curves.items()), flush=True)
    figures.save(picture(curves, counts, args.price), out / "active-choice.png")
    print(json.dumps(found["summary"], indent=2))


if __name__ == "__main__":
    main()
