"""Labellers held against each other: agreement and habits with intervals, and what each method finds of each.

Intervals are 95% percentile intervals over prompts drawn with replacement, all choices of a prompt together; those of
`bradley_terry` are 1.96 standard errors.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from rlhf_jax.data import world
from rlhf_jax.data.rows import Text
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.resampling import mean, ratio, spread, totals
from rlhf_jax.feedback import aggregate, agreement, bradley_terry
from rlhf_jax.feedback.choices import Choices

MOST = 20  # pairs of labellers that are listed, those with the most items in common
GRADES = 20  # different ones of which each two are compared; tables of more would not fit
REFITS, REFIT_STEPS = 200, 100  # of Dawid and Skene's, each on resampled prompts
NORMAL = 1.959964


class Agreement(NamedTuple):
    """How far some labellers agree; None where it is undefined.

    Attributes:
      who: two names, or "all".
      items: pairs of answers that two of them or more judged.
      same: of all two labels of an item the share that say the same: first, second or tie.
      kappa: of two labellers Cohen's, of all Fleiss'.
      weighted: of two labellers Cohen's with squared distances of the grades; None for all.
      nominal, ordinal, interval: Krippendorff's alpha, the last two of the grades.
    Of more than GRADES different grades weighted, ordinal and interval are None.
    """

    who: str
    items: int
    same: Estimate | None
    kappa: Estimate | None
    weighted: Estimate | None
    nominal: Estimate | None
    ordinal: Estimate | None
    interval: Estimate | None


def agreements(choices: Choices, *, seed: int = 0) -> list[Agreement]:
    """Of all labellers, and of each two who judged the same pairs of answers, at most MOST of these."""
    people = range(len(choices.people))
    grades, codes = np.unique(-choices.grade, return_inverse=True)
    labels = aggregate.of_choices(choices)
    sides = (choices.pair, choices.who), (len(choices.pairs), len(people))
    signs = agreement.table(*sides[0], labels.label, *sides[1])
    graded = agreement.table(*sides[0], codes, *sides[1])
    most = duos(choices)[:MOST]
    groups = [("all", list(people)), *((f"{choices.people[i]}, {choices.people[j]}", [i, j]) for i, j in most)]
    unit = choices.unit
    return [
        _agreement(name, signs[:, some], graded[:, some], len(labels.classes), grades, unit, seed)
        for name, some in groups
    ]


def duos(choices: Choices) -> list[tuple[int, int]]:
    """Every two labellers who judged the same pairs of answers, those with the most of them first."""
    said = np.zeros((len(choices.pairs), len(choices.people)), np.int64)
    said[choices.pair, choices.who] = 1
    common = said.T @ said
    found = (duo for duo in itertools.combinations(range(len(choices.people)), 2) if common[duo])
    return sorted(found, key=lambda duo: -common[duo])


def _agreement(
    name: str, signs: np.ndarray, graded: np.ndarray, classes: int, grades: np.ndarray, unit: np.ndarray, seed: int
) -> Agreement:
    here = (signs != agreement.MISSING).sum(axis=1) > 1
    signs, graded, unit = signs[here], graded[here], unit[here]
    if not len(unit):
        return Agreement(name, 0, *[None] * 6)
    estimate = lambda of, each: _estimate(of, each, unit, seed)
    marks = agreement.marks(signs, classes)
    few = len(grades) <= GRADES
    kappa, weighted, ordinal, interval = estimate(agreement.fleiss, marks), None, None, None
    if name != "all":
        kappa = estimate(agreement.cohen, agreement.joint(signs, classes))
    if name != "all" and few:
        squared = lambda sums: agreement.cohen(sums, "quadratic", grades)
        weighted = estimate(squared, agreement.joint(graded, len(grades)))
    nominal = estimate(agreement.krippendorff, agreement.coincidences(signs, classes))
    if few:
        matched = agreement.coincidences(graded, len(grades))
        ordinal = estimate(lambda sums: agreement.krippendorff(sums, "ordinal"), matched)
        interval = estimate(lambda sums: agreement.krippendorff(sums, "interval", grades), matched)
    return Agreement(name, len(unit), estimate(agreement.same, marks), kappa, weighted, nominal, ordinal, interval)


def _estimate(of: Callable[[np.ndarray], np.ndarray], each: np.ndarray, unit: np.ndarray, seed: int) -> Estimate | None:
    """A function of sums [..., draws] of what each item adds, [..., items]."""
    whole, drawn = totals(each.reshape(-1, each.shape[-1]), unit, seed)
    shape = each.shape[:-1]
    value, draws = float(of(whole.reshape(shape))), of(drawn.reshape(*shape, -1))
    draws = draws[np.isfinite(draws)]  # a resampling may hold one class alone
    return Estimate(value, *spread(draws)) if np.isfinite(value) and len(draws) else None


# Habits


class Habits(NamedTuple):
    """What one labeller tends to; None where the choices don't tell. Ties count half.

    Attributes:
      choices, ties: how many, and the share of ties.
      others: share of labels of other people, of the same pairs, that say the same.
      first: share of choices for the answer that was shown first; 0.5 if places are no matter.
      longer: share of choices for the answer of more words.
      beyond: the same less that of other people on the same pairs, by trait (`TRAITS`).
      consistent: of three answers each two of which were told apart, the share without a circle; rankings have none.
    """

    name: str
    choices: int
    ties: float
    others: Estimate | None
    first: Estimate | None
    longer: Estimate | None
    beyond: dict[str, Estimate | None]
    consistent: Estimate | None


def words(prompt: Text, answer: Text) -> float:
    """Words of an answer."""
    return float(sum(map(world.length, _contents(answer))))


def opinion(prompt: Text, answer: Text) -> float:
    """Whether an answer takes over the opinion in a prompt of the synthetic world. Errors: UserError for others."""
    question = prompt if isinstance(prompt, str) else next((t.content for t in prompt[::-1] if t.role == "user"), "")
    return float(world.echoes(question, " ".join(_contents(answer))))


def _contents(text: Text) -> list[str]:
    return [text] if isinstance(text, str) else [turn.content for turn in text]


TRAITS: dict[str, Callable[[Text, Text], float]] = {"longer": words, "repeats the user's opinion": opinion}


def traits(choices: Choices) -> dict[str, np.ndarray]:
    """Each trait of every answer, [texts]; one that isn't defined for all prompts is left out."""
    made = {}
    for name, of in TRAITS.items():
        try:
            made[name] = np.asarray([of(prompt, answer) for prompt, _, answer in choices.texts])
        except UserError:
            continue
    return made


def habits(choices: Choices, *, seed: int = 0) -> list[Habits]:
    """Of each labeller."""
    unit, sign, first = choices.unit[choices.pair], choices.sign, choices.shown
    grown = {name: _toward(choices, values) for name, values in traits(choices).items()}
    agreed, compared = _with_others(choices)
    made = []
    for person, name in enumerate(choices.people):
        own = choices.who == person
        part = lambda values, here, own=own: _mean(values[own & here], unit[own & here], seed)
        front, longer = np.where(first > 0, sign, 1 - sign), grown["longer"]
        with_others = own & (compared > 0)
        there = agreed[with_others], compared[with_others], unit[with_others]
        others = ratio(*there, seed=seed) if with_others.any() else None
        made.append(
            Habits(
                name, int(own.sum()), float((sign[own] == 0.5).mean()), others, part(front, first != 0),
                part(longer[0], longer[2]),
                {trait: part(up - rest, apart & ~np.isnan(rest)) for trait, (up, rest, apart) in grown.items()},
                _consistent(choices, own & ~choices.ranked, seed),
            )
        )  # fmt: skip
    return made


def _mean(values: np.ndarray, unit: np.ndarray, seed: int) -> Estimate | None:
    return mean(values, unit, seed=seed) if len(values) else None


def _toward(choices: Choices, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each choice is for more of a trait, how often others' are (nan: nobody else), and where it differs."""
    more = np.sign(values[choices.pairs[:, 0]] - values[choices.pairs[:, 1]])[choices.pair]
    up = np.where(more > 0, choices.sign, 1 - choices.sign)
    total, count = np.bincount(choices.pair, up), np.bincount(choices.pair)
    _, own = np.unique(choices.pair * len(choices.people) + choices.who, return_inverse=True)
    mine, times = np.bincount(own, up)[own], np.bincount(own)[own]
    others = count[choices.pair] - times
    rest = np.divide(total[choices.pair] - mine, others, out=np.full(len(up), np.nan), where=others > 0)
    return up, rest, more != 0


def _with_others(choices: Choices) -> tuple[np.ndarray, np.ndarray]:
    """Of each choice how many labels of other people, of the same pair, say the same, and how many there are."""
    code = np.rint(2 * choices.sign).astype(np.int64)
    votes = np.zeros((len(choices.pairs), 3))
    np.add.at(votes, (choices.pair, code), 1.0)
    own = np.unique(choices.pair * len(choices.people) + choices.who, return_inverse=True)[1]
    mine = np.zeros((own.max() + 1, 3))
    np.add.at(mine, (own, code), 1.0)
    rest = votes[choices.pair] - mine[own]
    return rest[np.arange(len(code)), code], rest.sum(axis=1)


def _consistent(choices: Choices, own: np.ndarray, seed: int) -> Estimate | None:
    if not own.any():
        return None
    pair = choices.pair[own]
    right, whole = agreement.triples(choices.unit[pair], choices.pairs[pair], choices.sign[own])
    some = whole > 0
    return ratio(right[some], whole[some], np.flatnonzero(some), seed=seed) if some.any() else None


# Methods


Figures = dict[str, Estimate | float | None]
UNSETTLED = "Not settled after {} iterations: the labels tell little."


class Weighed(NamedTuple):
    """What a method makes of choices.

    Attributes:
      probability: [pairs], that the pair's first answer is the better one.
      people: of each labeller the figures that the method has; None where the choices don't tell.
      note: what there is to say beside.
    """

    probability: np.ndarray
    people: dict[str, Figures]
    note: str = ""


def _majority(choices: Choices, seed: int) -> Weighed:
    found = aggregate.majority(aggregate.of_choices(choices))
    return Weighed(aggregate.chance_of_first(found), {})


def _dawid_skene(choices: Choices, seed: int) -> Weighed:
    labels = aggregate.of_choices(choices)
    fit = aggregate.dawid_skene(labels)
    low, high = confusion_intervals(labels, fit, choices.unit, seed=seed)
    cells = np.stack([fit.confusion, low, high], axis=-1)
    right = np.einsum("k,lkk...->l...", fit.prior, cells)[:, :1]
    people: dict[str, Figures] = {}
    for person, name in enumerate(choices.people):
        figures: Figures = {"right": float(right[person, 0])}
        for true, said in itertools.product(range(len(labels.classes)), repeat=2):
            figures[f"{labels.classes[said]} | {labels.classes[true]}"] = Estimate(
                *map(float, cells[person, true, said])
            )
        people[name] = figures
    note = UNSETTLED.format(fit.steps) if fit.steps >= aggregate.STEPS else ""
    return Weighed(aggregate.chance_of_first(fit.posterior), people, note)


def confusion_intervals(
    labels: aggregate.Labels, fit: aggregate.Confusions, unit: np.ndarray, *, seed: int = 0, refits: int = REFITS
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the intervals of `dawid_skene`'s confusion matrices, [people, K, K] each.

    Args:
      fit: of all labels; every refit begins with it.
      unit: [items], what is drawn as one.
    """
    found, places = np.unique(unit, return_inverse=True)
    rng, count = np.random.default_rng(seed), len(found)
    times = rng.multinomial(count, np.full(count, 1 / count), size=refits)
    again = lambda drawn: aggregate.dawid_skene(labels, weight=drawn[places], start=fit.posterior, steps=REFIT_STEPS)
    fits = np.stack([again(drawn).confusion for drawn in times])
    low, high = np.quantile(fits, [0.025, 0.975], axis=0)
    return low, high


def _bradley_terry(choices: Choices, seed: int) -> Weighed:
    fit = bradley_terry.fit(choices)
    wide = lambda value, error: Estimate(float(value), float(value - NORMAL * error), float(value + NORMAL * error))
    known = np.bincount(choices.who, choices.shown != 0) > 0  # of whom any order is known
    people: dict[str, Figures] = {
        name: {
            "skill": wide(fit.skill[i], fit.skill_error[i]),
            "bias for the first": wide(fit.bias[i], fit.bias_error[i]) if known[i] else None,
        }
        for i, name in enumerate(choices.people)
    }
    notes = [UNSETTLED.format(fit.steps)] if fit.steps >= bradley_terry.STEPS else []
    if choices.ranked.any():
        notes.append("Choices of one ranking follow from each other: skills read too high, their intervals too narrow.")
    return Weighed(fit.probability, people, " ".join(notes))


def _rated(figure: str, of: Callable[[aggregate.Labels], aggregate.Rated], choices: Choices) -> Weighed:
    found = of(aggregate.of_choices(choices))
    people: dict[str, Figures] = {name: {figure: float(found.people[i])} for i, name in enumerate(choices.people)}
    return Weighed(aggregate.chance_of_first(found.posterior), people)


METHODS: Mapping[str, Callable[[Choices, int], Weighed]] = {
    "majority": _majority,
    "dawid_skene": _dawid_skene,
    "glad": lambda choices, seed: _rated("ability", aggregate.glad, choices),
    "mace": lambda choices, seed: _rated("knows", lambda labels: aggregate.mace(labels, seed), choices),
    "bradley_terry": _bradley_terry,
}
