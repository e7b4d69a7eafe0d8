"""Replies of judges behind an address: where a letter is read, and when its chance is."""

import json
import math
from typing import Any

import pytest

from rlhf_jax.feedback import judge_replies
from rlhf_jax.feedback.judges import Template

PLAIN = Template("{prompt}|{first}|{second}", "Best:")


@pytest.mark.parametrize(
    ("text", "reasoning", "letter"),
    [
        ("A", False, "A"),
        (" [[B]] ", False, "B"),
        ("Response A.", False, "A"),
        ("best: B", False, "B"),
        ("Best: A\nBest: B", True, "B"),
        ("Best: **A**\nas I said", True, "A"),
        ("A", True, None),
        ("A cat", False, None),
        ("a", False, None),
        ("Best: A or B", True, None),
        ("C", False, None),
        ("İİİ Best: A", True, "A"),
        ("İbest: b\nBEST:B", True, "B"),
        ("", False, None),
    ],
)
def test_letters_are_read_where_they_stand_alone(text, reasoning, letter):
    assert judge_replies.verdict(text, PLAIN._replace(reasoning=reasoning)) == letter


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {"content": None},
        {"content": [{"token": "A"}]},
        {"content": [{"token": "A", "logprob": "x", "top_logprobs": []}]},
        {"content": [{"token": "A", "logprob": math.nan, "top_logprobs": []}]},
        {"content": [{"token": "A", "logprob": 5.0, "top_logprobs": []}]},
        {"content": [{"token": "B", "logprob": -1.0, "top_logprobs": []}]},
        [1],
    ],
)
def test_log_probabilities_that_say_nothing_leave_the_letter(logprobs):
    content = {"choices": [{"message": {"content": "A"}, "logprobs": logprobs}]}
    assert judge_replies.read(json.dumps(content).encode(), PLAIN).probability == 1.0


def token(text: str, **options: float) -> dict[str, Any]:
    top = [{"token": name, "logprob": math.log(share)} for name, share in options.items()]
    return {"token": text, "logprob": top[0]["logprob"] if top else 0.0, "top_logprobs": top}


def said(text: str, *tokens: dict[str, Any]) -> float | None:
    content = {"choices": [{"message": {"content": text}, "logprobs": {"content": list(tokens)}}]}
    return judge_replies.read(json.dumps(content).encode(), PLAIN).probability


def test_the_chance_is_that_of_the_token_where_the_verdict_stands():
    """The letter stands before and behind the verdict too, and tokens before and behind the text."""
    around = (
        token("A", A=0.9, B=0.1),
        token(" é. Best:"),
        token("A", A=0.6, B=0.2),
        token("\n"),
        token("A", A=0.9, B=0.1),
    )
    text = "A é. Best:A\nA"
    assert said(text, *around) == pytest.approx(0.75)
    assert said(text, token("A thought. "), *around, token("<end>")) == pytest.approx(0.75)
    # A character of two tokens, which only their bytes tell.
    cut = [token("\ufffd") | {"bytes": [0xC3]}, token("\ufffd. Best:") | {"bytes": [0xA9, *b". Best:"]}]
    assert said(text, around[0], token(" "), *cut, *around[2:]) == pytest.approx(0.75)
    # Tokens of another text, or a letter that no token says alone: the letter counts.
    assert said("Best: A", token("Best: B"), token(" A", A=0.6, B=0.2)) == 1.0
    assert said("Best: A", token("Best: A", A=0.6, B=0.2)) == 1.0
