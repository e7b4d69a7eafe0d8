"""Where the steps of a completion end: in its text, in its tokens, and in what a chat template makes of it."""

import itertools
import os.path
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.rows import Conversation, Refusal
from rlhf_jax.data.special import CLOSE, OPEN, bare
from rlhf_jax.data.templates import Plan
from rlhf_jax.errors import UserError

BROKEN = "\ufffd"  # what a part of a character reads as
Ends = tuple[int, ...]  # characters of the completion's text before the end of each step


def step_pattern(pattern: str, flag: str) -> re.Pattern[str]:
    """What ends a step, a regular expression. Errors: UserError for what is none, or also matches an empty text."""
    try:
        made = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{flag}={pattern!r} is no regular expression ({error}); give one such as '[.!?]'.") from None
    if made.search(""):
        raise UserError(f"{flag}={pattern!r} also matches where there is no text; give one such as '[.!?]'.")
    return made


def ends_of(text: str, pattern: re.Pattern[str]) -> Ends:
    """Where the steps of a text end: behind each match, and at the end of the text.

    White space alone is no step: it belongs to the one before, or if it comes first to the one behind.

    >>> text = "2 + 2 = 4. Then 4 * 3 = 12.\\n\\nSo 12"
    >>> cut(text, ends_of(text, re.compile(r"[.]\\s*")))
    ['2 + 2 = 4. ', 'Then 4 * 3 = 12.\\n\\n', 'So 12']
    """
    ends: list[int] = []
    for end in [*(match.end() for match in pattern.finditer(text)), len(text)]:
        if text[ends[-1] if ends else 0 : end].strip():
            ends.append(end)
        elif ends:
            ends[-1] = end
    return tuple(ends)


class Pieces:
    """What token ids read as, token by token."""

    ANCHOR = "a"  # some tokenizers drop the space before a first word

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode(self.ANCHOR, add_special_tokens=False)
        self._before, self._known = len(self._decoded([])), dict[int, str]()

    def __call__(self, ids: Sequence[int] | np.ndarray) -> tuple[str, np.ndarray]:
        """The text of token ids, and how many characters of it stand up to the end of each token, int [n]."""
        found = [int(one) for one in ids]
        pieces = [self._piece(one) for one in found]
        if not any(BROKEN in piece for piece in pieces):
            return "".join(pieces), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        # A character of several tokens reads as itself only where they stand together.
        whole = self._decoded(found)
        read = [os.path.commonprefix([whole, self._decoded(found[:count])]) for count in range(1, len(found) + 1)]
        return whole[self._before :], np.maximum.accumulate([len(text) - self._before for text in read])

    def _piece(self, one: int) -> str:
        if one not in self._known:
            self._known[one] = self._decoded([one])[self._before :]
        return self._known[one]

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            [*self._anchor, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class TokenEnds:
    """Finds the ends of the steps of token ids."""

    def __init__(self, tokenizer: Any, pattern: re.Pattern[str]):
        self._pieces, self._pattern = Pieces(tokenizer), pattern

    def __call__(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """How many of the tokens stand up to the end of each step, ascending; what has no text is one step.

        A step that ends inside a token ends behind it, and of steps that end in one token there is one.

        Args:
          ids: [n] of a completion, without the token that ended it.
        """
        text, upto = self._pieces(ids)
        found = np.searchsorted(upto, ends_of(text, self._pattern)) + 1
        return list(dict.fromkeys(found.tolist())) if len(found) else [len(upto)]


def cut(text: str, ends: Ends) -> list[str]:
    """The steps of a text, or all of it where there are none."""
    if not ends:
        return [text]
    _check(text, ends)
    return [text[a:b] for a, b in itertools.pairwise((0, *ends))]


def _check(text: str, ends: Ends) -> None:
    assert list(ends) == sorted(ends) and ends[0] >= 0 and ends[-1] == len(text), "steps don't make up their text"


def check_steps(counts: Sequence[int]) -> Refusal | None:
    """What is wrong with steps, given the tokens before the first of them and up to the end of each."""
    empty = next((n for n, (a, b) in enumerate(itertools.pairwise(counts), start=1) if a >= b), None)
    return None if empty is None else Refusal(f"step {empty} of {len(counts) - 1} has no token of its own")


def placed(plan: Plan, completion: Conversation, ends: Ends) -> Plan:
    """The plan of a completion in steps, with their places in its rendered answer.

    White space around an answer that a template takes away belongs to no step.

    Args:
      completion: one message of the assistant.
    Raises: Refusal if its content doesn't stand in the answer as it is.
    """
    (message,) = completion
    content = message.content
    _check(content, ends)
    text = plan.rendering.text
    start, stop = plan.spans[0][0], plan.spans[-1][1]
    if text.endswith(CLOSE, start, stop):  # the end token says nothing of the answer
        stop = text.rindex(OPEN, start, stop)
    answer = bare(text[start:stop])
    said, gone = content, 0
    if said not in answer:
        said, gone = content.strip(), len(content) - len(content.lstrip())
    if said not in answer:
        raise Refusal("the chat template changes the text of an answer, so the ends of its steps can't be found in it")
    place = answer.rindex(said)  # the last: thinking, which stands before, may hold it as well
    inside = [place + min(max(end - gone, 0), len(said)) for end in (0, *ends)]
    return plan._replace(steps=tuple(start + raw for raw in _raw(text[start:stop], inside)))


def _raw(text: str, places: Sequence[int]) -> list[int]:
    """Ascending places of a text without the wrapping of its tokens, in the text with it: behind a token whole."""
    found, seen, places_left = [], 0, list(places)
    for raw, character in enumerate(text):
        while places_left and places_left[0] == seen and character != CLOSE:
            found.append(raw)
            places_left.pop(0)
        seen += character not in (OPEN, CLOSE)
    return found + [len(text)] * len(places_left)
