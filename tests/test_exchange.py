"""Rows into the record and out of it, and the figures of those who label."""

import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import conversions, formats
from rlhf_jax.data.config import Data
from rlhf_jax.data.rows import Preference, Ranking, Stepwise
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import exchange, rankings
from rlhf_jax.feedback.judgement import Judgement, Task
from rlhf_jax.feedback.overview import overview
from rlhf_jax.feedback.record import Record
from tests.judged import say, task


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "record.db")


# Rows


def rows_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=4, unique_by=str.strip), st.data())
def test_exported_rankings_are_read_back_the_same(tmp_path_factory, texts, data):
    folder = tmp_path_factory.mktemp("rows")
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=len(texts), max_size=len(texts)))
    row = {"prompt": "q", "completions": texts, "ranks": ranks, "labeller": "ann"}
    (folder / "one.jsonl").write_text(json.dumps(row) + "\n")
    first = Record(folder / "one.db")
    assert exchange.judged(first, folder / "one.jsonl") == (1, 1, [])
    assert exchange.judged(first, folder / "one.jsonl") == (1, 0, []), "the same file again adds nothing"
    (out,) = exchange.rankings(first)
    assert out == row | {"at": first.judgements()[0].at}
    (read,) = formats.adapt("ranking", exchange.rankings(first)[0], False, ties=True)
    assert isinstance(read, Ranking) and read.ranks == tuple(map(float, ranks)), "ties are equal ranks"


def write(path: pathlib.Path, *rows: dict) -> pathlib.Path:
    path.write_text(exchange.lines(rows))
    return path


def test_what_the_record_wrote_itself_adds_nothing_to_it(record, tmp_path):
    record.add([task(number) for number in range(3)])
    more = {"rewrites": ((0, "better"),), "seconds": 5.0, "flags": (("false",), (), ()), "note": "hm"}
    record.say(say(task(0), "ann", "1", (4, 2, 2), ratings=(1.0, None, 3.0), **more))
    record.say(say(task(1), "ann", "2", (0, 1, 2)))
    record.say(Judgement(id="3", task=task(2).id, labeller="ann", kind="unsure"))
    before, rows = record.judgements(all=True), exchange.rankings(record)
    for name in ("rows", "renamed"):
        assert exchange.judged(record, write(tmp_path / f"{name}.jsonl", *rows)) == (2, 0, [])
    record.say(Judgement(id="4", task=task(1).id, labeller="ann", kind="undo", replaces="2"))
    assert exchange.judged(record, write(tmp_path / "third.jsonl", *rows)) == (2, 0, []), "what is undone stays undone"
    assert record.judgements(all=True)[:-1] == before
    assert exchange.judged(record, write(tmp_path / "new.jsonl", rows[0] | {"ranks": [0, 1, 2]})) == (1, 1, [])
    assert record.judgements()[-1].replaces == "1", "what says something else is a correction"


def test_of_equal_answers_the_first_is_kept(record, tmp_path):
    blank = {"prompt": "q", "completions": ["a", "a", "b"], "models": ["m", "n", "o"], "gold_ranks": [0, 2, 1]}
    (one,) = exchange.tasks_of(write(tmp_path / "blank.jsonl", blank))
    assert (one.answers, one.models, one.gold) == (("a", "b"), ("m", "o"), (0, 1))
    said = {"prompt": "q", "completions": ["a", "a", "b"], "ranks": [0, 2, 1], "ratings": [1, 2, 3], "labeller": "ann"}
    same = said | {"prompt": "p", "completions": ["a", "a", "a"]}
    count, new, left = exchange.judged(record, write(tmp_path / "said.jsonl", said, same))
    assert (count, new, left) == (1, 1, [f"{tmp_path}/said.jsonl:2: all of its answers are the same"])
    assert [(row["chosen"], row["rejected"]) for row in exchange.pairs(record)] == [("a", "b")]
    assert exchange.rankings(record)[0]["ratings"] == [1, 3]


def test_rows_say_who_judged_when_in_how_long_and_under_what_and_are_read_back_so(record, tmp_path):
    version = record.guide("Be kind.")
    record.add([task(0, 2), task(1, 2)])
    known = {"at": "2026-01-02T03:04:05.678+00:00", "seconds": 7.5, "guidelines": version}
    record.say(say(task(0, 2), "ann", "1", (0, 1), rewrites=((1, "better"),), **known))
    record.say(say(task(0, 2), "ben", "2", (0, 1), at="2026-01-03T00:00:00.000+00:00"))
    ann, ben = exchange.rankings(record)
    assert ann.items() >= ({"labeller": "ann"} | known).items()
    assert ben["at"] == "2026-01-03T00:00:00.000+00:00" and not {"seconds", "guidelines"} & ben.keys()
    assert exchange.demonstrations(record)[0].items() >= ({"labeller": "ann"} | known).items()
    (pair,) = exchange.pairs(record)
    assert pair["labellers"] == ["ann", "ben"] and pair["at"] == [ann["at"], ben["at"]]
    assert pair["seconds"] == [7.5, None] and pair["guidelines"] == [version, None]
    for form, row in (("ranking", ann), ("preference", pair)):
        without = {name: value for name, value in row.items() if name not in ("at", "seconds", "guidelines")}
        assert formats.adapt(form, row, True) == formats.adapt(form, without, True), "which no format reads"
    again = Record(tmp_path / "two.db")
    assert exchange.judged(again, write(tmp_path / "rows.jsonl", ann, ben)) == (2, 2, [])
    assert exchange.rankings(again) == [ann, ben]
    odd = {"at": "noon", "seconds": -1, "guidelines": 3}
    exchange.judged(again, write(tmp_path / "odd.jsonl", ann | {"prompt": "q"} | odd))
    (*_, last) = exchange.rankings(again)
    assert last["at"].endswith("+00:00") and not {"seconds", "guidelines"} & last.keys(), "what can't be is not known"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ratings": [1]}, "2 answers but 1 'ratings'"),
        ({"ratings": "7"}, "'ratings' is not a list of finite numbers and nulls"),
        ({"ratings": [1, float("inf")]}, "'ratings' is not a list of finite numbers"),
        ({"ratings": [1, 10**400]}, "'ratings' is not a list of finite numbers"),
        ({"ratings": [1, "x"]}, "'ratings' is not a list of finite numbers"),
        ({"ranks": [0, float("inf")]}, "they must be 2 finite numbers"),
        ({"completions": [str(k) for k in range(27)], "ranks": list(range(27))}, "it may have at most 26"),
    ],
)
def test_a_judgement_that_can_t_be_is_left_out_and_named_and_the_others_stay(record, tmp_path, change, says):
    good = {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1], "labeller": "ann"}
    file = write(tmp_path / "said.jsonl", good, good | {"prompt": "q"} | change, good | {"prompt": "r"})
    count, new, (left,) = exchange.judged(record, file)
    assert (count, new) == (2, 2) and left.startswith(f"{file}:2: ") and says in left and len(record.tasks()) == 2


def test_when_is_utc_or_not_known(record, tmp_path):
    sheet = {"completion_a": "a", "completion_b": "b", "preference": "a-is-better"}
    times = ("2023-06-01T12:00:00+02:00", "1 June", "2023-06-01T12:00:00")
    rows = [sheet | {"prompt": time, "timestamp": time, "evaluator": "ann"} for time in times]
    assert exchange.judged(record, write(tmp_path / "sheet.jsonl", *rows))[1] == 3
    first, *others = (one.at for one in record.judgements())
    assert first == "2023-06-01T10:00:00.000+00:00" and all(at > "2024" and at.endswith("+00:00") for at in others)


# How many judgements, and how many count: some stand twice, being of the same texts by the same person.
PUBLISHED = {
    "pandalm-three-annotators/testset-v1.valid.jsonl": (225, 192),
    "tulu-human-eval/eval_annotations_tulu_1.valid.jsonl": (84, 82),
    "oasst-en-100-trees/valid.jsonl": (None, None),
    "hh-harmless-base/valid.jsonl": (191, 191),
    "finegrained-qa-feedback/valid.jsonl": (None, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_judgements_go_round(shared, tmp_path, name):
    file = shared / "data" / name
    if not file.exists():
        file = next((shared / "data" / name.split("/")[0]).glob("*valid*.jsonl"))
    record = Record(tmp_path / "one.db")
    count, new, left = exchange.judged(record, file)
    rows = exchange.rankings(record)
    said, kept = PUBLISHED[name]
    assert (
        count >= new >= len(rows) > 0
        and len(left) < 0.1 * count + 1
        and (said is None or (count, len(rows)) == (said, kept))
    )
    for row in rows:
        (read,) = formats.adapt("ranking", row, True, ties=True)
        assert isinstance(read, Ranking)
    (tmp_path / "rows.jsonl").write_text(exchange.lines(rows))
    assert len(rankings.read_rankings(tmp_path / "rows.jsonl")) == len(rows)
    again = Record(tmp_path / "two.db")
    exchange.judged(again, tmp_path / "rows.jsonl")
    assert sorted(map(json.dumps, exchange.rankings(again))) == sorted(map(json.dumps, rows))


def test_pandalms_annotators_are_three_people_and_the_pairs_their_majority(shared, tmp_path):
    file = shared / "data/pandalm-three-annotators/testset-v1.valid.jsonl"
    record = Record(tmp_path / "one.db")
    exchange.judged(record, file)
    assert {one.labeller for one in record.judgements()} == {"annotator1", "annotator2", "annotator3"}
    found = {}
    for row in exchange.pairs(record):
        key = json.dumps(row["prompt"]), frozenset((row["chosen"][0]["content"], row["rejected"][0]["content"]))
        found[key] = row
    majority = 0
    for columns in rows_of(file):
        votes = [columns[f"annotator{k}"] for k in (1, 2, 3)]
        best = max((1, 2), key=votes.count)
        if votes.count(best) < 2:
            continue
        (pair,) = formats.adapt("pandalm", columns, True)
        assert isinstance(pair, Preference) and not isinstance(pair.prompt, str)
        chosen, rejected = (text[0].content for text in (pair.chosen, pair.rejected) if not isinstance(text, str))
        key = json.dumps([turn.fields for turn in pair.prompt]), frozenset((chosen, rejected))
        majority += found[key]["chosen"][0]["content"] == chosen
    assert majority > 50 and 0.6 < rankings.agreement(exchange.rankings(record)) < 1


def test_pairs_have_the_columns_that_the_data_config_names(record):
    record.add([task(0, 2)])
    for who, ranks in (("ann", (1, 0)), ("ben", (1, 0)), ("cy", (0, 0)), ("dan", (0, 1))):
        record.say(say(task(0, 2), who, who, ranks, strength=None if who == "cy" else 2))
    (row,) = exchange.pairs(record)
    assert (row["chosen"], row["rejected"]) == task(0, 2).answers[::-1]
    assert row["votes"] == [1.0, 1.0, 0.5, 0.0] and row["probability"] == 0.625 and row["margin"] == 0.5
    rows = formats.adapt("preference", row, False)
    for name in ("probability", "votes"):
        assert conversions.columns_of_pairs(row, Data(probability=name, margin="margin"), rows)["probability"] == 0.625


def test_mended_answers_and_marked_steps_are_rows_of_their_own(record):
    talk = [{"role": "user", "content": "q"}]
    answers = tuple([{"role": "assistant", "content": text}] for text in "ab")
    one = Task(prompt=talk, answers=answers)
    two = Task(prompt="q", answers=("x", "y"), kind="steps", gold=None)
    record.add([one, two])
    record.say(say(one, "ann", "1", (0, 1), rewrites=((1, "better"),)))
    record.say(Judgement(id="2", task=two.id, labeller="ann", kind="steps", marks=(1, -1)))
    (demonstration,) = exchange.demonstrations(record)
    assert demonstration["completion"] == [{"role": "assistant", "content": "better"}]
    formats.adapt("prompt_completion", demonstration, True)
    (steps,) = exchange.steps(record)
    (read,) = formats.adapt("rated_steps", steps, False)
    assert steps["ratings"] == [1, -1] and isinstance(read, Stepwise) and read.labels == (1.0, 0.0)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q"}, "no list of completions"),
        ({"prompt": "q", "completions": ["a", "b"], "ranks": [0, 1]}, "give the file as --judged"),
        ({"prompt": "q", "completions": ["a", "a"]}, "answers are the same"),
        ({"prompt": "q", "completions": ["a"]}, "one answer alone"),
        ({"prompt": "q", "completions": ["a", ""]}, "an empty answer"),
        ({"prompt": "q", "completions": ["a", "b"], "models": ["m"]}, "'models' is not a list with a value for each"),
        ({"prompt": "q", "completions": ["a", "b"], "gold_ranks": [0, "x"]}, "not a finite number"),
        ({"prompt": "q", "completions": ["a", "b"], "gold_ranks": [1, 1]}, "must tell some of its answers apart"),
        ({"prompt": "q", "completions": [str(k) for k in range(27)]}, "it may have at most 26"),
        ({"completions": ["a", "b"]}, "no column 'prompt'"),
    ],
)
def test_a_row_that_is_no_task_is_named(tmp_path, row, says):
    good = {"prompt": "p", "completions": ["a", "b"], "ranks": None, "labeller": None}
    (tmp_path / "t.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"t.jsonl:2 can't be used .*{says}"):
        exchange.tasks_of(tmp_path / "t.jsonl", 1)


# The overview


class Busy(Record):
    """A record to which somebody else adds a task and a judgement whenever its tasks were read."""

    def tasks(self) -> dict[str, Task]:
        found, other = super().tasks(), Record(self.path)
        other.add([new := task(len(found) + 1000)])
        other.say(say(new, "cy", f"busy {len(found)}"))
        return found


def test_figures_and_rows_are_read_while_judgements_come_in(record):
    record.add([task(0)])
    record.say(say(task(0), "ann", "1"))
    busy = Busy(record.path)
    assert overview(busy)["judgements"] == 1
    for rows in exchange.EXPORTS.values():
        rows(busy)


def test_the_overview_tells_the_slow_the_wrong_and_the_drifting(record):
    tests = [task(number, gold=(0, 1, 2)) for number in range(20)]
    record.add([*tests, task(50), task(51)])
    for number, one in enumerate(tests):
        record.say(say(one, "ann", f"a{number}", seconds=10.0))
        record.say(say(one, "ben", f"b{number}", (0, 1, 2) if number < 10 else (2, 1, 0), seconds=90.0))
    for number, (who, ranks) in enumerate((("ann", (0, 1, 2)), ("ben", (0, 2, 1)), ("cy", (0, 1, 2)))):
        record.say(say(task(50), who, f"o{number}", ranks, seconds=3600.0, flags=(("false",), (), ())))
    found = overview(record, cost_per_hour=18.0)
    ann, ben, cy = found["labellers"]
    assert (ann["accuracy"], ann["change"], ben["accuracy"], ben["change"]) == (1.0, 0.0, 0.5, -1.0)
    assert ben["drift"][9] == 1.0 and ben["drift"][-1] == 0.0 and len(ben["drift"]) == 20
    assert (ann["seconds"], ben["seconds"], cy["accuracy"], cy["tests"]) == (10.0, 90.0, None, 0)
    assert ann["agreement"] == pytest.approx((1 + 2 / 3) / 2) and ben["agreement"] == pytest.approx(2 / 3)
    assert ann["hours"] == pytest.approx((200 + 600) / 3600), "a pause is not paid"
    assert ann["cost"] == pytest.approx(18 * ann["hours"]) and ann["flags"]["false"] == 1
    assert found["tasks"] == {"all": 2, "complete": 1, "tests": 20} and found["judgements"] == 43
