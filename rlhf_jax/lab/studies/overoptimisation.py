"""Over-optimisation: what a reward model scores goes on rising where what it stands for has turned."""

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from scipy import special

from rlhf_jax.data import labellers
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.best_of import best_of
from rlhf_jax.evaluate.best_of import kl as kl_of
from rlhf_jax.lab.estimates import Fit, Law, fit, height, highest, near, order, stopped, within
from rlhf_jax.lab.ground import START, Ground, Row, gold
from rlhf_jax.lab.page import traded
from rlhf_jax.lab.study import Claim, Curve, Measured, Remedy, Seen, Study
from rlhf_jax.report.blocks import Frontier, Spot

GOLD, PROXY, KL, PAID = "gold", "proxy", "KL", "labels"
HEIGHT, RISE, FALL, AFTER = "gold at its highest", "rise of gold", "fall of gold", "proxy after the turn"
ORDER, TURN = "order of the proxy", "turn of the curve"
R2, OVER, OWN, ALL = "R2", "R2 over 0.9", "R2 over the other curve's", "R2 all the way"
FEW, MANY, PRICED, FRESH = "few pairs", "many pairs", "KL price", "fresh labels"
BY_KL, BY_PEOPLE, BY_SAME = "stopped by KL", "stopped by people", "stopped at the price's KL"
BEST_FEW, BEST_MANY, BEST_SMALL = "best of n, few pairs", "best of n, many pairs", "best of n, few weights"
BEST_LEAST, BEST_SURE, BEST_GOLD = "best of n, minimum", "best of n, mean less variance", "best of n, gold"
MEANT = f"{__name__}:liked"  # as a config names it
BAR, ASKED = 1.5, 0.125  # value from which a person likes an answer; share of the answers that people see
POINT = 2  # rollouts that are one point of a fit and of a picture
REACH = 10.0  # nats as far as curves are fitted
STARTS, START_SAMPLES = 256, 4  # prompts and answers to each that say what the start is worth
METRICS = ("rewards/gold", "rewards/model", "objective/kl", f"rewards/{MEANT}")


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What the study is run with."""

    few: Annotated[int, "pairs that the reward model with few learns from"] = 100
    many: Annotated[int, "pairs that the one with many learns from"] = 900
    fresh: Annotated[int, "pairs of answers of the policy that has turned, labelled and added to the few"] = 150
    rollouts: Annotated[int, "of each run of PPO"] = 24
    answers: Annotated[int, "of a rollout; even, from which two updates are made"] = 256
    rate: Annotated[float, "learning rate of PPO, which rises over the first half of a run and then stays"] = 2e-3
    price: Annotated[float, "of a nat, in reward units, of the run with a KL price"] = 0.2
    budget: Annotated[float, "nats an answer at which the early stop by KL stops"] = 3.0
    members: Annotated[int, "reward models of the ensemble, each on its own draw of the few pairs"] = 3
    lam: Annotated[float, "of mean less variance: what a unit of variance costs"] = 1.0
    prompts: Annotated[int, "held-out prompts of best of n"] = 64
    drawn: Annotated[int, "answers to each of them"] = 128

    def __post_init__(self) -> None:
        if self.rollouts < 3 * POINT or self.answers % 2 or self.drawn < 3:
            raise UserError(
                f"{self.rollouts} rollouts of {self.answers} answers and the best of {self.drawn} give no curve; "
                f"rollouts must be at least {3 * POINT}, answers even and drawn at least 3."
            )


class Run(NamedTuple):
    """A run of PPO, rollout by rollout; each rollout is drawn by the policy as it is before that rollout's updates."""

    kl: np.ndarray  # [R] nats an answer
    halves: np.ndarray  # [2, R] gold of either half of the answers
    proxy: np.ndarray  # [R] score of the reward model, standard deviations of the start's answers above their mean
    liked: np.ndarray  # [R] share of the answers that people saw and liked; nan where they saw none

    @property
    def gold(self) -> np.ndarray:
        """[R] gold of all answers."""
        return self.halves.mean(axis=0)

    def points(self, base: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """d, gold above the start's and proxy of every POINT rollouts together; what is left at the end isn't there.

        d is the square root of the KL, which by chance may be measured below 0.
        """
        whole = len(self.kl) // POINT * POINT
        kl, gained, proxy = (x[:whole].reshape(-1, POINT).mean(axis=1) for x in (self.kl, self.gold, self.proxy))
        return np.sqrt(np.maximum(kl, 0)), gained - base, proxy


# People, asked along the way


def liked(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """A reward function: 1 where a person likes an answer, 0 where not, None for the answers that nobody sees.

    The person is a labeller with the usual taste and slips; it likes what it values above BAR with the probability
    sigmoid((value - BAR) / temperature), turned round in the share `noise`. Prompt and answer decide all of it.
    """
    person, told = labellers.Labeller(), []
    for prompt, text in zip(prompts, completions, strict=True):
        rng = random.Random(f"liked {prompt.strip()} {text.strip()}")
        chance = float(special.expit((person.value(prompt, text) - BAR) / person.temperature))
        seen, draw = rng.random() < ASKED, rng.random()
        told.append(float(draw < person.noise + (1 - 2 * person.noise) * chance) if seen else None)
    return told


# Along a run


def told(run: Run, base: float, labels: int) -> dict[str, float]:
    """The figures of a run of PPO; `base` is the start's gold."""
    last = len(run.kl) - 1
    top, turned = height(run.halves), highest(run.gold)
    return at(run, last, labels) | {
        HEIGHT: top, RISE: top - base, FALL: top - near(run.gold, last),
        AFTER: near(run.proxy, last) - near(run.proxy, turned),
        ORDER: order(run.proxy),
    } | fitted("policy", *(x.tolist() for x in run.points(base)[:2]))  # fmt: skip


def at(run: Run, place: int, labels: int) -> dict[str, float]:
    """The figures of the policy at a place of a run."""
    return {name: near(x, place) for name, x in ((GOLD, run.gold), (PROXY, run.proxy), (KL, run.kl))} | {PAID: labels}


def fitted(law: Law, d: Sequence[float], gained: Sequence[float]) -> dict[str, float]:
    """The figures of the curve that is fitted as far as REACH, of the other published one, and of a fit to all."""
    other: Law = "policy" if law == "best_of" else "best_of"
    found, theirs = (fit(one, *within(d, gained, REACH)) for one in (law, other))
    both = {R2: found.r2, OVER: found.r2 - 0.9, OWN: found.r2 - theirs.r2}
    return both | {TURN: found.peak, ALL: fit(law, d, gained).r2}


# One seed


class Field(NamedTuple):
    """What the runs of a seed share: gold of the start's answers to training prompts, and the answers themselves."""

    ground: Ground
    knobs: Knobs
    prompts: list[str]
    texts: list[list[str]]
    base: float

    def ppo(self, name: str, reward: str, price: float = 0.0) -> Run:
        """PPO against a reward model, at a rate that doesn't fall."""
        knobs, scores = self.knobs, self.ground.scores(self.ground.rewards(reward), self.prompts, self.texts)
        changes = {
            "ppo.kl": price, "ppo.value": "head", "rewards.functions": ("gold", MEANT), "rewards.weights": (0.0, 0.0),
            "optimizer.schedule": "constant", "optimizer.learning_rate": knobs.rate, "optimizer.warmup": knobs.rollouts,
            "rollout.slots": knobs.answers, "rollout.epochs": 1, "rollout.minibatches": 2,
            "train.batch_size": knobs.answers // 2,
        }  # fmt: skip
        self.ground.ppo(name, reward, 2 * knobs.rollouts, changes)
        return read({key: np.asarray(x) for key, x in self.ground.trace(name, METRICS, 1).items()}, scores)


def read(trace: Mapping[str, np.ndarray], scores: np.ndarray) -> Run:
    """A run from its metrics, two updates a rollout; `scores` are those that its reward model gives to the start."""
    gold_of, model, kl, people = (trace[name].reshape(-1, 2) for name in METRICS)
    proxy = (model.mean(axis=1) - scores.mean()) / scores.std()
    return Run(kl.mean(axis=1), gold_of.T, proxy, np.nanmean(people, axis=1))


def fresh_pairs(ground: Ground, people: Sequence[labellers.Labeller], policy: str, count: int) -> list[Row]:
    """Pairs of a policy's own answers to training prompts, one label each; two that are the same are no pair."""
    asked = ground.prompts("prompts", 3 * count)
    texts = ground.answers(ground.subject(policy), asked, 2).texts
    first, second = zip(*texts, strict=True)
    return labellers.label_pairs(asked, first, second, people, 1, ground.seed)[:count]


def curves_of(run: Run, name: str, base: float, spread: float) -> dict[str, Curve]:
    """Gold and proxy along d, both in standard deviations of the start's answers above their mean."""
    d, gained, proxy = run.points(base)
    both = {GOLD: gained / spread, PROXY: proxy}
    return {f"{kind}, {name}": {"x": d.tolist(), "y": y.tolist()} for kind, y in both.items()}


def measure(ground: Ground, knobs: Knobs) -> Measured:
    """The reward models, the runs against them, and the best of n."""
    people = ground.people()
    pairs = ground.pairs(people)
    few, many = ground.write("few", pairs[: knobs.few]), ground.write("many", pairs[: knobs.many])
    ground.reward("reward-few", few, 60)
    ground.reward("reward-many", many, 80)
    prompts = ground.prompts("prompts", STARTS)
    texts = ground.answers(ground.subject(), prompts, START_SAMPLES).texts
    worth = gold(prompts, texts)
    field = Field(ground, knobs, prompts, texts, base := float(worth.mean()))
    runs = {
        FEW: field.ppo("ppo-few", "reward-few"),
        MANY: field.ppo("ppo-many", "reward-many"),
        PRICED: field.ppo("ppo-priced", "reward-few", knobs.price),
    }
    own = fresh_pairs(ground, people, "ppo-few", knobs.fresh)
    ground.reward("reward-fresh", ground.write("fresh", [*pairs[: knobs.few], *own]), 60)
    runs[FRESH] = field.ppo("ppo-fresh", "reward-fresh")
    labels = {FEW: knobs.few, MANY: min(knobs.many, len(pairs)), PRICED: knobs.few, FRESH: knobs.few + len(own)}
    figures = {START: {GOLD: base}} | {name: told(run, base, labels[name]) for name, run in runs.items()}
    seen = round(ASKED * knobs.answers * knobs.rollouts)
    figures[BY_KL] = at(runs[FEW], stopped(runs[FEW].kl, knobs.budget), knobs.few)
    figures[BY_SAME] = at(runs[FEW], stopped(runs[FEW].kl, figures[PRICED][KL]), knobs.few)
    figures[BY_PEOPLE] = at(runs[FEW], highest(runs[FEW].liked), knobs.few + seen)
    picked, curves = picks(ground, knobs, few, many)
    for name, run in runs.items():
        curves |= curves_of(run, name, base, float(worth.std()))
    return Measured(figures | picked, curves)


def picks(ground: Ground, knobs: Knobs, few: str, many: str) -> tuple[dict[str, dict[str, float]], dict[str, Curve]]:
    """The best of n of the start's answers to held-out prompts, by each reward model, from files of pairs."""
    ground.reward("reward-small", many, 80, changes={"lora.rank": 1})
    ground.reward("reward-several", few, 60, knobs.members)
    prompts = ground.prompts(most=knobs.prompts)
    texts = ground.answers(ground.subject(), prompts, knobs.drawn).texts
    scored = lambda name: ground.scores(ground.rewards(name), prompts, texts)
    several, truth = scored("reward-several"), gold(prompts, texts)
    ranked = {
        BEST_FEW: (scored("reward-few")[0], knobs.few),
        BEST_MANY: (scored("reward-many")[0], knobs.many),
        BEST_SMALL: (scored("reward-small")[0], knobs.many),
        BEST_LEAST: (several.min(axis=0), knobs.few),
        BEST_SURE: (several.mean(axis=0) - knobs.lam * several.var(axis=0), knobs.few),
        BEST_GOLD: (truth, 0),
    }
    figures, curves = {}, {}
    for name, (scores, labels) in ranked.items():
        figures[name], own = picked(scores, truth, labels)
        curves |= {f"{kind}, {name}": curve for kind, curve in own.items()}
    return figures, curves


def picked(scores: np.ndarray, truth: np.ndarray, labels: int) -> tuple[dict[str, float], dict[str, Curve]]:
    """Figures and curves of the best of 1 to N by [P, N] scores, where gold is `truth`."""
    draws = scores.shape[1]
    sizes = sorted({round(2 ** (half / 2)) for half in range(2 * draws.bit_length())} & set(range(1, draws + 1)))
    d = [math.sqrt(kl_of(n)) for n in sizes]
    each = np.asarray([best_of(truth, n, by=scores) for n in sizes])  # [sizes, prompts]
    proxy = (np.asarray([best_of(scores, n).mean() for n in sizes]) - scores.mean()) / scores.std()
    worth, halves = each.mean(axis=1), [each[:, own::2].mean(axis=1) for own in (0, 1)]
    top = float(np.mean([halves[1 - own][halves[own].argmax()] for own in (0, 1)]))
    gain, base = worth - truth.mean(), float(truth.mean())
    figures = {
        GOLD: worth[-1], PROXY: proxy[-1], KL: d[-1] ** 2, HEIGHT: top, RISE: top - base, FALL: top - worth[-1],
        AFTER: proxy[-1] - proxy[worth.argmax()], ORDER: order(proxy), PAID: labels,
    }  # fmt: skip
    curves: dict[str, Curve] = {
        GOLD: {"x": d, "y": (gain / truth.std()).tolist()},
        PROXY: {"x": d, "y": proxy.tolist()},
    }
    return {name: round(float(x), 9) for name, x in figures.items()} | fitted("best_of", d, gain), curves


# Pictures


def spots(seeds: Sequence[Seen], name: str) -> list[Spot]:
    """A curve, every seed a small point beside each point."""
    each = [seed.curves[name] for seed in seeds]
    return [("", [(one["x"][place], one["y"][place]) for one in each]) for place in range(len(each[0]["x"]))]


def mean_fit(seeds: Sequence[Seen], name: str, law: Law) -> tuple[Fit, list[Spot]]:
    """The curve that is fitted to the means over seeds of a condition's gold, and its points."""
    x, y = np.mean([[seed.curves[f"{GOLD}, {name}"][axis] for axis in ("x", "y")] for seed in seeds], axis=0).tolist()
    x, y = within(x, y, REACH)
    grid = np.linspace(0, max(x), 15)
    found = fit(law, x, y)
    return found, [("", [(float(a), float(b))]) for a, b in zip(grid, found.gold(grid), strict=True)]


def drawn(seeds: Sequence[Seen], title: str, law: Law, names: Sequence[str], kinds: Sequence[str]) -> Frontier:
    """Curves of several conditions with what is fitted to their gold, and how well."""
    fits = {name: mean_fit(seeds, name, law) for name in names}
    curves = {f"{kind}, {name}": spots(seeds, f"{kind}, {name}") for kind in kinds for name in names}
    curves |= {f"fitted to gold, {name}": points for name, (_, points) in fits.items()}
    shares = ", ".join(f"{name} {found.r2:.2f}" for name, (found, _) in fits.items())
    root, unit = "square root of the KL, nats an answer", "standard deviations above the start"
    return Frontier(title, root, unit, curves, f"R2 of the curves fitted to the means over seeds: {shares}.")


def pictures(seeds: Sequence[Seen]) -> dict[str, Frontier]:
    """Gold and proxy along d, by the data, of the best of n, and what the remedies come to."""
    return {
        "turn": drawn(seeds, "PPO against a reward model of few pairs", "policy", [FEW], [GOLD, PROXY]),
        "data": drawn(seeds, "Gold of PPO by the data of the reward model", "policy", [FEW, MANY], [GOLD]),
        "best": drawn(seeds, "Gold of the best of n", "best_of", [BEST_FEW, BEST_MANY, BEST_SMALL], [GOLD]),
        "remedies": traded(seeds, "Gold of PPO by KL", KL, GOLD, [FEW, MANY, PRICED, FRESH, BY_KL, BY_PEOPLE]),
    }


WITHOUT = "PPO without a KL price against a reward model of"
STUDY = Study(
    name="overoptimisation",
    title="Over-optimisation",
    question=(
        "A reward model is learnt from a finite number of labels. How far can a policy, or the best of n, follow it "
        "before the gold reward turns, how do the data and the size of the reward model move the turn, and what helps?"
    ),
    setup=[
        "Five simulated people (15% of labels turned round, 0.05 a word for length) give one label to each pair of the "
        "start's answers; the first `few` and `many` of these are what reward models learn from, in 60 and 80 updates.",
        "PPO begins at the start, with no KL price and at a rate that doesn't fall, so that it goes as far as it can. "
        "A rollout is `answers` answers of at most 24 tokens to training prompts; two updates are made from it. Gold, "
        "proxy and KL are those of each rollout's own answers; figures of a policy are the mean of three successive "
        "rollouts. The highest gold is found by one half of the answers and measured by the other, so that chance "
        "makes none; two successive rollouts are a point of the pictures and of the fits.",
        "Best of n: `drawn` answers of the start to each of `prompts` held-out prompts, of which the reward model "
        "picks the best of n; the mean over all subsets, at the KL log n - (n - 1) / n, an upper bound where "
        "answers tie. Its figures are those of n = `drawn`; where gold is highest one half of the prompts says and "
        "the other measures.",
        "With d = sqrt(KL), gold above the start is fitted by d (alpha - beta log d) for PPO and d (alpha - beta d) "
        "for the best of n (Gao et al. 2022), by least squares on the points of each seed up to 10 nats.",
    ],
    knobs=Knobs(),
    measure=measure,
    measures={
        GOLD: "at the end of a run, or at n = `drawn`, from -3 to 3; of PPO on training prompts, else on held-out ones",
        PROXY: "the same of the reward model's score, standard deviations of the start's answers above their mean",
        KL: "to the start, nats an answer",
        PAID: "that people give in all",
        HEIGHT: "along the way",
        RISE: "the highest less that of the start",
        FALL: "the highest less that of the end",
        AFTER: "proxy at the end less where gold is highest",
        ORDER: "rank correlation of the proxy with the rollout, or with n: 1 where it always rises",
        R2: "share of the variance of gold that the fitted curve explains, as far as it is fitted",
        OVER: "the same less 0.9",
        OWN: "the same less that of the curve published for the other way, PPO or the best of n",
        TURN: "the d at which the fitted curve is highest",
        ALL: "share that the same curve explains where it is fitted to all points, whatever their KL",
    },
    conditions={
        START: "the fine-tuned model",
        FEW: f"{WITHOUT} few pairs",
        MANY: f"{WITHOUT} many pairs",
        PRICED: "as `few pairs`, a nat costs `price`",
        FRESH: f"{WITHOUT} the few pairs and `fresh` more, of the answers in which `{FEW}` ended",
        BY_KL: f"`{FEW}`, its policy before the KL went over `budget`",
        BY_SAME: f"the same, before the KL went over that at which `{PRICED}` ends",
        BY_PEOPLE: f"`{FEW}`, the policy whose answers people liked best: they see one in eight and like it or not",
        BEST_FEW: "by the reward model of few pairs",
        BEST_MANY: "by that of many pairs",
        BEST_SMALL: "by one of many pairs that trains an adapter of rank 1 in the place of all weights",
        BEST_LEAST: "by the least of the scores of `members` reward models of few pairs",
        BEST_SURE: "by the mean of these less `lam` times their variance",
        BEST_GOLD: "by gold itself, which nothing can beat",
    },
    phenomena=[
        Claim("PPO's proxy rises all along", ORDER, FEW),
        Claim("It goes on rising after gold has turned", AFTER, FEW),
        Claim("Gold rises first", RISE, FEW),
        Claim("Then it falls", FALL, FEW),
        Claim("The published curve explains more than nine tenths of gold's variance", OVER, FEW),
        Claim("The curve published for best of n explains less of it", OWN, FEW),
        Claim("With many pairs gold falls too", FALL, MANY),
        Claim("The curve explains more than nine tenths there too", OVER, MANY),
        Claim("Many pairs let gold rise higher", HEIGHT, MANY, FEW),
        Claim("Many pairs move the turn to a larger d", TURN, MANY, FEW),
        Claim("The best of n turns too", FALL, BEST_FEW),
        Claim("Its curve explains more than nine tenths", OVER, BEST_FEW),
        Claim("With many pairs the best of n rises higher", HEIGHT, BEST_MANY, BEST_FEW),
        Claim("And turns at a larger d", TURN, BEST_MANY, BEST_FEW),
        Claim("With fewer trained weights it rises less high", HEIGHT, BEST_SMALL, BEST_MANY, -1),
        Claim("At the same KL a run with a KL price has more or less gold than one without", GOLD, PRICED, BY_SAME, 0),
    ],
    remedies=[
        Remedy(MANY, FEW, GOLD, 1, "more labels of the start's answers", (PROXY, KL, PAID)),
        Remedy(PRICED, FEW, GOLD, 1, "a price of the KL", (PROXY, KL, PAID)),
        Remedy(BY_KL, FEW, GOLD, 1, "an early stop at a KL", (PROXY, KL, PAID)),
        Remedy(BY_PEOPLE, FEW, GOLD, 1, "the policy that fresh labels along the way choose", (PROXY, KL, PAID)),
        Remedy(FRESH, FEW, GOLD, 1, "labels of the policy's own answers, and PPO again", (PROXY, KL, PAID)),
        Remedy(FRESH, MANY, GOLD, 1, "the same against more labels of the start's answers", (PROXY, KL, PAID)),
        Remedy(BEST_MANY, BEST_FEW, GOLD, 1, "more labels", (PROXY, PAID)),
        Remedy(BEST_LEAST, BEST_FEW, GOLD, 1, "the least of an ensemble", (PROXY, PAID)),
        Remedy(BEST_SURE, BEST_FEW, GOLD, 1, "an ensemble's mean less its variance", (PROXY, PAID)),
    ],
    pictures=pictures,
    notes=[
        "Settings were chosen on seeds 100 and 101, which the page doesn't show; the budget was read off a run there, "
        "price and ensemble weren't tuned. Tried before: at a rate of 3e-4 gold rose from 0.7 to 1.4 and had lost 0.3 "
        "of it at 7 nats, where the run ended; at 1.5e-3 from the first update on the rise was over within a rollout.",
        "A point of a fit has 512 answers, whose gold has a standard error of 0.05: chance alone keeps R2 below 1. The "
        "means over seeds have less of it; their R2 below the pictures was added when three seeds were seen.",
        "On seeds 100 and 101 gold levelled off beyond 10 nats: R2 with few and many pairs was 0.72 to 0.95 of all "
        "points, 0.91 to 0.97 up to there. That reach was set when two of the seeds below had run, fitted to all "
        "points. It changed one verdict: of all points PPO's curve explained 0.20 (0.11 to 0.29) more than the other.",
        "Five seeds had been seen when five more were run. By the first five two claims weren't shown that are now: "
        "that the best of n turns at a larger d (0.317, -0.009 to 0.643), and PPO's fit with many pairs (R2 of 0.93).",
        "`few weights` stands for a smaller reward model; an adapter of rank 1 may also just learn more slowly.",
        "PPO's figures are of training prompts, best of n's of held-out ones: they can't be held against each other. "
        "Labels of the policy's own answers were gathered in one round; more rounds were not tried.",
        "No run of PPO has an ensemble here; on another model neither the minimum nor mean less variance of five kept "
        "gold from falling: [PPO](../ppo.md).",
    ],
    references=[
        "Gao et al. 2022, arXiv:2210.10760 (the curves, data and size)",
        "Coste et al. 2023, arXiv:2310.02743 (ensembles against over-optimisation)",
        "Bai et al. 2022, arXiv:2204.05862 (labels gathered again along the way)",
    ],
)
