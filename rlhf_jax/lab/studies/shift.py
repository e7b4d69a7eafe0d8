"""Distributional shift: what a reward model knows away from the answers that it was taught with."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np

from rlhf_jax.data import labellers, world_rows
from rlhf_jax.evaluate.answers import Answers, Subject
from rlhf_jax.evaluate.calibration import calibration, confidences
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.lab.comparisons import Pairs, auroc, kept, pairs_of, wins, won
from rlhf_jax.lab.ground import Ground, Row, gold
from rlhf_jax.lab.page import compared
from rlhf_jax.lab.study import Claim, Measured, Remedy, Seen, Sign, Study
from rlhf_jax.report.blocks import Frontier, Spot

ACCURACY, CLEAR, ERROR, HOME = "accuracy", "accuracy, clear", "calibration error", "accuracy in domain"
SURE, WHOLE, COVERAGE, SPREAD = "overconfidence", "accuracy of the mean", "coverage", "disagreement"
PROMISED, TRUE, GAP = "promised win rate", "true win rate", "win rate gap"
GOLD, GAIN, PROXY, KL = "gold reward", "gold gain", "proxy gain", "KL"
# What may speak against a comparison of the ensemble's mean, by the measure of what it tells of its errors.
DOUBTS = {name: f"{name} tells errors" for name in ("disagreement", "closeness", "ratio")}
DOMAINS = {
    "in domain": "answers of the start to held-out prompts",
    "shifted": "answers of the start to held-out prompts in wordings and of sizes that no training row has",
    "policy": "answers of the PPO policy to the held-out prompts",
    "policy shifted": "answers of the PPO policy to the shifted prompts",
}
MODELS = {
    "plain": "labels on the start's answers alone",
    "mixed": "a part of them on its answers to shifted prompts (of the training split) instead",
    "relabelled": "a part of them on the policy's answers to training prompts instead",
}
ABSTAINS = {name: f"abstains by {name}" for name in DOUBTS}
# Which answers of a prompt's four are compared in training: each in one or two pairs.
COMPARED = ((0, 1), (2, 3), (1, 2))
CLEARLY = 1.0  # gold by which the answers of a clear pair differ


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What the study is run with."""

    labels: Annotated[int, "pairs that each reward model is taught with, one label each"] = 2400
    moved: Annotated[float, "share of them that mixing and relabelling spend elsewhere"] = 0.33
    members: Annotated[int, "of the ensemble, each on its own bootstrap of the pairs"] = 3
    reward_steps: Annotated[int, "updates of each reward model, of 32 pairs"] = 80
    ppo_steps: Annotated[int, "updates of PPO"] = 60
    rate: Annotated[float, "learning rate of PPO"] = 6e-4
    kl: Annotated[float, "price of a nat in PPO"] = 0.0
    noise: Annotated[float, "share of labels that are turned round"] = 0.1
    abstain: Annotated[float, "share of pairs on which an abstaining reward model says nothing"] = 0.3
    prompts: Annotated[int, "shifted prompts that are held out"] = 200
    samples: Annotated[int, "answers to each held-out prompt"] = 4


def known(differences: np.ndarray, pairs: Pairs) -> dict[str, float]:
    """What single members know of pairs: means over members of their accuracy, and of how true their chances are."""
    differ, clear = pairs.margin != 0, np.abs(pairs.margin) >= CLEARLY
    right = (np.sign(differences) == np.sign(pairs.margin)) + 0.5 * (differences == 0)
    errors = [calibration(one, pairs.chance, pairs.prompt).ece.mean for one in differences]
    sure = [np.subtract(*confidences(one, pairs.chance)).mean() for one in differences]
    shares = {ACCURACY: right[:, differ].mean(), CLEAR: right[:, clear].mean()}
    return {name: float(x) for name, x in (shares | {ERROR: np.mean(errors), SURE: np.mean(sure)}).items()}


def doubts(differences: np.ndarray) -> dict[str, np.ndarray]:
    """[P] each of DOUBTS: the members' standard deviation, how close their mean is to 0, and the one by the other."""
    spread, mean = differences.std(axis=0), np.abs(differences.mean(axis=0))
    return {"disagreement": spread, "closeness": -mean, "ratio": spread / np.maximum(mean, 1e-9)}


def abstaining(differences: np.ndarray, pairs: Pairs, share: float) -> tuple[dict[str, float], dict[str, float]]:
    """The ensemble's mean: its accuracy with what doubts tell of its errors, and its accuracy without the doubtful."""
    differ = pairs.margin != 0
    error = (np.sign(differences.mean(axis=0)) != np.sign(pairs.margin))[differ]
    by = {name: doubt[differ] for name, doubt in doubts(differences).items()}
    rest = {name: float(1 - error[kept(doubt, share)].mean()) for name, doubt in by.items()}
    tells = {DOUBTS[name]: auroc(doubt, error) - 0.5 for name, doubt in by.items()}
    return {WHOLE: float(1 - error.mean()), COVERAGE: 1.0} | tells, rest


def compare(
    prompts: Sequence[str], texts: Sequence[Sequence[str]], people: Sequence[labellers.Labeller], seed: int
) -> list[Row]:
    """Pairs of the four answers to each prompt with one label each, in an order that the seed decides."""
    asked = [prompt for prompt in prompts for _ in COMPARED]
    a, b = ([row[pair[side]] for row in texts for pair in COMPARED] for side in (0, 1))
    rows = labellers.label_pairs(asked, a, b, people, 1, seed)
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def shifted(count: int, seed: int, split: world_rows.Split) -> list[str]:
    """Prompts in wordings and of sizes that no row of a start has."""
    return [row["prompt"] for row in world_rows.prompts(count, seed, split, shifted=True)]


def named(model: str, domain: str) -> str:
    """The condition of a reward model that is asked about answers."""
    return f"{model}: {domain}"


def teach(ground: Ground, knobs: Knobs) -> dict[str, Rewards]:
    """The three reward models, with the same number of labels each, and between them the policy."""
    people, seed = ground.people(noise=knobs.noise, length_bias=0.0), ground.seed
    moved = round(knobs.moved * knobs.labels)
    asked = -(-2 * moved // len(COMPARED))  # twice what is needed: answers that are the same make no pair

    def rows(subject: Subject, prompts: Sequence[str]) -> list[Row]:
        return compare(prompts, ground.answers(subject, prompts, 4).texts, people, seed)

    def reward(name: str, pairs: Sequence[Row], members: int) -> Rewards:
        # One model alone sees a bootstrap too: it is compared with single members of the ensemble.
        return ground.reward(
            name, ground.write(f"pairs-{name}", pairs), knobs.reward_steps, members, {"data.bootstrap": True}
        )

    home = rows(ground.subject(), ground.prompts("prompts"))[: knobs.labels]
    models = {"plain": reward("plain", home, knobs.members)}
    policy = ground.ppo("ppo", "plain", knobs.ppo_steps, {"ppo.kl": knobs.kl, "optimizer.learning_rate": knobs.rate})
    elsewhere = {
        "mixed": rows(ground.subject(), shifted(asked, seed, "train")),
        "relabelled": rows(policy, ground.prompts("prompts", asked)),
    }
    for name, others in elsewhere.items():
        others = others[:moved]
        models[name] = reward(name, home[: len(home) - len(others)] + others, 1)
    return models


class Asked(NamedTuple):
    """Prompts of one place with answers of the start and of the policy."""

    prompts: list[str]
    answers: dict[str, Answers]  # by whose they are
    pairs: dict[str, Pairs]
    domains: dict[str, str]  # each domain with whose answers it has

    @property
    def texts(self) -> dict[str, list[list[str]]]:
        return {who: one.texts for who, one in self.answers.items()}


def ask(ground: Ground, person: labellers.Labeller, prompts: list[str], where: str, samples: int) -> Asked:
    """The answers to held-out prompts, ordinary ones (`where` is empty) or shifted ones."""
    domains = {where or "in domain": "start", f"policy {where}".strip(): "policy"}
    subjects = {"start": ground.subject(), "policy": ground.subject("ppo")}
    answers = {who: ground.answers(subject, prompts, samples) for who, subject in subjects.items()}
    pairs = {who: pairs_of(prompts, one.texts, person) for who, one in answers.items()}
    return Asked(prompts, answers, pairs, domains)


def measure(ground: Ground, knobs: Knobs) -> Measured:
    """The reward models asked about each domain, and the policy judged in and out of it."""
    models = teach(ground, knobs)
    person = ground.people(noise=knobs.noise, length_bias=0.0)[0]  # without confusion all prefer alike
    figures: dict[str, dict[str, float]] = {}
    held_out = {"": ground.prompts(), "shifted": shifted(knobs.prompts, ground.seed, "held_out")}
    for where, prompts in held_out.items():
        asked = ask(ground, person, prompts, where, knobs.samples)
        worth = {who: float(gold(prompts, texts).mean()) for who, texts in asked.texts.items()}
        true = won(prompts, asked.texts["policy"], asked.texts["start"], person)
        kl = ground.kl(ground.subject("ppo"), asked.answers["policy"])
        for name, model in models.items():
            scores = {who: ground.scores(model, prompts, texts) for who, texts in asked.texts.items()}
            for domain, who in asked.domains.items():
                found, pairs = asked.pairs[who].differences(scores[who]), asked.pairs[who]
                own = figures[named(name, domain)] = known(found, pairs)
                own[HOME] = figures[named(name, "in domain")][ACCURACY]
                if who == "policy":
                    promised = wins(scores["policy"].mean(axis=0), scores["start"].mean(axis=0))
                    own |= {PROMISED: promised, TRUE: true, GAP: promised - true}
                    own[PROXY] = float(scores["policy"].mean() - scores["start"].mean())
                if name != "plain":
                    continue
                own |= {GOLD: worth[who], SPREAD: float(scores[who].std(axis=0).mean())}
                if who == "policy":
                    own |= {GAIN: worth["policy"] - worth["start"], KL: kl}
                sure, rest = abstaining(found, pairs, knobs.abstain)
                own |= sure
                for doubt, share in rest.items():
                    figures[named(ABSTAINS[doubt], domain)] = {WHOLE: share, COVERAGE: 1 - knobs.abstain}
    return Measured(figures)


def pictures(seeds: Sequence[Seen]) -> dict[str, Frontier]:
    """Accuracy by domain; how often the policy's answers win, as promised and in truth."""
    curves = {model: {domain: named(model, domain) for domain in DOMAINS} for model in MODELS}
    drawn = {"accuracy": compared(seeds, "Accuracy of one reward model, by what it is asked about", ACCURACY, curves)}
    spots: dict[str, list[Spot]] = {}
    domains = [domain for domain in DOMAINS if domain.startswith("policy")]
    for name, model, measured in (
        ("in truth", "plain", TRUE), *((f"as {model} promises", model, PROMISED) for model in MODELS)
    ):  # fmt: skip
        for place, domain in enumerate(domains):
            each = [seed.value(named(model, domain), measured) for seed in seeds]
            spots.setdefault(name, []).append(("", [(float(place), x) for x in each if x is not None]))
    title = "How often an answer of the policy is preferred to one of the start"
    return drawn | {"promise": Frontier(title, "", "win rate", spots, x_names=domains)}


AWAY_FROM_HOME = {
    "shifted": "shifted prompts",
    "policy": "the policy's answers",
    "policy shifted": "the policy's answers to shifted prompts",
}
AWAY = tuple(AWAY_FROM_HOME)


def away(says: str, measured: str, sign: Sign, domains: Sequence[str], than: str = "in domain") -> list[Claim]:
    """A claim of the plain reward model for each domain."""
    model = "plain"
    return [
        Claim(f"{says} {AWAY_FROM_HOME[domain]}", measured, named(model, domain), named(model, than), sign)
        for domain in domains
    ]


def mends(model: str, domain: str, measured: str, sign: Sign, does: str, price: str = HOME) -> Remedy:
    """A remedy against the plain reward model in the same domain."""
    return Remedy(named(model, domain), named("plain", domain), measured, sign, does, (price,))


STUDY = Study(
    name="shift",
    title="Distributional shift",
    question=(
        "How much of what a reward model knows of the answers that it was taught with does it know of prompts in other "
        "wordings, and of the answers of a policy that was optimised against it? Do the members of an ensemble know "
        "when they err?"
    ),
    setup=[
        "An ensemble learns from pairs of the start's own answers to 1,000 prompts, one label each by people who like "
        "nothing but gold (a tenth of their labels is turned round). PPO without a KL price is trained against the "
        "mean of its members.",
        "Then it is asked about pairs of answers, all different ones of the same prompt, in four domains: answers of "
        "the start and of the policy, each to the start's held-out prompts and to shifted ones (other wordings, sums "
        "of three operators, lists of four; [the world](../../world.md#prompts)). What people prefer is known exactly: "
        "accuracy is against gold, calibration and win rates against the chance with which a person prefers an answer.",
        "Remedies have the same number of labels. Mixing spends a third of them on the start's answers to shifted "
        "prompts of the training split, relabelling a third on the policy's own answers to training prompts; they make "
        "one model each, which is compared with single members. Abstaining leaves out the three in ten comparisons "
        "that are doubted most: by the members' standard deviation, by how close the ensemble's mean is to zero, or by "
        "their ratio. No label and no gold decides what is left out.",
    ],
    knobs=Knobs(),
    measure=measure,
    measures={
        ACCURACY: "share of pairs of different gold of which a single member scores the better one higher",
        CLEAR: f"the same of pairs whose gold differs by {CLEARLY:g} or more",
        HOME: "the accuracy of the same reward model in domain",
        ERROR: "of a single member's chances, expected, against the chance with which people prefer",
        SURE: "a single member's chance that the answer which it prefers is preferred, less the true one",
        WHOLE: "accuracy of the mean of the ensemble's members, on the pairs that it doesn't abstain from",
        COVERAGE: "share of pairs on which something is said",
        SPREAD: "standard deviation of the members' scores, the mean over answers",
        DOUBTS["disagreement"]: "AUROC less 0.5 of the members' standard deviation for errors of their mean",
        DOUBTS["closeness"]: "the same of how close their mean is to 0",
        DOUBTS["ratio"]: "the same of the standard deviation through the mean's size",
        PROMISED: "chance that an answer of the policy is preferred to one of the start, as the reward model has it",
        TRUE: "the same in truth",
        GAP: "promised less true",
        PROXY: "score of the policy's answers less that of the start's, the reward model's units",
        GAIN: "gold of the policy's answers less that of the start's",
        GOLD: "from -3 to 3",
        KL: "of the policy to the start, nats an answer",
    },
    conditions={named(m, d): f"{what}; {where}" for d, where in DOMAINS.items() for m, what in MODELS.items()}
    | {
        named(ABSTAINS[doubt], d): f"the ensemble `plain`, which {ABSTAINS[doubt]}; {where}"
        for d, where in DOMAINS.items()
        for doubt in DOUBTS
    },
    phenomena=[
        *away("A reward model is right less often on", ACCURACY, -1, AWAY),
        *away("It is so where answers differ clearly, on", CLEAR, -1, AWAY),
        *away("It is surer of itself than it may be, more than in domain, on", SURE, 1, AWAY),
        *away("Its chances are further from the truth on", ERROR, 1, AWAY),
        Claim("The policy wins less often than the reward model promises", GAP, named("plain", "policy")),
        Claim("So it does on shifted prompts", GAP, named("plain", "policy shifted")),
        *away("PPO gains less gold with", GAIN, -1, ["policy shifted"], "policy"),
        *away("Members disagree more on", SPREAD, 1, AWAY),
        *(
            Claim(f"{says} {where}", DOUBTS[doubt], named("plain", domain))
            for doubt, says in (
                ("disagreement", "Where members disagree more their mean errs more often, on"),
                ("closeness", "Where the mean is closer to zero it errs more often, on"),
            )
            for domain, where in {"in domain": "answers in domain", **AWAY_FROM_HOME}.items()
            if domain != "policy shifted"
        ),
        *(
            Claim(
                f"Silence by the ratio leaves fewer errors than by closeness on {AWAY_FROM_HOME[domain]}",
                WHOLE,
                named(ABSTAINS["ratio"], domain),
                named(ABSTAINS["closeness"], domain),
                0,
            )
            for domain in AWAY[:2]
        ),
    ],
    remedies=[
        mends("mixed", "shifted", ACCURACY, 1, "a third of the labels on shifted prompts"),
        mends("mixed", "policy", ACCURACY, 1, "the same, asked about the policy's answers"),
        mends("relabelled", "policy", ACCURACY, 1, "a third of the labels on the policy's answers"),
        mends("relabelled", "policy", GAP, -1, "the same, asked how often the policy wins"),
        mends("mixed", "policy", GAP, -1, "for comparison, without the policy's answers"),
        *(
            mends(ABSTAINS[doubt], domain, WHOLE, 1, f"silence where {what}", COVERAGE)
            for domain in AWAY[:2]
            for doubt, what in (
                ("disagreement", "members disagree most"),
                ("closeness", "the mean is closest to zero"),
                ("ratio", "their disagreement is largest beside the mean"),
            )
        ),
    ],
    pictures=pictures,
    notes=[
        "Settings were chosen on the seeds 100 and 101, which are not on this page. A first trial (seed 100: 900 "
        "labels, four members) overfitted: single members were right on 69% of the pairs in domain, and the "
        "calibration error of their mean was 0.10 there and 0.08 on shifted prompts. So there are 2,400 labels, each "
        "seen about once. PPO's rate was doubled after it, from 3e-4.",
        "The reward model mostly knows manner. On seed 101 members were right on 84% of the pairs in domain of which "
        "only manner decides (639 pairs), and on 49% of those of like politeness of which one is more correct (211). "
        "Manner looks alike in any wording, so little was there to be lost on shifted prompts.",
        "A policy learns the manner that is liked, and what is left between its answers is what the reward model never "
        "knew: on seed 101 politeness differed in 610 pairs of the start's answers and in 162 of the policy's. It may "
        "be a part of the fall, but not all: where only manner decides, accuracy fell from 84% to 72%.",
        "Overconfidence is a mean and may have either sign. The calibration error is a sum of sizes: some of it is the "
        "chance of finite pairs, in every domain.",
        "Closeness needs no ensemble: one model has it too. The members' standard deviation is larger where the "
        "size of their mean is (correlation 0.29 in domain, seed 101), so it may be large just where the mean is sure.",
        "Remedies are one model each, and plain's figures the mean of three: their differences are the noisier for it. "
        "No second policy was trained against the relabelled model: its promise is about the first policy's answers.",
        "Claims are many, and each interval is its own: of forty that are not so, about one is shown by chance.",
        "The machine was shared with other work: a seed took about 155 s of processor time.",
    ],
    references=[
        "Gleave and Irving 2022, arXiv:2203.07472 (uncertainty of reward models)",
        "Coste et al. 2024, arXiv:2310.02743 (ensembles)",
        "Touvron et al. 2023, arXiv:2307.09288, section 3.4.3 (fresh labels for each policy)",
    ],
)
