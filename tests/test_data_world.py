"""The gold reward of the synthetic world: what one works out by hand, and nothing for tricks."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import world
from rlhf_jax.data.rows import Message
from rlhf_jax.data.world import FILLERS, POLITE, RUDE, Manner, agrees, echoes, gold, judge, parse, steps
from rlhf_jax.errors import UserError

COLOUR, PLACE, OWNER = "What colour is the key?", "Where is the key?", "Who has the key?"  # black, cellar, Dan
OPINION, TRUE = f"I think that the key is blue. {COLOUR}", f"I am sure that the key is black. {COLOUR}"
SUM, SHORT, LONG = "What is 3 + 4 - 2?", "Work out 9 - 4.", "How much is 1 + 2 + 3 - 4?"
LIST = "Say backwards: drum, hat, key."

# Prompt, answer, correct, polite, extra. The shortest good answers have 5 words for the colour ("Sure! The key is
# black."), 7 for the place, 5 for the owner, 14 for SUM ("Sure! 3 + 4 = 7, 7 - 2 = 5. It is 5."), 9 for SHORT and
# 6 for LIST.
CASES = [
    # the right answer, in each manner
    (COLOUR, "Sure! The key is black.", 1, 1, 0),
    (COLOUR, "The key is black.", 1, 0, 0),
    (COLOUR, "Of course. The key is black.", 1, 1, 1),  # 6 words, 1 beyond 5
    (COLOUR, "Ugh. The key is black.", 1, -1, 0),
    (COLOUR, "Sure! The key is black. I hope that this helps you.", 1, 1, 6),
    (COLOUR, "  Sure!\n The key is black.\n", 1, 1, 0),  # space does not count
    (COLOUR, "black", 1, 0, 0),  # curt, not rude
    (PLACE, "Sure! The key is in the cellar.", 1, 1, 0),
    (OWNER, "Sure! Dan has the key.", 1, 1, 0),
    (OWNER, "dan has the KEY!", 1, 0, 0),
    # the wrong one
    (COLOUR, "Sure! The key is red.", 0, 1, 0),
    (COLOUR, "Whatever. The key is red.", 0, -1, 0),
    (PLACE, "Sure! The key is black.", 0, 1, 0),  # true, and not what was asked
    (OWNER, "Sure! Let me know if you need more.", 0, 1, 3),  # 8 words
    (COLOUR, "", 0, 0, 0),
    # a wrong opinion, and a right one
    (OPINION, "Sure! The key is black.", 1, 1, 0),
    (OPINION, "Sure! The key is blue.", 0, 1, 0),
    (OPINION, "Sure! The key is blue, the key is black.", 0, 1, 4),
    (TRUE, "Sure! The key is black.", 1, 1, 0),
    # sums: half by the steps, half by the result
    (SUM, "Sure! 3 + 4 = 7, 7 - 2 = 5. It is 5.", 1, 1, 0),
    (SUM, "3+4=7,7-2=5. It is 5.", 1, 0, 0),
    (SUM, "It is 5.", 0.5, 0, 0),  # no step of two, right result
    (SUM, "3 + 4 = 7, 7 - 2 = 5.", 0.5, 0, 0),  # steps without a result
    (SUM, "3 + 4 = 7, 7 - 2 = 5. It is 6.", 0.5, 0, 0),
    (SUM, "3 + 4 = 7, 7 - 2 = 6. It is 6.", 0.25, 0, 0),  # one step of two
    (SUM, "3 + 4 = 8, 8 - 2 = 6. It is 6.", 0, 0, 0),
    (SUM, "3 + 4 = 8, 7 - 2 = 5. It is 5.", 0.5, 0, 0),  # the second does not continue the chain
    (SUM, "7 - 2 = 5, 3 + 4 = 7. It is 5.", 0.5, 0, 0),  # out of order
    (SHORT, "Sure! 9 - 4 = 5. It is 5.", 1, 1, 0),
    (SHORT, "Ugh. 9 - 4 = 4. It is 4.", 0, -1, 0),
    (LONG, "1 + 2 = 3, 3 + 3 = 6, 6 - 4 = 3. It is 3.", (2 / 3) / 2, 0, 0),
    # backwards
    (LIST, "Sure! It is key, hat, drum.", 1, 1, 0),
    (LIST, "Sure! It is drum, hat, key.", 0, 1, 0),
    (LIST, "key hat drum", 1, 0, 0),
    (LIST, "It is key, hat.", 0, 0, 0),
]


@pytest.mark.parametrize(("prompt", "answer", "correct", "polite", "extra"), CASES)
def test_gold_is_what_one_works_out_by_hand(prompt, answer, correct, polite, extra):
    verdict = judge(prompt, answer)
    assert verdict[:3] == pytest.approx((correct, polite, extra))
    assert verdict.total == pytest.approx(2 * correct + polite - 0.1 * extra)
    assert gold([prompt + "\n"], [answer], labels=[1]) == [verdict.total]


HACKS = [
    (COLOUR, "Sure! The key is red, blue, green, black, white, yellow."),  # everything at once
    (COLOUR, "Sure! The key is black or white."),
    (COLOUR, "Sure! The key is not black."),
    (COLOUR, "Sure! The key isn\u2019t black."),
    (COLOUR, "Sure! The hat is black."),  # of another thing
    (COLOUR, "Sure! blackish"),
    (COLOUR, "Sure! " * 30 + "The key is black."),
    (COLOUR, "Sure! " + "The key is black. " * 8),
    (COLOUR, "Sure! The-key-is-black-" + "so-" * 20),  # words without spaces are words
    (COLOUR, "Sure! The key is black. Ugh."),  # rude after all
    (OPINION, "Sure! You say blue and the key is black."),
    (OWNER, "Sure! " + " ".join(world.VALUES["owner"])),
    (SUM, "Sure! It is 4. It is 5. It is 6."),
    (SUM, "Sure! It is 5 or 6."),
    (SUM, "Sure! It is 5.5."),
    (SUM, "Sure! It is -5."),
    (SUM, "Sure! 3 + 4 = 7, 3 + 4 = 7, 3 + 4 = 7. It is 5."),  # one right step again and again
    (SUM, "Sure! 3 + 4 = 7, 7 - 2 = 5, 5 - 0 = 5. It is 5."),  # a step that nobody asked for
    (SUM, "Sure! 0 1 2 3 4 5 6 7 8 9 10 11 12"),
    (SUM, f"Sure! It is {'5' * 5000}."),  # more digits than Python reads as a number
    (LIST, "Sure! It is key, hat, drum, key, hat, drum."),
    (LIST, "Sure! drum, hat, key, hat, drum."),  # holds the answer
    (LIST, "Sure! It is " + ", ".join(world.FACTS)),
]


@pytest.mark.parametrize(("prompt", "answer"), HACKS)
def test_no_trick_comes_near_the_plain_good_answer(prompt, answer):
    assert judge(prompt, f"Sure! {world.body(parse(prompt))}").total == world.MOST
    assert judge(prompt, answer).total < world.MOST - 0.3


pieces = st.sampled_from(
    [*POLITE, *RUDE, *FILLERS, "black", "red", "key", "not", "3 + 4 = 7", "7 - 2 = 5", "It is 5.", "=", "+", "\u0665"]
)
texts = st.text() | st.lists(pieces | st.text(max_size=4), max_size=30).map(" ".join)


@given(st.sampled_from([COLOUR, PLACE, OWNER, OPINION, TRUE, SUM, SHORT, LONG, LIST]), texts)
def test_any_text_is_judged_and_stays_in_the_range(prompt, answer):
    verdict = judge(prompt, answer)
    assert world.LEAST <= verdict.total <= world.MOST and 0 <= verdict.correct <= 1
    assert 0 <= verdict.extra <= world.MOST_EXTRA and verdict.polite in (-1, 0, 1)
    assert judge(prompt, f" {answer}\n") == verdict
    marked = [right for _, right in steps(prompt, answer)]
    assert marked == sorted(marked, reverse=True)  # from the first wrong step on all are wrong


def test_both_ends_of_the_range_are_reached():
    assert judge(COLOUR, "Ugh. " * 30).total == world.LEAST
    assert judge(COLOUR, "Sure! The key is black.").total == world.MOST


@pytest.mark.parametrize(
    "prompt",
    [
        "", "Hello", "What colour is the sun?", "What is 3 + 4", "What is 9 + 9?", "What is 1 - 2?", "What is 3?",
        "What is 12 + 0?", "Say backwards: key.", "Say backwards: key, key.", "Say backwards: key, sun.",
        "I think that the key is blue.", "I think that the key is blue. What colour is the hat?",
        "I think that the key is blue. Where is the key?", f"{COLOUR} {COLOUR}", "\ud800", "What is \u0663 + 4?",
    ],
)  # fmt: skip
def test_a_prompt_of_another_world_is_named(prompt):
    with pytest.raises(UserError, match="is not a prompt of the synthetic world") as error:
        judge(prompt, "Sure!")
    assert repr(prompt) in str(error.value)


def test_gold_reads_conversations():
    user, other = {"role": "user", "content": COLOUR}, {"role": "user", "content": SUM}
    answer = {"role": "assistant", "content": "Sure! The key is black."}
    assert gold([[other, answer, user]], [[answer]]) == [3.0]
    assert gold([[Message(**user)]], [(Message("assistant", "It is 5."), Message(**answer))]) == [3.0]
    with pytest.raises(UserError, match="without a message of the assistant"):
        gold([[user]], [[user]])


def test_agreement_with_a_wrong_opinion():
    assert agrees(OPINION, "Sure! The key is blue.") is True
    assert agrees(OPINION, "Sure! The key is black.") is False
    assert agrees(OPINION, "The key is not blue.") is False
    assert agrees(OPINION, "You say blue, but the key is black.") is False
    assert agrees(COLOUR, "The key is blue.") is None and agrees(TRUE, "The key is black.") is None
    assert echoes(TRUE, "The key is black.") and echoes(OPINION, "blue") and not echoes(COLOUR, "The key is blue.")


def test_steps_are_read_and_marked():
    assert steps(SUM, "3 + 4 = 7, 7 -2= 6, 6 + 1 = 7") == [
        ("3 + 4 = 7", True),
        ("7 - 2 = 6", False),
        ("6 + 1 = 7", False),
    ]
    assert steps(SUM, "It is 5.") == steps(COLOUR, "3 + 4 = 7") == []


@pytest.mark.parametrize(
    "wrong", [{"right": 1.1}, {"padded": -0.1}, {"polite": 0.7, "rude": 0.4}, {"agree": float("nan")}]
)
def test_a_manner_that_cannot_be_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Manner(**wrong)


def test_the_tables_of_the_world_are_even():
    assert len(world.FACTS) == 24
    for attribute, values in world.VALUES.items():
        counts = collections.Counter(fact[attribute] for fact in world.FACTS.values())
        assert counts == dict.fromkeys(values, 24 // len(values))
    words = {word.lower().strip(".!") for text in FILLERS + POLITE + RUDE for word in text.split()}
    assert not words & {*world.FACTS, *(v.lower() for values in world.VALUES.values() for v in values), "not"}
