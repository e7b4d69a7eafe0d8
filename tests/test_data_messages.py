"""Messages with calls of tools, thinking and parts, and the tools on offer, in every form that holds messages."""

import itertools
import json

import pytest

from rlhf_jax.data.formats import adapt
from rlhf_jax.data.rows import Conversation, Demonstration, Message, Refusal

Q, A, B = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")
q, a, b = ({"role": m.role, "content": m.content} for m in (Q, A, B))
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"z": 1, "a": "\u00e9"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALLED = [
    {"role": "system", "content": [{"type": "text", "text": "s"}, {"type": "text", "text": "t"}]},
    q,
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL], "weight": 1},
    {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
    a,
]


def said(speaker, value):
    return {"from": speaker, "value": value}


def turns(name, columns) -> Conversation:
    """The turns of the one demonstration that the columns give."""
    (row,) = adapt(name, columns, True)
    assert isinstance(row, Demonstration) and isinstance(row.completion, tuple)
    return row.completion


@pytest.mark.parametrize("name", ["messages", "prompt_completion", "preference", "labelled_messages", "prompt"])
@pytest.mark.parametrize("offered", [[TOOL], json.dumps([TOOL])])
def test_tools_and_their_calls_are_read_in_every_form_of_messages(name, offered):
    columns = {
        "messages": {"messages": CALLED},
        "prompt_completion": {"prompt": CALLED[:2], "completion": CALLED[2:]},
        "preference": {"prompt": CALLED[:2], "chosen": CALLED[2:], "rejected": [b]},
        "labelled_messages": {"messages": CALLED, "label": True},
        "prompt": {"prompt": CALLED},
    }[name]
    (row,) = adapt(name, columns | {"tools": offered}, True)
    assert json.loads(row.tools) == [TOOL]
    texts = [getattr(row, field) for field in ("prompt", "completion", "chosen") if hasattr(row, field)]
    system, question, call, result, last = itertools.chain(*texts)
    assert (system, question, last) == (Message("system", "st"), Q, A)
    assert call.content == "" and json.loads(call.more) == {"tool_calls": [CALL], "reasoning_content": "hm"}
    assert list(json.loads(call.more)["tool_calls"][0]["function"]["arguments"]) == ["z", "a"]  # as they stand
    assert json.loads(result.more) == {"tool_call_id": "1", "name": "add"} and result[:2] == ("tool", "2")
    hash(row)


@pytest.mark.parametrize(
    ("arguments", "read"),
    [('{"x": 1}', {"x": 1}), ("", ""), ("{x", "{x"), ("[1]", "[1]"), ({}, {}), (None, None)],
)
def test_arguments_that_are_the_text_of_an_object_become_the_object(arguments, read):
    call = {"name": "add", "arguments": arguments}
    for written in (call, {"type": "function", "function": call}):
        columns = {"messages": [q, {"role": "assistant", "content": "", "tool_calls": [written]}]}
        (made,) = json.loads(turns("messages", columns)[-1].more)["tool_calls"]
        assert made.get("function", made)["arguments"] == read


def test_sharegpt_with_calls_tools_and_a_system_column():
    call = {"name": "add", "arguments": {"x": 1}}
    columns = {
        "conversations": [said("human", "q"), said("function_call", json.dumps(call)), said("observation", "2")]
        + [said("gpt", "a")],
        "system": "s",
        "tools": json.dumps([TOOL["function"]]),
    }
    (row,) = adapt("sharegpt", columns, True)
    assert json.loads(row.tools) == [TOOL]
    system, question, called, result, last = turns("sharegpt", columns)
    assert (system, question, result, last) == (Message("system", "s"), Q, Message("tool", "2"), A)
    assert called.content == ""
    assert json.loads(called.more) == {"tool_calls": [{"type": "function", "function": call}]}
    own = [said("system", "mine"), *columns["conversations"]]
    assert turns("sharegpt", columns | {"conversations": own})[0] == Message("system", "mine")


def test_alpaca_with_a_history_and_a_system_column():
    columns = {"instruction": "q", "output": "a", "system": "s", "history": [["r", "b"]]}
    (row,) = adapt("alpaca", columns, True)
    assert row == Demonstration((Message("system", "s"), Message("user", "r"), B, Q), (A,))
    assert adapt("alpaca", columns | {"system": "", "history": []}, False)
    with pytest.raises(Refusal, match="need a chat template"):
        adapt("alpaca", columns, False)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": [{"type": "image_url", "image_url": {}}]}, "part of type 'image_url', and only text"),
        ({"content": ["x"]}, "part of type 'str'"),
        ({"content": [{"type": "text"}]}, "not a string"),
        ({"content": "", "tool_calls": []}, "empty answer"),
        ({"content": "", "thinking": "hm"}, "empty answer"),
        ({"content": "x", "thinking": 3}, "not a string"),
        ({"content": "x", "tool_calls": {}, "name": "\ud800"}, "surrogate"),
        ({"content": "x", "tool_calls": "add"}, "not a list with entries"),
        ({"content": "x", "tool_calls": [{"function": {"arguments": "{}"}}]}, "without the name of a function"),
    ],
)
def test_a_message_that_cannot_be_used_is_refused_with_the_reason(message, reason):
    with pytest.raises(Refusal, match=reason):
        adapt("messages", {"messages": [q, {"role": "assistant", **message}]}, True)


@pytest.mark.parametrize("offered", ["add", "{}", [1], [{"description": "no name"}], {"name": "add"}])
def test_tools_that_are_none_are_refused_beside_messages_and_nothing_beside_a_text(offered):
    with pytest.raises(Refusal, match="not a list of functions"):
        adapt("messages", {"messages": [q, a], "tools": offered}, True)
    assert adapt("text", {"text": "a", "tools": offered}, True) == (Demonstration("", "a"),)


def test_tools_beside_a_text_are_refused_because_no_template_writes_them():
    with pytest.raises(Refusal, match="beside a text"):
        adapt("prompt_completion", {"prompt": "q", "completion": "a", "tools": [TOOL]}, True)
    for none in ([], "", "[]", None):
        assert adapt("messages", {"messages": [q, a], "tools": none}, True)[0].tools == ""
