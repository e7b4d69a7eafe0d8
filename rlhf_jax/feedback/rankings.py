"""Rankings of several answers to a prompt: made by simulated people, left blank for real ones, and how far they agree.

A row is one person's ranking of the answers to one prompt, in the form of the data format `ranking`: prompt,
completions, ranks (a number each, the smallest the best) and labeller. The rows of a prompt follow each other.
"""

import itertools
import json
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from rlhf_jax.data import formats, labellers, sources, world
from rlhf_jax.data.labellers import Labeller
from rlhf_jax.data.rows import Left, Refusal, Text
from rlhf_jax.errors import UserError

Row = dict[str, Any]
T = TypeVar("T")


# Rows


def rank_answers(
    prompts: Sequence[Text],
    answers: Sequence[Sequence[str]],
    panel: Sequence[Labeller],
    labels: int = 3,
    seed: int = 0,
) -> list[Row]:
    """The rankings that `labels` people of a panel give to the answers of each prompt.

    Empty answers are left out, and prompts with fewer than two different answers. The texts and the seed decide who
    is asked; nobody is asked twice before all were asked once.

    Args:
      prompts: of the synthetic world; of a conversation the last user message counts.
      answers: some to each prompt; of equal texts the ranks are equal.
    Returns: rows with the columns prompt, completions (as given), ranks (0 the best), labeller (the index in the
      panel) and gold (the gold reward of each completion).
    Raises: UserError for less than one label or labeller, and a prompt of another world.
    """
    if labels < 1 or not panel:
        raise UserError(f"{labels} labels an item by {len(panel)} labellers; both must be at least 1.")
    rows = []
    for prompt, texts in _comparable(prompts, answers):
        question = question_of(prompt).strip()
        gold = [round(world.judge(question, text).total, 6) for text in texts]
        item = question, *sorted(text.strip() for text in texts)
        for member, number in labellers.asked(item, len(panel), labels, seed):
            ranks = list(panel[member].ranks(question, texts, number))
            rows.append(_row(prompt, texts, ranks, member) | {"gold": gold})
    return rows


def blank_rankings(
    prompts: Sequence[Text], answers: Sequence[Sequence[str]], tools: Sequence[str] | None = None
) -> list[Row]:
    """The same rows with nothing in ranks and labeller, one a prompt, for people to fill in.

    Args:
      tools: what each prompt offers, JSON text, "" for none: its row keeps it. None: none do.
    """
    tools = [""] * len(prompts) if tools is None else tools
    offers = [{"tools": json.loads(text)} if text else {} for text in tools]
    made = _comparable(list(zip(prompts, offers, strict=True)), answers)
    return [_row(prompt, texts, None, None) | offered for (prompt, offered), texts in made]


def read_rankings(path: str | os.PathLike) -> list[Row]:
    """The rows of a file of rankings. Raises: UserError naming the first that nobody has filled in, or can't be used.

    A row of several people for one prompt each has its own line; labeller may be any name or number.
    """
    rows = []
    for record in sources.read(os.fspath(path), flag="the path"):
        if isinstance(record, sources.Refused):
            raise UserError(f"{record.where} can't be used ({record.reason}); mend it.")
        columns = dict(record.columns)
        if columns.get("ranks") is None:
            raise UserError(
                f"{record.where} has no ranks; fill them in, a number for each completion, or drop the row."
            )
        try:
            formats.adapt("ranking", columns, True, ties=True)
        except (Refusal, Left) as refusal:
            raise UserError(f"{record.where} can't be used ({refusal}); mend it.") from None
        rows.append(columns)
    return rows


def question_of(prompt: Text) -> str:
    """What a prompt asks: itself, or the last user message of a conversation; empty if there is none."""
    if isinstance(prompt, str):
        return prompt
    return next((turn.content for turn in reversed(prompt) if turn.role == "user"), "")


def _comparable(prompts: Sequence[T], answers: Sequence[Sequence[str]]) -> Iterator[tuple[T, list[str]]]:
    for prompt, texts in zip(prompts, answers, strict=True):
        said = [text for text in texts if text.strip()]  # the formats refuse an empty answer, and its row with it
        if len({text.strip() for text in said}) > 1:
            yield prompt, said


def _row(prompt: Text, texts: list[str], ranks: list[float] | None, labeller: int | None) -> Row:
    asked = prompt if isinstance(prompt, str) else [turn.fields for turn in prompt]
    return {"prompt": asked, "completions": texts, "ranks": ranks, "labeller": labeller}


# Agreement


def agreement(rows: Iterable[Mapping[str, Any]]) -> float:
    """How often two people say the same of the same two answers: 1 always, 0.5 as two coins do.

    The share is over all prompts, all two answers of different text, and all two rankings that are not of the same
    labeller. Who ranks the two equally says the same only as another who does.

    Returns: the share, 0 to 1; nan if no two people ranked the same answers.

    >>> rows = [{"prompt": "Q", "completions": ["A", "B", "C"], "ranks": ranks} for ranks in ([1, 2, 3], [1, 3, 2])]
    >>> print(round(agreement(rows), 3))
    0.667
    """
    same = pairs = 0
    for people, ranks in _rankings(rows):
        signs = np.sign(ranks[:, :, None] - ranks[:, None, :])[:, *np.triu_indices(ranks.shape[1], 1)]
        for i, j in itertools.combinations(range(len(people)), 2):
            if people[i] is None or people[i] != people[j]:
                same += int((signs[i] == signs[j]).sum())
                pairs += signs.shape[1]
    return same / pairs if pairs else math.nan


def concordance(rows: Iterable[Mapping[str, Any]]) -> float:
    """The mean over prompts of `kendall_w` of all rankings of the prompt.

    Prompts of one ranking and of which it is undefined are left out; nan if there are no others.
    """
    values = [kendall_w(ranks) for _, ranks in _rankings(rows) if len(ranks) > 1]
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def kendall_w(ranks: np.ndarray) -> float:
    """Kendall's coefficient of concordance of m rankings of the same n answers, ties corrected.

    W = 12 S / (m^2 (n^3 - n) - m T), with S the squared deviations of the answers' sums of ranks from their mean,
    and T the sum over the ties of t answers of t^3 - t; equal answers share the mean of their places. It is 1 if all
    rankings are the same, and 1/m on average if they have nothing to do with each other.

    Args:
      ranks: [m, n], the smaller the better; of each row only the order counts.
    Returns: W, 0 to 1; nan if every ranking ranks all answers equally.
    References: Kendall and Smith 1939, Annals of Mathematical Statistics 10; Kendall 1948, Rank Correlation Methods.

    >>> print(kendall_w(np.array([[1, 2, 3], [1, 2, 3]])), kendall_w(np.array([[1, 2, 3], [3, 2, 1]])))
    1.0 0.0
    """
    ranks = np.asarray(ranks, np.float64)
    signs = np.sign(ranks[:, :, None] - ranks[:, None, :])
    places = signs.sum(axis=2) / 2  # mean places, less the mean of all of them
    # A ranking with ties has the squared deviations (n^3 - n - T) / 12: so this is W as it is above.
    most = len(ranks) * np.square(places).sum()
    return float(np.square(places.sum(axis=0)).sum() / most) if most else math.nan


def _rankings(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[Any], np.ndarray]]:
    """Of each prompt with the same different answers: who ranked them, and the ranks [people, answers]."""
    found: dict[Hashable, list[tuple[Any, list[float]]]] = {}
    for row in rows:
        texts = [_key(text) for text in row["completions"]]
        ranks = dict(zip(reversed(texts), reversed(row["ranks"]), strict=True))  # of equal texts the first one's
        item = _key(row["prompt"]), frozenset(texts)
        found.setdefault(item, []).append((row.get("labeller"), [ranks[text] for text in sorted(ranks)]))
    for same in found.values():
        people, ranks = zip(*same, strict=True)
        yield list(people), np.asarray(ranks, np.float64)


def _key(text: Any) -> str:
    return text.strip() if isinstance(text, str) else json.dumps(text)
