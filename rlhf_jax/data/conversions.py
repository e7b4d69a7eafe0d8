"""What each kind of row gives to a loss that takes single answers, pairs or labelled answers."""

import itertools
from collections.abc import Callable, Iterator
from typing import Literal

from rlhf_jax.data.rows import Demonstration, Labelled, Preference, Prompt, Ranking, Row, Stepwise, Text

Form = Literal["demonstration", "pair", "labelled"]
# (prompt, completions, labels) of each example that a row gives.
Converted = Iterator[tuple[Text, tuple[Text, ...], tuple[bool, ...]]]


def _demonstration(row: Demonstration) -> Converted:
    yield row.prompt, (row.completion,), ()


def _chosen(row: Preference) -> Converted:
    yield row.prompt, (row.chosen,), ()


def _pair(row: Preference) -> Converted:
    yield row.prompt, (row.chosen, row.rejected), (True, False)


def _labelled(row: Labelled) -> Converted:
    yield row.prompt, (row.completion,), (row.label,)


def _best(row: Ranking) -> Converted:
    best = min(range(len(row.ranks)), key=row.ranks.__getitem__)
    yield row.prompt, (row.completions[best],), ()


def _ranked_pairs(row: Ranking) -> Converted:
    """Every two answers of different rank and different text."""
    order = sorted(range(len(row.ranks)), key=row.ranks.__getitem__)
    for better, worse in itertools.combinations(order, 2):
        pair = row.completions[better], row.completions[worse]
        if row.ranks[better] < row.ranks[worse] and pair[0] != pair[1]:
            yield row.prompt, pair, (True, False)


CONVERSIONS: dict[tuple[type[Row], Form], Callable[..., Converted]] = {
    (Demonstration, "demonstration"): _demonstration,
    (Preference, "demonstration"): _chosen,
    (Ranking, "demonstration"): _best,
    (Preference, "pair"): _pair,
    (Ranking, "pair"): _ranked_pairs,
    (Labelled, "labelled"): _labelled,
    # Pairs stay pairs until they are split and cut to length: `dataset.unpaired` makes single answers of them.
    (Preference, "labelled"): _pair,
    (Ranking, "labelled"): _ranked_pairs,
}
NEEDS: dict[Form, str] = {
    "demonstration": "answers to imitate",
    "pair": "pairs of a chosen and a rejected answer",
    "labelled": "answers with a label",
}
HOLDS: dict[type[Row], str] = {
    Demonstration: "single answers",
    Preference: "pairs",
    Labelled: "labelled single answers",
    Ranking: "ranked answers",
    Stepwise: "labelled steps",
    Prompt: "prompts without answers",
}
# What to type when rows of one kind meet a loss that takes another; losses by the rows they take.
INSTEAD: dict[type[Row], str] = {
    Demonstration: "use --config.algorithm=sft --config.loss.name=nll or other data",
    Labelled: "use --config.algorithm=preference with --config.loss.name=kto",
}


def impossible(path: str, columns: str, row: type[Row], form: Form) -> str:
    """The sentence for rows of a source that can't become examples of a form; `columns` says what they lack."""
    instead = INSTEAD[row] if row in INSTEAD else "add what is missing or give other data with --config.data.path"
    return f"this loss needs {NEEDS[form]} and {path} holds {HOLDS[row]} ({columns}); {instead}"
