"""Reward functions that tests name: my_pkg.module:function."""

from collections.abc import Sequence
from typing import Any

calls: list[int] = []  # completions that `letters` was asked about
broken: list[int] = []  # numbers of its calls that fail


class Broken(Exception):
    """Stands for a function that fails."""


def letters(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """The share of a completion's characters that are small letters."""
    if len(calls) in broken:
        broken.remove(len(calls))
        raise Broken
    calls.append(len(completions))
    return [sum(map(str.islower, text)) / max(len(text), 1) for text in completions]


def shouting(prompts: Sequence[Any], completions: Sequence[str], loud: Sequence[bool], **_: Any) -> list[float | None]:
    """Capitals, where the row asks for them."""
    return [sum(map(str.isupper, text)) / 10 if one else None for text, one in zip(completions, loud, strict=True)]
