"""What each kind of row gives to a loss: single answers, pairs, ranked groups, labels, labelled steps, or prompts."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlhf_jax.data.config import Data
from rlhf_jax.data.rows import (
    Conversation,
    Demonstration,
    Labelled,
    Message,
    Preference,
    Prompt,
    Ranking,
    Refusal,
    Row,
    Stepwise,
    Text,
)

Form = Literal["demonstration", "pair", "ranking", "labelled", "stepwise", "prompt"]


class Made(NamedTuple):
    """What one example is made of.

    Attributes:
      completions: () of a prompt alone.
      labels, ranks: one a completion where the loss reads them.
      ends: of labelled steps, the character of the completion's text at which each ends.
      step_labels: one a step.
      probability: of a pair, that the first is better.
    """

    prompt: Text
    completions: tuple[Text, ...]
    labels: tuple[bool, ...] = ()
    ranks: tuple[float, ...] = ()
    ends: tuple[int, ...] = ()
    step_labels: tuple[float, ...] = ()
    probability: float = 1.0


def _demonstration(row: Demonstration) -> Iterator[Made]:
    yield Made(row.prompt, (row.completion,))


def _chosen(row: Preference) -> Iterator[Made]:
    yield Made(row.prompt, (row.chosen,))


def _pair(row: Preference) -> Iterator[Made]:
    yield Made(row.prompt, (row.chosen, row.rejected), (True, False))


def _labelled(row: Labelled) -> Iterator[Made]:
    yield Made(row.prompt, (row.completion,), (row.label,))


def _best(row: Ranking) -> Iterator[Made]:
    best = min(range(len(row.ranks)), key=row.ranks.__getitem__)
    yield Made(row.prompt, (row.completions[best],))


def _ranked_pairs(row: Ranking) -> Iterator[Made]:
    """Every two answers of different rank and different text."""
    order = sorted(range(len(row.ranks)), key=row.ranks.__getitem__)
    for better, worse in itertools.combinations(order, 2):
        pair = row.completions[better], row.completions[worse]
        if row.ranks[better] < row.ranks[worse] and pair[0] != pair[1]:
            yield Made(row.prompt, pair, (True, False))


def tied_pairs(row: Ranking) -> Iterator[Made]:
    """Every two answers of equal rank and different text, each as likely the better one."""
    for first, second in itertools.combinations(range(len(row.ranks)), 2):
        pair = row.completions[first], row.completions[second]
        if row.ranks[first] == row.ranks[second] and pair[0] != pair[1]:
            yield Made(row.prompt, pair, (True, False), probability=0.5)


def _group(row: Ranking) -> Iterator[Made]:
    """All answers at once, each text as often as it is ranked."""
    yield Made(row.prompt, row.completions, ranks=row.ranks)


def _group_of_two(row: Preference) -> Iterator[Made]:
    yield Made(row.prompt, (row.chosen, row.rejected), ranks=(0.0, 1.0))


def _outcome(row: Stepwise) -> Iterator[Made]:
    """The solution is right if no step is wrong."""
    yield Made(row.prompt, (joined(row.completions)[0],), (min(row.labels) >= 0.5,))


def _steps(row: Stepwise) -> Iterator[Made]:
    answer, ends = joined(row.completions)
    yield Made(row.prompt, (answer,), ends=ends, step_labels=row.labels)


def _asked(row: Row) -> Iterator[Made]:
    """The prompt alone, for rollouts; of a whole conversation what stands before its first answer.

    Raises: Refusal for a row of which nothing can be asked. An empty prompt can, where the row is a prompt.
    """
    prompt = row.prompt
    if prompt == () and isinstance(row, Demonstration) and not isinstance(row.completion, str):
        prompt = opening(row.completion)
    if not prompt and not isinstance(row, Prompt):
        why = "nothing stands before the first answer" if prompt == () else "the row is a text without a prompt"
        raise Refusal(why)
    yield Made(prompt, ())


def opening(turns: Conversation) -> Conversation:
    """What stands before the first answer of a conversation."""
    return tuple(itertools.takewhile(lambda turn: turn.role != "assistant", turns))


def joined(steps: Sequence[Text]) -> tuple[Text, tuple[int, ...]]:
    """Steps as the one answer that they make, as they are, and where each ends in its text."""
    texts = [step if isinstance(step, str) else "".join(turn.content for turn in step) for step in steps]
    whole = "".join(texts)
    ends = tuple(itertools.accumulate(map(len, texts)))
    return (whole if isinstance(steps[0], str) else (Message("assistant", whole),)), ends


CONVERSIONS: dict[tuple[type[Row], Form], Callable[..., Iterator[Made]]] = {
    (Demonstration, "demonstration"): _demonstration,
    (Preference, "demonstration"): _chosen,
    (Ranking, "demonstration"): _best,
    (Preference, "pair"): _pair,
    (Ranking, "pair"): _ranked_pairs,
    (Ranking, "ranking"): _group,
    (Preference, "ranking"): _group_of_two,
    (Labelled, "labelled"): _labelled,
    # Pairs stay pairs until they are split and cut to length: `dataset.unpaired` makes single answers of them.
    (Preference, "labelled"): _pair,
    (Ranking, "labelled"): _ranked_pairs,
    (Stepwise, "labelled"): _outcome,
    (Stepwise, "stepwise"): _steps,
    (Prompt, "prompt"): _asked,
    (Demonstration, "prompt"): _asked,
    (Preference, "prompt"): _asked,
    (Ranking, "prompt"): _asked,
    (Labelled, "prompt"): _asked,
    (Stepwise, "prompt"): _asked,
}
NEEDS: dict[Form, str] = {
    "demonstration": "answers to imitate",
    "pair": "pairs of a chosen and a rejected answer",
    "ranking": "ranked answers or pairs",
    "labelled": "answers with a label",
    "stepwise": "solutions with a label for each step",
    "prompt": "prompts",
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
    Labelled: (
        "use --config.algorithm=preference with --config.loss.name=kto, "
        "or --config.algorithm=reward --config.loss.name=outcome"
    ),
    Stepwise: "use --config.algorithm=reward --config.loss.name=process",
}


def impossible(path: str, columns: str, row: type[Row], form: Form) -> str:
    """The sentence for rows of a source that can't become examples of a form; `columns` says what they lack."""
    instead = INSTEAD[row] if row in INSTEAD else "add what is missing or give other data with --config.data.path"
    return f"this loss needs {NEEDS[form]} and {path} holds {HOLDS[row]} ({columns}); {instead}"


def columns_of_pairs(columns: Mapping[str, Any], config: Data, rows: Sequence[Row]) -> dict[str, float]:
    """What the columns named by `config` say of a record's one pair: probability and margin, as far as named.

    Raises: Refusal for a record that isn't one pair, lacks the column, or holds something else there.
    """
    said = {}
    for what, name in (("probability", config.probability), ("margin", config.margin)):
        if name is None:
            continue
        if len(rows) != 1 or not isinstance(rows[0], Preference):
            raise Refusal(f"the column {name!r} is read of single pairs, and this row holds something else")
        if name not in columns:
            raise Refusal(f"it has no column {name!r}, which data.{what} names")
        said[what] = _number(columns[name], name, votes=what == "probability")
    if not 0 <= said.get("probability", 1.0) <= 1:
        raise Refusal(f"{config.probability!r} is {said['probability']}, not from 0 to 1")
    return said


def _number(value: Any, name: str, votes: bool) -> float:
    """A finite number, or the share of votes that are true."""
    several: list[Any] = value if votes and isinstance(value, list) and value else [value]
    for one in several:
        if not isinstance(one, int | float) or not math.isfinite(one):
            raise Refusal(f"{name!r} holds {str(one)[:40]!r}, not a finite number{' or votes' if votes else ''}")
    return math.fsum(several) / len(several)
