"""Who is asked what: each task as often as it wants, nobody twice, tests among them, and nothing taken away."""

import itertools
import pathlib
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.feedback import exchange
from rlhf_jax.feedback.assignment import Terms, answer, keep, order, turn, undo
from rlhf_jax.feedback.judgement import Judgement, right
from rlhf_jax.feedback.record import Record, Taken
from tests.judged import say, task

PLAIN = Terms(tests=0.0)


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "record.db")


# Judges until nothing is left, as one of several windows of the same person.
WORK = """
import contextlib, uuid
from rlhf_jax.feedback.assignment import Terms, answer, order, turn
from rlhf_jax.feedback.judgement import Judgement
from rlhf_jax.feedback.record import Record, Taken

def work(path, who):
    record, terms = Record(path), Terms(tests=0.0)
    while (now := turn(record, who, terms)).state in ("task", "wait"):
        if now.task is not None:
            shown = order(record, who, now.id, now.task)
            said = dict(id=uuid.uuid4().hex, task=now.id, labeller=who, ranks=(0.0, 1.0, 2.0), shown=shown)
            with contextlib.suppress(Taken):  # judged in the other window
                answer(record, Judgement(**said))
"""
ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_people_at_once_get_each_task_as_often_as_it_wants_and_nobody_twice(tmp_path, kind):
    path, tasks = str(tmp_path / "record.db"), [task(number, labels=2) for number in range(12)]
    Record(path).add(tasks)
    people = ["ann", "ben", "cy"]
    if kind == "threads":
        exec(WORK, names := {})
        several = [threading.Thread(target=names["work"], args=(path, who)) for who in people * 2]  # two windows each
        for one in several:
            one.start()
        for one in several:
            one.join(60)
    else:
        command = lambda who: [sys.executable, "-c", f"{WORK}\nwork({path!r}, {who!r})"]
        several = [subprocess.Popen(command(who), cwd=ROOT) for who in [*people, "ann"]]
        assert [one.wait(120) for one in several] == [0] * 4
    said = Record(path).judgements(all=True)
    assert len(said) == 24, "two labels of each of twelve tasks, none lost and none doubled"
    for one in tasks:
        assert len({said.labeller for said in said if said.task == one.id}) == 2


def test_a_lease_ends_and_a_late_answer_is_kept(record):
    record.add([task(0, labels=1)])
    assert turn(record, "ann", PLAIN, at=0.0).state == "task"
    assert turn(record, "ben", PLAIN, at=60.0).state == "wait"
    keep(record, task(0).id, "ann", {"places": [1]}, PLAIN, at=1700.0)  # who is still at it keeps the task
    assert turn(record, "ben", PLAIN, at=3400.0).state == "wait"
    assert turn(record, "ben", PLAIN, at=3600.0).state == "task"
    assert answer(record, say(task(0), "ben", "b")) and turn(record, "ann", PLAIN, at=3700.0).state == "done"
    assert answer(record, say(task(0), "ann", "a")), "a person's work is not thrown away"
    with pytest.raises(Taken, match="is not with cy"):
        answer(record, say(task(0), "cy", "c"))


def test_a_task_that_went_to_another_is_not_taken_back_and_neither_waits_for_the_other(record):
    record.add([task(0, labels=1)])
    turn(record, "ann", PLAIN, at=0.0)
    assert turn(record, "ben", PLAIN, at=1900.0).state == "task"
    keep(record, task(0).id, "ann", {"note": "late"}, PLAIN, at=1950.0)
    assert record.draft(task(0).id, "ann") == {"note": "late"}, "but what was begun is kept"
    assert turn(record, "ann", PLAIN, at=2000.0).state == "wait"
    assert turn(record, "ben", PLAIN, at=2000.0).state == "task", "one of them can go on"
    with record.change() as db:  # both hold it, as older programs let them
        db.execute("UPDATE leases SET until = 9000.0")
    assert [turn(record, who, PLAIN, at=2100.0).state for who in ("ann", "ben", "cy")] == ["task", "task", "wait"]
    keep(record, task(0).id, "ann", {}, PLAIN, at=9999.0)
    assert turn(record, "ben", PLAIN, at=9999.0).state == "wait", "what is free again is whose sign of life comes first"


def test_who_comes_back_gets_the_same_task_and_draft(record):
    record.add([task(number) for number in range(3)])
    now = turn(record, "ann", PLAIN)
    keep(record, now.id, "ann", {"places": [1, 0, 2]}, PLAIN)
    assert turn(Record(record.path), "ann", PLAIN).id == now.id
    assert record.draft(now.id, "ann") == {"places": [1, 0, 2]} and record.draft(now.id, "ben") is None
    answer(record, say(task(0), "ann", "1"))
    assert record.draft(now.id, "ann") is None


def test_the_last_judgement_alone_can_be_taken_back(record):
    record.add([task(number, labels=1) for number in range(2)])
    for number in range(2):
        now = turn(record, "ann", PLAIN)
        answer(record, say(task(number), "ann", f"{number}", replaces=now.replaces))
    assert turn(record, "ann", PLAIN).undo == "1"
    with pytest.raises(Taken, match="not the last judgement"):
        undo(record, "ann", "0", "u", PLAIN)
    assert undo(record, "ann", "1", "u", PLAIN) and not undo(record, "ann", "1", "u", PLAIN)
    assert turn(record, "ben", PLAIN).state == "wait", "its place is kept for who took it back"
    again = turn(record, "ann", PLAIN)
    assert (again.id, again.replaces, again.undo) == (task(1).id, "u", "0")
    assert again.before and again.before.id == "1"
    assert answer(record, say(task(1), "ann", "2", (2, 1, 0), replaces="u"))
    assert [one.id for one in record.judgements()] == ["0", "2"]


def test_who_cannot_judge_is_not_asked_again_and_another_is(record):
    record.add([task(0, labels=1)])
    turn(record, "ann", PLAIN)
    answer(record, Judgement(id="1", task=task(0).id, labeller="ann", kind="unsure"))
    assert turn(record, "ann", PLAIN).state in ("wait", "done") and turn(record, "ben", PLAIN).state == "task"


def test_the_first_round_stops_who_answers_otherwise(record):
    tests = [task(number, gold=(0, 1, 2)) for number in range(3)]
    record.add([task(9), *tests])
    terms = Terms(qualify=2, pass_mark=0.6, tests=0.0)
    for who, ranks in (("ann", (0, 1, 2)), ("ben", (2, 1, 0)), ("cy", (0, 0, 0))):
        for number in range(2):
            now = turn(record, who, terms)
            assert now.qualifying == (number, 2) and now.id == tests[number].id
            answer(record, say(tests[number], who, f"{who}{number}", ranks))
    assert [turn(record, who, terms).state for who in ("ann", "ben", "cy")] == ["task", "failed", "failed"]
    assert turn(record, "ann", terms).undo is None, "the first round can't be tried again"
    assert turn(record, "ann", terms).id == task(9).id and exchange.rankings(record) == []


def test_tests_come_as_often_as_they_should_and_are_everyones(record):
    record.add([task(number, labels=2) for number in range(30)])
    record.add([task(number, gold=(0, 1, 2), labels=1) for number in range(100, 130)])
    record.salt = bytes(32)  # or it would be drawn by chance
    terms = Terms(tests=0.3)
    share = {}
    for who in ("ann", "ben"):
        left = turn(record, who, terms).left
        while (now := turn(record, who, terms)).task is not None:
            assert now.left == left > 0, "a test counts like any other task, and nobody can tell it by that"
            answer(record, say(now.task, who, f"{who}{now.id}"))
            left -= 1
        assert left == 0
        own = [one for one in record.judgements() if one.labeller == who]
        share[who] = sum(record.task(one.task).gold is not None for one in own) / len(own)
        assert len({one.task for one in own}) == len(own) and turn(record, who, terms).state == "done"
    assert all(0.15 < value < 0.45 for value in share.values()), share


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_right_counts_the_pairs_that_are_ordered_as_gold(gold, ranks):
    one = task(0, 4, gold=tuple(map(float, gold)))
    found, count = right(say(one, "a", "1", map(float, ranks)), one)
    opposite, _ = right(say(one, "a", "1", [-float(rank) for rank in ranks]), one)
    assert count == 6 and found + opposite == 6
    assert right(say(one, "a", "1", one.gold), one) == (6, 6)
    assert right(Judgement(id="1", task=one.id, labeller="a", kind="unsure"), one) == (3, 6)


def test_the_blind_order_is_everyones_own_and_always_the_same_and_no_other_records(record, tmp_path):
    orders = lambda one: [order(one, who, task(n).id, task(n)) for who in "abcdefgh" for n in range(16)]
    assert set(orders(record)) == set(itertools.permutations(range(3)))
    assert orders(record) == orders(Record(record.path)) != orders(Record(tmp_path / "other.db"))
