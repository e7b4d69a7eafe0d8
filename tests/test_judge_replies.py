"""Replies of judges behind an address: where a letter is read, and when its chance is."""

import json
import math

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
