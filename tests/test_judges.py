"""Judges of pairs: templates, verdicts on file, the rows that are read, and what is said of a judge."""

import collections
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from rlhf_jax.data import formats
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.judges import figures, together
from rlhf_jax.feedback.judges import Pair, Recorded, Template, Verdict, average, both, key_of, read_template
from rlhf_jax.feedback.pairs import Compared, read, recorded

SHORT = Template("{prompt}\n1 {first}\n2 {second}", "Best:")
BRACES = Pair("One?", "two", " three {first} {second}")


def chances(verdicts) -> list[float]:
    return [verdict.probability for verdict in verdicts]


# Templates


def test_a_place_that_is_named_inside_an_answer_stays_text():
    assert SHORT.fill(BRACES, False) == "One?\n1 two\n2 three {first} {second}"
    assert SHORT.fill(BRACES, True) == "One?\n1 three {first} {second}\n2 two"


@pytest.mark.parametrize("reasoning", [False, True])
def test_the_shipped_templates_are_read(reasoning):
    template = read_template(None, reasoning)
    assert template.cue == "The better response is:" and template.reasoning == reasoning
    assert ("First compare" in template.asked) == reasoning


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{prompt} {first}\n---\nBest:", r"has no \{second\}; before a line --- it must have"),
        (b"{prompt} {first} {second}", r"has no \{prompt\}"),
        (b"{prompt} {first} {second}\n---\n \n", "has nothing behind its line ---; write how the answer begins"),
        (b"\xff\n---\nBest:", "is not UTF-8 text; check --template"),
        (None, "there is no template .*; check --template"),
    ],
)
def test_a_template_that_says_nothing_is_refused(tmp_path, text, says):
    file = tmp_path / "template.txt"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(UserError, match=says):
        read_template(str(file))


# Several judges, and verdicts on file


def test_several_judges_are_averaged_where_all_of_them_judged():
    first = [both(0.9, 0.7), both(None, 0.5, "late"), Verdict(0.25)]
    second = [both(0.5, 0.3), both(0.5, 0.5), both(0.5, 0.5)]
    mean, failed, half = average([first, second])
    assert (mean.probability, mean.ahead, mean.behind) == pytest.approx((0.6, 0.7, 0.5))
    assert failed == Verdict(None, None, 0.5, "late") and half == Verdict(0.375)


def test_a_recorded_verdict_is_found_in_either_order_and_averaged():
    judge = Recorded("file", [(Pair("q\n", "a", "b"), 0.75), (Pair("q", " b", "a"), 0.75), (Pair("r", "a", "a"), 1.0)])
    assert chances(judge([Pair("q", "a", "b"), Pair("q", "b", "a"), Pair("r", "a", "a")])) == [0.5, 0.5, 0.5]
    assert judge([Pair("s", "a", "b")]) == [Verdict(None, why="file has no verdict on it")]


ROWS: list[tuple[dict[str, Any], Any, str]] = [
    ({"input": "q", "output_1": "a", "output_2": "b", "label": 2, "labeller": "ann"}, [0.0], "label"),
    ({"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.25, "generator_1": "m", "generator_2": "n"},
     [0.75], "preference"),
    ({"instruction": "q", "input": "", "response1": "a", "response2": "b", "annotator1": 0, "annotator2": 1,
      "annotator3": 1}, [pytest.approx(5 / 6)], "annotator2"),
    ({"prompt": "q", "completion_a": "a", "completion_b": "b", "preference": "tie", "model_a": "m", "model_b": "n"},
     [0.5], "preference"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "chance": 0.75}, [1.0], "chance"),
    ({"prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 0, 1]}, [0.0, 0.5, 1.0], ""),
    ({"prompt": "q", "completions": ["a", "b", "c"]}, [None, None, None], ""),
]  # fmt: skip


@pytest.mark.parametrize(("row", "labels", "column"), ROWS)
def test_pairs_are_read_with_their_ties_and_in_the_order_of_their_rows(tmp_path, row, labels, column):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    found = read(str(file), "rows")
    assert [one.label for one in found.pairs] == labels and not found.refused
    texts = [(one.plain.first, one.plain.second) for one in found.pairs]
    assert texts == [("a", "b"), ("a", "c"), ("b", "c")][: len(labels)]
    assert {key_of(one.pair) for one in found.pairs} == {("q", *each) for each in texts}
    assert found.pairs[0].models == (("m", "n") if "n" in row.values() else None)
    if column:
        (verdict,) = recorded(str(file), column, "file")([found.pairs[0].pair])
        assert verdict.probability == (1.0 if column == "annotator2" else 0.75 if column == "chance" else labels[0])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input": "q", "output_1": "a", "output_2": "b", "label": 3}, "'label' is '3', not 0 .a tie., or from 1"),
        ({"input": "q", "output_1": "a", "output_2": "a", "label": 1}, "the two answers are the same"),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": True}, "'label' is 'True'"),
        ({"instruction": "q", "output_1": "a", "output_2": "b"}, "no column 'preference'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "p": 2}, "'p' is '2', not from 0 to 1"),
        ({"prompt": "q", "completions": ["a", "a"]}, "no two answers of different text"),
        ({"prompt": "q", "completions": "a"}, "is not a list"),
    ],
)
def test_rows_that_compare_nothing_are_refused_with_the_reason(tmp_path, row, says):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl holds no two answers to compare .*{says}"):
        read(str(file), "rows", probability="p" if "p" in row else None)


# What is said of a judge


def compared(label: float | None, prompt: str = "q", first: str = "long", second: str = "s", **more) -> Compared:
    pair = Pair(prompt, first, second)
    return Compared(pair, pair, label, more.get("models"), more.get("source", "file"), "file:1")


def test_figures_by_hand():
    found = [
        compared(1.0, "a", models=("me", "you")),
        compared(0.0, "b", models=("you", "me"), source="other"),
        compared(0.5, "c", models=("me", "me")),
        compared(None, "d", first="same", second="size"),
        compared(1.0, "e", source="other"),
        compared(1.0, "f"),
    ]
    verdicts = [
        both(0.9, 0.8), both(0.9, 0.2), both(0.5, 0.5), both(0.3, 0.1), both(0.5, 0.5), both(None, 0.5, "late"),
    ]  # fmt: skip
    told = figures(found, verdicts, "me")
    assert (told.count, told.judged, told.failed) == (6, 5, {"late": 1})
    assert told.position is not None and told.position.count == 5
    assert told.position.flips.mean == pytest.approx(1 / 5)
    assert told.position.first.mean == pytest.approx((0.55 + 0.85 + 0.5 + 0.6 + 0.5) / 5)
    # Labelled and not a tie: right, wrong (0.55 against 0), and an equal chance.
    assert {name: (one.count, one.accuracy.mean) for name, one in told.agreement.items()} == {
        "all rows": (3, pytest.approx(0.5)), "file": (1, 1.0), "other": (2, pytest.approx(0.25)),
    }  # fmt: skip
    assert told.longer is not None and told.longer.count == 4
    assert told.longer.judge.mean == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert told.longer.people is not None and told.longer.people.mean == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert told.own == told.models["me"] and told.own is not None and told.own.count == 2
    assert told.own.judge.mean == 0.5 and told.own.people is not None and told.own.people.mean == 1.0
    assert told.own.gap is not None and told.own.gap.mean == -0.5
    assert figures(found, [Verdict(None, why="no")] * 6).agreement == {}


def test_intervals_resample_prompts():
    many = [compared(1.0, "one") for _ in range(50)]
    told = figures(many, [Verdict(0.9)] * 25 + [Verdict(0.1)] * 25)
    accuracy = told.agreement["all rows"].accuracy
    assert accuracy.low == accuracy.mean == accuracy.high == 0.5 and told.position is None
    assert told.agreement["all rows"].prompts == 1


# Recorded judges of real files


def lines(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_three_recorded_judges_agree_as_an_independent_count_says(shared):
    folder = shared / "data" / "alpaca-eval-judges"
    kinds = ("alpaca_eval_cot_gpt4_turbo_fn", "alpaca_eval_gpt4_turbo_fn", "weighted_alpaca_eval_gpt4_turbo")
    files = {kind: folder / f"gpt-3.5-turbo-0301.{kind}.jsonl" for kind in kinds}
    found = read(str(files[kinds[2]]), "weighted").pairs
    verdicts = {kind: recorded(str(file), "preference", kind)([p.pair for p in found]) for kind, file in files.items()}
    second = {kind: [row["preference"] > 1.5 for row in lines(file)] for kind, file in files.items()}
    for kind, verdict in verdicts.items():
        assert [chance < 0.5 for chance in chances(verdict)] == second[kind]
        told = figures(found, verdict)
        same = np.mean([a == b for a, b in zip(second[kind], second[kinds[2]], strict=True)])
        assert told.agreement["all rows"].accuracy.mean == pytest.approx(same)
        assert told.models["gpt-3.5-turbo-0301"].judge.mean == pytest.approx(np.mean(second[kind]))
    all_same = [len(set(row)) == 1 for row in zip(*second.values(), strict=True)]
    told = together(found, verdicts)
    assert told is not None and told.differ == 29 == all_same.count(False) and told.count == 230
    assert told.alike.mean == pytest.approx(np.mean(all_same)) and len(told.pairs) == 3


def test_the_constant_nonsense_is_preferred_in_53_of_60(shared):
    file = shared / "data" / "alpaca-eval-judges" / "nullmodel.weighted_alpaca_eval_gpt4_turbo.jsonl"
    found = read(str(file), "null").pairs
    told = figures(found, recorded(str(file), "preference", "weighted")([one.pair for one in found]))
    assert told.models["example"].count == 60 and told.models["example"].judge.mean == pytest.approx(53 / 60)
    assert told.models["example"].gap is not None and told.models["example"].gap.mean == 0


def test_annotators_agree_with_the_majority_as_an_independent_count_says(shared):
    file = shared / "data" / "pandalm-three-annotators" / "testset-v1.train.jsonl"
    rows = [
        row
        for row in lines(file)
        if all(isinstance(row[n], str) and row[n].strip() for n in ("response1", "response2"))
        and row["response1"] != row["response2"]
    ]
    found = read(str(file), "pandalm")
    assert len(found.pairs) == len(rows) == 486 and len(found.refused) == 546 - 486
    points = {0: 0, 1: 1, 2: -1}
    # Two rows judge the same pair: the verdict on file is their mean.
    own = collections.defaultdict(list)
    for row in rows:
        for place, side in ((("response1", "response2"), 1), (("response2", "response1"), -1)):
            own[row["instruction"], row["input"], *(row[n].strip() for n in place)].append(
                side * points[row["annotator1"]]
            )
    right = []
    for row in rows:
        votes = sum(points[row[f"annotator{n}"]] for n in (1, 2, 3))
        key = row["instruction"], row["input"], row["response1"].strip(), row["response2"].strip()
        if votes:
            right.append((1 + np.sign(sum(own[key])) * np.sign(votes)) / 2)
    told = figures(found.pairs, recorded(str(file), "annotator1", "one")([one.pair for one in found.pairs]))
    assert told.agreement["all rows"].count == len(right)
    assert told.agreement["all rows"].accuracy.mean == pytest.approx(np.mean(right))


def test_ties_of_fine_grained_feedback_are_kept(shared):
    file = shared / "data" / "finegrained-qa-feedback" / "dev_feedback.train.jsonl"
    choices = [choice for row in lines(file) for choice in row["preference"]]
    found = read(str(file), "qa")
    assert not found.refused and [one.label for one in found.pairs] == [(0.5, 1.0, 0.0)[choice] for choice in choices]


def test_rows_for_evaluation_alone_are_judged_and_have_no_format_to_train_on(shared):
    for file in (shared / "data" / "llmbar").glob("*.jsonl"):  # its sheet of MT-Bench among them
        assert read(str(file), "llmbar").evaluation
    file = shared / "data" / "llmbar" / "llmbar_natural.jsonl"
    found = read(str(file), "llmbar").pairs
    assert [one.label for one in found] == [float(row["label"] == 1) for row in lines(file)]
    told = figures(found, recorded(str(file), "label", "labels")([one.pair for one in found]))
    assert told.agreement["all rows"].accuracy.mean == 1.0
    with pytest.raises(UserError, match="which no format reads"):
        formats.detect([lines(file)[0]], "llmbar")
