"""Columns that users already have become rows, or are refused with the reason."""

import collections
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.formats import FORMATS, adapt, check, detect, lacking
from rlhf_jax.data.formats.columns import ASSISTANT, HUMAN
from rlhf_jax.data.rows import (
    Demonstration,
    Labelled,
    Left,
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
        "rated_steps",
        {"prompt": "q", "completions": ["a", "b", "c"], "ratings": [-1, 0, 1.0]},
        Stepwise("q", ("a", "b", "c"), (0.0, 0.5, 1.0)),
    ),
    ("ranking", {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 0]}, Ranking("q", ("a", "b"), (1, 0))),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, None),
    ("sharegpt", {"conversations": [said("human", "q"), said("gpt", "a")]}, Demonstration((), (Q, A))),
    (
        "sharegpt_preference",
        {"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
        Preference((Q,), (A,), (B,)),
    ),
    ("hh", {"chosen": f"{HUMAN} q{ASSISTANT} a", "rejected": f"{HUMAN} q{ASSISTANT} b"}, None),
    ("question_answer", {"question": "q", "answer": "a"}, Demonstration((Q,), (A,))),
    ("prompt", {"prompt": "q"}, Prompt("q")),
    ("text", {"text": "a"}, Demonstration("", "a")),
]
TREE = {
    "role": "prompter",
    "text": "q",
    "replies": [
        {"role": "assistant", "text": "b", "rank": 1, "replies": [{"role": "prompter", "text": "b, then?"}]},
        {"role": "assistant", "text": "a", "rank": 0, "replies": [
            {"role": "prompter", "text": "r", "replies": [{"role": "assistant", "text": "s", "rank": None}]},
            {"role": "prompter", "text": "never answered", "replies": []},
            {"role": "prompter", "text": "t", "replies": [
                {"role": "assistant", "text": "u", "rank": None},
                {"role": "assistant", "text": "v", "rank": 1},
                {"role": "assistant", "text": "w", "rank": 0, "deleted": True},
            ]},
        ]},
    ],
}  # fmt: skip
R, S, T, V = Message("user", "r"), Message("assistant", "s"), Message("user", "t"), Message("assistant", "v")
DOMAINS = {"academy": "a", "business": "b", "entertainment": "c", "literature": " ", "normal": "d"}
COMPARED = {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 0, "annotator2": 2, "annotator3": 2}
GRADED = {"prompt": "q", "completion_a": "a", "completion_b": "b", "preference": "b-is-slightly-better"}
JUDGED = {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.4}
FEEDBACK = {"corrected-prediction": "a, mended", "errors": [{"start": 1, "end": 3}, {"start": 2, "end": 5}]}
PREDICTIONS = {f"prediction {n}": text for n, text in enumerate(("abcdefg", "b", "c", "d"), start=1)}
PASSAGES = {"question": "q", "passages": [["title", "One.", "Two."]], "gold": "a", "feedback": FEEDBACK}
FINE = {**PASSAGES, **PREDICTIONS, "preference": [2, 0, 1, 0, 0, 0]}
FINE_PROMPT = (Message("user", "title\nOne. Two.\n\nq"),)
RATED = [
    {"completions": [{"text": "a", "rating": 0}, {"text": "b", "rating": -1}], "chosen_completion": 0},
    {"completions": [{"text": "c", "rating": None}], "human_completion": {"text": "d"}},
]


def replies(*texts):
    return tuple((Message("assistant", text),) for text in texts)


PUBLISHED = [
    (
        "self_instruct",
        {"instruction": "q", "instances": [{"input": "", "output": "a"}, {"input": "i", "output": "b"}]},
        (Demonstration((Q,), (A,)), Demonstration((Message("user", "q\ni"),), (B,))),
    ),
    (
        "oasst",
        {"message_tree_id": "x", "prompt": TREE},
        (Demonstration((), (Q, A, R, S)), Demonstration((), (Q, A, T, V))),
    ),
    ("oasst_ranking", {"message_tree_id": "x", "prompt": TREE}, (Ranking((Q,), replies("b", "a"), (1, 0)),)),
    (
        "scored_transcripts",
        {"text": [f"{HUMAN} q{ASSISTANT} b", f"{HUMAN} q{ASSISTANT} a"], "score": [0.5, 1]},
        (Preference((Q,), (A,), (B,)),),
    ),
    *(
        (
            f"domain_{name}",
            {"query": "q", "responses": DOMAINS | {"literature": "e"}},
            (Ranking((Q,), replies("a", "b", "c", "e", "d"), tuple(float(name != other) for other in DOMAINS)),),
        )
        for name in DOMAINS
    ),
    ("pandalm", COMPARED, (Preference((Q,), (B,), (A,)),)),
    ("graded_pair", GRADED, (Preference((Q,), (B,), (A,)),)),
    ("judged_pair", JUDGED, (Preference((Q,), (A,), (B,)),)),
    (
        "finegrained",
        FINE,
        (Demonstration(FINE_PROMPT, (A,)), Demonstration(FINE_PROMPT, (Message("assistant", "a, mended"),))),
    ),
    (
        "finegrained_pairs",
        FINE,
        (
            Preference(FINE_PROMPT, (B,), (Message("assistant", "abcdefg"),)),
            Preference(FINE_PROMPT, (Message("assistant", "abcdefg"),), (Message("assistant", "d"),)),
        ),
    ),
    (
        "finegrained_ranking",
        FINE,
        (Ranking(FINE_PROMPT, replies("abcdefg", "b", "c", "d"), (-1.5, -2.0, -1.5, -1.0)),),
    ),
    (
        "finegrained_spans",
        FINE,
        (Stepwise(FINE_PROMPT, replies("a", "b", "c", "de", "fg"), (True, False, False, False, True)),),
    ),
    (
        "first_error",
        {"question": "q", "model_output_steps": ["a", "b", "c"], "model_output_solution_first_error_step": 2},
        (Stepwise((Q,), replies("a\n", "b\n", "c"), (True, False, False)),),
    ),
    (
        "mistake_index",
        {"input": "q", "steps": ["a", "b"], "target": "1", "answer": "1"},
        (Stepwise((Q,), replies("a\n", "b"), (True, True)),),
    ),
    (
        "prm800k",
        {"question": {"problem": "q"}, "label": {"steps": RATED}},
        (Stepwise((Q,), replies("b"), (False,)), Stepwise((Q,), replies("a\n", "d"), (0.5, 1.0))),
    ),
    (
        "solutions",
        {
            "question": "q",
            "ground_truth": "a",
            "small": {"is_correct": False, "solution": "b"},
            "big": {"is_correct": True, "solution": "a"},
        },
        (Labelled((Q,), (B,), False), Labelled((Q,), (A,), True)),
    ),
    ("problem", {"problem": "q", "solution": "a", "answer": "1"}, (Prompt((Q,)),)),
    ("first_turn", {"question_id": 1, "turns": ["q", "r"]}, (Prompt((Q,)),)),
]


@pytest.mark.parametrize(("name", "columns", "row"), EXAMPLES)
def test_columns_are_recognised_and_read(name, columns, row):
    assert detect([columns], "f") == name
    assert row is None or adapt(name, columns, chat=True) == (row,)
    (made,) = adapt(name, columns, chat=False)
    assert isinstance(made, FORMATS[name].row)


@pytest.mark.parametrize(("name", "columns", "rows"), PUBLISHED)
def test_published_shapes_are_recognised_and_read(name, columns, rows):
    form = FORMATS[name]
    readings = [other for other in FORMATS if FORMATS[other].columns == form.columns]
    assert detect([columns], "f") == readings[0]
    assert detect([columns], "f", [form.row]) == next(r for r in readings if FORMATS[r].row is form.row)
    assert adapt(name, columns, chat=True) == rows
    plain = adapt(name, columns, chat=False)
    assert [type(row) for row in plain] == [form.row] * len(rows)
    assert name.startswith("oasst") or all(isinstance(row.prompt, str) and row.prompt[-1] in "\n:" for row in plain)


def test_every_format_has_an_example():
    assert {name for name, _, _ in EXAMPLES + PUBLISHED} == set(FORMATS)


TIES = [
    ("ranking", {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1]}, "all 'ranks' are the same"),
    ("pandalm", COMPARED | {"annotator2": 0}, "a tie"),
    ("pandalm", COMPARED | {"annotator2": 1}, "no choice of most annotators"),
    ("pandalm", COMPARED | {"response1": " "}, "one of the two answers is empty"),
    ("graded_pair", GRADED | {"preference": "tie"}, "a tie"),
    ("graded_pair", GRADED | {"completion_a": "b"}, "are the same"),
    ("judged_pair", JUDGED | {"preference": 1.5}, "a tie"),
    ("scored_transcripts", {"text": ["a", "b"], "score": [1, 1.0]}, "a tie"),
    ("finegrained_pairs", FINE | {"preference": [0] * 6}, "a tie"),
    ("finegrained_ranking", FINE | {"preference": [0] * 6}, "the same"),
    ("finegrained_ranking", FINE | {f"prediction {n}": " " for n in (1, 2, 3)}, "the same"),
    ("domain_literature", {"query": "q", "responses": DOMAINS}, "empty"),
    ("oasst", {"message_tree_id": "x", "prompt": {"role": "prompter", "text": "q"}}, "no reply"),
    ("oasst_ranking", {"message_tree_id": "x", "prompt": {"role": "prompter", "text": "q"}}, "two ranked replies"),
    ("prm800k", {"question": {"problem": "q"}, "label": {"steps": [RATED[1] | {"human_completion": None}]}}, "rated"),
]


@pytest.mark.parametrize(("name", "columns", "reason"), TIES)
def test_a_good_row_with_nothing_to_learn_from_is_left(name, columns, reason):
    with pytest.raises(Left, match=reason):
        adapt(name, columns, chat=True)


def test_a_question_with_choices_or_a_score_beside_a_document_is_no_pair():
    with pytest.raises(UserError, match="which no format reads"):
        detect([{"question": "q", "choices": ["x", "y"], "answer": "x"}], "f")
    assert detect([{"text": "a", "score": 0.7}], "f") == "text"


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
    ("rated_steps", {"prompt": "q", "completions": ["a", "b"], "ratings": [1, 2]}, "holds 2; allowed are -1, 0, 1"),
    ("rated_steps", {"prompt": "q", "completions": ["a", "b"], "ratings": [1, True]}, "not a number"),
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
    with pytest.raises(UserError, match=r"f has the columns 'score', 'title'.*allowed are .*hh \(chosen, rejected"):
        detect([{"title": "x", "score": 1}], "f")


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
    (row,) = adapt("hh", columns, chat=False)
    assert row == Preference(start, chosen, rejected)
    if chosen.strip() != rejected.strip():
        (row,) = adapt("hh", columns, chat=True)
        assert isinstance(row, Preference)
        roles = [m.role for m in row.prompt if isinstance(m, Message)]
        assert roles == ["user", "assistant"] * len(before) + ["user"]
        assert row.prompt[-1] == Message("user", question.strip())


@given(st.text(min_size=1), st.text(), st.text(min_size=1))
def test_text_is_opaque_also_where_it_looks_like_a_template(instruction, given_input, output):
    if not output.strip():
        return
    columns = {"instruction": instruction + "{input}{x}", "input": given_input, "output": output}
    (row,) = adapt("alpaca", columns, chat=False)
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
            (row,) = adapt(name, columns, chat=True)
            used += isinstance(row, FORMATS[name].row)
    assert len(records) - used == unusable


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3) | st.sampled_from([q, a, TREE]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "steps", "from", "value", "start", "end"]), inner)
    ),
    max_leaves=6,
)
SOUND = {name: columns for name, columns, _ in EXAMPLES + PUBLISHED}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.data(), st.booleans())
def test_whatever_stands_in_a_column_gives_rows_or_a_reason(name, data, chat):
    spoilt = data.draw(st.sampled_from([*SOUND[name], "tools", "input", "system", "history"]))
    with contextlib.suppress(Refusal, Left):
        rows = adapt(name, SOUND[name] | {spoilt: data.draw(junk)}, chat)
        assert rows and all(isinstance(row, FORMATS[name].row) for row in rows)
        hash(rows)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"problem": "q", "solution": "s", "answer": "1", "messages": CHAT}, "messages"),
        ({"problem": "q", "solution": "s", "answer": "1"}, "problem"),
        ({"turns": ["q"], "question_id": 1, "messages": CHAT}, "messages"),
        ({"message_tree_id": "t", "prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ({"query": "q", "responses": ["a", "b"], "prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ({"question": "q", "ground_truth": "a", "prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"question": "q", "ground_truth": "a", "answer": "a"}, "question_answer"),
    ],
)
def test_a_set_made_of_a_published_one_is_read_by_its_own_columns(columns, name):
    assert detect([columns], "rows") == name


def test_columns_that_an_earlier_reading_hides_are_told_with_the_flag_that_reads_them():
    told = lacking([Demonstration], [{"prompt": "q", "completion": "a", "label": True}])
    assert told.endswith("which --config.data.format=prompt_completion would read")
