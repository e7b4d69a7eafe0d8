"""The record of judgements: nothing that was said is changed or lost, and what can't be said is refused."""

import pathlib
import signal
import sqlite3
import subprocess
import sys

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import exchange
from rlhf_jax.feedback.judgement import Judgement
from rlhf_jax.feedback.record import Record, Taken
from tests.judged import say, task


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "record.db")


def test_a_judgement_is_neither_changed_nor_deleted(record):
    record.add([task()])
    record.say(say(task(), "ann", "1"))
    for change in ("UPDATE judgements SET labeller = 'ben'", "DELETE FROM judgements"):
        with record.connection() as db, pytest.raises(sqlite3.IntegrityError, match="never"):
            db.execute(change)
    assert [one.labeller for one in record.judgements()] == ["ann"]


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
