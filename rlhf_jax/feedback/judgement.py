"""What people are asked and what they say: a task, a judgement of it, and when the one fits the other.

The record (`feedback.record`) keeps both. Texts are in the form that files have: a string, or a list of objects with
role and content.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rlhf_jax.errors import UserError

Kind = Literal["ranking", "steps"]
# unsure: can't judge. undo: takes back the record that it replaces.
Said = Literal["ranking", "steps", "unsure", "undo"]
Flag = Literal["harmful", "false", "off-topic"]
FLAGS: tuple[str, ...] = get_args(Flag)
MARKS = (-1, 0, 1)  # of a step: bad, neutral, good
LABELS = 3  # how many people judge a task, if nobody says
MOST = 26  # answers to rank: each has a letter
LONGEST_ID, LONGEST_TEXT, LONGEST_NOTE = 100, 100_000, 2_000  # characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Answers to one prompt that are to be ranked, or the steps of one answer that are to be marked.

    Attributes:
      answers: of kind steps, the steps in order, each a string.
      models: which model wrote each answer, () if nobody knows; labellers never see it.
      gold: the known ranks, the smallest the best, or the known marks; such a task tests who labels.
      labels: how many people are to judge it; a task with gold is for everyone. None: as the record has it, LABELS if
        it is new there.
      tools: the functions that the prompt offers, JSON text, "" for none.
    """

    prompt: Any
    answers: tuple[Any, ...]
    models: tuple[str | None, ...] = ()
    gold: tuple[float, ...] | None = None
    kind: Kind = "ranking"
    labels: int | None = None
    tools: str = ""

    @property
    def id(self) -> str:
        """A hash of what is asked: the same in every process, and whatever order the answers to rank stand in."""
        texts = [json.dumps(answer, sort_keys=True) for answer in self.answers]
        parts = [self.kind, self.prompt, self.tools, texts if self.kind == "steps" else sorted(texts)]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What one person said of one task. What is said of answers stands in the task's own order of them.

    Attributes:
      id: made by whoever writes it down, so that the same judgement sent twice is one.
      ranks: of a ranking: a number an answer, the smallest the best, equal ones are ties.
      marks: of steps: a mark each, 1 good, 0 neutral, -1 bad.
      strength: of two answers, how clear it was: 1 slightly, 2 clearly; None: nobody asked.
      ratings: a number an answer on a scale of its own, None where there is none; () for none at all.
      flags: what is wrong with each answer, of FLAGS; () for nothing with any.
      rewrites: (place of an answer, the text that should stand there).
      at: when, UTC in ISO form. seconds: that the labeller looked at it; None: not known.
      guidelines: version of the text that it was made under, "" for none.
      shown: the order in which the labeller saw the answers; () if it is not known.
      replaces: the judgement that this one corrects or takes back; None for a first one.
    """

    id: str
    task: str
    labeller: str
    kind: Said = "ranking"
    ranks: tuple[float, ...] = ()
    marks: tuple[int, ...] = ()
    strength: int | None = None
    ratings: tuple[float | None, ...] = ()
    flags: tuple[tuple[str, ...], ...] = ()
    rewrites: tuple[tuple[int, str], ...] = ()
    note: str = ""
    at: str = ""
    seconds: float | None = None
    guidelines: str = ""
    shown: tuple[int, ...] = ()
    replaces: str | None = None

    @property
    def said(self) -> dict[str, Any]:
        """All but who, when and how: what two copies of one judgement share."""
        names = ("kind", "ranks", "marks", "strength", "ratings", "flags", "rewrites", "note")
        return {name: getattr(self, name) for name in names}


def check_task(task: Task) -> None:
    """Errors: UserError for a task that nobody can judge."""
    what, least = ("steps", 1) if task.kind == "steps" else ("answers", 2)
    if len(task.answers) < least:
        raise UserError(f"a task has {len(task.answers)} {what}; it must have at least {least}.")
    if task.kind == "ranking" and len(task.answers) > MOST:
        raise UserError(f"a task has {len(task.answers)} answers to rank; it may have at most {MOST}.")
    if task.models and len(task.models) != len(task.answers):
        raise UserError(f"a task has {len(task.answers)} {what} and {len(task.models)} models; give as many.")
    if task.gold is not None:
        if len(task.gold) != len(task.answers) or not all(math.isfinite(value) for value in task.gold):
            raise UserError(f"a task's gold is {list(task.gold)}; it must be a finite number for each of its {what}.")
        if task.kind == "steps" and not set(task.gold) <= set(MARKS):
            raise UserError(f"a task's gold is {list(task.gold)}; of steps allowed are -1, 0 and 1.")
        if task.kind == "ranking" and len(set(task.gold)) < 2:
            raise UserError(f"a task's gold is {list(task.gold)}; it must tell some of its answers apart.")
    if task.labels is not None and task.labels < 1:
        raise UserError(f"a task wants {task.labels} labels; it must want at least 1.")


def check(said: Judgement, task: Task) -> None:
    """Errors: UserError, one sentence, for the first thing in which a judgement does not fit its task."""
    count = len(task.answers)
    if not 0 < len(said.id) <= LONGEST_ID:
        raise UserError(f"a judgement's id has {len(said.id)} characters; it must have 1 to {LONGEST_ID}.")
    if said.kind not in ("unsure", "undo", task.kind):
        raise UserError(f"a judgement of kind {said.kind!r} is none of a task of kind {task.kind!r}.")
    wanted = count if said.kind == "ranking" else 0
    if len(said.ranks) != wanted or not all(math.isfinite(rank) for rank in said.ranks):
        raise UserError(f"ranks are {list(said.ranks)}; they must be {wanted} finite numbers, one an answer.")
    wanted = count if said.kind == "steps" else 0
    if len(said.marks) != wanted or not set(said.marks) <= set(MARKS):
        raise UserError(f"marks are {list(said.marks)}; they must be {wanted} of -1, 0 and 1, one a step.")
    if said.strength is not None and (said.strength not in (1, 2) or count != 2 or said.kind != "ranking"):
        raise UserError(f"strength is {said.strength}; it may be 1 or 2, of a ranking of two answers.")
    if len(said.ratings) not in (0, count) or not all(one is None or math.isfinite(one) for one in said.ratings):
        raise UserError(f"ratings are {list(said.ratings)}; they must be none, or a finite number or null an answer.")
    if len(said.flags) not in (0, count) or not all(set(one) <= set(FLAGS) for one in said.flags):
        raise UserError(f"flags are {list(map(list, said.flags))}; a list an answer, of {', '.join(FLAGS)}.")
    for place, text in said.rewrites:
        if not 0 <= place < count or not text.strip() or len(text) > LONGEST_TEXT:
            raise UserError(
                f"the rewritten answer {place} has {len(text)} characters; it must be of one of the {count} answers, "
                f"not be empty and have at most {LONGEST_TEXT}."
            )
    if len(said.note) > LONGEST_NOTE:
        raise UserError(f"a note has {len(said.note)} characters; it may have at most {LONGEST_NOTE}.")
    if said.shown and sorted(said.shown) != list(range(count)):
        raise UserError(f"the order shown is {list(said.shown)}; it must name each of the {count} answers once.")
    if said.seconds is not None and not 0 <= said.seconds < math.inf:
        raise UserError(f"seconds are {said.seconds}; they must be a finite number, at least 0.")


def right(said: Judgement, task: Task) -> tuple[float, int]:
    """How much of a task's gold a judgement found, and of how much.

    Of ranked answers every two that gold tells apart count: 1 in the same order, half if they are tied. Of steps every
    one counts. Who can't judge has found half of it, as coins would.

    Returns: (found, of how many); (0, 0) of a task without gold, or that is undone.
    """
    if task.gold is None or said.kind == "undo":
        return 0.0, 0
    if task.kind == "steps":
        if said.kind == "unsure":
            return len(task.gold) / 2, len(task.gold)
        return float(sum(a == b for a, b in zip(said.marks, task.gold, strict=True))), len(task.gold)
    ranks = said.ranks if said.kind == "ranking" else (0.0,) * len(task.gold)
    found, count = 0.0, 0
    for i in range(len(ranks)):
        for j in range(len(ranks)):
            if task.gold[i] < task.gold[j]:
                found += 1.0 if ranks[i] < ranks[j] else 0.5 * (ranks[i] == ranks[j])
                count += 1
    return found, count


def aligned(texts: Sequence[Any], values: Sequence[Any], order: Sequence[Any]) -> list[Any]:
    """Values that stand beside `texts`, in the order in which the same texts stand in `order`; equal texts in turn.

    >>> aligned(["a", "b", "a"], [1, 2, 3], ["a", "a", "b"])
    [1, 3, 2]
    """
    left: dict[str, list[Any]] = {}
    for text, value in zip(texts, values, strict=True):
        left.setdefault(json.dumps(text, sort_keys=True), []).append(value)
    return [left[json.dumps(text, sort_keys=True)].pop(0) for text in order]
