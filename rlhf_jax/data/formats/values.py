"""What stands in a column as text, messages, calls of tools, or a refusal with the reason.

Text is passed through as it is, and so is the order of the keys of calls and tools: a chat template writes them
as they come.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.rows import Conversation, Message, Refusal, Text

Columns = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# Fields of a message, beside role and content, that chat templates read.
STRINGS = ("name", "tool_call_id", "reasoning_content", "thinking")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


# Scalars and lists


def string(value: Any, name: str) -> str:
    """The value, if it is a text that can be written down."""
    if not isinstance(value, str):
        raise Refusal(f"{name!r} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refusal(f"{name!r} holds half of a surrogate pair, which is no character") from None
    return value


def entries(value: Any, name: str) -> list[Any]:
    """A list that isn't empty."""
    if not isinstance(value, list) or not value:
        raise Refusal(f"{name!r} is not a list with entries")
    return value


def perhaps(value: Any, name: str) -> list[Any]:
    """A list, or nothing."""
    return entries(value, name) if value else []


def fields(value: Any, name: str) -> Columns:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise Refusal(f"{name!r} is {type(value).__name__}, not an object")
    return value


def label(value: Any, name: str) -> bool:
    """A thumb: true, false, 1 or 0."""
    if not isinstance(value, int | float) or value not in (0, 1):  # True == 1: labels are written both ways
        raise Refusal(f"{name!r} is {value!r}, not true or false")
    return bool(value)


def whole(value: Any, name: str) -> int:
    """A whole number; true and false are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refusal(f"{name!r} is {value!r}, not a whole number")
    return value


def number(value: Any, name: str) -> float:
    """A number that equals itself; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise Refusal(f"{name!r} is {value!r}, not a number")
    return float(value)


# Messages


def message(value: Any, name: str) -> Message:
    """One turn in the form of OpenAI: role, content, and the fields of tools and thinking."""
    value = _turn(value, name)
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(f"{name!r} has a message with role {role!r}; allowed are {', '.join(ROLES)}")
    more: dict[str, Any] = {}
    if value.get("tool_calls"):
        more["tool_calls"] = [
            _call(call, f"{name}.tool_calls") for call in entries(value["tool_calls"], f"{name}.tool_calls")
        ]
    for field in STRINGS:
        if value.get(field) is not None:
            more[field] = string(value[field], f"{name}.{field}")
    content = value.get("content")
    if content is None and "tool_calls" in more:
        content = ""
    return Message(role, _content(content, f"{name}.content"), packed(more, name) if more else "")


def _turn(value: Any, name: str) -> Columns:
    if not isinstance(value, Mapping):
        raise Refusal(f"{name!r} holds {type(value).__name__} where a message should be")
    return value


def _content(value: Any, name: str) -> str:
    """A string, or the texts of a list of parts, one after the other."""
    if not isinstance(value, list):
        return string(value, name)
    kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in value}
    if others := kinds - {"text"}:
        raise Refusal(f"{name!r} has a part of type {min(map(repr, others))}, and only text is read")
    return "".join(string(part.get("text"), f"{name}.text") for part in value)


def _call(value: Any, name: str) -> Columns:
    """A call of a function, in OpenAI's form or bare; its arguments as an object, which templates want."""
    call = fields(value, name)
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Refusal(f"{name!r} holds a call without the name of a function")
    if isinstance(function.get("arguments"), str):
        arguments = parsed(function["arguments"])
        if isinstance(arguments, dict):
            function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def parsed(text: str) -> Any:
    """The JSON value of a text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def packed(value: Any, name: str) -> str:
    """JSON text of a value, so that it can be hashed."""
    try:
        return string(json.dumps(value, ensure_ascii=False, separators=(",", ":")), name)
    except (TypeError, ValueError, RecursionError) as error:
        raise Refusal(f"{name!r} can't be written as JSON ({error})") from None


def conversation(value: Any, name: str) -> Conversation:
    """A list of messages, perhaps empty."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Refusal(f"{name!r} is {type(value).__name__}, not a list of messages")
    return tuple(message(one, name) for one in value)


def spoken(value: Any, name: str) -> Conversation:
    """A list of turns in the form of ShareGPT, from and value; a function_call's value is the JSON of its calls."""
    if not isinstance(value, list):
        raise Refusal(f"{name!r} is {type(value).__name__}, not a list of messages")
    return tuple(_said(one, name) for one in value)


def _said(value: Any, name: str) -> Message:
    turn = _turn(value, name)
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise Refusal(f"{name!r} has a message with from {speaker!r}; allowed are {', '.join(SPEAKERS)}")
    text = _content(turn.get("value"), f"{name}.value")
    if speaker != "function_call":
        return Message(SPEAKERS[speaker], text)
    found = parsed(text)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise Refusal(f"{name!r} has a function_call that is not the JSON of a call")
    calls = [_call(call, name) for call in calls]
    calls = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    return Message("assistant", "", packed({"tool_calls": calls}, name))


def tools(value: Any, wrap: bool = False) -> str:
    """The functions on offer, a list or the JSON text of one, as JSON text; empty for none.

    Args:
      wrap: whether bare functions get the {"type": "function", "function": ...} around them that templates expect.
    """
    if isinstance(value, str):
        value = parsed(value) if value.strip() else []
    if value is None or not isinstance(value, list) or not all(map(_is_tool, value)):
        raise Refusal("'tools' is not a list of functions, each with a name, nor the JSON of one")
    if wrap:
        value = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    return packed(value, "tools") if value else ""


def _is_tool(value: Any) -> bool:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


# Prompts and answers


def text(value: Any, name: str) -> Text:
    """A string or a list of messages."""
    if isinstance(value, str):
        return string(value, name)
    if not isinstance(value, Sequence):
        raise Refusal(f"{name!r} is {type(value).__name__}, not a string or a list of messages")
    return conversation(value, name)


def answer(value: Text, name: str) -> Text:
    """The text of an answer: not empty, and a conversation ends with the assistant."""
    if isinstance(value, str):
        if not value.strip():
            raise Refusal(f"{name!r} is an empty answer")
        return value
    if not value or value[-1].role != "assistant":
        raise Refusal(f"{name!r} does not end with an assistant message")
    if any(says_nothing(one) for one in value):
        raise Refusal(f"{name!r} has an empty answer")
    return value


def says_nothing(one: Message) -> bool:
    """Whether an assistant's turn neither says nor calls anything."""
    return one.role == "assistant" and not one.content.strip() and "tool_calls" not in json.loads(one.more or "{}")


def prompt(value: Any) -> Text:
    """A string, perhaps empty, or a list with messages."""
    asked = text(value, "prompt")
    if asked == ():
        raise Refusal("'prompt' has no message")
    return asked


def asked(question: str, chat: bool, system: str = "") -> Text:
    """A question as a prompt: with a chat template a user's message, without one a text that ends with a newline."""
    if chat:
        return (*((Message("system", system),) if system else ()), Message("user", question))
    return question if question.endswith("\n") else f"{question}\n"


def reply(value: str, chat: bool) -> Text:
    """An answer in the shape of `asked`."""
    return (Message("assistant", value),) if chat else value


def prompt_and_answers(columns: Columns, values: Sequence[tuple[str, Any]]) -> tuple[Text, list[Text]]:
    """A prompt and its answers in one shape: all strings, or all conversations.

    Many sets hold a string prompt beside conversations that repeat it as their first message, or a
    conversation as the prompt of string answers.
    """
    before = prompt(columns["prompt"])
    answers = [text(value, name) for name, value in values]
    if isinstance(before, str) and any(not isinstance(a, str) for a in answers):
        before = (Message("user", before),)
    if not isinstance(before, str):
        answers = [_after(before, a) for a in answers]
    return before, [answer(a, name) for a, (name, _) in zip(answers, values, strict=True)]


def _after(before: Conversation, value: Text) -> Conversation:
    if isinstance(value, str):
        return (Message("assistant", value),)
    return value[len(before) :] if value[: len(before)] == before else value
