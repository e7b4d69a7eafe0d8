"""The alignment tax: what RLHF on some tasks costs on those that nobody labelled."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import numpy as np

from rlhf_jax.data import world, world_rows
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.evaluate.answers import Answers, Subject, logprobs
from rlhf_jax.lab.ground import PRETRAINED, START, Ground, Row, gold
from rlhf_jax.lab.page import traded
from rlhf_jax.lab.study import Claim, Measured, Remedy, Seen, Sign, Study
from rlhf_jax.report.blocks import Frontier
from rlhf_jax.sampling.sampler import Completion

GAIN, KL = "gold of labelled tasks", "KL"
LOSS, QUESTIONS, OTHERS = "document loss", "question loss", "right elsewhere"
RIGHT = {kind: f"right, {kind}" for kind in world.KINDS}
FACTS = RIGHT["fact"]
LABELLED: tuple[world.Kind, ...] = ("fact", "opinion")  # what pairs and rollouts ask; sums and lists are the others
# Each run of PPO with what it changes of the plain one; a name of a knob stands for its value.
RUNS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ptx, low": {"ppo.pretrain": "text", "ppo.pretrain_weight": "ptx_low"},
    "ptx, high": {"ppo.pretrain": "text", "ppo.pretrain_weight": "ptx_high"},
    "kl price": {"ppo.kl": "kl"},
    "lora": {"lora.rank": "rank", "optimizer.learning_rate": "lora_rate"},
}
SHARES = (0.25, 0.5, 0.75)  # of the policy in an average with the start
AVERAGES = {share: f"average {share:.0%}" for share in SHARES}


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What the study is run with."""

    steps: Annotated[int, "updates of each PPO run"] = 48
    rate: Annotated[float, "learning rate of PPO"] = 6e-4
    reward_steps: Annotated[int, "updates of the reward model"] = 60
    ptx_low: Annotated[float, "the smaller weight of the documents' loss in PPO-ptx"] = 0.1
    ptx_high: Annotated[float, "the larger one"] = 1.0
    kl: Annotated[float, "price of a nat, where there is one"] = 0.2
    rank: Annotated[int, "of the adapter"] = 8
    lora_rate: Annotated[float, "learning rate of the adapter"] = 3e-3
    samples: Annotated[int, "answers to each held-out prompt of a labelled task"] = 4
    documents: Annotated[int, "held-out documents whose loss is taken"] = 300


def of_kinds(rows: Sequence[Row], kinds: Sequence[world.Kind]) -> list[Row]:
    """The rows whose prompts ask for these kinds of things."""
    return [row for row in rows if world.parse(row["prompt"]).kind in kinds]


def averaged(name: str, start: Subject, policy: Subject, share: float) -> Subject:
    """A model whose every parameter is (1 - share) of the start's and share of the policy's."""
    mix = lambda a, b: (1 - share) * a + share * b
    return policy._replace(name=name, params=jax.tree.map(mix, start.params, policy.params))


def losses(subject: Subject, documents: Sequence[str]) -> tuple[float, float]:
    """Mean negative log-likelihood of documents, nats a token: of all of them, and of their questions, the first lines.

    The first token of a text has none, as in training, unless a beginning token stands before it.
    """
    encoder = Encoder(subject.tokenizer)
    rows = [row for row in encoder.encode_many([("", text) for text in documents]) if isinstance(row, Tokens)]
    assert len(rows) == len(documents)
    ends = [row.start + lines(subject.tokenizer, row.ids[row.start :]) for row in rows]
    return _loss(subject, rows, [len(row) for row in rows]), _loss(subject, rows, ends)


def lines(tokenizer: Any, ids: np.ndarray) -> int:
    """How many tokens the first line has, the token that ends it included; all of them without an end."""
    return next((place for place, token in enumerate(ids.tolist(), 1) if "\n" in tokenizer.decode([token])), len(ids))


def _loss(subject: Subject, rows: Sequence[Tokens], ends: Sequence[int]) -> float:
    """Nats a token of each row up to its end."""
    none = np.zeros(0, np.float32)
    parts = [row.ids[row.start : end] for row, end in zip(rows, ends, strict=True)]
    told = [[Completion(place, 0, part, none, none, "")] for place, part in enumerate(parts)]
    answers = Answers([row.prompt for row in rows], told, [[""] for _ in rows])
    return -float(np.sum(logprobs(subject, answers, 1.0))) / sum(map(len, parts))


def forgotten(ground: Ground, knobs: Knobs, subject: Subject) -> dict[str, float]:
    """The losses of held-out documents."""
    written = world_rows.documents(knobs.documents, ground.seed, split="held_out")
    return dict(zip((LOSS, QUESTIONS), losses(subject, [row["completion"] for row in written]), strict=True))


def judge(ground: Ground, knobs: Knobs, subject: Subject) -> dict[str, float]:
    """The gain, and each sort of tax, on held-out prompts and documents of the start."""
    asked = {kind: [row["prompt"] for row in of_kinds(ground.rows("prompts_held_out"), [kind])] for kind in world.KINDS}
    labelled = [prompt for kind in LABELLED for prompt in asked[kind]]
    answers = ground.answers(subject, labelled, knobs.samples)
    figures = {GAIN: float(gold(labelled, answers.texts).mean()), KL: ground.kl(subject, answers)}
    figures |= forgotten(ground, knobs, subject)
    for kind, prompts in asked.items():
        texts = ground.answers(subject, prompts, 1, temperature=0.0).texts
        told = [world.judge(prompt, row[0]).correct for prompt, row in zip(prompts, texts, strict=True)]
        figures[RIGHT[kind]] = float(np.mean(told))
    return figures | {OTHERS: float(np.mean([figures[RIGHT[kind]] for kind in world.KINDS if kind not in LABELLED]))}


def measure(ground: Ground, knobs: Knobs) -> Measured:
    """One reward model, each run of PPO against it, and averages of the plain one with the start."""
    taught = ground.write("pairs", of_kinds(ground.rows("answers"), LABELLED))
    asked = ground.write("asked", of_kinds(ground.rows("prompts"), LABELLED))
    ground.reward("reward", taught, knobs.reward_steps)
    figures = {PRETRAINED: forgotten(ground, knobs, ground.subject(PRETRAINED))}
    figures[START] = judge(ground, knobs, ground.subject())
    known = dataclasses.asdict(knobs) | {"text": (ground.path("documents"),)}
    plain = {"data.path": (asked,), "ppo.kl": 0.0, "optimizer.learning_rate": knobs.rate}
    for name, changes in RUNS.items():
        fields = plain | {path: known.get(value, value) for path, value in changes.items()}
        folder = name.replace(", ", "-").replace(" ", "-")
        figures[name] = judge(ground, knobs, ground.ppo(folder, "reward", knobs.steps, fields))
    for share, name in AVERAGES.items():
        figures[name] = judge(ground, knobs, averaged(name, ground.subject(), ground.subject("ppo"), share))
    return Measured(figures)


def pictures(seeds: Sequence[Seen]) -> dict[str, Frontier]:
    """The tax against the gain."""
    names = [START, *RUNS, *AVERAGES.values()]
    return {
        "loss": traded(seeds, "The loss of held-out questions against the gain", GAIN, QUESTIONS, names),
        "right": traded(seeds, "What is right of other tasks against the gain", GAIN, OTHERS, names),
    }


DOES = {
    "ptx, low": "each update also learns documents, at the smaller weight",
    "ptx, high": "the same at the larger weight",
    "kl price": "a price for leaving the start",
    "lora": "an adapter in the place of all weights",
    AVERAGES[0.25]: "a quarter of the way from the start's weights to the policy's",
    AVERAGES[0.5]: "half of the way",
    AVERAGES[0.75]: "three quarters",
}
MENDED: dict[str, Sign] = {QUESTIONS: -1, OTHERS: 1, FACTS: 1}
STUDY = Study(
    name="tax",
    title="The alignment tax",
    question=(
        "What does RLHF on some tasks cost on those that nobody labelled, and on text; and what keeps that for the "
        "least of the gain?"
    ),
    setup=[
        "People compare the start's answers to two of the world's four kinds of prompts, facts and opinions; a reward "
        "model learns from them, and PPO asks the same two kinds. Sums and lists are asked neither in pairs nor in "
        "rollouts: they, and the documents of pre-training, are what can be forgotten.",
        "The gain is gold on held-out prompts of the labelled kinds. The tax is the held-out loss of documents, of "
        "their questions alone and whole, and what is right of greedy answers to held-out sums and lists. A document's "
        "answers are written as badly as people write, so a policy that answers better must find them less likely: "
        "the loss of its questions, which nothing rewards or punishes, is the plainer sign of forgetting.",
        "The plain run pays nothing for leaving the start. Every other one changes one thing. Averages take the plain "
        "run's weights and the start's and need no training.",
    ],
    knobs=Knobs(),
    measure=measure,
    measures={
        GAIN: "of answers at temperature 1 to held-out facts and opinions, from -3 to 3",
        QUESTIONS: "of the questions of held-out documents, nats a token",
        LOSS: "of whole held-out documents, nats a token",
        OTHERS: "share right of greedy answers to held-out sums and lists, the mean of both",
        **{RIGHT[kind]: f"the same for the kind {kind}" for kind in world.KINDS},
        KL: "to the start on labelled tasks, nats an answer",
    },
    conditions={
        PRETRAINED: "the model before it was fine-tuned, which can't be asked: its losses alone",
        START: "the fine-tuned model",
        "ppo": "PPO without anything against forgetting",
        **{name: f"{does}" for name, does in DOES.items()},
    },
    phenomena=[
        Claim("PPO gains gold on the labelled tasks", GAIN, "ppo", START),
        Claim("Fine-tuning makes questions of held-out documents less likely", QUESTIONS, START, PRETRAINED),
        Claim("PPO makes them still less likely", QUESTIONS, "ppo", START),
        Claim("It makes held-out documents less likely", LOSS, "ppo", START),
        Claim("It is right less often on tasks that nobody labelled", OTHERS, "ppo", START, -1),
        Claim("It is right less often about facts, for which the reward model should pay", FACTS, "ppo", START, -1),
    ],
    remedies=[
        Remedy(name, "ppo", measured, sign, does, (GAIN, KL))
        for measured, sign in MENDED.items()
        for name, does in DOES.items()
    ],
    pictures=pictures,
    notes=[
        "Settings were tried once on seed 100, which is not on this page, and kept as they were. The claim about facts "
        "was added when that seed was seen; what the model before fine-tuning has, when all seeds were.",
        "PPO-ptx learns the very documents from which the held-out ones are drawn, so it takes back what fine-tuning "
        "had cost too, and ends below the start; an average with the start can't.",
        "A greedy answer to a sum is right one time in five at the start, so there is little to lose.",
    ],
    references=[
        "Ouyang et al. 2022, arXiv:2203.02155, section 4.2 and Eq. 2 (the tax, and PPO-ptx)",
        "Lin et al. 2024, arXiv:2309.06256 (averages of weights)",
        "Biderman et al. 2024, arXiv:2405.09673 (LoRA forgets less)",
    ],
)
