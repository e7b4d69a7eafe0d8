"""Choices of two answers by several labellers, as arrays: read from files of rows, and written back as soft labels."""

import dataclasses
import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import formats, sources
from rlhf_jax.data.dataset import format_of
from rlhf_jax.data.formats.choices import READERS, Choice, choices
from rlhf_jax.data.rows import Left, Preference, Ranking, Refusal, Text
from rlhf_jax.errors import UserError

DIGITS = 12  # of a grade: 0.3 and 1 - 0.7 are the same one


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """N choices of P pairs of T answers, by L labellers.

    Attributes:
      texts: T of (prompt, tools, answer), each once.
      prompt: [T] int, which answers belong to one prompt.
      pairs: [P, 2] int, places among the texts: the answer that the pair's first labeller was shown first, or where
        nobody knows that, either by a coin that the texts decide.
      pair, who: [N] int, places among the pairs and the people.
      grade: [N] float64, from 1 (the pair's first answer is better) to 0, in 12 digits; 0.5 is a tie.
      shown: [N] float64, 1 if the pair's first answer was shown first, -1 if the second was, 0 if nobody knows.
      ranked: [N] bool, a part of a ranking of three answers or more, whose choices follow from each other.
      people: L names.
    """

    texts: tuple[tuple[Text, str, Text], ...]
    prompt: np.ndarray
    pairs: np.ndarray
    pair: np.ndarray
    who: np.ndarray
    grade: np.ndarray
    shown: np.ndarray
    ranked: np.ndarray
    people: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pair)

    @property
    def sign(self) -> np.ndarray:
        """[N] float64: 1, 0.5 or 0 for the first answer, neither, the second; how clear a choice was is left away."""
        return (np.sign(self.grade - 0.5) + 1) / 2

    @property
    def unit(self) -> np.ndarray:
        """[P] int, the prompt of each pair: what is resampled as one."""
        return self.prompt[self.pairs[:, 0]]


def gather(said: Iterable[Choice]) -> Choices:
    """Choices as arrays; whoever chose, and in which order answers were shown, is kept.

    Of several choices of one labeller between the same two answers the last counts.

    Errors: UserError for no choice at all.

    >>> made = gather([Choice("Q", "A", "B", 1.0, "ann"), Choice("Q", "B", "A", 1.0, "bob")])
    >>> print(made.people, made.pairs.tolist(), made.grade, made.shown)
    ('ann', 'bob') [[0, 1]] [1. 0.] [ 1. -1.]
    """
    texts: dict[tuple[Text, str, Text], int] = {}
    prompts: dict[Hashable, int] = {}
    people: dict[str, int] = {}
    pairs: dict[tuple[int, int], int] = {}
    rows: dict[tuple[int, int], tuple[float, float, bool]] = {}
    for one in said:
        i, j = (texts.setdefault((one.prompt, one.tools, text), len(texts)) for text in (one.first, one.second))
        swapped = (j, i) in pairs or ((i, j) not in pairs and not one.shown and _coin(one))
        place = pairs.setdefault((j, i) if swapped else (i, j), len(pairs))
        grade, shown = (1 - one.grade, -1.0) if swapped else (one.grade, 1.0)
        key = place, people.setdefault(one.who, len(people))
        rows[key] = round(grade, DIGITS), shown * one.shown, one.ranked
    if not rows:
        raise UserError(
            "nobody chose between two different answers; give rows of pairs, rankings or sheets of choices."
        )
    prompt = [prompts.setdefault((asked, tools), len(prompts)) for asked, tools, _ in texts]
    columns = zip(*((*key, *row) for key, row in rows.items()), strict=True)
    pair, who, grade, shown, ranked = map(np.asarray, columns)
    return Choices(
        tuple(texts), np.asarray(prompt), np.asarray(list(pairs)), pair, who, grade.astype(np.float64),
        shown.astype(np.float64), ranked, tuple(people),
    )  # fmt: skip


def _coin(one: Choice) -> bool:
    """Half of the pairs, whoever is the first: the order of chosen and rejected must not tell which is better."""
    ordered = sorted((repr(one.first), repr(one.second)))
    digest = hashlib.blake2b(repr((one.prompt, *ordered)).encode(), digest_size=1).digest()
    return (digest[0] % 2 == 0) == (repr(one.first) == ordered[0])


# Files


class Found(NamedTuple):
    """What files hold: the choices, records read, and (where, why) of those that could not be used."""

    choices: Choices
    read: int
    refused: list[tuple[str, str]]


def read(paths: Sequence[str], *, chat: bool = False, shown: bool = True, flag: str = "--rows") -> Found:
    """The choices in files of rankings, pairs, and published sheets of choices.

    A labeller is the text of the column labeller (of sheets evaluator, annotator, or the column's own name), else
    the file's name, or its path where another file has that name: of several files without names each is one labeller.

    Args:
      chat: prompts of sheets become messages, for tokenizers with a chat template.
      shown: the order in which answers stand in a row is the one in which they were shown.
      flag: what gave the paths, for messages.
    Errors: UserError for a path that can't be read or holds rows of another kind, and for no choice at all.
    """
    found: list[Choice] = []
    refused: list[tuple[str, str]] = []
    records, names = 0, [_called(path) for path in paths]
    for path, called in zip(paths, names, strict=True):
        rows = list(sources.read(path, flag=flag))
        records += len(rows)
        name = format_of(path, rows, "auto", [Ranking, Preference])
        if name not in READERS and formats.FORMATS[name].row not in (Ranking, Preference):
            raise UserError(f"{path} is read as {name!r}, which compares no answers; give {flag} pairs or rankings.")
        person = called if names.count(called) == 1 else path
        for record in rows:
            try:
                if isinstance(record, sources.Refused):
                    raise Refusal(record.reason)
                said = choices(name, record.columns, chat)
            except (Refusal, Left) as reason:
                refused.append((record.where, str(reason)))
                continue
            found += [one._replace(who=one.who or person, shown=one.shown and shown) for one in said]
    if not found:
        why = f"; the first refused is {': '.join(refused[0])}" if refused else ""
        raise UserError(f"{flag}={','.join(paths)} holds no choice of two different answers{why}.")
    return Found(gather(found), records, refused)


def _called(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].partition(".jsonl")[0]


def soft_rows(choices: Choices, probability: np.ndarray) -> list[dict[str, Any]]:
    """Rows of pairs whose labels are soft, for `--config.data.probability=probability`.

    Args:
      probability: [P], that the pair's first answer is the better one.
    Returns: rows with the columns prompt, chosen (the likelier answer), rejected, probability (0.5 to 1), labels
      (how many people chose), labellers (who they are), and tools where the prompt offers some.
    """
    labellers: dict[int, list[str]] = {}
    for place, who in zip(choices.pair.tolist(), choices.who.tolist(), strict=True):
        labellers.setdefault(place, []).append(choices.people[who])
    rows = []
    for place, (pair, chance) in enumerate(zip(choices.pairs.tolist(), probability.tolist(), strict=True)):
        better, worse = pair if chance >= 0.5 else pair[::-1]
        prompt, tools, chosen = choices.texts[better]
        row = {"prompt": _column(prompt), "chosen": _column(chosen), "rejected": _column(choices.texts[worse][2])}
        people = labellers[place]
        row |= {"probability": max(chance, 1 - chance), "labels": len(people), "labellers": people}
        rows.append(row | ({"tools": tools} if tools else {}))
    return rows


def _column(text: Text) -> Any:
    return text if isinstance(text, str) else [turn.fields for turn in text]
