"""Rankings of a model's answers: drawn, and ranked by simulated people, by a scorer with noise, or left to people."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax import registry
from rlhf_jax.chain.config import PEOPLE, WORLD, Labels
from rlhf_jax.data import labellers, prompts
from rlhf_jax.data.prompts import Asked
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject, answer
from rlhf_jax.evaluate.scorers import SCORERS, Scorer, score
from rlhf_jax.feedback import rankings
from rlhf_jax.feedback.rankings import Row
from rlhf_jax.sampling.sampler import Sampler


def collect(section: Labels, subject: Subject, asked: Sequence[Asked], seed: int) -> list[Row]:
    """The answers of a model to prompts, ranked as `section` says; a row a ranking, or a blank one a prompt.

    Errors: UserError if no prompt got two different answers, and as the scorer.
    """
    sampler, encoder = Sampler(subject.model, samples=section.answers), Encoder(subject.tokenizer)
    texts, tools = [one.text for one in asked], [one.tools for one in asked]
    answers = answer(subject, encoder, sampler, texts, section.sampling, seed, tools).texts
    if section.by == WORLD:
        rows = rankings.rank_answers(texts, answers, _panel(section), section.rankings, seed)
    elif section.by == PEOPLE:
        rows = rankings.blank_rankings(texts, answers, tools)
    else:
        scorer = registry.resolve(SCORERS, section.by, "scorer")
        rows = by_scorer(asked, answers, scorer, count=section.rankings, scale=section.scale, seed=seed)
    if not rows:
        raise UserError(
            "labels: no prompt got two different answers, so there is nothing to rank; raise "
            "--config.labels.sampling.temperature."
        )
    return rows


def _panel(section: Labels) -> list[labellers.Labeller]:
    knobs = {name: value for name, value in vars(section.labeller).items() if name != "seed"}
    return labellers.panel(section.labellers, section.labeller.seed, **knobs)


def by_scorer(
    asked: Sequence[Asked], answers: Sequence[Sequence[str]], scorer: Scorer, *, count: int, scale: float, seed: int
) -> list[Row]:
    """Rankings by a scorer with noise, `count` of the answers to each prompt; the column scores has the scores.

    The order is that of score / scale plus Gumbel noise of an answer's own text: so each two answers are ordered with
    the probability sigmoid((score_a - score_b) / scale), as Bradley and Terry have it, and several as Plackett and
    Luce. The seed, the prompt's place and the ranking's number decide the noise.

    Args:
      scale: at least 0; at 0 there is no noise, and equal scores rank equally.
    """
    kept = [
        (place, row)
        for place, (one, texts) in enumerate(zip(asked, answers, strict=True))
        for row in rankings.blank_rankings([one.text], [texts], [one.tools])
    ]
    columns = prompts.columns([asked[place] for place, _ in kept])
    values = score(scorer, [asked[place].text for place, _ in kept], [row["completions"] for _, row in kept], columns)
    return [
        row | {"ranks": noisy_ranks(row["completions"], scores, scale, (seed, place, number)), "labeller": number}
        | {"scores": scores}
        for (place, row), scores in zip(kept, values, strict=True)
        for number in range(count)
    ]  # fmt: skip


def noisy_ranks(texts: Sequence[str], scores: Sequence[float], scale: float, key: Sequence[int]) -> list[float]:
    """The place of each answer, 0 the best; equal texts have one.

    >>> noisy_ranks(["a", "b", "a", "c"], [1.0, 2.0, 1.0, 1.0], 0.0, (0,))
    [1.0, 0.0, 1.0, 1.0]
    """
    different = list(dict.fromkeys(text.strip() for text in texts))
    value = {text.strip(): number for text, number in zip(texts, scores, strict=True)}
    noise = scale * np.random.default_rng(list(key)).gumbel(size=len(different))
    noisy = {text: value[text] + extra for text, extra in zip(different, noise, strict=True)}
    places = {number: float(place) for place, number in enumerate(sorted(set(noisy.values()), reverse=True))}
    return [places[noisy[text.strip()]] for text in texts]


def told(rows: Sequence[Row], asked: int) -> str:
    """What was collected, in a line."""
    there = len({str(row["prompt"]) for row in rows})
    line = f"{len(rows)} rows of {there} prompts; {asked - there} left out, without two different answers"
    if rows[0]["ranks"] is None or len(rows) == there:
        return line
    agreed: Any = rankings.agreement(rows)
    return f"{line}; two rankings say the same of two answers: {agreed:.1%} (coins: 50%)"
