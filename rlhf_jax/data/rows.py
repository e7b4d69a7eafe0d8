"""The kinds of rows that every data format is brought to.

Text is opaque: nothing in this project acts on what a row says. `tools` of a row is the JSON text of the list of
functions that its prompt offers, as a chat template takes them, or empty.
"""

import dataclasses
import json
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn of a conversation.

    `more` is the JSON text of an object with the other fields that a chat template reads (tool_calls, name,
    tool_call_id, reasoning_content), or empty: text, so that a message can be hashed.
    """

    role: str
    content: str
    more: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """All of it as one object, as files and chat templates have it."""
        return {"role": self.role, "content": self.content, **json.loads(self.more or "{}")}


Conversation = tuple[Message, ...]
Text = str | Conversation


class Refusal(Exception):
    """A row that can't be used; the argument is the reason, a clause without capital or full stop."""


class Left(Exception):
    """A good row with nothing to learn from, such as a tie of two answers; the argument is the reason, a clause."""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """An answer to imitate. A whole conversation has `prompt=()`: every assistant turn is trained."""

    prompt: Text
    completion: Text
    tools: str = ""


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the first preferred."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: str = ""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """One answer with a thumb up (True) or down (False)."""

    prompt: Text
    completion: Text
    label: bool
    tools: str = ""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Several answers to one prompt; the smaller the rank the better, equal ranks are ties."""

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[float, ...]
    tools: str = ""


@dataclasses.dataclass(frozen=True)
class Stepwise:
    """The steps of one solution in order, each right (1), wrong (0) or neutral (0.5)."""

    prompt: Text
    completions: tuple[Text, ...]
    labels: tuple[float, ...]
    tools: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt without an answer, for rollouts."""

    prompt: Text
    tools: str = ""


Row = Demonstration | Preference | Labelled | Ranking | Stepwise | Prompt
