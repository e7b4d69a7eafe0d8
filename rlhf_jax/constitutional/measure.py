"""What the models are worth, on prompts that nothing was trained on: how harmless, and how helpful."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rlhf_jax import registry
from rlhf_jax.constitutional import checks, writing
from rlhf_jax.constitutional.config import Constitutional
from rlhf_jax.constitutional.stages import Products
from rlhf_jax.data import prompts as asked
from rlhf_jax.data import sources
from rlhf_jax.data.formats import values
from rlhf_jax.data.prompts import Asked
from rlhf_jax.data.rows import Text
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.intervals import Estimate, paired
from rlhf_jax.evaluate.resampling import mean
from rlhf_jax.evaluate.scorers import SCORERS, Scorer, score
from rlhf_jax.feedback.revision import Revised

HELPFUL, REVISED, ONLY = "helpful", "revised", "helpful only"


class View(NamedTuple):
    """One side of what the models are worth.

    Attributes:
      scorer: what gives the scores.
      prompts: [P]. texts, scores: by model, [P][S] and [P, S].
      score: the mean of each model's.
      above: by (model, other) the mean difference on the same prompts.
    """

    scorer: str
    prompts: list[Text]
    texts: dict[str, list[list[str]]]
    scores: dict[str, np.ndarray]
    score: dict[str, Estimate]
    above: dict[tuple[str, str], Estimate]


class Measured(NamedTuple):
    """What the models are worth on both sides.

    Attributes:
      rounds: names of the helpful model's answers after each round, in their order; none where nothing was revised.
      final: the name of the last model.
      revised: the helpful model's first answers to the prompts that provoke harm, through all rounds.
      human, labels: how many pairs people compared, and a model.
      agrees: share of the model's labels that the scorer of harmlessness shares, of pairs that it holds for unequal.
        None: it holds none for unequal, can't score them, or the labels were given.
      given: the inputs that were named, of which nobody knows here how they were made.
    """

    harmless: View
    helpful: View
    rounds: list[str]
    final: str
    revised: list[Revised]
    human: int
    labels: int
    agrees: Estimate | None
    given: tuple[str, ...] = ()


def measure(whole: Constitutional, products: Products) -> Measured:
    """Lets all models answer both sets of prompts, and the helpful one's answers be revised."""
    paths = {HELPFUL: products.helpful, REVISED: products.revised, whole.final: products.final}
    paths |= {} if products.helpful_only is None else {ONLY: products.helpful_only}
    subjects = [writing.open_model(whole, path, name) for name, path in paths.items()]
    critic, samplers = None, writing.Samplers()
    if "revisions" in whole.made:
        named = whole.revisions.critic
        critic = subjects[0] if named is None else writing.open_model(whole, named, "critic")
    views, revised = {}, {}
    for side in checks.SIDES:
        rows = checks.evaluated(whole, side)
        texts = {one.name: _answers(whole, one, rows, samplers) for one in subjects}
        after, revised[side] = ({}, []) if critic is None else _rounds(whole, critic, rows, texts[HELPFUL], samplers)
        views[side] = _view(whole, side, rows, {HELPFUL: texts.pop(HELPFUL), **after, **texts})
    rounds = [name for name in views["harmless"].texts if name.startswith("round ")]
    first = revised["harmless"][:: _samples(whole)]
    labels, agrees = 0, None
    if "labels" in whole.made:
        pairs = _lines(str(products.labels))
        labels, agrees = len(pairs), _agrees(whole, pairs)
    elif products.labels is not None:
        labels = _count(whole, products.labels)
    people = 0 if products.human is None else len(_lines(products.human))
    given = tuple(name for name, path in vars(whole.inputs).items() if path is not None)
    return Measured(
        **views, rounds=rounds, final=whole.final, revised=first, human=people, labels=labels, agrees=agrees,
        given=given,
    )  # fmt: skip


def _answers(
    whole: Constitutional, subject: Subject, rows: Sequence[Asked], samplers: writing.Samplers
) -> list[list[str]]:
    return writing.draw(subject, rows, whole.evaluate.sampling, whole.seed, _samples(whole), samplers)


def _samples(whole: Constitutional) -> int:
    return whole.evaluate.samples


def _scorer(whole: Constitutional, side: str) -> Scorer:
    return registry.resolve(SCORERS, str(getattr(whole.evaluate, side).scorer), "scorer")


def _rounds(
    whole: Constitutional,
    critic: Subject,
    rows: Sequence[Asked],
    answers: Sequence[Sequence[str]],
    samplers: writing.Samplers,
) -> tuple[dict[str, list[list[str]]], list[Revised]]:
    """The answers after each round, by its name, and every answer's way."""
    count = _samples(whole)
    flat = [(row.text, text) for row, texts in zip(rows, answers, strict=True) for text in texts]
    found = writing.revise(whole, critic, *zip(*flat, strict=True), samplers=samplers)
    names = {f"round {number}": number for number in range(1, whole.revisions.rounds + 1)}
    made = {}
    for name, number in names.items():
        latest = [one.answers[number] for one in found]
        made[name] = [latest[start : start + count] for start in range(0, len(latest), count)]
    return made, found


def _view(whole: Constitutional, side: str, rows: list[Asked], texts: dict[str, list[list[str]]]) -> View:
    prompts, columns, scorer = [row.text for row in rows], asked.columns(rows), _scorer(whole, side)
    scores = {name: np.asarray(score(scorer, prompts, said, columns)) for name, said in texts.items()}
    means = {name: values.mean(axis=1) for name, values in scores.items()}
    against = [(name, HELPFUL) for name in means if name != HELPFUL]
    rounds = [HELPFUL, *(name for name in means if name.startswith("round "))]
    against += [(later, earlier) for earlier, later in zip(rounds[1:-1], rounds[2:], strict=True)]
    against += [(whole.final, name) for name in (REVISED, ONLY) if name in means]
    told = paired(means | {f"{a}\n{b}": means[a] - means[b] for a, b in against}, seed=whole.seed)
    section = getattr(whole.evaluate, side)
    above = {(a, b): told[f"{a}\n{b}"] for a, b in against}
    return View(str(section.scorer), prompts, texts, scores, {name: told[name] for name in means}, above)


def _agrees(whole: Constitutional, pairs: Sequence[Mapping[str, Any]]) -> Estimate | None:
    """Of pairs of which the scorer holds one answer for better, the share whose better one is the chosen one.

    Pairs whose prompt is no longer in the file are left out. None where nothing is left, and where the scorer fails on
    the prompts of training, whose rows may lack columns that it reads.
    """
    rows = checks.provoking(whole, whole.labels.rows)
    there = {row.text: place for place, row in enumerate(rows)}
    asks = [there.get(values.text(pair["prompt"], "prompt")) for pair in pairs]
    pairs = [pair for pair, place in zip(pairs, asks, strict=True) if place is not None]
    places = [place for place in asks if place is not None]
    if not places:
        return None
    texts = [[_content(pair["chosen"]), _content(pair["rejected"])] for pair in pairs]
    columns = {name: [column[place] for place in places] for name, column in asked.columns(rows).items()}
    try:
        told = np.asarray(score(_scorer(whole, "harmless"), [rows[place].text for place in places], texts, columns))
    except Exception as error:  # a scorer of the user's raises what it likes, and all else is measured
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"labels: {whole.evaluate.harmless.scorer} can't score them ({why}); how far it agrees is not known")
        return None
    differs = told[:, 0] != told[:, 1]
    if not differs.any():
        return None
    return mean((told[:, 0] > told[:, 1])[differs].astype(float), np.asarray(places)[differs])


def _content(text: Any) -> str:
    return text if isinstance(text, str) else str(text[-1]["content"])


def _lines(path: str) -> list[dict[str, Any]]:
    """Of a file that was written here."""
    return [json.loads(line) for line in epath.Path(path).read_text().splitlines()]


def _count(whole: Constitutional, path: str) -> int:
    """How many rows a file of labels has that somebody gave, whatever its form."""
    split = (whole.dpo if whole.final == "dpo" else whole.reward).data.split
    return sum(isinstance(row, sources.Record) for row in sources.read(path, split, "--config.inputs.labels"))
