"""Rows into the record and out of it, in the columns that training reads and that published sets have.

What is written can be read back: `judged(record, rows)` of the rows of `rankings` gives the same rankings.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from rlhf_jax.data import formats, sources
from rlhf_jax.data.formats import choices
from rlhf_jax.data.rows import Left, Preference, Ranking, Refusal, Text
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judgement import Judgement, Task, aligned, check, check_task
from rlhf_jax.feedback.rankings import Row
from rlhf_jax.feedback.record import Record, judgement_of, now

T = TypeVar("T")

# Tasks


def tasks_of(path: str | os.PathLike, labels: int | None = None) -> list[Task]:
    """The tasks that a file holds, nobody having judged them yet.

    Rows have prompt and completions; perhaps models (who wrote each), gold_ranks (the known ones, which make it a
    test), tools; steps in the place of completions, with gold_marks, are to be marked one by one. Blank rankings are
    such rows. A row that has ranks is no task, and neither is one whose answers are all the same. Of equal answers to
    rank the first is kept.

    Args:
      labels: how many people are to judge each; None: as the record that they are added to has it.
    Errors: UserError naming the first row that can't be used.
    """
    found = []
    for record in sources.read(os.fspath(path), flag="--tasks"):
        if isinstance(record, sources.Refused):
            raise UserError(f"{record.where} can't be used ({record.reason}); mend it.")
        try:
            found.append(_task(record.columns, labels))
        except (Refusal, UserError) as reason:
            raise UserError(f"{record.where} can't be used ({str(reason).rstrip('.')}); mend it.") from None
    return found


def _task(columns: Mapping[str, Any], labels: int | None) -> Task:
    if "ranks" in columns:
        raise Refusal("it has ranks, so it is a judgement; give the file as --judged")
    kind, gold = ("steps", "gold_marks") if "steps" in columns else ("ranking", "gold_ranks")
    answers = columns.get("steps") if kind == "steps" else columns.get("completions")
    if not isinstance(answers, list):
        raise Refusal("it has no list of completions, nor of steps")
    name = "rated_steps" if kind == "steps" else "ranking"  # these adapters know what may stand in a column
    judged = {"ratings": [0] * len(answers), "ranks": list(range(len(answers)))}
    try:
        row: Any = formats.adapt(name, {**columns, "completions": answers, **judged}, True)[0]
    except Left:
        raise Refusal("it has one answer alone") from None
    texts = tuple(map(_plain, row.completions))
    places = list(range(len(texts))) if kind == "steps" else _distinct(texts)
    known, models = columns.get(gold), columns.get("models", [])
    for what, values in ((gold, known), ("models", models)):
        if values and (not isinstance(values, list) or len(values) != len(answers)):
            raise Refusal(f"{what!r} is not a list with a value for each answer")
    if known and not all(map(_is_finite, known)):
        raise Refusal(f"{gold!r} holds something that is not a finite number")
    task = Task(
        prompt=_plain(row.prompt), answers=_at(places, texts), models=_at(places, models),
        gold=_at(places, known) if known else None, kind=kind, labels=labels, tools=row.tools,
    )  # fmt: skip
    check_task(task)
    return task


def _distinct(texts: Sequence[Any]) -> list[int]:
    """The places of the answers without those that stood before. Raises: Refusal if all are the same."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(json.dumps(text, sort_keys=True), place)
    if len(first) < 2:
        raise Refusal("all of its answers are the same")
    return list(first.values())


def _at(places: Sequence[int], values: Sequence[T]) -> tuple[T, ...]:
    """The values at some places; none of none."""
    return tuple(values[place] for place in places) if values else ()


def _is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _plain(text: Text) -> Any:
    """A text as files have it."""
    return text if isinstance(text, str) else [turn.fields for turn in text]


# Judgements by people elsewhere


@dataclasses.dataclass(frozen=True)
class Opinion:
    """What one labeller said elsewhere of answers in the order of their row."""

    labeller: str
    row: Ranking
    strength: int | None = None
    ratings: tuple[float | None, ...] = ()
    note: str = ""
    at: str = ""
    seconds: float | None = None
    guidelines: str = ""


Columns = Mapping[str, Any]


def _opinions(form: str, columns: Columns, name: str) -> Iterator[Opinion]:
    """Everything that people said in one record of a format; `name` is who said it where the record doesn't tell."""
    if formats.FORMATS[form].row is Preference:  # its adapter keeps what most said, and drops ties
        said = choices.choices(form, columns, True)
        if not said:
            raise Left("its two answers are the same, or one is empty")
        for one in said:
            ranks = (float(one.grade < 0.5), float(one.grade > 0.5))
            row = Ranking(one.prompt, (one.first, one.second), ranks, one.tools)
            clear = None if form != "graded_pair" or one.grade == 0.5 else 2 if one.grade in (0, 1) else 1
            yield Opinion(one.who or name, row, clear, *_beside(columns))
        return
    for row in formats.adapt(form, columns, True, ties=True):
        if not isinstance(row, Ranking):
            raise Refusal("it holds neither ranked answers nor a pair")
        ratings = columns.get("ratings") or []
        if not isinstance(ratings, list) or not all(one is None or _is_finite(one) for one in ratings):
            raise Refusal("'ratings' is not a list of finite numbers and nulls")
        if ratings and len(ratings) != len(row.completions):
            raise Refusal(f"{len(row.completions)} answers but {len(ratings)} 'ratings'")
        seconds, guidelines = columns.get("seconds"), columns.get("guidelines")
        yield Opinion(
            str(columns.get("labeller", name)), row, ratings=tuple(ratings), at=_utc(str(columns.get("at") or "")),
            seconds=seconds if isinstance(seconds, int | float) and _is_finite(seconds) and seconds >= 0 else None,
            guidelines=guidelines if isinstance(guidelines, str) else "",
        )  # fmt: skip


def _beside(columns: Columns) -> tuple[tuple[float | None, ...], str, str]:
    """What Tulu's sheets say beside the preference: whether each answer can be accepted, a comment, and when."""
    accepted = [columns.get(f"completion_{side}_is_acceptable") for side in "ab"]
    ratings = tuple({"yes": 1.0, "no": 0.0}.get(str(value)) for value in accepted)
    known = any(rating is not None for rating in ratings)
    return ratings if known else (), str(columns.get("comment") or ""), _utc(str(columns.get("timestamp") or ""))


def _utc(text: str) -> str:
    """A time as judgements have it; "" for one that is not in ISO form, or of nobody knows which zone."""
    try:
        at = datetime.datetime.fromisoformat(text)
        return at.astimezone(datetime.UTC).isoformat(timespec="milliseconds") if at.tzinfo else ""
    except (ValueError, OverflowError):
        return ""


def judged(record: Record, path: str | os.PathLike, labels: int | None = None) -> tuple[int, int, list[str]]:
    """Adds the judgements that stand in a file, and their tasks: rankings, pairs, trees, sheets, whatever is ranked.

    The same file again adds nothing, and neither does a row that says what its labeller said last of the same answers:
    what the record itself wrote says nothing new to it. Who judged is what the row says, else the name of the file; of
    two judgements by one of the same answers the one that is read later is a correction of the other.

    Args:
      labels: how many people are to judge each task, those of the file counted; None: as it is, or as new tasks have.
    Returns: how many judgements the file holds, how many of these are new, and what was left out, a reason a row.
    Errors: UserError for a file of which no row holds a judgement.
    """
    name, left = os.path.basename(os.fspath(path)), []
    new = count = 0
    records = list(sources.read(os.fspath(path), flag="--judged"))
    read = [one.columns for one in records if isinstance(one, sources.Record)]
    form = formats.detect(read, os.fspath(path), (Ranking,)) if read else ""
    with record.change() as db:
        for one in records:
            if isinstance(one, sources.Refused):
                left.append(f"{one.where}: {one.reason}")
                continue
            try:
                opinions = list(_opinions(form, one.columns, name))
            except (Refusal, Left) as reason:
                left.append(f"{one.where}: {reason}")
                continue
            for place, opinion in enumerate(opinions):
                text = json.dumps([name, one.columns, place], sort_keys=True, default=str)
                id = f"file-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
                try:
                    new += _add(record, db, opinion, id, labels)
                    count += 1
                except (Refusal, UserError) as reason:
                    left.append(f"{one.where}: {str(reason).rstrip('.')}")
    if not count:
        raise UserError(
            f"{name} holds no judgement ({left[0] if left else 'it is empty'}); give rows of ranked answers or pairs."
        )
    return count, new, left


def _add(record: Record, db: Any, opinion: Opinion, id: str, labels: int | None) -> bool:
    """Adds one with its task; whether it is new. Raises: Refusal or UserError for one that can't be, adding nothing."""
    row = opinion.row
    texts = tuple(map(_plain, row.completions))
    places = _distinct(texts)
    task = Task(prompt=_plain(row.prompt), answers=_at(places, texts), labels=labels, tools=row.tools)
    said = Judgement(
        id=id, task=task.id, labeller=opinion.labeller, ranks=_at(places, row.ranks), strength=opinion.strength,
        ratings=_at(places, opinion.ratings), note=opinion.note, at=opinion.at or now(), seconds=opinion.seconds,
        guidelines=opinion.guidelines,
    )  # fmt: skip
    check_task(task)
    check(said, task)
    known = record.task_in(db, record.add_to(db, task))  # perhaps with the answers in another order
    if db.execute("SELECT 1 FROM judgements WHERE id = ?", (id,)).fetchone():
        return False
    ranks, ratings = (
        tuple(aligned(task.answers, some, known.answers)) if some else () for some in (said.ranks, said.ratings)
    )
    head = record.head_in(db, task.id, opinion.labeller)
    said = dataclasses.replace(said, ranks=ranks, ratings=ratings, replaces=head and head.id)
    before = head
    if head is not None and head.kind == "undo":  # what was taken back is not said anew by the file that it was in
        before = judgement_of(db.execute("SELECT * FROM judgements WHERE id = ?", (head.replaces,)).fetchone())
    return not (before and _repeats(said, before)) and record.say_in(db, said)


def _repeats(said: Judgement, before: Judgement) -> bool:
    """Whether a judgement says nothing that an earlier one of the same task did not."""
    place = lambda ranks: [sorted(set(ranks)).index(rank) for rank in ranks]
    if before.kind != said.kind or place(said.ranks) != place(before.ranks):
        return False
    more = ("ratings", "strength", "note")
    return all(getattr(said, name) in ((), None, "", getattr(before, name)) for name in more)


# Rows to train on


def rankings(record: Record) -> list[Row]:
    """The rankings that count, as the format `ranking` reads them; those of a prompt follow each other.

    Returns: rows with prompt, completions, ranks, labeller, at; seconds, guidelines, tools, models and ratings where
      there are some. Tests are left out, their ranks being known, and so is who can't judge.
    """
    rows = []
    for task, said in _said(record, "ranking"):
        for one in said:
            more = {"tools": json.loads(task.tools)} if task.tools else {}
            more |= {"models": list(task.models)} if any(task.models) else {}
            more |= {"ratings": list(one.ratings)} if any(rating is not None for rating in one.ratings) else {}
            row = {"prompt": task.prompt, "completions": list(task.answers), "ranks": list(one.ranks)}
            rows.append(row | _whose(one) | more)
    return rows


def pairs(record: Record) -> list[Row]:
    """Each two answers that were ranked, with what everyone said of them.

    Returns: rows with prompt, chosen (which most put first), rejected, votes (a number a labeller: 1 for chosen, 0.5 a
      tie, 0 against), probability (their mean), labellers, at (when each said it), seconds and guidelines where there
      are some, and margin (mean strength, below 0 against) where each of them said how clear it was. Two answers that
      stand equal are left out.
    """
    rows = []
    for task, said in _said(record, "ranking"):
        for i, j in itertools.combinations(range(len(task.answers)), 2):
            if task.answers[i] == task.answers[j] or not said:
                continue
            signs = [(one.ranks[j] > one.ranks[i]) - (one.ranks[j] < one.ranks[i]) for one in said]
            if sum(signs) == 0:
                continue
            side = 1 if sum(signs) > 0 else -1
            chosen, rejected = (i, j) if side > 0 else (j, i)
            votes = [(1 + side * sign) / 2 for sign in signs]
            row = {"prompt": task.prompt, "chosen": task.answers[chosen], "rejected": task.answers[rejected]}
            row |= {"votes": votes, "probability": math.fsum(votes) / len(votes)}
            row |= _whose_all(said)
            if all(one.strength or not sign for one, sign in zip(said, signs, strict=True)):
                strengths = [side * sign * (one.strength or 0) for one, sign in zip(said, signs, strict=True)]
                row["margin"] = sum(strengths) / len(strengths)
            rows.append(row | ({"tools": json.loads(task.tools)} if task.tools else {}))
    return rows


def demonstrations(record: Record) -> list[Row]:
    """What people wrote in the place of an answer: rows with prompt, completion, and whose it is as in `rankings`."""
    rows = []
    for task, said in _said(record, "ranking", "unsure"):
        for one in said:
            for place, text in one.rewrites:
                mended = text if isinstance(task.answers[place], str) else [{"role": "assistant", "content": text}]
                row = {"prompt": task.prompt, "completion": mended} | _whose(one)
                rows.append(row | ({"tools": json.loads(task.tools)} if task.tools else {}))
    return rows


def steps(record: Record) -> list[Row]:
    """Marked steps, as the format `rated_steps` reads them: prompt, completions, ratings, and whose they are."""
    return [
        {"prompt": task.prompt, "completions": list(task.answers), "ratings": list(one.marks)} | _whose(one)
        for task, said in _said(record, "steps")
        for one in said
    ]


def history(record: Record) -> list[Row]:
    """Every judgement ever made, with those that were taken back, and its task."""
    said = record.judgements(all=True)
    tasks = record.tasks()  # after these: whoever adds judgements meanwhile adds their tasks too
    return [
        dataclasses.asdict(one) | {"prompt": tasks[one.task].prompt, "answers": list(tasks[one.task].answers)}
        | {"models": list(tasks[one.task].models), "gold": tasks[one.task].gold}
        for one in said
    ]  # fmt: skip


Rows = Literal["rankings", "pairs", "demonstrations", "steps", "history"]
EXPORTS: dict[Rows, Callable[[Record], list[Row]]] = {
    "rankings": rankings,
    "pairs": pairs,
    "demonstrations": demonstrations,
    "steps": steps,
    "history": history,
}


def lines(rows: Iterable[Row]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _whose(one: Judgement) -> Row:
    """Who judged, when, in how long and under which guidelines, for whoever asks what a model rests on."""
    known = {name: value for name in ("seconds", "guidelines") if (value := getattr(one, name)) not in (None, "")}
    return {"labeller": one.labeller, "at": one.at, **known}


def _whose_all(said: Sequence[Judgement]) -> Row:
    """The same of several, a list each."""
    every = [_whose(one) for one in said]
    names = [name for name in ("at", "seconds", "guidelines") if any(name in one for one in every)]
    return {"labellers": [one.labeller for one in said], **{n: [one.get(n) for one in every] for n in names}}


def _said(record: Record, *kinds: str) -> Iterator[tuple[Task, Sequence[Judgement]]]:
    """The tasks that are no tests, each with what counts of its judgements."""
    said: dict[str, list[Judgement]] = {}
    for one in record.judgements():
        if one.kind in kinds:
            said.setdefault(one.task, []).append(one)
    for id, task in record.tasks().items():
        if task.gold is None and id in said:
            yield task, said[id]
