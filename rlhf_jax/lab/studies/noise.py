"""Label noise: what methods make of pairs of which a part is turned round."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from rlhf_jax.lab.ground import START, Ground, gold
from rlhf_jax.lab.page import compared
from rlhf_jax.lab.study import Claim, Measured, Remedy, Seen, Study
from rlhf_jax.report.blocks import Frontier

GOLD, KL = "gold reward", "KL"
LEVELS = (0.0, 0.2, 0.4)
# Each method with its fields of the config; `noise` stands for the share that is really turned round.
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "conservative": {"loss.label_smoothing": "noise"},
    "robust": {"loss.name": "robust", "loss.label_smoothing": "noise"},
    "ipo": {"loss.name": "ipo"},
    "kto": {"algorithm": "preference", "loss.name": "kto"},
}


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What the study is run with."""

    temperature: Annotated[float, "of the labellers: how far apart answers must be to be told apart"] = 0.5
    steps: Annotated[int, "updates of each method"] = 60
    samples: Annotated[int, "answers to each held-out prompt"] = 4


def named(method: str, level: float) -> str:
    """The condition of a method at a level of noise."""
    return f"{method} {level:.0%}"


def measure(ground: Ground, knobs: Knobs) -> Measured:
    """Every method at every level, from the same pairs."""
    prompts, figures = ground.prompts(), {}

    def judged(name: str) -> Mapping[str, float]:
        subject = ground.subject(name)
        answers = ground.answers(subject, prompts, knobs.samples)
        return {GOLD: float(gold(prompts, answers.texts).mean()), KL: ground.kl(subject, answers)}

    figures[START] = judged(START)
    for level in LEVELS:
        people = ground.people(noise=level, temperature=knobs.temperature, length_bias=0.0)
        rows = ground.write(f"pairs-{level}", ground.pairs(people))
        for method, fields in METHODS.items():
            changes = {name: level if value == "noise" else value for name, value in fields.items()}
            ground.preference(name := f"{method}-{level}", rows, knobs.steps, changes)
            figures[named(method, level)] = judged(name)
    return Measured(figures)


def pictures(seeds: Sequence[Seen]) -> dict[str, Frontier]:
    """Gold by noise."""
    curves = {method: {f"{level:.0%}": named(method, level) for level in LEVELS} for method in METHODS}
    return {"gold": compared(seeds, "Gold reward by the share of turned labels", GOLD, curves, "labels turned round")}


STUDY = Study(
    name="noise",
    title="Label noise",
    question="What is lost when a part of the labels is turned round, and which method loses least?",
    setup=["Pairs of two answers of the start to each of about 1,000 prompts, each labelled once."],
    knobs=Knobs(),
    measure=measure,
    measures={GOLD: "of answers to held-out prompts, from -3 to 3", KL: "to the start, nats an answer"},
    conditions={START: "the fine-tuned model"}
    | {named(m, x): f"{m}, {x:.0%} of the labels turned round" for x in LEVELS for m in METHODS},
    phenomena=[
        Claim("Turned labels cost DPO gold reward", GOLD, named("dpo", 0.4), named("dpo", 0.0), -1),
    ],
    remedies=[
        Remedy(named(method, 0.4), named("dpo", 0.4), GOLD, 1, method, (KL,)) for method in METHODS if method != "dpo"
    ],
    pictures=pictures,
)
