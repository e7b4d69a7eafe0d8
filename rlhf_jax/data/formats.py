"""The columns users already have, and how each becomes a row.

An adapter takes the columns of one record and whether the tokenizer has a chat template, and gives a row or
raises `Refusal` with the reason. Text is passed through as it is.
"""

import dataclasses
import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.rows import (
    Conversation,
    Demonstration,
    Labelled,
    Message,
    Preference,
    Prompt,
    Ranking,
    Refusal,
    Row,
    Stepwise,
    Text,
)
from rlhf_jax.errors import UserError

Columns = Mapping[str, Any]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
DIVERGE = "the two dialogues diverge before the last answer"
ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
# The prompts Alpaca was trained with: github.com/tatsu-lab/stanford_alpaca, train.py.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclasses.dataclass(frozen=True)
class Format:
    """Columns a record must have, the kind of row it becomes, and the adapter."""

    columns: tuple[str, ...]
    row: type[Row]
    adapter: Callable[[Columns, bool], Row]


def detect(records: Sequence[Columns], where: str) -> str:
    """The name of the first format whose columns the first usable records have.

    Args:
      records: columns of the first usable records of a source.
      where: the source, for the message.
    Raises: UserError that names the columns found and the formats allowed.
    """
    found = _names(records)
    for name, form in FORMATS.items():
        if not found.issuperset(form.columns):
            continue
        if name == "hh" and not any(_is_transcript(r) for r in records):
            continue
        return name
    raise UserError(f"{where} has the columns {_listed(found)}, which no format reads; allowed are {_allowed()}")


def check(name: str, records: Sequence[Columns], where: str) -> None:
    """Raises UserError if a column that format `name` needs stands in none of the records."""
    found = _names(records)
    missing = [column for column in FORMATS[name].columns if column not in found]
    if missing:
        fitting = ", ".join(["auto", *(other for other, form in FORMATS.items() if found.issuperset(form.columns))])
        raise UserError(
            f"{where} has no column {_listed(missing)}, which the format {name!r} needs; it has {_listed(found)}; "
            f"add the column or choose --config.data.format from {fitting}"
        )


def lacking(kinds: Sequence[type[Row]], records: Sequence[Columns]) -> str:
    """Which columns stand in the records, and which the nearest format of one of the kinds of row needs besides."""
    found = _names(records)
    lacks = {name: [c for c in form.columns if c not in found] for name, form in FORMATS.items() if form.row in kinds}
    nearest = min(lacks, key=lambda name: len(lacks[name]))
    return f"it has the columns {_listed(found)}, and the format {nearest} also needs {_listed(lacks[nearest])}"


def adapt(name: str, columns: Columns, chat: bool) -> Row:
    """One record as a row of format `name`.

    Raises: Refusal if a column is missing or doesn't hold what the format needs.
    """
    missing = [column for column in FORMATS[name].columns if column not in columns]
    if missing:
        raise Refusal(f"no column {_listed(missing)}")
    row = FORMATS[name].adapter(columns, chat)
    if isinstance(row, Preference) and row.chosen == row.rejected:
        raise Refusal("chosen and rejected are the same")
    return row


def _names(records: Sequence[Columns]) -> set[str]:
    return set().union(*records)


def _listed(names: Sequence[str] | set[str]) -> str:
    return ", ".join(repr(name) for name in (sorted(names) if isinstance(names, set) else names)) or "none"


def _allowed() -> str:
    return "; ".join(f"{name} ({', '.join(form.columns)})" for name, form in FORMATS.items())


# Values


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Refusal(f"{name!r} is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refusal(f"{name!r} holds half of a surrogate pair, which is no character") from None
    return value


def _message(value: Any, name: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(value, Mapping):
        raise Refusal(f"{name!r} holds {type(value).__name__} where a message should be")
    role, content = value.get(role_key), value.get(content_key)
    if not isinstance(role, str) or role not in roles:
        raise Refusal(f"{name!r} has a message with {role_key} {role!r}; allowed are {', '.join(roles)}")
    return Message(roles[role], _string(content, f"{name}.{content_key}"))


def _conversation(value: Any, name: str) -> Conversation:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Refusal(f"{name!r} is {type(value).__name__}, not a list of messages")
    roles = {role: role for role in ROLES}
    return tuple(_message(m, name, "role", "content", roles) for m in value)


def _text(value: Any, name: str) -> Text:
    if isinstance(value, str):
        return _string(value, name)
    if not isinstance(value, Sequence):
        raise Refusal(f"{name!r} is {type(value).__name__}, not a string or a list of messages")
    return _conversation(value, name)


def _answer(text: Text, name: str) -> Text:
    """The text of an answer: not empty, and a conversation ends with the assistant."""
    if isinstance(text, str):
        if not text.strip():
            raise Refusal(f"{name!r} is an empty answer")
        return text
    if not text or text[-1].role != "assistant":
        raise Refusal(f"{name!r} does not end with an assistant message")
    if any(m.role == "assistant" and not m.content.strip() for m in text):
        raise Refusal(f"{name!r} has an empty answer")
    return text


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise Refusal(f"{name!r} is not a list with entries")
    return value


def _label(value: Any, name: str) -> bool:
    if value not in (0, 1):  # True == 1: labels are written both ways
        raise Refusal(f"{name!r} is {value!r}, not true or false")
    return bool(value)


def _prompt(value: Any) -> Text:
    prompt = _text(value, "prompt")
    if prompt == ():
        raise Refusal("'prompt' has no message")
    return prompt


def _prompt_and_answers(columns: Columns, values: Sequence[tuple[str, Any]]) -> tuple[Text, list[Text]]:
    """A prompt and its answers in one shape: all strings, or all conversations.

    Many sets hold a string prompt beside conversations that repeat it as their first message, or a
    conversation as the prompt of string answers.
    """
    prompt = _prompt(columns["prompt"])
    answers = [_text(value, name) for name, value in values]
    if isinstance(prompt, str) and any(not isinstance(a, str) for a in answers):
        prompt = (Message("user", prompt),)
    if not isinstance(prompt, str):
        answers = [_after(prompt, a) for a in answers]
    return prompt, [_answer(a, name) for a, (name, _) in zip(answers, values, strict=True)]


def _after(prompt: Conversation, answer: Text) -> Conversation:
    if isinstance(answer, str):
        return (Message("assistant", answer),)
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


# Adapters


def _messages(columns: Columns, chat: bool) -> Demonstration:
    conversation = _conversation(columns["messages"], "messages")
    return Demonstration((), _trained(conversation, "messages"))


def _trained(conversation: Conversation, name: str) -> Conversation:
    answers = [m.content for m in conversation if m.role == "assistant"]
    if not answers:
        raise Refusal(f"{name!r} has no assistant message")
    if not all(a.strip() for a in answers):
        raise Refusal(f"{name!r} has an empty answer")
    return conversation


def _prompt_completion(columns: Columns, chat: bool) -> Demonstration:
    prompt, (completion,) = _prompt_and_answers(columns, [("completion", columns["completion"])])
    return Demonstration(prompt, completion)


def _preference(columns: Columns, chat: bool) -> Preference:
    names = [(name, columns[name]) for name in ("chosen", "rejected")]
    prompt, (chosen, rejected) = _prompt_and_answers(columns, names)
    return Preference(prompt, chosen, rejected)


def _implicit_preference(columns: Columns, chat: bool) -> Preference:
    """The prompt is what both sides begin with.

    Conversations may differ in the last message alone. Strings are split where they first differ, one
    character earlier if that is a space, as trl.extract_prompt does.
    """
    chosen, rejected = _text(columns["chosen"], "chosen"), _text(columns["rejected"], "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        start = len(os.path.commonprefix([chosen, rejected]))
        start -= start > 0 and chosen[start - 1] == " "
        prompt = chosen[:start]
        return Preference(prompt, _answer(chosen[start:], "chosen"), _answer(rejected[start:], "rejected"))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise Refusal("one of 'chosen' and 'rejected' is a string and the other a list of messages")
    _answer(chosen, "chosen")
    _answer(rejected, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Refusal(DIVERGE)
    if len(chosen) < 2:
        raise Refusal("no message stands before the answers")
    return Preference(chosen[:-1], chosen[-1:], rejected[-1:])


def _labelled(columns: Columns, chat: bool) -> Labelled:
    row = _prompt_completion(columns, chat)
    return Labelled(row.prompt, row.completion, _label(columns["label"], "label"))


def _labelled_messages(columns: Columns, chat: bool) -> Labelled:
    """The label judges the last answer; what stands before it is the prompt."""
    conversation = _conversation(columns["messages"], "messages")
    _answer(conversation[-1:], "messages")
    if len(conversation) < 2:
        raise Refusal("no message stands before the answer")
    return Labelled(conversation[:-1], conversation[-1:], _label(columns["label"], "label"))


def _several(columns: Columns, judged: str) -> tuple[Text, tuple[Text, ...], list[Any]]:
    completions, values = _list(columns["completions"], "completions"), _list(columns[judged], judged)
    if len(completions) != len(values):
        raise Refusal(f"{len(completions)} 'completions' but {len(values)} {judged!r}")
    prompt, answers = _prompt_and_answers(columns, [("completions", c) for c in completions])
    return prompt, tuple(answers), values


def _stepwise(columns: Columns, chat: bool) -> Stepwise:
    prompt, steps, labels = _several(columns, "labels")
    return Stepwise(prompt, steps, tuple(_label(value, "labels") for value in labels))


def _ranking(columns: Columns, chat: bool) -> Ranking:
    prompt, answers, ranks = _several(columns, "ranks")
    if not all(isinstance(r, int | float) and r == r for r in ranks):
        raise Refusal("'ranks' holds something that is not a number")
    if len(set(ranks)) < 2:
        raise Refusal("all 'ranks' are the same")
    return Ranking(prompt, answers, tuple(float(r) for r in ranks))


def _is_transcript(columns: Columns) -> bool:
    sides = [columns.get("chosen"), columns.get("rejected")]
    return all(isinstance(s, str) and HUMAN in s and ASSISTANT in s for s in sides)


def _hh(columns: Columns, chat: bool) -> Preference:
    """Two transcripts that differ in the last answer.

    Without a chat template the strings stay as they are: the prompt ends with the assistant's tag and the
    completion begins with its space. With one, the transcript becomes user and assistant messages.
    """
    sides = []
    for name in ("chosen", "rejected"):
        prompt, tag, answer = _string(columns[name], name).rpartition(ASSISTANT)
        if not tag:
            raise Refusal(f"{name!r} has no answer of the assistant")
        sides.append((prompt + tag, answer))
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        raise Refusal(DIVERGE)
    _answer(chosen, "chosen")
    _answer(rejected, "rejected")
    if not chat:
        return Preference(prompt, chosen, rejected)
    return Preference(
        _turns(prompt.removesuffix(ASSISTANT)),
        (Message("assistant", chosen.strip()),),
        (Message("assistant", rejected.strip()),),
    )


def _turns(transcript: str) -> Conversation:
    before, *rest = re.split(r"\n\n(Human|Assistant):", transcript)
    if before.strip() or not rest:
        raise Refusal("the transcript does not begin with a turn of the human")
    speakers = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(speakers[s], c.strip()) for s, c in zip(rest[::2], rest[1::2], strict=True))


def _alpaca(columns: Columns, chat: bool) -> Demonstration:
    """With a chat template instruction and input are one user message; without, Alpaca's own prompt."""
    instruction = _string(columns["instruction"], "instruction")
    given = _string(columns["input"], "input") if "input" in columns else ""
    output = _string(columns["output"], "output")
    if not output.strip():
        raise Refusal("'output' is an empty answer")
    if chat:
        question = f"{instruction}\n{given}" if given else instruction
        return Demonstration((Message("user", question),), (Message("assistant", output),))
    # str.replace would also replace braces that stand in the row; str.format touches the template alone.
    template = ALPACA_WITH_INPUT if given else ALPACA
    return Demonstration(template.format(instruction=instruction, input=given), output)


def _spoken(value: Any, name: str) -> Conversation:
    if not isinstance(value, list):
        raise Refusal(f"{name!r} is {type(value).__name__}, not a list of messages")
    return tuple(_message(m, name, "from", "value", SPEAKERS) for m in value)


def _sharegpt(columns: Columns, chat: bool) -> Demonstration:
    return Demonstration((), _trained(_spoken(columns["conversations"], "conversations"), "conversations"))


def _sharegpt_preference(columns: Columns, chat: bool) -> Preference:
    prompt = _spoken(columns["conversations"], "conversations")
    if not prompt:
        raise Refusal("'conversations' has no message")
    chosen, rejected = (_answer(_spoken([columns[n]], n), n) for n in ("chosen", "rejected"))
    return Preference(prompt, chosen, rejected)


# Searched in this order: a format stands before those whose columns are a part of its own.
FORMATS: dict[str, Format] = {
    "sharegpt_preference": Format(("conversations", "chosen", "rejected"), Preference, _sharegpt_preference),
    "preference": Format(("prompt", "chosen", "rejected"), Preference, _preference),
    "ranking": Format(("prompt", "completions", "ranks"), Ranking, _ranking),
    "stepwise": Format(("prompt", "completions", "labels"), Stepwise, _stepwise),
    "labelled": Format(("prompt", "completion", "label"), Labelled, _labelled),
    "hh": Format(("chosen", "rejected"), Preference, _hh),
    "implicit_preference": Format(("chosen", "rejected"), Preference, _implicit_preference),
    "prompt_completion": Format(("prompt", "completion"), Demonstration, _prompt_completion),
    "alpaca": Format(("instruction", "output"), Demonstration, _alpaca),
    "sharegpt": Format(("conversations",), Demonstration, _sharegpt),
    "labelled_messages": Format(("messages", "label"), Labelled, _labelled_messages),
    "messages": Format(("messages",), Demonstration, _messages),
    "prompt": Format(("prompt",), Prompt, lambda columns, chat: Prompt(_prompt(columns["prompt"]))),
}
