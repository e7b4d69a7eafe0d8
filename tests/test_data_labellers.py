"""Simulated labellers do what their numbers say, within 99.9% intervals, and nothing else."""

import dataclasses
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import world_rows
from rlhf_jax.data.labellers import Labeller, label, label_pairs, panel
from rlhf_jax.data.world import Manner, agrees, judge, length, parse
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import wilson

COLOUR = "What colour is the key?\n"  # black
OPINION = f"I think that the key is blue. {COLOUR}"
GOOD, BAD = "Sure! The key is black.", "Ugh. The key is red."
EXACT = Labeller(noise=0.0, length_bias=0.0)
LABELS = 2000
Items = tuple[list[str], list[str], list[str]]


def interval(share, count):
    """Wilson's at 99.9%: it depends on the trials over the square of the quantile alone."""
    return wilson(share, count * (1.959964 / 3.290527) ** 2)


def share(labeller, prompt, a, b, labels=LABELS):
    return sum(labeller.prefers(prompt, a, b, number) for number in range(labels)) / labels


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Labeller, prompt, a, b, and the probability of a, each from the definition of the knob.
CLOSED = {
    # gold 3 against -1 (right 2 and polite 1, against rude -1): sigmoid(4 / 0.5) is 1 to the third digit
    "noise": (dataclasses.replace(EXACT, noise=0.15), COLOUR, GOOD, BAD, 0.85 * sigmoid(8) + 0.15 * sigmoid(-8)),
    # 6 words more cost 0.6
    "gold": (EXACT, COLOUR, GOOD, f"{GOOD} I hope that this helps you.", sigmoid(0.6 / 0.5)),
    "temperature": (
        dataclasses.replace(EXACT, temperature=2.0), COLOUR, GOOD, f"{GOOD} I hope that this helps you.", sigmoid(0.3)
    ),
    # a word is worth 0.25 to it: 6 words are worth 1.5 and cost 0.6
    "length": (
        dataclasses.replace(EXACT, length_bias=0.25), COLOUR, GOOD, f"{GOOD} I hope that this helps you.",
        sigmoid((0.6 - 1.5) / 0.5),
    ),
    # "black" and "The key is black." differ in nothing but 3 words
    "short": (
        dataclasses.replace(EXACT, length_bias=-0.1), COLOUR, "black", "The key is black.", sigmoid(0.3 / 0.5)
    ),
    # the truth is worth 2, agreement 2.3
    "agreeable": (
        dataclasses.replace(EXACT, agreeableness=2.3), OPINION, GOOD, "Sure! The key is blue.", sigmoid(-0.3 / 0.5)
    ),
    # where nobody has an opinion there is nothing to agree with
    "no opinion": (
        dataclasses.replace(EXACT, agreeableness=9.0), COLOUR, "black white", "The key is blue.", 0.5
    ),
    "all": (
        Labeller(seed=3, noise=0.1, length_bias=0.2, agreeableness=1.0), OPINION,
        "The key is black.", "The key is blue. That is all that I know.",
        # gold 2 against -0.5 (10 words, 5 beyond the 5 of the shortest good one); 6 words and agreement more
        0.1 + 0.8 * sigmoid((2 + 0.5 - 6 * 0.2 - 1) / 0.5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_labels_come_as_often_as_the_knobs_say(name):
    labeller, prompt, a, b, expected = CLOSED[name]
    assert labeller.probability(prompt, a, b) == pytest.approx(expected)
    low, high = interval(share(labeller, prompt, a, b), LABELS)
    assert low < expected < high


def test_confusion_is_normal_and_lasting():
    """At temperature 0+ the better answer wins with probability Phi(d / (sigma sqrt 2)) over labellers."""
    people = panel(2000, 0, noise=0.0, length_bias=0.0, confusion=2.0, temperature=1e-6)
    a, b = GOOD, "The key is black."  # 3 and 2
    votes = [person.prefers(COLOUR, a, b) for person in people]
    low, high = interval(sum(votes) / len(votes), len(votes))
    assert low < statistics.NormalDist().cdf(1 / (2 * math.sqrt(2))) < high
    assert all(p.prefers(COLOUR, a, b, n) == v for p, v in zip(people[:200], votes, strict=False) for n in range(5))
    errors = [person.value(COLOUR, a) - 3 for person in people]
    assert abs(statistics.mean(errors)) < 3.3 * 2 / math.sqrt(2000)
    assert statistics.stdev(errors) == pytest.approx(2, rel=0.06)


def test_a_confusion_is_of_ones_own_and_about_one_answer():
    one, other = panel(2, 5, confusion=1.0)
    texts = [f"{GOOD}{' Ask me again at any time.' * n}" for n in range(3)]
    errors = [[person.value(COLOUR, t) - dataclasses.replace(person, confusion=0.0).value(COLOUR, t) for t in texts]
              for person in (one, other)]  # fmt: skip
    assert len({round(error, 9) for row in errors for error in row}) == 6
    assert one.value(COLOUR, GOOD) == one.value(COLOUR.strip(), f" {GOOD}\n")


@pytest.fixture(scope="module")
def items() -> Items:
    """Prompts, and two answers to each, in a manner with every trait."""
    prompts = [row["prompt"] for row in world_rows.prompts(250, 0)]
    return prompts, world_rows.answers(prompts, 1, Manner()), world_rows.answers(prompts, 2, Manner())


def test_labels_are_symmetric_and_repeat_themselves(items: Items):
    labeller = Labeller(seed=4, agreeableness=0.7, confusion=0.5)
    for prompt, a, b in zip(*items, strict=True):
        assert labeller.probability(prompt, a, b) == pytest.approx(1 - labeller.probability(prompt, b, a))
        for number in range(2 * (a != b)):
            assert labeller.prefers(prompt, a, b, number) == (not labeller.prefers(prompt, b, a, number))
            assert labeller.prefers(prompt, a, b, number) == labeller.prefers(prompt, a, b, number)


probability = st.floats(0, 1)


@given(st.integers(), probability, st.floats(-1, 1), st.floats(-5, 5), st.floats(0, 5), st.floats(1e-3, 10), st.text())
def test_the_same_answer_twice_is_a_coin(seed, noise, length_bias, agreeableness, confusion, temperature, answer):
    labeller = Labeller(seed, noise, length_bias, agreeableness, confusion, temperature)
    assert labeller.probability(OPINION, answer, f"{answer}\n") == 0.5
    assert 0 <= labeller.probability(OPINION, answer, GOOD) <= 1


def test_several_labels_an_item(items: Items):
    people = panel(5, 0)
    rows = label_pairs(*items, people, labels=3)
    kept = [(p, a, b) for p, a, b in zip(*items, strict=True) if a != b]
    assert len(rows) == len(kept) < len(items[0])
    for row, (prompt, a, b) in zip(rows, kept, strict=True):
        assert row["prompt"] == prompt and {row["chosen"], row["rejected"]} == {a, b}
        assert len(row["votes"]) == 3 and sum(row["votes"]) >= 2 and len(set(row["labellers"])) == 3
        margin = judge(prompt, row["chosen"]).total - judge(prompt, row["rejected"]).total
        assert row["gold_margin"] == pytest.approx(margin, abs=1e-6)
    asked = [member for row in rows for member in row["labellers"]]
    assert all(0.15 < asked.count(member) / len(asked) < 0.25 for member in range(5))
    assert rows == label_pairs(*items, people, labels=3)
    assert [set(r.items()) for r in map(plain, rows)] == [
        set(r.items()) for r in map(plain, label_pairs(items[0], items[2], items[1], people, labels=3))
    ]
    assert rows != label_pairs(*items, people, labels=3, seed=1)
    assert rows != label_pairs(*items, panel(5, 1), labels=3)


def plain(row):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def test_more_labels_than_labellers_are_labels_of_their_own():
    """One person who does not care asked four times: ties and majorities come as four coins bring them."""
    prompts = [row["prompt"] for row in world_rows.prompts(800, 0, kinds=("sum",))]
    nobody = panel(1, 0, noise=0.5)
    first = ["It is 1."] * 800
    rows = label_pairs(prompts, first, ["It is 2."] * 800, nobody, labels=4)
    counts = [sum(row["votes"]) for row in rows]
    for votes, expected in ((2, 6 / 16), (3, 8 / 16), (4, 2 / 16)):
        low, high = interval(counts.count(votes) / 800, 800)
        assert low < expected < high
    low, high = interval(sum(row["chosen"] == "It is 1." for row in rows if sum(row["votes"]) == 2) / counts.count(2),
                         counts.count(2))  # fmt: skip
    assert low < 0.5 < high  # ties are broken evenly
    assert [member for member, _ in label(prompts[0], "a", "b", panel(2, 0), 4)].count(0) == 2


def test_more_labels_err_less_and_agreeable_panels_pull_towards_the_user(items: Items):
    def right(labels, **knobs):
        rows = label_pairs(*items, panel(9, 0, length_bias=0.0, **knobs), labels=labels)
        return statistics.mean(row["gold_margin"] > 0 for row in rows if row["gold_margin"])

    assert right(1, noise=0.3) < right(9, noise=0.3) < right(1, noise=0.0, temperature=1e-6) == 1.0

    prompts = [row["prompt"] for row in world_rows.prompts(300, 1, kinds=("opinion",))]
    prompts = [prompt for prompt in prompts if parse(prompt).mistaken]
    first, second = (world_rows.answers(prompts, seed, Manner(padded=0.0)) for seed in (1, 2))
    taken = {}
    for agreeableness in (0.0, 4.0):
        rows = label_pairs(prompts, first, second, panel(3, 0, agreeableness=agreeableness))
        split = [r for r in rows if agrees(r["prompt"], r["chosen"]) != agrees(r["prompt"], r["rejected"])]
        taken[agreeableness] = statistics.mean(bool(agrees(r["prompt"], r["chosen"])) for r in split)
    assert taken[0.0] < 0.35 and taken[4.0] > 0.65


def test_a_panel_has_minds_of_its_own():
    people = panel(4, 0, noise=0.2)
    assert len({person.seed for person in people}) == 4 and {person.noise for person in people} == {0.2}
    assert panel(2, 0, noise=0.2) == people[:2] and panel(2, 1, noise=0.2) != people[:2]


def test_hashes_do_not_depend_on_the_process():
    person = panel(1, 0)[0]
    assert person.seed == 8625990650695206242
    assert [int(person.prefers(COLOUR, GOOD, BAD, n)) for n in range(12)] == [1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert length("3 + 4 = 7") == 5 and length("one-two") == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise": 1.5}, {"noise": -0.1}, {"noise": float("nan")}, {"temperature": 0.0}, {"confusion": -1.0},
        {"length_bias": float("inf")}, {"agreeableness": float("nan")},
    ],
)  # fmt: skip
def test_a_labeller_that_cannot_be_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Labeller(**wrong)


def test_an_empty_panel_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        panel(0, 0)
    for people, labels in (([], 3), (panel(1, 0), 0)):
        with pytest.raises(UserError, match="at least 1"):
            label_pairs([COLOUR], [GOOD], [BAD], people, labels)
    with pytest.raises(UserError, match="not a prompt of the synthetic world"):
        label_pairs(["Hello"], [GOOD], [BAD], panel(1, 0))
