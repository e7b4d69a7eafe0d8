"""Length: labellers who like long answers teach models to pad."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from scipy import special

from rlhf_jax.data import world
from rlhf_jax.lab.ground import NONE, START, Changes, Ground, Row, gold, words
from rlhf_jax.lab.page import compared, traded
from rlhf_jax.lab.study import Claim, Curve, Measured, Remedy, Seen, Study
from rlhf_jax.report.blocks import Frontier, Lines

GOLD, WORDS, KL, CORRECT = "gold reward", "words", "KL", "correct"
LONGER, TASTE, PAIRS = "longer chosen", "taste a word", "pairs"
LABELS = "labels"  # the condition that is no model
BREVITY = f"{__name__}:brevity"  # as a config names it
USUAL = 10  # words of an answer of the start; about 0 the score of a whole answer is not below that of one cut off
MARGIN = "length_margin"  # the column of what a pair's lengths are worth
SCORED, JUDGED = "by the reward model", "by gold"
# Each preference run: the rows that it reads, and what it changes.
RUNS: dict[str, tuple[str, Changes]] = {
    "dpo unbiased": ("unbiased", NONE),
    "dpo biased": ("biased", NONE),
    "dpo measured": ("measured", {"data.margin": MARGIN}),
    "dpo balanced": ("balanced", NONE),
    "dpo fresh": ("fresh", NONE),
    "dpo careful": ("careful", NONE),
    "dpo desensitised": ("biased", {"preference.length_alpha": 0.5}),
    "dpo normalised": ("biased", {"loss.name": "dpo_norm"}),
    "dpo beta": ("biased", {"loss.beta": 0.3}),
}


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What the study is run with."""

    bias: Annotated[float, "what a word more is worth to labellers; gold takes 0.1 off for it"] = 0.3
    noise: Annotated[float, "share of the labels that are turned round"] = 0.1
    careful: Annotated[float, "share of the pairs that people without the taste label too"] = 0.2
    steps: Annotated[int, "updates of each preference method"] = 60
    reward_steps: Annotated[int, "updates of each reward model"] = 60
    ppo_steps: Annotated[int, "updates of each run of PPO, four a rollout"] = 40
    samples: Annotated[int, "answers to each held-out prompt"] = 4


def brevity(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward function: by how many words each completion is shorter than USUAL, below 0 where it is longer."""
    return [float(USUAL - world.length(text)) for text in completions]


def longer(row: Row) -> int:
    """By how many words the chosen answer is longer than the rejected one."""
    return world.length(row["chosen"]) - world.length(row["rejected"])


def slope(rows: Sequence[Row]) -> float:
    """What a word more adds to the log-odds of being chosen: logistic regression on the difference alone.

    Raises: ValueError where the longer answer always wins or always loses, for which no number is large enough.
    """
    by = np.asarray([longer(row) for row in rows], float)
    if not (by > 0).any() or not (by < 0).any():
        raise ValueError(f"{len(rows)} pairs in which the longer answer always has the same fate have no slope")
    low, high = -50.0, 50.0
    for _ in range(60):  # the slope of the log-likelihood falls, through 0 once
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(by * special.expit(-middle * by)) > 0 else (low, middle)
    return (low + high) / 2


def margined(rows: Sequence[Row], taste: float) -> list[Row]:
    """The pairs with the margin of R-DPO: what the lengths alone are worth, in log-odds, is no merit of the answer."""
    return [row | {MARGIN: -taste * longer(row)} for row in rows]


def balanced(rows: Sequence[Row], seed: int) -> list[Row]:
    """Of each difference in words as many pairs in which the longer answer won as in which the shorter did.

    Which ones of the more frequent sort stay is drawn; pairs of equal lengths all do.
    """
    rng, kept = random.Random(f"balanced {seed}"), []
    apart: dict[int, tuple[list[int], list[int]]] = {}
    for place, row in enumerate(rows):
        if by := longer(row):
            apart.setdefault(abs(by), ([], []))[by > 0].append(place)
        else:
            kept.append(place)
    for sides in apart.values():
        least = min(map(len, sides))
        kept += [place for side in sides for place in rng.sample(side, least)]
    return [rows[place] for place in sorted(kept)]


def labelled(ground: Ground, knobs: Knobs) -> tuple[dict[str, list[Row]], float]:
    """The pairs that the runs read, by name, and the taste that labels of the same pairs by two sorts of people show.

    The two sorts label all pairs, so that runs can be compared; remedies see those without the taste on a part alone.
    """
    biased, unbiased = (
        ground.pairs(ground.people(noise=knobs.noise, length_bias=bias)) for bias in (knobs.bias, 0.0)
    )  # the same pairs in the same order
    both = round(knobs.careful * len(biased))
    taste = slope(biased[:both]) - slope(unbiased[:both])
    rows = {
        "biased": biased,
        "unbiased": unbiased,
        "measured": margined(biased, taste),
        "balanced": balanced(biased, ground.seed),
        "fresh": unbiased[:both] + biased[both:],
        "careful": unbiased[:both],
    }
    return rows, taste


def measure(ground: Ground, knobs: Knobs) -> Measured:
    """Every method from the same pairs."""
    prompts, figures = ground.prompts(), {}
    rows, taste = labelled(ground, knobs)
    files = {name: ground.write(f"pairs-{name}", own) for name, own in rows.items()}

    def judged(name: str) -> Mapping[str, float]:
        subject = ground.subject(name)
        answers = ground.answers(subject, prompts, knobs.samples)
        right = [world.judge(p, text).correct for p, row in zip(prompts, answers.texts, strict=True) for text in row]
        told = {"gold": gold(prompts, answers.texts), "words": words(answers.texts)}
        return {
            GOLD: float(told["gold"].mean()), WORDS: float(told["words"].mean()),
            CORRECT: float(np.mean(right)), KL: ground.kl(subject, answers),
        }  # fmt: skip

    figures[LABELS] = {
        LONGER: float(np.mean([longer(row) > 0 for row in rows["biased"] if longer(row)])),
        TASTE: taste, PAIRS: len(rows["balanced"]),
    }  # fmt: skip
    figures[START] = judged(START)
    for name, (part, changes) in RUNS.items():
        ground.preference(name, files[part], knobs.steps, changes)
        figures[name] = judged(name)
    for part in ("unbiased", "biased"):
        ground.reward(f"reward-{part}", files[part], knobs.reward_steps)
    brief = {"rewards.functions": ("gold", BREVITY), "rewards.weights": (0.0, taste)}
    ran = {
        "ppo unbiased": ("reward-unbiased", NONE),
        "ppo biased": ("reward-biased", NONE),
        "ppo penalty": ("reward-biased", brief),
    }
    for name, (reward, changes) in ran.items():
        ground.ppo(name, reward, knobs.ppo_steps, changes)
        figures[name] = judged(name)
    return Measured(figures, _curve(ground, "ppo biased"))


def _curve(ground: Ground, name: str) -> dict[str, Curve]:
    """What the reward model and gold say of a run's rollouts, one after the other."""
    told = ground.trace(name, ["rewards/model", "rewards/gold"], 4)
    rollouts = range(len(told["rewards/model"]))
    of = {SCORED: "rewards/model", JUDGED: "rewards/gold"}
    return {named: {"x": [*rollouts], "y": told[metric]} for named, metric in of.items()}


def pictures(seeds: Sequence[Seen]) -> dict[str, Lines | Frontier]:
    """Gold against words, gold by condition, and a run of PPO as its reward model and as gold see it."""
    models = [name for name in CONDITIONS if name != LABELS]
    shorter = {way: {n.removeprefix(f"{way} "): n for n in models if n.startswith(way)} for way in ("dpo", "ppo")}
    each = {name: np.asarray([seed.curves[name]["y"] for seed in seeds]) for name in seeds[0].curves}
    rollouts = [*range(len(next(iter(each.values())).T))]
    curves = {name: (rollouts, y.mean(axis=0).tolist()) for name, y in each.items()}
    bands = {name: (y.min(axis=0).tolist(), y.max(axis=0).tolist()) for name, y in each.items()}
    return {
        "traded": traded(seeds, "Gold reward and words of each model", WORDS, GOLD, models),
        "words": compared(seeds, "Words an answer by labels and remedy", WORDS, shorter),
        "run": Lines(
            "PPO against a reward model that likes length: what its answers earn", "rollouts", "score", curves,
            "The mean over the seeds, and the least and the most. The units differ: log-odds, and gold reward.",
            bands=bands,
        ),
    }  # fmt: skip


CONDITIONS = {
    LABELS: "the pairs themselves, as people with the taste label them",
    START: "the fine-tuned model",
    "dpo unbiased": "DPO on labels of people without the taste",
    "dpo biased": "DPO on labels of people with it, like all that follow",
    "dpo measured": "R-DPO: a margin for what lengths are worth to labellers, as a part labelled twice shows",
    "dpo balanced": "on pairs left over so that of each difference in words the longer answer wins as often as not",
    "dpo fresh": "that part of the pairs with the labels of people without the taste, the others as they were",
    "dpo careful": "on that part of the pairs alone, labelled by people without the taste",
    "dpo desensitised": "LD-DPO: tokens past the length that both answers have count half",
    "dpo normalised": "DPO with log-ratios by token (`loss.name=dpo_norm`)",
    "dpo beta": "at three times the KL price, `loss.beta=0.3`",
    "ppo unbiased": "PPO against a reward model of labels of people without the taste",
    "ppo biased": "PPO against a reward model of labels of people with it, like all that follow",
    "ppo penalty": "a word costs what it is worth to labellers, as the part labelled twice shows",
}
PRICES = (WORDS, CORRECT, KL)

STUDY = Study(
    name="length",
    title="Length",
    question=(
        "Labellers like long answers more than they should. How much do models pad that learn from them, by DPO and "
        "by PPO against a reward model, what does it cost, and what helps?"
    ),
    setup=[
        "Five simulated people give one label to each of about 970 pairs of answers of the start. Those with the taste "
        "see an answer as gold plus `bias` a word, where gold itself takes off 0.1 for a word too many; a share "
        "`noise` of the labels is turned round. The same people without the taste label the same pairs.",
        "For the remedies `dpo measured`, `dpo fresh`, `dpo careful` and `ppo penalty` the share `careful` of the "
        "pairs has labels of both sorts of people. What a word is worth to labellers is the difference of two slopes "
        "there: by how much the log-odds of being chosen rise with a word more, in labels with the taste, less in "
        "those without. Neither gold nor the size of the taste is used.",
        "DPO and its kin take updates of about 16 pairs; PPO takes rollouts of 64 answers to the training prompts, of "
        "at most 24 tokens. All is measured on answers to 200 held-out prompts at temperature 1.",
    ],
    knobs=Knobs(),
    measure=measure,
    measures={
        GOLD: "of answers to held-out prompts, from -3 to 3",
        WORDS: "an answer",
        CORRECT: "how right answers are, 0 to 1 (docs/world.md)",
        KL: "to the start, nats an answer",
        LONGER: "share of pairs of different lengths in which people with the taste choose the longer answer",
        TASTE: "what a word more adds to the log-odds that the people with the taste choose an answer, as measured",
        PAIRS: "left in `dpo balanced`",
    },
    conditions=CONDITIONS,
    phenomena=[
        Claim("DPO on labels that like length lengthens answers", WORDS, "dpo biased", START),
        Claim("DPO on them earns less gold than on labels that don't", GOLD, "dpo biased", "dpo unbiased", -1),
        Claim("DPO on labels that like length ends below the start", GOLD, "dpo biased", START, -1),
        Claim("PPO against a reward model of labels that like length lengthens answers", WORDS, "ppo biased", START),
        Claim("PPO earns less gold than against one of labels that don't", GOLD, "ppo biased", "ppo unbiased", -1),
        Claim("PPO for labels that like length ends above the start or below it", GOLD, "ppo biased", START, 0),
        Claim("Labels without the taste shorten answers", WORDS, "dpo unbiased", START, -1),
    ],
    remedies=[
        *(Remedy(f"dpo {name}", "dpo biased", GOLD, 1, does, PRICES) for name, does in {
            "measured": "R-DPO with the taste as measured on the part labelled twice",
            "balanced": "pairs in which length doesn't tell who wins",
            "fresh": "a part of the labels without the taste",
            "careful": "that part alone",
            "desensitised": "LD-DPO, half weight to tokens past the common length",
            "normalised": "log-ratios by token",
            "beta": "three times the KL price",
        }.items()),
        Remedy("ppo penalty", "ppo biased", GOLD, 1, "words cost the taste as measured", PRICES),
        Remedy("dpo measured", "dpo careful", GOLD, 1, "all pairs less the taste, against that part alone", PRICES),
    ],
    pictures=pictures,
    notes=[
        "Settings were chosen on seeds 100 and 101, which the page doesn't show. No remedy was tuned: beta, "
        "LD-DPO's weight and the beta of `dpo normalised` were set once, and the margin of `dpo measured` and the "
        "price of a word in `ppo penalty` come from the labels.",
        "`dpo measured`, `dpo fresh`, `dpo careful` and `ppo penalty` cost the labels of people without the taste "
        "for a part of the pairs; `dpo balanced` costs pairs, and no label. Whoever has such labels should try `dpo "
        "careful` first, as many updates on the few pairs (here five passes, against one): the last remedy asks "
        "whether all pairs with a margin are worth more.",
        "With `bias` 0.3 and the temperature 0.5 of these people a word is truly worth 0.6 in log-odds, before "
        "labels are turned round. The slopes show less than half of it: answers differ by whole sentences, and "
        "where a probability is near 1 a word more adds nothing.",
        "A price of words needs a zero. At first `ppo penalty` took the taste off for every word. Whole answers "
        "then had scores of about -3, PPO gives -1 to one that is cut off (`ppo.missing_end`), and on seed 0 it "
        "learnt not to end: 18.2 words, gold -0.04. Since then an answer of 10 words, like those of the start, "
        "costs nothing (first tried on seed 101); nothing else was changed.",
        "Tried on one other seed each and left out: SimPO (seed 100: gold 0.26, `dpo biased` 0.35) and LD-DPO that "
        "leaves tokens past the common length out altogether (seed 101: 0.29, `dpo biased` 0.49). LD-DPO weighs the "
        "end of the longer answer down; that the model should go on where the shorter one ended still counts in "
        "full. Ensembles of reward models and a higher KL price in PPO weren't tried.",
        "Seeds 0 and 1 were interrupted and went on, so the time that they took is told too short.",
        "In this world padding is one of four sentences, and a model so small is seldom right: gold is won and lost "
        "here by manners and words, hardly by facts. Rollouts of PPO end after 24 tokens, answers that are measured "
        "after 40.",
    ],
    references=[
        "Saito et al. 2023, arXiv:2310.10076 (labels that like length)",
        "Singhal et al. 2023, arXiv:2310.03716 (length and RLHF)",
        "Park et al. 2024, arXiv:2403.19159 (R-DPO)",
        "Liu et al. 2024, arXiv:2409.06411 (LD-DPO)",
        "Lambert et al. 2024, arXiv:2411.15124 (length-normalised DPO)",
        "Meng et al. 2024, arXiv:2405.14734 (SimPO)",
    ],
)  # fmt: skip
