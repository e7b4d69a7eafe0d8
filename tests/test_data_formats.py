"""Columns that users already have become rows, or are refused with the reason."""

import collections
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.formats import ASSISTANT, FORMATS, HUMAN, adapt, check, detect
from rlhf_jax.data.rows import (
    Demonstration,
    Labelled,
    Message,
    Preference,
    Prompt,
    Ranking,
    Refusal,
    Stepwise,
)
from rlhf_jax.data.sources import Record, read
from rlhf_jax.errors import UserError

Q, A, B = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")
q, a, b = ({"role": m.role, "content": m.content} for m in (Q, A, B))


def said(speaker, value):
    return {"from": speaker, "value": value}


EXAMPLES = [
    ("messages", {"messages": [q, a]}, Demonstration((), (Q, A))),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, Demonstration("q", "a")),
    ("prompt_completion", {"prompt": [q], "completion": [a]}, Demonstration((Q,), (A,))),
    ("prompt_completion", {"prompt": [q], "completion": "a"}, Demonstration((Q,), (A,))),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, Preference("q", "a", "b")),
    ("preference", {"prompt": "q", "chosen": [q, a], "rejected": [q, b]}, Preference((Q,), (A,), (B,))),
    ("preference", {"prompt": [q], "chosen": [a], "rejected": [b]}, Preference((Q,), (A,), (B,))),
    ("implicit_preference", {"chosen": [q, a], "rejected": [q, b]}, Preference((Q,), (A,), (B,))),
    (
        "implicit_preference",
        {"chosen": "It is so", "rejected": "It is no"},
        Preference("It is", " so", " no"),
    ),
    ("labelled", {"prompt": "q", "completion": "a", "label": False}, Labelled("q", "a", False)),
    ("labelled", {"prompt": [q], "completion": [a], "label": 1}, Labelled((Q,), (A,), True)),
    ("labelled_messages", {"messages": [q, a], "label": True}, Labelled((Q,), (A,), True)),
    (
        "stepwise",
        {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
        Stepwise("q", ("a", "b"), (True, False)),
    ),
    (
        "ranking",
        {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 0]},
        Ranking("q", ("a", "b"), (1, 0)),
    ),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, None),
    ("sharegpt", {"conversations": [said("human", "q"), said("gpt", "a")]}, Demonstration((), (Q, A))),
    (
        "sharegpt_preference",
        {"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
        Preference((Q,), (A,), (B,)),
    ),
    ("hh", {"chosen": f"{HUMAN} q{ASSISTANT} a", "rejected": f"{HUMAN} q{ASSISTANT} b"}, None),
    ("prompt", {"prompt": "q"}, Prompt("q")),
]


@pytest.mark.parametrize(("name", "columns", "row"), EXAMPLES)
def test_columns_are_recognised_and_read(name, columns, row):
    assert detect([columns], "f") == name
    assert row is None or adapt(name, columns, chat=True) == row
    assert isinstance(adapt(name, columns, chat=False), FORMATS[name].row)


def test_every_format_has_an_example():
    assert {name for name, _, _ in EXAMPLES} == set(FORMATS)


REFUSALS = [
    ("messages", {"messages": [q]}, "no assistant message"),
    ("messages", {"messages": "hello"}, "not a list of messages"),
    ("messages", {"messages": [q, {"role": "assistant", "content": ""}]}, "empty answer"),
    ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
    ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "role"),
    ("messages", {"messages": [q, {"role": "assistant", "content": None}]}, "not a string"),
    ("prompt_completion", {"prompt": "q"}, "no column 'completion'"),
    ("prompt_completion", {"prompt": 3, "completion": "a"}, "not a string or a list of messages"),
    ("prompt_completion", {"prompt": "q", "completion": " \n"}, "empty answer"),
    ("prompt_completion", {"prompt": "\ud800", "completion": "a"}, "surrogate"),
    ("prompt_completion", {"prompt": [], "completion": [a]}, "no message"),
    ("prompt_completion", {"prompt": [q], "completion": [q]}, "does not end with an assistant"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
    ("implicit_preference", {"chosen": [q, a], "rejected": [b, a]}, "diverge before the last answer"),
    ("implicit_preference", {"chosen": "a", "rejected": [q, a]}, "one of"),
    ("implicit_preference", {"chosen": "same", "rejected": "same, longer"}, "empty answer"),
    ("implicit_preference", {"chosen": [a], "rejected": [b]}, "no message stands before"),
    ("labelled", {"prompt": "q", "completion": "a", "label": "up"}, "not true or false"),
    ("labelled_messages", {"messages": [a], "label": True}, "no message stands before"),
    ("stepwise", {"prompt": "q", "completions": ["a"], "labels": [True, True]}, "1 'completions' but 2"),
    ("ranking", {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1]}, "all 'ranks' are the same"),
    ("ranking", {"prompt": "q", "completions": ["a", "b"], "ranks": [1, "x"]}, "not a number"),
    ("hh", {"chosen": "x", "rejected": "y"}, "no answer of the assistant"),
    ("sharegpt", {"conversations": [said("cat", "q")]}, "from 'cat'"),
]


@pytest.mark.parametrize(("name", "columns", "reason"), REFUSALS)
@pytest.mark.parametrize("chat", [True, False])
def test_a_row_that_cannot_be_used_is_refused_with_the_reason(name, columns, reason, chat):
    with pytest.raises(Refusal, match=reason):
        adapt(name, columns, chat)


def test_a_column_missing_from_the_file_is_named_with_what_is_there_and_what_is_allowed():
    with pytest.raises(UserError, match=r"f has no column 'rejected'.*has 'chosen', 'prompt'; .* from auto, prompt$"):
        check("preference", [{"prompt": "q", "chosen": "a"}], "f")
    with pytest.raises(UserError, match=r"f has the columns 'score', 'text'.*allowed are .*hh \(chosen, rejected"):
        detect([{"text": "x", "score": 1}], "f")


def test_a_column_missing_from_one_row_refuses_that_row_alone():
    check("preference", [{"prompt": "q", "chosen": "a"}, {"rejected": "b"}], "f")


turn = st.text(max_size=20).filter(lambda t: "\n\n" not in t)
answer = turn.filter(lambda t: t.strip() != "")


@given(st.lists(st.tuples(turn, turn), max_size=3), turn, answer, answer)
def test_a_transcript_without_template_is_kept_to_the_last_character(before, question, chosen, rejected):
    start = "".join(f"{HUMAN} {h}{ASSISTANT} {r}" for h, r in before) + f"{HUMAN} {question}{ASSISTANT}"
    columns = {"chosen": start + chosen, "rejected": start + rejected}
    if chosen == rejected:
        return
    row = adapt("hh", columns, chat=False)
    assert row == Preference(start, chosen, rejected)
    if chosen.strip() != rejected.strip():
        row = adapt("hh", columns, chat=True)
        assert isinstance(row, Preference)
        roles = [m.role for m in row.prompt if isinstance(m, Message)]
        assert roles == ["user", "assistant"] * len(before) + ["user"]
        assert row.prompt[-1] == Message("user", question.strip())


@given(st.text(min_size=1), st.text(), st.text(min_size=1))
def test_text_is_opaque_also_where_it_looks_like_a_template(instruction, given_input, output):
    if not output.strip():
        return
    columns = {"instruction": instruction + "{input}{x}", "input": given_input, "output": output}
    row = adapt("alpaca", columns, chat=False)
    assert isinstance(row, Demonstration) and isinstance(row.prompt, str)
    assert instruction + "{input}{x}" in row.prompt and row.completion == output


@pytest.mark.parametrize("chat", [True, False])
def test_the_real_hh_file_has_exactly_four_unusable_rows(shared, chat):
    reasons = collections.Counter()
    for record in read(str(shared / "data/hh-harmless-base/train.jsonl")):
        assert isinstance(record, Record)
        try:
            adapt("hh", record.columns, chat)
        except Refusal as refusal:
            reasons[str(refusal).removeprefix("'chosen' ").removeprefix("'rejected' ")] += 1
    assert reasons == {"the two dialogues diverge before the last answer": 2, "is an empty answer": 2}


@pytest.mark.parametrize(
    ("file", "name", "unusable"),
    [
        ("hh-harmless-base/valid.jsonl", "hh", 3),
        ("llama-factory-feedback/dpo_en_demo.train.jsonl", "sharegpt_preference", 0),
        ("llama-factory-feedback/kto_en_demo.train.jsonl", "labelled_messages", 0),
        ("alpaca-en-demo/train.jsonl", "alpaca", 0),
    ],
)
def test_real_files_are_recognised_and_used(shared, file, name, unusable):
    records = [r.columns for r in read(str(shared / "data" / file)) if isinstance(r, Record)]
    assert detect(records[:64], file) == name
    used = 0
    for columns in records:
        with contextlib.suppress(Refusal):
            used += isinstance(adapt(name, columns, chat=True), FORMATS[name].row)
    assert len(records) - used == unusable
