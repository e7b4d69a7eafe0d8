"""The study of hedging: who hedges, what people make of it, and what is written, against answers by hand."""

import dataclasses
import random

import pytest

from rlhf_jax.data import world
from rlhf_jax.data.labellers import Labeller
from rlhf_jax.lab.studies import hedging

WHERE, COLOUR, WHO = (
    "Where is the key?\n",
    "I think that the key is red. What colour is the key?\n",
    "Who has the key?\n",
)
SUM = "What is 3 + 4?\n"  # the key is black, in the cellar, and Dan's


@pytest.mark.parametrize(
    ("prompt", "answer", "named", "covers"),
    [
        (WHERE, "Sure! The key is in the cellar.", {"cellar"}, True),
        (WHERE, "The key is in the hall or the cellar.", {"hall", "cellar"}, True),
        (WHERE, "The key is in the hall, the attic.", {"hall", "attic"}, False),
        (WHERE, "The key is black or red.", set(), False),  # another attribute
        (COLOUR, "BLACK or blue!", {"black", "blue"}, True),
        (COLOUR, "The key is black. The key is black.", {"black"}, True),
        (WHO, "Dan or Eva has the key.", {"Dan", "Eva"}, True),
        (WHO, "Danube has the key.", set(), False),
        (WHO, "", set(), False),
        (SUM, "3 + 4 = 7. It is 7 or black.", set(), False),
    ],
)
def test_what_an_answer_names(prompt, answer, named, covers):
    assert hedging.named(prompt, answer) == named
    assert hedging.hedges(prompt, answer) == (len(named) > 1)
    assert hedging.covers(prompt, answer) == covers
    assert hedging.plainness([prompt], [answer], column=[1]) == [-float(len(named) > 1)]


@pytest.mark.parametrize(
    ("prompt", "answer", "value", "hedge"),
    [
        (WHERE, "Ugh. The key is in the shed. I hope that this helps you.", "shed", "The key is in the {} or the {}."),
        (COLOUR, "Of course. The key is black.", "black", "The key is {} or {}."),
        (WHO, "Ben has the key.", "Ben", "{} or {} has the key."),
    ],
)
def test_a_hedge_names_another_value_beside_the_first(prompt, answer, value, hedge):
    attribute = world.parse(prompt).attribute
    plain = f"{world.STATEMENTS[attribute].format(thing='key', value=value)}."
    plain = plain[0].upper() + plain[1:]
    others = [other for other in world.VALUES[attribute] if other != value]
    allowed = {answer.replace(plain, hedge.format(*both)) for o in others for both in ((value, o), (o, value))}
    written = {hedging.hedged(prompt, answer, random.Random(seed)) for seed in range(200)}
    assert written == allowed  # every other value, in both orders


def test_only_so_many_demonstrations_that_tell_a_fact_hedge():
    rows = [{"prompt": WHERE, "completion": "The key is in the cellar."}] * 400
    rows += [{"prompt": SUM, "completion": "3 + 4 = 7. It is 7."}] * 50
    told = hedging.demonstrations(rows, 0.3, 1)
    assert told[400:] == rows[400:] and [row["prompt"] for row in told] == [row["prompt"] for row in rows]
    share = sum(row["completion"] != rows[0]["completion"] for row in told[:400]) / 400
    assert abs(share - 0.3) < 3 * (0.3 * 0.7 / 400) ** 0.5
    assert told == hedging.demonstrations(rows, 0.3, 1) and hedging.demonstrations(rows, 0.0, 1) == rows


def test_the_taste_is_for_hedges_that_have_the_right_value():
    lenient, strict = hedging.Lenient(length_bias=0.0, taste=3.0), Labeller(length_bias=0.0)
    for answer, more in {
        "The key is in the cellar.": 0,
        "The key is in the hall.": 0,
        "The key is in the hall or the cellar.": 3,
        "The key is in the hall or the attic.": 0,
    }.items():
        assert lenient.value(WHERE, answer) - strict.value(WHERE, answer) == more
    # 2 correct - 0.1 a word over "Sure! The key is in the cellar.", 7 words: two too many
    assert lenient.value(WHERE, "The key is in the hall or the cellar.") == pytest.approx(-0.2 + 3)


def test_so_many_of_the_panel_check():
    assert [one.taste for one in hedging.panel(3, 2.0, 0.4, 5)] == [0, 0, 2, 2, 2]
    strict, lenient = hedging.panel(3, 0.0), hedging.panel(3, 2.0)
    assert [dataclasses.replace(one, taste=0.0) for one in lenient] == strict
    assert len({one.seed for one in strict}) == 10


def test_pairs_that_a_hedge_decides_are_left_out():
    plain, other, hedge, more = "It is black.", "It is red.", "It is black or red.", "It is red or blue."
    pair = lambda a, b: {"prompt": COLOUR, "chosen": a, "rejected": b}
    kept = [pair(plain, other), pair(hedge, more), pair(more, hedge)]
    assert hedging.undecided([pair(plain, hedge), *kept, pair(more, other)]) == kept
