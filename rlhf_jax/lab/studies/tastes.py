"""Labellers of two tastes: whom a policy serves that learnt from all of their labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np

from rlhf_jax.data import labellers
from rlhf_jax.data.labellers import Labeller
from rlhf_jax.lab import page
from rlhf_jax.lab.ground import NONE, START, Changes, Ground, Row, gold, words
from rlhf_jax.lab.study import Claim, Measured, Remedy, Seen, Study
from rlhf_jax.report.blocks import Frontier

MANY, FEW, WORSE = "gain of the majority", "gain of the minority", "gain of the worse off"
AVERAGE, GAP = "gain of the average labeller", "regret gap"
LOST_MANY, LOST_FEW = "regret of the majority", "regret of the minority"
GOLD, WORDS, KL, MODELS = "gold reward", "words", "KL", "models"
OWN_MANY, OWN_FEW = "all by the majority", "all by the minority"
POOLED, WEIGHED = "pooled 80:20", "weighed equally"
APART, LEAST = "two models", "least of two rewards"
WORD = 0.1  # what gold takes off for a word too many: a labeller to whom it gives this back doesn't mind length
PEOPLE = 5  # of each group


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What the study is run with."""

    taste: Annotated[
        float, "what a word more is worth to the majority, all in all, and a word less to the minority"
    ] = 0.3
    share: Annotated[float, "of the labels that the minority gives"] = 0.2
    noise: Annotated[float, "share of the labels that are turned round"] = 0.1
    steps: Annotated[int, "updates of each policy"] = 60
    reward_steps: Annotated[int, "updates of each reward model"] = 80
    samples: Annotated[int, "answers to each held-out prompt"] = 4


# Labels


def groups(seed: int, knobs: Knobs) -> tuple[list[Labeller], list[Labeller]]:
    """Five people of the majority, who like long answers, and five others, who like short ones as much."""
    people = labellers.panel(2 * PEOPLE, seed, noise=knobs.noise)
    leaning = lambda by, some: [dataclasses.replace(one, length_bias=WORD + by) for one in some]
    return leaning(knobs.taste, people[:PEOPLE]), leaning(-knobs.taste, people[PEOPLE:])


def parted(count: int, share: float) -> np.ndarray:
    """[count] bool: which rows are the minority's, spread evenly; share of them, from 0 to 1.

    >>> print(parted(5, 0.4).astype(int))
    [0 0 1 0 1]
    """
    passed = np.floor(np.arange(count + 1) * share + 1e-9)
    return np.diff(passed) > 0


def pooled(many: Sequence[Row], few: Sequence[Row], share: float) -> list[Row]:
    """One label a pair: the minority's on its share of the pairs, the majority's on the others."""
    return [b if here else a for a, b, here in zip(many, few, parted(len(many), share), strict=True)]


def taken(rows: Sequence[Row], here: np.ndarray) -> list[Row]:
    """The rows where `here` is true."""
    return [row for row, one in zip(rows, here, strict=True) if one]


def by_scores(pairs: Sequence[Row], scores: np.ndarray) -> list[Row]:
    """The pairs with the answer of the higher score as chosen, ties left out; scores [pairs, 2], chosen's first."""
    rows = []
    for row, (one, other) in zip(pairs, scores, strict=True):
        if one != other:
            names = ("chosen", "rejected") if one > other else ("rejected", "chosen")
            rows.append({"prompt": row["prompt"], "chosen": row[names[0]], "rejected": row[names[1]]})
    return rows


# Measuring


def measure(ground: Ground, knobs: Knobs) -> Measured:
    """Policies from the labels of one group, of both, and of both with each remedy."""
    people = groups(ground.seed, knobs)
    many, few = (ground.pairs(group) for group in people)
    theirs = parted(len(many), knobs.share)
    own = [taken(many, ~theirs), taken(few, theirs)]
    files = [ground.write(name, part) for name, part in zip(("many", "few"), own, strict=True)]
    scores = np.stack([of_pairs(ground, f"reward-{i}", file, knobs, many) for i, file in enumerate(files)])
    rows = {
        OWN_MANY: many, OWN_FEW: few, POOLED: pooled(many, few, knobs.share),
        LEAST: by_scores(many, scores.min(axis=0)),
    }  # fmt: skip
    prompts = ground.prompts()
    raw = {START: seen(ground, START, prompts, people, knobs)}
    for place, (name, told) in enumerate(rows.items()):
        policy(ground, f"p-{place}", ground.write(f"rows-{place}", told), knobs)
        raw[name] = seen(ground, f"p-{place}", prompts, people, knobs)
    balanced = {"data.path": tuple(files), "data.weights": (0.5, 0.5)}
    policy(ground, "weighed", files[0], knobs, balanced)
    raw[WEIGHED] = seen(ground, "weighed", prompts, people, knobs)
    for name, file in zip(("only-many", "only-few"), files, strict=True):
        policy(ground, name, file, knobs)
    raw[APART] = served([seen(ground, name, prompts, people, knobs) for name in ("only-many", "only-few")], knobs.share)
    figures = {name: figures_of(told, raw, knobs.share) for name, told in raw.items()}
    for name in rows.keys() | {WEIGHED, APART}:
        figures[name] |= {MODELS: 2 if name == APART else 1}
    return Measured(figures)


def policy(ground: Ground, name: str, file: str, knobs: Knobs, changes: Changes = NONE) -> None:
    """DPO on the pairs of a file."""
    ground.preference(name, file, knobs.steps, changes)


def of_pairs(ground: Ground, name: str, file: str, knobs: Knobs, pairs: Sequence[Row]) -> np.ndarray:
    """[pairs, 2] scores of chosen and rejected by a reward model of the labels in `file`, in its own deviations."""
    rewards = ground.reward(name, file, knobs.reward_steps)
    texts = [[row["chosen"], row["rejected"]] for row in pairs]
    (scores,) = ground.scores(rewards, [row["prompt"] for row in pairs], texts)
    return scores / scores.std()


def seen(
    ground: Ground, name: str, prompts: Sequence[str], people: Sequence[Sequence[Labeller]], knobs: Knobs
) -> dict[str, float]:
    """What a model's answers are worth to each group, without its slips, and by gold."""
    subject = ground.subject(name)
    answers = ground.answers(subject, prompts, knobs.samples)
    told = {MANY: people[0][0], FEW: people[1][0]}
    flat = [(prompt, text) for prompt, row in zip(prompts, answers.texts, strict=True) for text in row]
    found = {measure: float(np.mean([one.value(*pair) for pair in flat])) for measure, one in told.items()}
    found |= {GOLD: float(gold(prompts, answers.texts).mean()), WORDS: float(words(answers.texts).mean())}
    return found | {KL: ground.kl(subject, answers)}


def served(each: Sequence[Mapping[str, float]], share: float) -> dict[str, float]:
    """Two models, of which the majority uses the first and the minority the second; the rest is the mean over users."""
    first, second = each
    return {
        name: {MANY: first[MANY], FEW: second[FEW]}.get(name, (1 - share) * first[name] + share * second[name])
        for name in first
    }


def figures_of(told: Mapping[str, float], raw: Mapping[str, Mapping[str, float]], share: float) -> dict[str, float]:
    """A condition's figures: gains above the start, and regrets against the model of the group's own labels."""
    start = raw[START]
    many, few = (told[measure] - start[measure] for measure in (MANY, FEW))
    lost = [raw[own][measure] - told[measure] for own, measure in ((OWN_MANY, MANY), (OWN_FEW, FEW))]
    average = (1 - share) * many + share * few
    found = {MANY: many, FEW: few, WORSE: min(many, few), AVERAGE: average, LOST_MANY: lost[0], LOST_FEW: lost[1]}
    return found | {GAP: lost[1] - lost[0]} | {name: told[name] for name in (GOLD, WORDS, KL)}


def pictures(seeds: Sequence[Seen]) -> dict[str, Frontier]:
    """What each model is worth to both groups."""
    names = [name for name in STUDY.conditions if name != START]
    return {"groups": page.traded(seeds, "What each model is worth to both groups, above the start", MANY, FEW, names)}


STUDY = Study(
    name="tastes",
    title="Labellers of two tastes",
    question="Two groups of labellers want different answers. Whom does a policy serve that learnt from all labels?",
    setup=[
        "All labellers value answers by gold, which takes 0.1 for a word too many; besides, the majority likes long "
        "answers and the minority short ones. All in all a word beyond the shortest polite right answer is worth "
        "`taste` to the one, and costs the other as much. Pairs of the start's own answers to about 1,000 prompts have "
        "one label each, unless said otherwise, and every policy is trained by DPO with as many updates.",
        "Each model's answers to 200 held-out prompts are valued as each group values them, without slips. A group's "
        "gain is what they are worth to it above the start's answers; its regret is what it would gain from a model of "
        "all pairs labelled by itself alone, less what it gains.",
    ],
    knobs=Knobs(),
    measure=measure,
    measures={
        MANY: "what a model's answers are worth to the majority, in gold's unit, above the start's",
        FEW: "the same to the minority",
        WORSE: "the lower of both",
        AVERAGE: "both weighed by the groups' sizes",
        LOST_MANY: f"its gain from `{OWN_MANY}` less its gain here",
        LOST_FEW: f"its gain from `{OWN_FEW}` less its gain here",
        GAP: "regret of the minority less that of the majority",
        GOLD: "of the same answers, from -3 to 3",
        WORDS: "mean length of the answers",
        KL: "to the start, nats an answer",
        MODELS: "that must be kept",
    },
    conditions={
        START: "the fine-tuned model",
        OWN_MANY: "every pair labelled by the majority",
        OWN_FEW: "every pair labelled by the minority",
        POOLED: "a fifth of the pairs labelled by the minority, the others by the majority",
        WEIGHED: "the labels of `pooled 80:20`, half of each update from either group",
        LEAST: "a reward model of each group's labels of `pooled 80:20`; all pairs relabelled by the lower reward",
        APART: "a model of each group's own labels of `pooled 80:20`, used by that group",
    },
    phenomena=[
        Claim("Pooled labels serve the average labeller", AVERAGE, POOLED),
        Claim("The minority gains less from them than it could have", LOST_FEW, POOLED),
        Claim("It loses more of what it could have than the majority does", GAP, POOLED),
        Claim("The minority is worse off than with the start", FEW, POOLED, None, -1),
        Claim("The majority loses something too", LOST_MANY, POOLED),
        Claim("Answers get longer, as the majority likes them", WORDS, POOLED, START),
        Claim("By gold they are worse than the start's", GOLD, POOLED, START, -1),
        Claim("With equal weights it is the majority that loses more", GAP, WEIGHED, None, -1),
    ],
    remedies=[
        Remedy(name, POOLED, measure, 1, does, (MANY, AVERAGE, GOLD, KL, MODELS))
        for name, does in {
            WEIGHED: "the groups' labels weighed equally",
            LEAST: "the lower of two groups' rewards",
            APART: "a model for each group",
        }.items()
        for measure in (FEW, WORSE)
    ],
    pictures=pictures,
    notes=[
        "Settings were chosen on seed 100, which is not shown, in one trial. There pooled labels gained 1.62 for the "
        "majority and -1.17 for the minority, equal weights 0.13 and 0.27, the lower of two rewards -0.27 and 0.80, "
        "two models 2.31 and 0.80. No other share of labels was tried, nor a weaker taste.",
        "The tastes are strong and exactly opposed: a word is worth three times what gold takes off for it. Groups "
        "that differ less, or in things that one answer can have both of, lose less to each other.",
        "Gold is not neutral here: it takes something off for a word, as the minority does.",
        "An answer can get longer by more words than it can get shorter, so that the majority has more to gain from "
        "its own model than the minority, and more to lose: regrets of both are in one unit, but not of one whole.",
        "Regret is measured against about 980 labels of the group's own; a fifth of the pooled ones is the minority's. "
        "What that costs by itself can be seen from `two models`, which has no more labels than `pooled 80:20`.",
        "Labels say which group they are from, which all three remedies need; `two models` must know it of users too. "
        "Groups that have to be found out were not tried.",
        "Each of the two rewards is divided by its own standard deviation on the training pairs; in other units the "
        "lower of both would choose other answers.",
        "A group's gain is that of a person without slips and of its exact taste; labels have slips of 10% besides. "
        "Six verdicts on remedies have no correction for their number.",
    ],
    references=[
        "Santurkar et al. 2023, arXiv:2303.17548 (whose opinions)",
        "Siththaranjan et al. 2024, arXiv:2312.08358 (what an average of hidden groups learns)",
        "Chakraborty et al. 2024, arXiv:2402.08925 (the minimum over groups)",
    ],
)
