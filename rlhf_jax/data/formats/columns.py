"""Columns that users already have, in the forms of TRL, HH transcripts, Alpaca and ShareGPT.

An adapter takes the columns of one record and whether the tokenizer has a chat template, and gives a row or
raises `Refusal` or `Left` with the reason.
"""

import os.path
import re
from typing import Any

from rlhf_jax.data.formats.values import (
    Columns,
    answer,
    asked,
    conversation,
    entries,
    label,
    number,
    perhaps,
    prompt_and_answers,
    reply,
    says_nothing,
    spoken,
    string,
    text,
    tools,
)
from rlhf_jax.data.rows import (
    Conversation,
    Demonstration,
    Labelled,
    Message,
    Preference,
    Ranking,
    Refusal,
    Stepwise,
    Text,
)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
DIVERGE = "the two dialogues diverge before the last answer"
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


# Single answers


def messages(columns: Columns, chat: bool) -> Demonstration:
    return Demonstration((), _trained(conversation(columns["messages"], "messages"), "messages"))


def _trained(turns: Conversation, name: str) -> Conversation:
    if not any(turn.role == "assistant" for turn in turns):
        raise Refusal(f"{name!r} has no assistant message")
    if any(map(says_nothing, turns)):
        raise Refusal(f"{name!r} has an empty answer")
    return turns


def prompt_completion(columns: Columns, chat: bool) -> Demonstration:
    prompt, (completion,) = prompt_and_answers(columns, [("completion", columns["completion"])])
    return Demonstration(prompt, completion)


def question_answer(columns: Columns, chat: bool) -> Demonstration:
    question, said = (string(columns[name], name) for name in ("question", "answer"))
    answer(said, "answer")
    return Demonstration(asked(question, chat), reply(said, chat))


def is_open_question(columns: Columns) -> bool:
    """Whether the answer is one to write and not the choice among options that stand in columns of their own."""
    return isinstance(columns.get("answer"), str) and not any(name.startswith(("choice", "option")) for name in columns)


def document(columns: Columns, chat: bool) -> Demonstration:
    """A text without a prompt, to pre-train on."""
    written = string(columns["text"], "text")
    answer(written, "text")
    return Demonstration("", written)


# Pairs and rankings


def preference(columns: Columns, chat: bool) -> Preference:
    names = [(name, columns[name]) for name in ("chosen", "rejected")]
    prompt, (chosen, rejected) = prompt_and_answers(columns, names)
    return Preference(prompt, chosen, rejected)


def implicit_preference(columns: Columns, chat: bool) -> Preference:
    """The prompt is what both sides begin with.

    Conversations may differ in the last message alone. Strings are split where they first differ, one
    character earlier if that is a space, as trl.extract_prompt does.
    """
    chosen, rejected = text(columns["chosen"], "chosen"), text(columns["rejected"], "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        start = len(os.path.commonprefix([chosen, rejected]))
        start -= start > 0 and chosen[start - 1] == " "
        prompt = chosen[:start]
        return Preference(prompt, answer(chosen[start:], "chosen"), answer(rejected[start:], "rejected"))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise Refusal("one of 'chosen' and 'rejected' is a string and the other a list of messages")
    answer(chosen, "chosen")
    answer(rejected, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Refusal(DIVERGE)
    if len(chosen) < 2:
        raise Refusal("no message stands before the answers")
    return Preference(chosen[:-1], chosen[-1:], rejected[-1:])


def _several(columns: Columns, judged: str) -> tuple[Text, tuple[Text, ...], list[Any]]:
    completions, values = entries(columns["completions"], "completions"), entries(columns[judged], judged)
    if len(completions) != len(values):
        raise Refusal(f"{len(completions)} 'completions' but {len(values)} {judged!r}")
    prompt, answers = prompt_and_answers(columns, [("completions", c) for c in completions])
    return prompt, tuple(answers), values


def ranking(columns: Columns, chat: bool) -> Ranking:
    prompt, answers, ranks = _several(columns, "ranks")
    if not all(isinstance(r, int | float) and r == r for r in ranks):
        raise Refusal("'ranks' holds something that is not a number")
    return Ranking(prompt, answers, tuple(float(r) for r in ranks))


# Labels


def labelled(columns: Columns, chat: bool) -> Labelled:
    row = prompt_completion(columns, chat)
    return Labelled(row.prompt, row.completion, label(columns["label"], "label"))


def labelled_messages(columns: Columns, chat: bool) -> Labelled:
    """The label judges the last answer; what stands before it is the prompt."""
    turns = conversation(columns["messages"], "messages")
    answer(turns[-1:], "messages")
    if len(turns) < 2:
        raise Refusal("no message stands before the answer")
    return Labelled(turns[:-1], turns[-1:], label(columns["label"], "label"))


def stepwise(columns: Columns, chat: bool) -> Stepwise:
    prompt, steps, labels = _several(columns, "labels")
    return Stepwise(prompt, steps, tuple(float(label(value, "labels")) for value in labels))


RATINGS = {-1: 0.0, 0: 0.5, 1: 1.0}


def rated_steps(columns: Columns, chat: bool) -> Stepwise:
    prompt, steps, ratings = _several(columns, "ratings")
    numbers = [number(value, "ratings") for value in ratings]
    if bad := set(numbers) - RATINGS.keys():
        raise Refusal(f"'ratings' holds {min(bad):g}; allowed are -1, 0, 1")
    return Stepwise(prompt, steps, tuple(RATINGS[int(value)] for value in numbers))


# HH transcripts


def is_transcript(columns: Columns) -> bool:
    sides = [columns.get("chosen"), columns.get("rejected")]
    return all(isinstance(s, str) and HUMAN in s and ASSISTANT in s for s in sides)


def hh(columns: Columns, chat: bool) -> Preference:
    return transcripts(columns["chosen"], columns["rejected"], chat)


def transcripts(better: Any, worse: Any, chat: bool) -> Preference:
    """Two transcripts that differ in the last answer.

    Without a chat template the strings stay as they are: the prompt ends with the assistant's tag and the
    completion begins with its space. With one, the transcript becomes user and assistant messages.
    """
    sides = []
    for name, side in (("chosen", better), ("rejected", worse)):
        prompt, tag, said = string(side, name).rpartition(ASSISTANT)
        if not tag:
            raise Refusal(f"{name!r} has no answer of the assistant")
        sides.append((prompt + tag, said))
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        raise Refusal(DIVERGE)
    answer(chosen, "chosen")
    answer(rejected, "rejected")
    if not chat:
        return Preference(prompt, chosen, rejected)
    return Preference(
        _turns(prompt.removesuffix(ASSISTANT)), reply(chosen.strip(), chat), reply(rejected.strip(), chat)
    )


def _turns(transcript: str) -> Conversation:
    before, *rest = re.split(r"\n\n(Human|Assistant):", transcript)
    if before.strip() or not rest:
        raise Refusal("the transcript does not begin with a turn of the human")
    speakers = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(speakers[s], c.strip()) for s, c in zip(rest[::2], rest[1::2], strict=True))


# Alpaca


def alpaca(columns: Columns, chat: bool) -> Demonstration:
    said = string(columns["output"], "output")
    answer(said, "output")
    given = string(columns["input"], "input") if "input" in columns else ""
    prompt = instructed(string(columns["instruction"], "instruction"), given, chat)
    before = _earlier(columns)
    if before and isinstance(prompt, str):
        raise Refusal("'system' and 'history' need a chat template: Alpaca's own prompt has no place for them")
    return Demonstration(prompt if isinstance(prompt, str) else before + prompt, reply(said, chat))


def instructed(instruction: str, given: str, chat: bool) -> Text:
    """With a chat template instruction and input are one user message; without, Alpaca's own prompt."""
    if chat:
        return (Message("user", f"{instruction}\n{given}" if given else instruction),)
    # str.replace would also replace braces that stand in the row; str.format touches the template alone.
    template = ALPACA_WITH_INPUT if given else ALPACA
    return template.format(instruction=instruction, input=given)


def _earlier(columns: Columns) -> Conversation:
    """What LLaMA-Factory has before the instruction: a system message and turns of question and answer."""
    system, turns = _system(columns), []
    for pair in perhaps(columns.get("history"), "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refusal("'history' holds something that is not a question with its answer")
        turns += [Message("user", string(pair[0], "history")), Message("assistant", string(pair[1], "history"))]
    return (*system, *turns)


def _system(columns: Columns) -> Conversation:
    system = string(columns.get("system", ""), "system")
    return (Message("system", system),) if system else ()


# ShareGPT


def sharegpt(columns: Columns, chat: bool) -> Demonstration:
    turns = _trained(_conversations(columns), "conversations")
    return Demonstration((), turns, _wrapped(columns))


def sharegpt_preference(columns: Columns, chat: bool) -> Preference:
    prompt = _conversations(columns)
    if not prompt:
        raise Refusal("'conversations' has no message")
    chosen, rejected = (answer(spoken([columns[n]], n), n) for n in ("chosen", "rejected"))
    return Preference(prompt, chosen, rejected, _wrapped(columns))


def _conversations(columns: Columns) -> Conversation:
    turns = spoken(columns["conversations"], "conversations")
    return turns if turns and turns[0].role == "system" else _system(columns) + turns


def _wrapped(columns: Columns) -> str:
    """LLaMA-Factory writes bare functions, and templates look for them inside {"type": "function", ...}."""
    return tools(columns["tools"], wrap=True) if "tools" in columns else ""
