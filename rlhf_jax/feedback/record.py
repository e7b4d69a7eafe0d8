"""The record of what people said: tasks and judgements in one SQLite file, to which judgements are only ever added.

A correction, or taking something back, is a new judgement that names the one it replaces; the database itself refuses
to change, overwrite or delete one, or what was asked. Any number of threads and processes may have the file open: every
change is one transaction, on disk before the call returns. A kill loses nothing that was written and leaves nothing
half written.

What of a judgement counts is its latest: one that nothing replaces and that takes nothing back.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import hmac
import json
import os
import pathlib
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judgement import LABELS, Judgement, Task, aligned, check, check_task

VERSION = 2
WAIT = 60.0  # seconds for another writer to finish
SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
  place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, prompt TEXT NOT NULL, answers TEXT NOT NULL,
  models TEXT NOT NULL, gold TEXT, labels INTEGER NOT NULL, tools TEXT NOT NULL, added TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS judgements (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, task TEXT NOT NULL REFERENCES tasks (id),
  labeller TEXT NOT NULL, kind TEXT NOT NULL, said TEXT NOT NULL, at TEXT NOT NULL, seconds REAL,
  guidelines TEXT NOT NULL, shown TEXT NOT NULL, replaces TEXT UNIQUE REFERENCES judgements (id));
CREATE INDEX IF NOT EXISTS by_task ON judgements (task, labeller);
CREATE INDEX IF NOT EXISTS by_labeller ON judgements (labeller);
CREATE VIEW IF NOT EXISTS heads AS SELECT * FROM judgements AS one WHERE NOT EXISTS
  (SELECT 1 FROM judgements AS other WHERE other.replaces = one.id);
CREATE TABLE IF NOT EXISTS leases (
  task TEXT NOT NULL REFERENCES tasks (id), labeller TEXT NOT NULL, until REAL NOT NULL,
  PRIMARY KEY (task, labeller)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS drafts (
  task TEXT NOT NULL REFERENCES tasks (id), labeller TEXT NOT NULL, draft TEXT NOT NULL,
  PRIMARY KEY (task, labeller)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS links (
  name TEXT NOT NULL, role TEXT NOT NULL, token TEXT NOT NULL, PRIMARY KEY (name, role));
CREATE TABLE IF NOT EXISTS guidelines (version TEXT PRIMARY KEY, text TEXT NOT NULL, added TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS salts (place INTEGER PRIMARY KEY, salt BLOB NOT NULL);
INSERT OR IGNORE INTO salts VALUES (1, randomblob(32));

CREATE TRIGGER IF NOT EXISTS no_change BEFORE UPDATE ON judgements
  BEGIN SELECT RAISE (ABORT, 'a judgement is never changed'); END;
CREATE TRIGGER IF NOT EXISTS no_change_of_a_task BEFORE UPDATE OF place, id, kind, prompt, answers, tools ON tasks
  BEGIN SELECT RAISE (ABORT, 'what a task asks is never changed'); END;
CREATE TRIGGER IF NOT EXISTS no_change_of_guidelines BEFORE UPDATE ON guidelines
  BEGIN SELECT RAISE (ABORT, 'guidelines are never changed'); END;
CREATE TRIGGER IF NOT EXISTS no_loss BEFORE DELETE ON judgements
  BEGIN SELECT RAISE (ABORT, 'a judgement is never deleted'); END;
CREATE TRIGGER IF NOT EXISTS no_loss_of_a_task BEFORE DELETE ON tasks
  BEGIN SELECT RAISE (ABORT, 'a task is never deleted'); END;
CREATE TRIGGER IF NOT EXISTS no_loss_of_guidelines BEFORE DELETE ON guidelines
  BEGIN SELECT RAISE (ABORT, 'guidelines are never deleted'); END;
-- INSERT OR REPLACE deletes what is in its way without asking the triggers above.
CREATE TRIGGER IF NOT EXISTS no_second BEFORE INSERT ON judgements WHEN EXISTS (SELECT 1 FROM judgements AS one
    WHERE one.id = NEW.id OR one.number = NEW.number OR one.replaces = NEW.replaces)
  BEGIN SELECT RAISE (ABORT, 'a judgement is never overwritten'); END;
CREATE TRIGGER IF NOT EXISTS no_second_task BEFORE INSERT ON tasks WHEN EXISTS (SELECT 1 FROM tasks AS one
    WHERE one.id = NEW.id OR one.place = NEW.place)
  BEGIN SELECT RAISE (ABORT, 'a task is never overwritten'); END;
CREATE TRIGGER IF NOT EXISTS no_second_guidelines BEFORE INSERT ON guidelines WHEN EXISTS (SELECT 1 FROM guidelines
    AS one WHERE one.version = NEW.version)
  BEGIN SELECT RAISE (ABORT, 'guidelines are never overwritten'); END;
"""
OLD = {1: "DELETE FROM drafts;"}  # what a version needs to become the present one: its drafts are in unsalted orders


class Taken(UserError):
    """What was said is in the way of what was said before: it is judged already, or the id is another judgement's."""


class Record:
    """An open record. Every method is one transaction of its own; the object itself may be shared by threads."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Opens the file, and makes it if it isn't there.

        Errors: UserError for a file that is no record, or can't be written.
        """
        name = os.fspath(path)
        if "://" in name:
            raise UserError(f"a record is a file of this machine, and {name} is none; give a path.")
        self.path = pathlib.Path(name).expanduser()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.connection() as db:
                db.execute("BEGIN")  # both are read of one state: another process may be making the file
                found = db.execute("PRAGMA user_version").fetchone()[0]
                others = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                db.execute("COMMIT")
                if found not in (0, *OLD, VERSION) or (found == 0 and others):
                    raise UserError(f"{name} is a database of another kind or version; give another file.")
                if found != VERSION:
                    db.execute("PRAGMA journal_mode = WAL")
                    steps = f"{SCHEMA} {OLD.get(found, '')} PRAGMA user_version = {VERSION};"
                    db.executescript(f"BEGIN IMMEDIATE; {steps} COMMIT;")
                self.salt: bytes = db.execute("SELECT salt FROM salts").fetchone()[0]
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(f"{name} can't be used as a record ({error}); give another file.") from error

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """A connection outside of any transaction; a new one each time, so that no two threads share one."""
        db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA synchronous = FULL")  # an answer cost a person a minute, and this a millisecond
            yield db
        finally:
            db.close()

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """One transaction that nobody writes beside; on an error nothing of it is kept."""
        with self.connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                if db.in_transaction:  # a full disk ends it by itself
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    # Tasks

    def add(self, tasks: Iterable[Task]) -> int:
        """Adds tasks, and gives how many are new.

        One that is there gets the number of labels that is given, and gold and models if it had none.

        Errors: UserError for a task that nobody can judge; then none of them is added.
        """
        with self.change() as db:
            before = db.execute("SELECT count(*) FROM tasks").fetchone()[0]
            for task in tasks:
                self.add_to(db, task)
            return db.execute("SELECT count(*) FROM tasks").fetchone()[0] - before

    def add_to(self, db: sqlite3.Connection, task: Task) -> str:
        """Adds one within a transaction; gives its id."""
        check_task(task)
        there = db.execute("SELECT * FROM tasks WHERE id = ?", (task.id,)).fetchone()
        if there is None:
            gold, labels = None if task.gold is None else json.dumps(task.gold), task.labels or LABELS
            row = task.id, task.kind, *map(json.dumps, (task.prompt, task.answers, task.models)), gold, labels
            db.execute(
                "INSERT INTO tasks (id, kind, prompt, answers, models, gold, labels, tools, added)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, task.tools, now()),
            )
            return task.id
        known, new = task_of(there), {}
        if task.labels is not None:
            new["labels"] = task.labels
        beside = lambda values: json.dumps(aligned(task.answers, values, known.answers))  # perhaps in another order
        if known.gold is None and task.gold is not None:
            new["gold"] = beside(task.gold)
        if not any(known.models) and any(task.models):
            new["models"] = beside(task.models)
        for name, value in new.items():
            db.execute(f"UPDATE tasks SET {name} = ? WHERE id = ?", (value, task.id))
        return task.id

    def tasks(self) -> dict[str, Task]:
        """All tasks by their ids, in the order in which they were added."""
        with self.connection() as db:
            return {row["id"]: task_of(row) for row in db.execute("SELECT * FROM tasks ORDER BY place")}

    def task(self, id: str) -> Task:
        """One task. Errors: UserError if there is none of that id."""
        with self.connection() as db:
            return self.task_in(db, id)

    def task_in(self, db: sqlite3.Connection, id: str) -> Task:
        """As `task`, within a transaction."""
        row = db.execute("SELECT * FROM tasks WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise UserError(f"there is no task {id!r}.")
        return task_of(row)

    # Judgements

    def say(self, judgement: Judgement) -> bool:
        """Adds a judgement, and ends the lease and the draft of its task.

        Returns: whether it is new; False if the same judgement, by its id, stands there already.
        Errors: UserError if it does not fit its task; Taken if its labeller judged the task before and it does not
          name that judgement in `replaces`, or if another judgement has its id.
        """
        with self.change() as db:
            return self.say_in(db, judgement)

    def say_in(self, db: sqlite3.Connection, judgement: Judgement) -> bool:
        """As `say`, within a transaction."""
        there = db.execute("SELECT * FROM judgements WHERE id = ?", (judgement.id,)).fetchone()
        if there is not None:
            same = judgement_of(there)
            if (same.task, same.labeller, same.said) != (judgement.task, judgement.labeller, judgement.said):
                raise Taken(f"the id {judgement.id!r} is that of another judgement; make a new one.")
            return False
        check(judgement, self.task_in(db, judgement.task))
        head = self.head_in(db, judgement.task, judgement.labeller)
        if (head and head.id) != judgement.replaces:
            what = f"it stands as {head.id!r}" if head else "nothing was"
            raise Taken(
                f"{judgement.labeller} has judged task {judgement.task} before: {what}, and this names "
                f"{judgement.replaces!r} as what it replaces."
            )
        if judgement.kind == "undo" and (head is None or head.kind == "undo"):
            raise Taken(f"{judgement.labeller} has said nothing of task {judgement.task} that could be taken back.")
        db.execute(
            "INSERT INTO judgements (id, task, labeller, kind, said, at, seconds, guidelines, shown, replaces)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (judgement.id, judgement.task, judgement.labeller, judgement.kind, json.dumps(judgement.said))
            + (judgement.at or now(), judgement.seconds, judgement.guidelines, json.dumps(judgement.shown))
            + (judgement.replaces,),
        )
        for table in ("leases", "drafts"):
            where = (judgement.task, judgement.labeller)
            db.execute(f"DELETE FROM {table} WHERE task = ? AND labeller = ?", where)
        return True

    def judgements(self, all: bool = False) -> list[Judgement]:
        """The judgements that count, in the order in which they were made.

        Args:
          all: every one ever made, with those that were replaced and those that replace.
        """
        with self.connection() as db:
            query = "SELECT * FROM judgements" if all else "SELECT * FROM heads WHERE kind <> 'undo'"
            return [judgement_of(row) for row in db.execute(f"{query} ORDER BY number")]

    def head_in(self, db: sqlite3.Connection, task: str, labeller: str) -> Judgement | None:
        """The last that a labeller said of a task, be it that something is taken back; None if nothing."""
        query = "SELECT * FROM heads WHERE task = ? AND labeller = ? ORDER BY number DESC LIMIT 1"
        row = db.execute(query, (task, labeller)).fetchone()
        return None if row is None else judgement_of(row)

    def last_of(self, labeller: str) -> Judgement | None:
        """The newest judgement of a labeller that counts; None if there is none."""
        with self.connection() as db:
            query = "SELECT * FROM heads WHERE labeller = ? AND kind <> 'undo' ORDER BY number DESC LIMIT 1"
            row = db.execute(query, (labeller,)).fetchone()
            return None if row is None else judgement_of(row)

    # Links: who may come in

    def link(self, name: str, role: str, renew: bool = False) -> str | None:
        """A new secret for someone who has none yet, or, with `renew`, in the place of theirs; None for the others.

        The record keeps a hash alone, so that nobody who reads the file can come in as somebody else.
        """
        secret = secrets.token_urlsafe(24)
        with self.change() as db:
            there = db.execute("SELECT 1 FROM links WHERE name = ? AND role = ?", (name, role)).fetchone()
            if there and not renew:
                return None
            db.execute("INSERT OR REPLACE INTO links (name, role, token) VALUES (?, ?, ?)", (name, role, _hash(secret)))
        return secret

    def whose(self, secret: str) -> tuple[str, str] | None:
        """The name and the role that a secret belongs to; None if nobody's. It takes as long for a wrong one."""
        given, found = _hash(secret), None
        with self.connection() as db:
            for row in db.execute("SELECT name, role, token FROM links"):
                if hmac.compare_digest(row["token"], given):
                    found = row["name"], row["role"]
        return found

    def labellers(self) -> list[str]:
        """Everyone who has a link to label or has judged something, by name."""
        with self.connection() as db:
            query = "SELECT name FROM links WHERE role = 'labeller' UNION SELECT labeller FROM judgements ORDER BY 1"
            return [row[0] for row in db.execute(query)]

    # Chance, guidelines and drafts

    def mark(self, *parts: Any) -> str:
        """A hash of the parts that is the same as long as the record lives, and that nobody without it can compute."""
        return hashlib.blake2b(json.dumps(parts).encode(), key=self.salt, digest_size=8).hexdigest()

    def guide(self, text: str) -> str:
        """Keeps a text of guidelines; gives its version, a hash of it; "" for no text."""
        if not text.strip():
            return ""
        version = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        with self.change() as db:
            if not db.execute("SELECT 1 FROM guidelines WHERE version = ?", (version,)).fetchone():
                db.execute("INSERT INTO guidelines VALUES (?, ?, ?)", (version, text, now()))
        return version

    def knows(self, version: str) -> bool:
        """Whether there were ever guidelines of a version."""
        with self.connection() as db:
            return db.execute("SELECT 1 FROM guidelines WHERE version = ?", (version,)).fetchone() is not None

    def draft(self, task: str, labeller: str) -> Any:
        """What a labeller has begun to say of a task, as the page keeps it; None for nothing."""
        with self.connection() as db:
            query = "SELECT draft FROM drafts WHERE task = ? AND labeller = ?"
            row = db.execute(query, (task, labeller)).fetchone()
            return None if row is None else json.loads(row[0])


def now() -> str:
    """The time in UTC, as judgements have it: 2026-01-31T12:00:00.000+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def task_of(row: sqlite3.Row) -> Task:
    """A row of the table of tasks."""
    gold = None if row["gold"] is None else tuple(json.loads(row["gold"]))
    answers, models = (tuple(json.loads(row[name])) for name in ("answers", "models"))
    return Task(
        prompt=json.loads(row["prompt"]), answers=answers, models=models, gold=gold, kind=row["kind"],
        labels=row["labels"], tools=row["tools"],
    )  # fmt: skip


def judgement_of(row: sqlite3.Row) -> Judgement:
    """A row of the table of judgements."""
    names = [f.name for f in dataclasses.fields(Judgement)]
    others = {name: row[name] for name in names if name in row.keys()}
    said = {name: _tuples(value) for name, value in json.loads(row["said"]).items()}
    return Judgement(**{**others, **said, "shown": tuple(json.loads(row["shown"]))})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()  # 192 bits of chance need neither salt nor a slow hash
