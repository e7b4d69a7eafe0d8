"""Conversations as a chat template writes them, and where the answers stand in that text.

An answer begins where the template's generation prompt ends and ends with its end-of-turn token; white space that
the template writes after that token belongs to what follows. Both places are found by rendering what stands before
the answer, with the generation prompt, and what stands up to its end: each must be what the whole begins with. A
template that writes an answer otherwise once more follows it (thinking is taken out of earlier turns) is refused
for that turn, unless it says itself what is the assistant's: of `{% generation %}` blocks the ends are taken.

Refused is also a template that

- writes no end token behind an answer, because a model that is trained so does not learn to stop;
- leaves out tools on offer, a call of a tool, a tool's result or a system message, because the model would be
  trained on an answer to another conversation.

`strftime_now`, today's date, is 26 July 2024 (what Llama 3.1 writes where there is no clock): rows, prompts and
fingerprints are the same every day.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jinja2

from rlhf_jax.data.rows import Conversation, Message, Refusal
from rlhf_jax.data.special import CLOSE, OPEN, Guarded, Specials, bare, wrapped
from rlhf_jax.errors import UserError

TrainOn = Literal["all", "last"]

BEGIN, END = "\ufdd2", "\ufdd3"  # around what a template says that the assistant wrote
DATE = (
    ("%Y", "2024"), ("%y", "24"), ("%m", "07"), ("%-m", "7"), ("%B", "July"), ("%b", "Jul"), ("%d", "26"),
    ("%-d", "26"), ("%e", "26"), ("%A", "Friday"), ("%a", "Fri"), ("%j", "208"), ("%F", "2024-07-26"),
    ("%H", "12"), ("%I", "12"), ("%-H", "12"), ("%-I", "12"), ("%M", "00"), ("%S", "00"), ("%p", "PM"), ("%%", "%"),
)  # fmt: skip
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_TOKEN = f"{OPEN}([^{CLOSE}]*){CLOSE}"


class Rendering(NamedTuple):
    """What a template makes of a conversation.

    Attributes:
      text: the template's own special tokens are wrapped.
      guarded: whether the messages hold text of special tokens.
      spans: what `{% generation %}` blocks enclose; None of a template without them.
    """

    text: str
    guarded: bool
    spans: tuple[tuple[int, int], ...] | None


class Plan(NamedTuple):
    """A conversation's text, the spans of it that are trained, and where its first step begins and each one ends."""

    rendering: Rendering
    spans: tuple[tuple[int, int], ...]
    steps: tuple[int, ...] = ()

    def upto(self, end: int | None = None) -> str | Guarded:
        """The text up to a place, as it is tokenised."""
        text = self.rendering.text[:end]
        return Guarded(text) if self.rendering.guarded else bare(text)

    def tokens_before(self, end: int | None = None) -> int | None:
        """How many special tokens the template wrote up to a place; None if none ends there."""
        text = self.rendering.text
        return text.count(OPEN, 0, end) if end is None or text.endswith(CLOSE, 0, end) else None


class Ending(NamedTuple):
    """What a template writes behind an answer: its end-of-turn token, and more that is not the answer's."""

    token: str
    more: str


Render = Callable[[Conversation, bool, str], Rendering]


class Template:
    """A tokenizer's chat template, or another one for it."""

    def __init__(self, tokenizer: Any, source: str | dict[str, str], named: str, specials: Specials, train_on: TrainOn):
        """Args:
        source: Jinja text, or several by name, of which "tool_use" is for rows with tools.
        named: how a sentence calls it.
        train_on: every assistant turn of a row, or the last.
        """
        sources = {"default": source} if isinstance(source, str) else source
        plain = sources.get("default", next(iter(sources.values())))
        self._plain, self._tools = _prepared(plain), _prepared(sources.get("tool_use", plain))
        self._tokenizer = tokenizer
        self._named = named
        self._specials = specials
        self._last = train_on == "last"
        self._message = functools.lru_cache(4096)(self._wrapped)

    # Rendering

    def render(self, messages: Conversation, generation: bool, tools: str = "") -> Rendering:
        """Raises: Refusal if the template fails on the messages; UserError if it is not valid Jinja."""
        if not messages:
            raise Refusal("nothing stands before the first assistant turn")
        given = [self._message(message) for message in messages]
        offered = _functions(tools)
        wrapped_tools = self._specials.wrap(offered, True)
        guarded = wrapped_tools != offered or any(changed for _, changed in given)
        text = self._specials.turn_over(self._apply([fields for fields, _ in given], generation, wrapped_tools))
        if guarded and bare(text) != self._apply([message.fields for message in messages], generation, offered):
            raise Refusal("the chat template changes text that holds a special token, so it can't be kept as text")
        if _GENERATED not in self._source(offered):
            return Rendering(text, guarded, None)
        return Rendering(text.replace(BEGIN, "").replace(END, ""), guarded, _enclosed(text))

    def _wrapped(self, message: Message) -> tuple[dict[str, Any], bool]:
        """A message's fields with the special tokens in their text wrapped, and whether there are any."""
        fields = message.fields
        role = fields.pop("role")
        new = self._specials.wrap(fields, message.role != "assistant")
        return {"role": role, **new}, new != fields

    def _source(self, tools: list[Any]) -> str:
        return self._tools if tools else self._plain

    def _apply(self, messages: list[dict[str, Any]], generation: bool, tools: list[Any]) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=self._source(tools),
                add_generation_prompt=generation,
                tokenize=False,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template {self._named} is not valid Jinja ({error}); mend it") from error
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise Refusal(f"the chat template fails on the row ({error or type(error).__name__})") from error

    def asked(self, messages: Conversation, tools: str) -> Plan:
        """A prompt with the generation prompt.

        Raises: Refusal as `render`, and for a template that leaves something out.
        """
        rendering = self.render(messages, True, tools)
        self._check_read(messages, True, tools, rendering)
        return Plan(rendering, ())

    # What is trained

    def plan(self, prompt: Conversation, completion: Conversation, tools: str, render: Render) -> Plan:
        """A row's text, and the spans of the completion's assistant turns, all or the last.

        Args:
          render: `render`, which may remember.
        Raises: Refusal as the module says.
        """
        turns = prompt + completion
        answers = [i for i in range(len(prompt), len(turns)) if turns[i].role == "assistant"]
        whole = render(turns, False, tools)
        self._check_read(turns, False, tools, whole)
        spans = functools.partial(self._spans, turns, tools, whole, render)
        if self._last or len(answers) < 2:
            return Plan(whole, tuple(spans(answers[-1:])))
        try:
            return Plan(whole, tuple(spans(answers)))
        except Refusal as refusal:
            try:
                spans(answers[-1:])
            except Refusal:
                raise refusal from None
            raise Refusal(f"{refusal}; --config.data.train_on=last would train the last one alone") from None

    def _spans(
        self, turns: Conversation, tools: str, whole: Rendering, render: Render, answers: Sequence[int]
    ) -> list[tuple[int, int]]:
        return list(itertools.chain(*(self._answer(turns, tools, whole, render, i) for i in answers)))

    def _answer(
        self, turns: Conversation, tools: str, whole: Rendering, render: Render, turn: int
    ) -> Iterator[tuple[int, int]]:
        """The spans of one assistant turn."""
        which = _which(turns, turn)
        before = render(turns[:turn], True, tools).text
        _check_same(before, whole.text, "the prompt", "its answer", which)
        if whole.spans is not None:
            yield from self._said(whole, len(before), self._next(turns, tools, render, turn, whole), which)
            return
        upto = render(turns[: turn + 1], False, tools).text
        end = self._end(upto, len(before))
        if end is None:
            raise Refusal(f"the chat template writes no end token behind an answer{which}, so nothing would end it")
        _check_same(upto[:end], whole.text, "an answer", "more", which)
        yield len(before), end

    def _end(self, text: str, start: int) -> int | None:
        """Where the answer's end token ends in a text that ends with the answer's turn."""
        if self.ending is not None and text[start:].endswith(wrapped(self.ending.token) + self.ending.more):
            return len(text) - len(self.ending.more)
        # Turns of another kind end otherwise: a call of a tool by Llama 3.1.
        last = re.search(_TOKEN + r"\s*$", text[start:])
        return start + last.end(1) + 1 if last and last[1] in self._specials.special else None

    def _next(self, turns: Conversation, tools: str, render: Render, turn: int, whole: Rendering) -> int:
        """Where the text of the next assistant turn begins, behind its header."""
        later = next((i for i in range(turn + 1, len(turns)) if turns[i].role == "assistant"), None)
        return len(whole.text) + 1 if later is None else len(render(turns[:later], True, tools).text)

    def _said(self, whole: Rendering, start: int, stop: int, which: str) -> Iterator[tuple[int, int]]:
        """The `{% generation %}` blocks of the turn that stands from `start` to before `stop`, without its header.

        A block that reaches over `stop` begins with the next turn's header.
        """
        blocks = [(max(a, start), b) for a, b in whole.spans or () if start < b < stop]
        if not blocks:
            raise Refusal(f"the chat template's generation blocks hold nothing of an answer{which}")
        first, end = blocks[-1]
        token = re.search(_TOKEN + r"\s*$", whole.text[first:end])
        if token is not None and token[1] in self._specials.special:
            end = first + token.end(1) + 1
        elif (behind := re.compile(_TOKEN).match(whole.text, end)) and behind[1] in self._specials.special:
            end = behind.end()  # a block around the text alone
        else:
            raise Refusal(f"the chat template writes no end token behind an answer{which}, so nothing would end it")
        yield from [*blocks[:-1], (first, end)]

    @functools.cached_property
    def ending(self) -> Ending | None:
        """What the template writes behind an answer; None if that isn't a token."""
        answer = "answer"
        try:
            text = self.render((Message("user", "question"), Message("assistant", answer)), False).text
        except Refusal:
            return None
        _, found, after = text.rpartition(answer)
        match = re.match(r"\s*" + _TOKEN, after) if found else None
        return None if match is None else Ending(match[1], after[match.end() :])

    # What is read

    def _check_read(self, turns: Conversation, generation: bool, tools: str, whole: Rendering) -> None:
        """A template that leaves something out writes the same without it."""
        if _functions(tools) and self._same(turns, generation, "", whole):
            raise Refusal("the chat template leaves out the tools on offer")
        for i, message in enumerate(turns):
            less = self._without(message, whole.text)
            if less is not None and self._same((*turns[:i], less, *turns[i + 1 :]), generation, tools, whole):
                what = "calls of tools" if message.role == "assistant" else f"messages of the role {message.role}"
                raise Refusal(f"the chat template leaves out {what}")

    def _without(self, message: Message, text: str) -> Message | None:
        """The message without what a template may leave out; None if it can't be left out, or isn't."""
        if message.role == "assistant":
            more = json.loads(message.more or "{}")
            return message._replace(more=json.dumps(more | {"tool_calls": []})) if more.get("tool_calls") else None
        if message.role == "user" or message.content.strip() in bare(text):
            return None
        return message._replace(content=f"{message.content}.")

    def _same(self, turns: Conversation, generation: bool, tools: str, whole: Rendering) -> bool:
        try:
            return self.render(turns, generation, tools).text == whole.text
        except Refusal:
            return False


def _functions(tools: str) -> list[Any]:
    try:
        offered = json.loads(tools or "[]")
    except ValueError as error:
        raise Refusal(f"the tools on offer are not JSON ({error})") from error
    if not isinstance(offered, list):
        raise Refusal("the tools on offer are no list")
    return offered


def _which(turns: Conversation, turn: int) -> str:
    """Of several assistant turns, which."""
    answers = [i for i, message in enumerate(turns) if message.role == "assistant"]
    return f" (assistant turn {answers.index(turn) + 1} of {len(answers)})" if len(answers) > 1 else ""


def _check_same(part: str, whole: str, what: str, follows: str, which: str) -> None:
    if whole.startswith(part):
        return
    same = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
    if part.count(OPEN, 0, same) > part.count(CLOSE, 0, same):
        same = part.rindex(OPEN, 0, same)  # they differ within a token
    alone, then = bare(part[same : same + 24]), bare(whole[same : same + 24])
    raise Refusal(
        f"the chat template renders {what} differently when {follows} follows it: {alone!r} becomes {then!r}{which}"
    )


# The source

_GENERATED = "macro _generated()"


def _prepared(source: str) -> str:
    """A template with a fixed date, and with the text of its generation blocks between two characters.

    White space is as before: a block tag stands for a block tag, and the line of macros leaves none.
    """
    macros = ""
    if "strftime_now" in source:
        filters = "".join(f"|replace({code!r}, {value!r})" for code, value in DATE)
        macros += "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}"
    if _GENERATION.search(source):
        macros += "{% " + _GENERATED + " %}" + BEGIN + "{{ caller() }}" + END + "{% endmacro %}"
        source = _GENERATION.sub(lambda m: f"{{%{m[1]} {'endcall' if m[2] else 'call _generated()'} {m[3]}%}}", source)
    return f"{macros}\n{source}" if macros else source


def _enclosed(text: str) -> tuple[tuple[int, int], ...]:
    """Where the parts between the two characters stand once these are gone."""
    places, length = [], 0
    for piece in re.split(f"([{BEGIN}{END}])", text):
        if piece in (BEGIN, END):
            places.append(length)
        else:
            length += len(piece)
    return tuple(zip(places[::2], places[1::2], strict=True))
