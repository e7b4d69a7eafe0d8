"""Rows into the record and out of it, in the columns that training reads and that published sets have.

What is written can be read back: `judged(record, rows)` of the rows of `rankings` gives the same rankings.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rlhf_jax.data import formats, sources
from rlhf_jax.data.formats import choices
from rlhf_jax.data.rows import Left, Preference, Ranking, Refusal, Text
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judgement import Judgement, Task, aligned
from rlhf_jax.feedback.rankings import Row
from rlhf_jax.feedback.record import Record, now

# Tasks


def tasks_of(path: str | os.PathLike, labels: int) -> list[Task]:
    """The tasks that a file holds, nobody having judged them yet.

    Rows have prompt and completions; perhaps models (who wrote each), gold_ranks (the known ones, which make it a
    test), tools; steps in the place of completions, with gold_marks, are to be marked one by one. Blank rankings are
    such rows. A row that has ranks is no task, and neither is one whose answers are all the same.

    Errors: UserError naming the first row that can't be used.
    """
    found = []
    for record in sources.read(os.fspath(path), flag="--tasks"):
        if isinstance(record, sources.Refused):
            raise UserError(f"{record.where} can't be used ({record.reason}); mend it.")
        try:
            found.append(_task(record.columns, labels))
        except Refusal as refusal:
            raise UserError(f"{record.where} can't be used ({refusal}); mend it.") from None
    return found


def _task(columns: Mapping[str, Any], labels: int) -> Task:
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
    if kind == "ranking" and len({json.dumps(_plain(text)) for text in row.completions}) < 2:
        raise Refusal("all of its answers are the same")
    known, models = columns.get(gold), columns.get("models", [])
    for what, values in ((gold, known), ("models", models)):
        if values and (not isinstance(values, list) or len(values) != len(answers)):
            raise Refusal(f"{what!r} is not a list with a value for each answer")
    if known and not all(isinstance(value, int | float) and math.isfinite(value) for value in known):
        raise Refusal(f"{gold!r} holds something that is not a finite number")
    return Task(
        prompt=_plain(row.prompt), answers=tuple(map(_plain, row.completions)), models=tuple(models),
        gold=tuple(known) if known else None, kind=kind, labels=labels, tools=row.tools,
    )  # fmt: skip


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
        ratings = columns.get("ratings")
        yield Opinion(
            str(columns.get("labeller", name)), row, ratings=tuple(ratings) if isinstance(ratings, list) else ()
        )


def _beside(columns: Columns) -> tuple[tuple[float | None, ...], str, str]:
    """What Tulu's sheets say beside the preference: whether each answer can be accepted, a comment, and when."""
    accepted = [columns.get(f"completion_{side}_is_acceptable") for side in "ab"]
    ratings = tuple({"yes": 1.0, "no": 0.0}.get(str(value)) for value in accepted)
    known = any(rating is not None for rating in ratings)
    return ratings if known else (), str(columns.get("comment") or ""), str(columns.get("timestamp") or "")


def judged(record: Record, path: str | os.PathLike, labels: int = 3) -> tuple[int, int, list[str]]:
    """Adds the judgements that stand in a file, and their tasks: rankings, pairs, trees, sheets, whatever is ranked.

    The same file again adds nothing. Who judged is what the row says, else the name of the file; of two judgements by
    one of the same answers the second stands in a row of its own and is a correction of the first.

    Args:
      labels: how many people are to judge each task, those of the file counted.
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
                count += 1
                new += _add(record, db, opinion, id, labels)
    if not count:
        raise UserError(
            f"{name} holds no judgement ({left[0] if left else 'it is empty'}); give rows of ranked answers or pairs."
        )
    return count, new, left


def _add(record: Record, db: Any, opinion: Opinion, id: str, labels: int) -> bool:
    """Adds one with its task; whether it is new."""
    row = opinion.row
    texts = tuple(map(_plain, row.completions))
    task = Task(prompt=_plain(row.prompt), answers=texts, labels=labels, tools=row.tools)
    known = record.task_in(db, record.add_to(db, task))  # perhaps with the answers in another order
    if db.execute("SELECT 1 FROM judgements WHERE id = ?", (id,)).fetchone():
        return False
    head = record.head_in(db, task.id, opinion.labeller)
    values = {"ranks": row.ranks, "ratings": opinion.ratings}
    said: dict[str, Any] = {name: tuple(aligned(texts, some, known.answers)) for name, some in values.items() if some}
    return record.say_in(
        db,
        Judgement(
            id=id, task=task.id, labeller=opinion.labeller, strength=opinion.strength, note=opinion.note,
            at=opinion.at or now(), replaces=head and head.id, **said,
        ),
    )  # fmt: skip


# Rows to train on


def rankings(record: Record) -> list[Row]:
    """The rankings that count, as the format `ranking` reads them; those of a prompt follow each other.

    Returns: rows with prompt, completions, ranks, labeller; tools, models and ratings where there are some. Tests are
      left out, their ranks being known, and so is who can't judge.
    """
    rows = []
    for task, said in _said(record, "ranking"):
        for one in said:
            more = {"tools": json.loads(task.tools)} if task.tools else {}
            more |= {"models": list(task.models)} if any(task.models) else {}
            more |= {"ratings": list(one.ratings)} if any(rating is not None for rating in one.ratings) else {}
            row = {"prompt": task.prompt, "completions": list(task.answers), "ranks": list(one.ranks)}
            rows.append(row | {"labeller": one.labeller} | more)
    return rows


def pairs(record: Record) -> list[Row]:
    """Each two answers that were ranked, with what everyone said of them.

    Returns: rows with prompt, chosen (which most put first), rejected, votes (a number a labeller: 1 for chosen, 0.5 a
      tie, 0 against), probability (their mean), labellers, and margin (mean strength, below 0 against) where each of
      them said how clear it was. Two answers that stand equal are left out.
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
            row |= {"labellers": [one.labeller for one in said]}
            if all(one.strength or not sign for one, sign in zip(said, signs, strict=True)):
                strengths = [side * sign * (one.strength or 0) for one, sign in zip(said, signs, strict=True)]
                row["margin"] = sum(strengths) / len(strengths)
            rows.append(row | ({"tools": json.loads(task.tools)} if task.tools else {}))
    return rows


def demonstrations(record: Record) -> list[Row]:
    """What people wrote in the place of an answer: rows with prompt, completion, labeller."""
    rows = []
    for task, said in _said(record, "ranking", "unsure"):
        for one in said:
            for place, text in one.rewrites:
                mended = text if isinstance(task.answers[place], str) else [{"role": "assistant", "content": text}]
                row = {"prompt": task.prompt, "completion": mended, "labeller": one.labeller}
                rows.append(row | ({"tools": json.loads(task.tools)} if task.tools else {}))
    return rows


def steps(record: Record) -> list[Row]:
    """Marked steps, as the format `rated_steps` reads them: rows with prompt, completions, ratings, labeller."""
    return [
        {"prompt": task.prompt, "completions": list(task.answers), "ratings": list(one.marks)}
        | {"labeller": one.labeller}
        for task, said in _said(record, "steps")
        for one in said
    ]


def history(record: Record) -> list[Row]:
    """Every judgement ever made, with those that were taken back, and its task."""
    tasks = record.tasks()
    return [
        dataclasses.asdict(one) | {"prompt": tasks[one.task].prompt, "answers": list(tasks[one.task].answers)}
        | {"models": list(tasks[one.task].models), "gold": tasks[one.task].gold}
        for one in record.judgements(all=True)
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


def _said(record: Record, *kinds: str) -> Iterator[tuple[Task, Sequence[Judgement]]]:
    """The tasks that are no tests, each with what counts of its judgements."""
    said: dict[str, list[Judgement]] = {}
    for one in record.judgements():
        if one.kind in kinds:
            said.setdefault(one.task, []).append(one)
    for id, task in record.tasks().items():
        if task.gold is None and id in said:
            yield task, said[id]
