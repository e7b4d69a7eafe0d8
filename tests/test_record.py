"""The record of judgements: nothing that was said is changed or lost, and what can't be said is refused."""

import dataclasses
import pathlib
import signal
import sqlite3
import subprocess
import sys

import pytest

from experiments import label
from rlhf_jax import flags
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import exchange
from rlhf_jax.feedback.judgement import Judgement, Task
from rlhf_jax.feedback.record import Record, Taken
from tests.judged import say, task


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "record.db")


def test_a_judgement_is_neither_changed_nor_deleted(record):
    record.add([task()])
    record.say(say(task(), "ann", "1"))
    record.say(say(task(), "ann", "2", (2, 1, 0), replaces="1"))
    record.guide("Be kind.")
    columns = "task, labeller, kind, said, at, guidelines, shown"
    other = "task, 'ben', kind, said, at, guidelines, shown"
    changes = [
        "UPDATE judgements SET labeller = 'ben'",
        "DELETE FROM judgements",
        f"INSERT OR REPLACE INTO judgements (id, {columns}) SELECT id, {other} FROM judgements",
        f"INSERT OR REPLACE INTO judgements (id, number, {columns}) SELECT 'x', number, {other} FROM judgements",
        f"INSERT OR REPLACE INTO judgements (id, replaces, {columns}) SELECT 'x', '1', {other} FROM judgements",
        *(f"UPDATE tasks SET {name} = 'x'" for name in ("id", "kind", "prompt", "answers", "tools")),
        "DELETE FROM tasks",
        "INSERT OR REPLACE INTO tasks SELECT 9, id, kind, prompt, answers, models, gold, 9, tools, added FROM tasks",
        "INSERT OR REPLACE INTO tasks SELECT place, 9, kind, prompt, answers, models, gold, 9, tools, added FROM tasks",
        "UPDATE guidelines SET text = 'x'",
        "DELETE FROM guidelines",
        "INSERT OR REPLACE INTO guidelines SELECT version, 'x', added FROM guidelines",
    ]
    for change in changes:
        with record.connection() as db, pytest.raises(sqlite3.IntegrityError, match="never"):
            db.execute("PRAGMA foreign_keys = OFF")  # the triggers alone
            db.execute(change)
    assert [(one.id, one.labeller) for one in record.judgements(all=True)] == [("1", "ann"), ("2", "ann")]
    assert record.tasks() == {task().id: task(labels=3)} and record.guide("Be kind.")


def test_what_is_known_later_stands_in_the_order_of_the_answers(record):
    record.add([task(labels=2)])
    turned = Task(prompt=task().prompt, answers=task().answers[::-1], models=("c", "b", "a"), gold=(2.0, 1.0, 0.0))
    assert turned.id == task().id and record.add([turned]) == 0
    known = task(models=("a", "b", "c"), gold=(0.0, 1.0, 2.0), labels=2)
    assert record.task(task().id) == known, "labels are as they were, for nobody gave any"
    record.add([task(models=("x", "y", "z"), gold=(1.0, 0.0, 0.0), labels=5)])
    assert record.task(task().id) == dataclasses.replace(known, labels=5), "and what was known is kept"


@pytest.mark.parametrize(
    ("more", "says"),
    [({"gold": (1.0, 1.0, 1.0)}, "must tell some of its answers apart"), ({"count": 27}, "at most 26"),
     ({"labels": 0}, "at least 1"), ({"count": 1}, "at least 2")],
)  # fmt: skip
def test_a_task_that_nobody_can_judge_is_refused(record, more, says):
    with pytest.raises(UserError, match=says):
        record.add([task(1), task(0, **more)])
    assert record.tasks() == {}


def test_a_record_of_the_first_version_goes_on(record):
    record.add([task()])
    record.say(say(task(), "ann", "1"))
    with record.connection() as db:
        db.executescript("DROP TABLE salts; DROP TRIGGER no_second; PRAGMA user_version = 1;")
        db.execute("INSERT INTO drafts VALUES (?, 'ben', '{}')", (task().id,))
    again = Record(record.path)
    assert again.judgements() == record.judgements() and again.draft(task().id, "ben") is None
    assert again.salt == Record(record.path).salt != record.salt and len(again.salt) == 32


def test_a_transaction_that_ended_by_itself_shows_its_own_error(record):
    with pytest.raises(ValueError, match="full"), record.change() as db:
        db.execute("ROLLBACK")  # as the database does on a full disk
        raise ValueError("full")


def test_a_correction_and_an_undo_are_new_and_name_what_they_replace(record):
    record.add([task()])
    first, second = say(task(), "ann", "1"), say(task(), "ann", "2", (2, 1, 0), replaces="1")
    assert record.say(first) and not record.say(first), "the same one again is no second"
    with pytest.raises(Taken, match="has judged task"):
        record.say(say(task(), "ann", "2", (2, 1, 0)))
    with pytest.raises(Taken, match="that of another judgement"):
        record.say(say(task(), "ann", "1", (2, 1, 0)))
    assert record.say(second)
    assert record.say(Judgement(id="3", task=task().id, labeller="ann", kind="undo", replaces="2"))
    assert record.judgements() == [] and [one.id for one in record.judgements(all=True)] == ["1", "2", "3"]
    with pytest.raises(Taken, match="could be taken back"):
        record.say(Judgement(id="4", task=task().id, labeller="ann", kind="undo", replaces="3"))
    assert record.say(say(task(), "ann", "5", replaces="3")) and record.say(say(task(), "ben", "6"))
    assert [(one.id, one.labeller) for one in record.judgements()] == [("5", "ann"), ("6", "ben")]
    assert len(exchange.history(record)) == 5


def test_a_judgement_comes_back_as_it_was_said(record):
    record.add([task()])
    said = say(
        task(), "ann", "1", (0, 0, 1), ratings=(7.0, None, 1.0), flags=((), ("false", "harmful"), ()),
        rewrites=((1, "better"),), note="hm", at="2026-01-31T12:00:00.000+00:00", seconds=12.5, guidelines="v",
        shown=(2, 0, 1),
    )  # fmt: skip
    record.say(said)
    assert record.judgements() == [said]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ranks": (0.0, 1.0)}, "they must be 3 finite numbers, one an answer"),
        ({"ranks": (0.0, 1.0, float("nan"))}, "3 finite numbers"),
        ({"kind": "steps"}, "is none of a task of kind 'ranking'"),
        ({"marks": (1, 1, 1)}, "they must be 0 of -1, 0 and 1"),
        ({"strength": 1}, "of a ranking of two answers"),
        ({"ratings": (1.0,)}, "ratings are"),
        ({"flags": (("rude",), (), ())}, "of harmful, false, off-topic"),
        ({"rewrites": ((3, "x"),)}, "must be of one of the 3 answers"),
        ({"rewrites": ((0, " "),)}, "not be empty"),
        ({"shown": (0, 0, 1)}, "must name each of the 3 answers once"),
        ({"seconds": -1.0}, "at least 0"),
        ({"id": ""}, "it must have 1 to 100"),
        ({"task": "nowhere"}, "there is no task 'nowhere'"),
    ],
)
def test_what_does_not_fit_its_task_is_refused_in_one_sentence(record, change, says):
    record.add([task()])
    given = {"id": "1", "task": task().id, "labeller": "ann", "ranks": (0.0, 1.0, 2.0)} | change
    with pytest.raises(UserError, match=says):
        record.say(Judgement(**given))
    assert record.judgements(all=True) == []


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at by anybody" * 20)
    with pytest.raises(UserError, match="can't be used as a record"):
        Record(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE other (x)")
    db.close()
    with pytest.raises(UserError, match="of another kind or version"):
        Record(tmp_path / "other.db")
    with pytest.raises(UserError, match="file of this machine"):
        Record("gs://bucket/record.db")


WRITER = """
import sys
from rlhf_jax.feedback.record import Record
from rlhf_jax.feedback.judgement import Judgement
record = Record(sys.argv[1])
ids = list(record.tasks())
for number in range(10**6):
    id = f"{number}"
    for task in ids:
        record.say(Judgement(id=f"{task}-{id}", task=task, labeller=id, ranks=(0.0, 1.0, 2.0)))
        print(f"{task}-{id}", flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_wrote(tmp_path):
    path = tmp_path / "record.db"
    Record(path).add([task(number) for number in range(3)])
    root = pathlib.Path(__file__).resolve().parents[1]
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True, cwd=root) as writer:
        assert writer.stdout
        told = [writer.stdout.readline().strip() for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        told += [line.strip() for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    there = [one.id for one in Record(path).judgements()]
    assert there[: len(told)] == told and len(there) <= len(told) + 1
    with Record(path).connection() as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert Record(path).say(say(task(0), "late", "late"))


def test_links_are_kept_as_hashes_and_survive(record):
    secret = record.link("ann", "labeller")
    assert secret and record.link("ann", "labeller") is None
    assert Record(record.path).whose(secret) == ("ann", "labeller")
    assert record.whose("") is None and record.whose(secret[:-1]) is None
    assert secret.encode() not in b"".join(file.read_bytes() for file in record.path.parent.iterdir())
    newer = record.link("ann", "labeller", renew=True)
    assert newer and record.whose(secret) is None and record.whose(newer) == ("ann", "labeller")


def test_labels_change_when_they_are_given_and_an_export_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(label, "serve", lambda program, record: None)
    run = lambda *words: flags.run(label.main, label.Label, ["label", *words])
    rows = [{"prompt": f"q{n}", "completions": ["a", "b"]} for n in range(2)]
    blank, said = tmp_path / "t.jsonl", tmp_path / "said.jsonl"
    blank.write_text(exchange.lines(rows[:1]))
    said.write_text(exchange.lines([row | {"ranks": [0, 1]} for row in rows[:1]]))
    labels = lambda: [one.labels for one in Record(tmp_path / "t.db").tasks().values()]
    run(f"--tasks={blank}", "--labellers=ann")
    assert labels() == [3]
    run(f"--tasks={blank}", "--labellers=ann", "--labels=1")
    blank.write_text(exchange.lines(rows))
    run(f"--tasks={blank}", f"--judged={said}", f"--export={tmp_path}/rows.jsonl")
    assert labels() == [1], "neither the judgements nor the export"
    run(f"--tasks={blank}", f"--judged={said}")
    run(f"--tasks={blank}", "--labellers=ann")
    assert labels() == [1, 3], "nor a start without --labels; what is new gets the default"
