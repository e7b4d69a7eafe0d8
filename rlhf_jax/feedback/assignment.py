"""Who is asked what next: each task by as many different people as it wants, nobody twice, and tests among them.

A task is lent to a labeller for a while; a place that is lent is not given to another. A labeller who comes back gets
the task that was lent. A hash of the labeller and the task, with a salt that the record was made with, decides the
order of the answers and where a test stands: it is the same in every process and after every restart, and no labeller
can compute it.
"""

import dataclasses
import json
import sqlite3
import time
from typing import Annotated, Any, Literal

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judgement import Judgement, Task, right
from rlhf_jax.feedback.record import Record, Taken, judgement_of, now, task_of


@dataclasses.dataclass(frozen=True)
class Terms:
    """How tasks are handed out. A test is a task whose gold is known."""

    qualify: Annotated[int, "tests that each labeller is given first; 0: none"] = 0
    pass_mark: Annotated[float, "share of these that must be right to go on, 0 to 1"] = 0.7
    tests: Annotated[float, "share of the later tasks that are tests, which nobody can tell from others, 0 to 1"] = 0.1
    lease: Annotated[float, "minutes that a task is kept for a labeller who falls silent"] = 30.0

    def __post_init__(self) -> None:
        for name, most in (("qualify", 10**6), ("pass_mark", 1.0), ("tests", 1.0), ("lease", 10**6)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"--{name}={getattr(self, name)} is not allowed; it must be from 0 to {most}.")


# failed: under the pass mark. wait: what is left is with others at this moment. done: there is nothing left.
State = Literal["task", "failed", "wait", "done"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a labeller is to do now.

    Attributes:
      replaces: the judgement, taken back, that theirs of this task will replace; None for a first one.
      done: how many of their judgements count. left: how many tasks they would still be given if they were alone; it
        falls by one with a test as with any other task, which would give the test away.
      qualifying: (how many tests of the first round they did, of how many); None behind it.
      undo: the id of the judgement that they may take back; None where there is none.
      before: what they had said of the task, if it was taken back.
    """

    state: State
    id: str = ""
    task: Task | None = None
    replaces: str | None = None
    done: int = 0
    left: int = 0
    qualifying: tuple[int, int] | None = None
    undo: str | None = None
    before: Judgement | None = None


MINE = "SELECT 1 FROM heads WHERE heads.task = tasks.id AND heads.labeller = :me AND heads.kind <> 'undo'"
SAID = "SELECT count(*) FROM heads WHERE heads.task = tasks.id AND heads.kind NOT IN ('undo', 'unsure')"
LENT = "SELECT count(*) FROM leases WHERE leases.task = tasks.id AND leases.until > :now AND leases.labeller <> :me"
# What is left of the tasks that are no tests; of those that are lent at this moment some may come back.
OPEN = f"gold IS NULL AND NOT EXISTS ({MINE}) AND ({SAID}) < labels"
FREE = f"{OPEN} AND ({SAID}) + ({LENT}) < labels"
TESTS = f"gold IS NOT NULL AND NOT EXISTS ({MINE})"


def turn(record: Record, labeller: str, terms: Terms, at: float | None = None) -> Turn:
    """What a labeller does next, and lends the task to them.

    Args:
      at: the time in seconds since 1970; None: now.
    """
    clock = time.time() if at is None else at
    with record.change() as db:
        asked = {"me": labeller, "now": clock}
        said, first = _said(db, labeller), _first(db, terms)
        open = db.execute(f"SELECT count(*) FROM tasks WHERE {OPEN}", asked).fetchone()[0]
        unseen = db.execute(f"SELECT count(*) FROM tasks WHERE {TESTS}", asked).fetchone()[0]
        tested = [task for task in first if task in said]
        before = len(first) - len(tested)
        left = before + _left(record, labeller, len(said) + before, open, unseen - before, terms)
        told: dict[str, Any] = dict(done=len(said), left=left, undo=_undo(said, first))
        if len(tested) < len(first):
            told |= dict(qualifying=(len(tested), len(first)))
            place = next(task for task in first if task not in said)
            row = db.execute("SELECT * FROM tasks WHERE id = ?", (place,)).fetchone()
        elif first and _share(record, db, labeller, first) < terms.pass_mark:
            return Turn("failed", **told)
        else:
            row = _next(record, db, asked, terms, len(said))
        if row is None:
            return Turn("wait" if open else "done", **told)
        until = clock + 60 * terms.lease
        db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", (row["id"], labeller, until))
        head = record.head_in(db, row["id"], labeller)
        undone = None
        if head is not None and head.kind == "undo":
            taken = db.execute("SELECT * FROM judgements WHERE id = ?", (head.replaces,)).fetchone()
            undone = judgement_of(taken)
        return Turn("task", row["id"], task_of(row), head and head.id, before=undone, **told)


def _said(db: sqlite3.Connection, labeller: str) -> dict[str, str]:
    """The tasks that a labeller has judged, in the order of that, with the ids of the judgements that count."""
    query = "SELECT task, id FROM heads WHERE labeller = ? AND kind <> 'undo' ORDER BY number"
    return dict(tuple(row) for row in db.execute(query, (labeller,)))


def _first(db: sqlite3.Connection, terms: Terms) -> list[str]:
    """The tests of the first round."""
    query = "SELECT id FROM tasks WHERE gold IS NOT NULL ORDER BY place LIMIT ?"
    return [row["id"] for row in db.execute(query, (terms.qualify,))]


def _next(record: Record, db: sqlite3.Connection, asked: dict[str, Any], terms: Terms, said: int) -> sqlite3.Row | None:
    """The task that is lent already, else perhaps a test, else the first that has a place."""
    # While it is lent its place is theirs; after that it may have become another's.
    lent = "SELECT tasks.* FROM tasks JOIN leases AS own ON own.task = tasks.id AND own.labeller = :me"
    stands = f"({OPEN} AND own.until > :now) OR ({FREE}) OR ({TESTS})"
    row = db.execute(f"{lent} WHERE {stands} ORDER BY own.until DESC LIMIT 1", asked).fetchone()
    if row is not None:
        return row
    free = db.execute(f"SELECT * FROM tasks WHERE {FREE} ORDER BY place LIMIT 1", asked).fetchone()
    if free is not None and _is_test(record, asked["me"], said, terms):
        test = db.execute(f"SELECT * FROM tasks WHERE {TESTS} ORDER BY place LIMIT 1", asked).fetchone()
        return test or free
    return free


def _is_test(record: Record, labeller: str, said: int, terms: Terms) -> bool:
    """Whether what a labeller is given after so many judgements is a test, if there is one left."""
    return int(record.mark("test", labeller, said), 16) < terms.tests * 2**64


def _left(record: Record, labeller: str, said: int, open: int, unseen: int, terms: Terms) -> int:
    """How many tasks a labeller is given until none is open, tests among them."""
    given = 0
    while open > 0:
        if unseen > 0 and _is_test(record, labeller, said + given, terms):
            unseen -= 1
        else:
            open -= 1
        given += 1
    return given


def _undo(said: dict[str, str], first: list[str]) -> str | None:
    """The last judgement, but for one that ended the first round: it can't be tried again and again."""
    if not said:
        return None
    task, id = list(said.items())[-1]
    return None if task in first and all(one in said for one in first) else id


def _share(record: Record, db: sqlite3.Connection, labeller: str, tests: list[str]) -> float:
    """How much of the gold of some tests, all of them judged, a labeller found."""
    judged = [(record.head_in(db, task, labeller), record.task_in(db, task)) for task in tests]
    found = [right(one, task) for one, task in judged if one is not None]
    return sum(some for some, _ in found) / max(sum(count for _, count in found), 1)


def keep(record: Record, task: str, labeller: str, draft: Any, terms: Terms, at: float | None = None) -> None:
    """Keeps what a labeller has begun to say of a task that is lent to them, and lends it anew.

    One that was lent for a time that is over, and has no place left, is not: another has it.

    Errors: Taken if it is not lent to them, as after they judged it in another window.
    """
    with record.change() as db:
        _lent(db, task, labeller)
        clock = time.time() if at is None else at
        asked = {"me": labeller, "now": clock, "task": task, "until": clock + 60 * terms.lease}
        free = f"until > :now OR EXISTS (SELECT 1 FROM tasks WHERE id = :task AND (({FREE}) OR ({TESTS})))"
        db.execute(f"UPDATE leases SET until = :until WHERE task = :task AND labeller = :me AND ({free})", asked)
        db.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?)", (task, labeller, json.dumps(draft)))


def answer(record: Record, judgement: Judgement) -> bool:
    """Adds the judgement of a task that was lent to its labeller; whether it is new.

    What comes after the time that it was lent for is kept, though another may have taken the place: a person's work is
    never thrown away.

    Errors: as Record.say, and Taken if the task was never lent to them.
    """
    with record.change() as db:
        there = db.execute("SELECT 1 FROM judgements WHERE id = ?", (judgement.id,)).fetchone()
        if not there:
            _lent(db, judgement.task, judgement.labeller)
        return record.say_in(db, judgement)


def undo(record: Record, labeller: str, last: str, id: str, terms: Terms, at: float | None = None) -> bool:
    """Takes a labeller's last judgement back, and lends its task to them again; whether that is new.

    Args:
      last: the id of the judgement, which must be the last of theirs that counts.
      id: of the record that takes it back, made by whoever asks for it.
    """
    with record.change() as db:
        there = db.execute("SELECT task FROM judgements WHERE id = ? AND labeller = ?", (last, labeller)).fetchone()
        again = db.execute("SELECT 1 FROM judgements WHERE id = ?", (id,)).fetchone()
        if there is None or (not again and _undo(_said(db, labeller), _first(db, terms)) != last):
            raise Taken(f"{last!r} is not the last judgement of {labeller}, which alone can be taken back.")
        taken = Judgement(id=id, task=there["task"], labeller=labeller, kind="undo", at=now(), replaces=last)
        new = record.say_in(db, taken)
        if new:
            until = (time.time() if at is None else at) + 60 * terms.lease
            db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", (there["task"], labeller, until))
        return new


def _lent(db: sqlite3.Connection, task: str, labeller: str) -> None:
    query = "SELECT 1 FROM leases WHERE task = ? AND labeller = ?"
    if not db.execute(query, (task, labeller)).fetchone():
        raise Taken(f"task {task!r} is not with {labeller}; it was judged in another window or never handed out.")


def order(record: Record, labeller: str, id: str, task: Task) -> tuple[int, ...]:
    """The order in which a labeller sees the answers of a task; steps stand as they are."""
    places = range(len(task.answers))
    if task.kind == "steps":
        return tuple(places)
    return tuple(sorted(places, key=lambda place: record.mark("order", labeller, id, place)))
