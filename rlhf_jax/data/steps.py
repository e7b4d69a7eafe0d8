"""Where the steps of a completion end: in its text, and in what a chat template makes of it."""

import itertools
from collections.abc import Sequence

from rlhf_jax.data.rows import Conversation, Refusal
from rlhf_jax.data.special import CLOSE, OPEN, bare
from rlhf_jax.data.templates import Plan

Ends = tuple[int, ...]  # characters of the completion's text before the end of each step


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
