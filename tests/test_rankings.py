"""Rankings: the law that simulated people follow, rows that others can fill in, and how agreement is counted."""

import itertools
import json
import math
import pathlib
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import formats, labellers, sources, world_rows
from rlhf_jax.data.labellers import Labeller, panel
from rlhf_jax.data.rows import Message, Ranking, Refusal
from rlhf_jax.data.world import Manner, judge
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.rankings import (
    agreement,
    blank_rankings,
    concordance,
    kendall_w,
    rank_answers,
    read_rankings,
)

COLOUR = "What colour is the key?\n"  # black
GOOD, PLAIN, BAD = "Sure! The key is black.", "The key is black.", "Ugh. The key is red."
TEXTS = (PLAIN, GOOD, f"{GOOD} I hope that this helps you.", BAD)
RANKINGS = 4000
Items = tuple[list[str], list[list[str]]]


def near(share: float, expected: float, count: int) -> bool:
    """Within 4 standard errors of a share."""
    return abs(share - expected) < 4 * math.sqrt(max(expected * (1 - expected), 1 / count) / count)


# One person


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_each_two_answers_are_ordered_as_labels_of_the_two_are(noise):
    person = Labeller(seed=2, noise=noise, agreeableness=1.0, confusion=0.5, temperature=0.8)
    drawn = np.array([person.ranks(COLOUR, TEXTS, label) for label in range(RANKINGS)])
    for i, j in itertools.combinations(range(len(TEXTS)), 2):
        share = (drawn[:, i] < drawn[:, j]).mean()
        assert near(share, person.probability(COLOUR, TEXTS[i], TEXTS[j]), RANKINGS)


def test_whole_orders_come_as_often_as_plackett_and_luce_say():
    """Chi-squared of the 6 orders of three answers, turned ones mixed in: below its 99.9% point at 5 degrees."""
    texts, noise = TEXTS[:3], 0.2
    person = Labeller(seed=1, noise=noise, length_bias=0.02, temperature=0.7)
    weight = [math.exp(person.value(COLOUR, text) / person.temperature) for text in texts]
    luce: dict[tuple[int, ...], float] = {
        (a, b, c): weight[a] / sum(weight) * weight[b] / (weight[b] + weight[c])
        for a, b, c in itertools.permutations(range(3))
    }
    counts = dict.fromkeys(luce, 0)
    for label in range(RANKINGS):
        ranks = person.ranks(COLOUR, texts, label)
        a, b, c = sorted(range(3), key=ranks.__getitem__)
        counts[a, b, c] += 1
    expected = {order: (1 - noise) * luce[order] + noise * luce[order[::-1]] for order in luce}
    assert min(expected.values()) * RANKINGS > 20
    squared = sum((counts[o] - RANKINGS * expected[o]) ** 2 / (RANKINGS * expected[o]) for o in luce)
    assert squared < 20.52


@given(st.permutations(TEXTS), st.integers(0, 999), st.integers(0, 3))
def test_the_order_of_answers_is_no_matter_and_fewer_are_ranked_as_before(texts, label, seed):
    person = Labeller(seed=seed, noise=0.3)
    places = dict(zip(TEXTS, person.ranks(COLOUR, TEXTS, label), strict=True))
    assert sorted(places.values()) == [0.0, 1.0, 2.0, 3.0]
    assert person.ranks(COLOUR.strip(), [f" {text}\n" for text in texts], label) == tuple(map(places.get, texts))
    left = texts[:2]
    assert (places[left[0]] < places[left[1]]) == (person.ranks(COLOUR, left, label) == (0.0, 1.0))


def test_equal_texts_rank_equally():
    for label in range(20):
        a, b, again, c = Labeller().ranks(COLOUR, (GOOD, BAD, f"{GOOD} ", PLAIN), label)
        assert a == again and sorted((a, b, c)) == [0.0, 1.0, 2.0]
    assert Labeller().ranks(COLOUR, ("x", "x")) == (0.0, 0.0)


def test_rankings_do_not_depend_on_the_process():
    person = panel(1, 0)[0]
    assert [person.ranks(COLOUR, TEXTS, label) for label in range(3)] == FIRST


FIRST = [(2.0, 0.0, 1.0, 3.0), (2.0, 1.0, 0.0, 3.0), (2.0, 0.0, 1.0, 3.0)]


# Rows


@pytest.fixture(scope="module")
def items() -> Items:
    """Prompts, and four answers to each."""
    prompts = [row["prompt"] for row in world_rows.prompts(120, 0)]
    drawn = [world_rows.answers(prompts, seed, Manner()) for seed in range(4)]
    return prompts, [list(texts) for texts in zip(*drawn, strict=True)]


def test_rows_say_who_ranked_what_and_its_gold(items: Items):
    prompts, answers = items
    people = panel(5, 0)
    rows = rank_answers(*items, people, labels=3)
    kept = [(p, texts) for p, texts in zip(prompts, answers, strict=True) if len(set(texts)) > 1]
    assert [(r["prompt"], r["completions"]) for r in rows] == [item for item in kept for _ in range(3)]
    for start in range(0, len(rows), 3):
        assert len({row["labeller"] for row in rows[start : start + 3]}) == 3
    for row in rows:
        assert row["gold"] == pytest.approx([judge(row["prompt"], text).total for text in row["completions"]], abs=1e-6)
        assert formats.adapt("ranking", row, False) == (
            Ranking(row["prompt"], tuple(row["completions"]), tuple(row["ranks"])),
        )
    asked = [row["labeller"] for row in rows]
    assert all(0.1 < asked.count(member) / len(asked) < 0.3 for member in range(5))
    assert json.loads(json.dumps(rows)) == rows == rank_answers(*items, people, labels=3)
    assert rows != rank_answers(*items, people, labels=3, seed=1) != rank_answers(*items, panel(5, 1), labels=3, seed=1)


def test_nobody_is_asked_twice_before_all_were_asked_once(items: Items):
    prompts, answers = items[0][:20], items[1][:20]
    rows = rank_answers(prompts, answers, panel(3, 0, noise=0.5), labels=7)
    turns = [[row["labeller"] for row in rows[start : start + 7]] for start in range(0, len(rows), 7)]
    assert all(set(turn[:3]) == set(turn[3:6]) == {0, 1, 2} and turn[:3] == turn[3:6] for turn in turns)
    assert any(rows[i]["ranks"] != rows[i + 3]["ranks"] for i in range(0, len(rows), 7))  # another label of the same


def test_what_cannot_be_ranked_is_left_out():
    answers = [["x", "x "], ["x", "", " "], ["x", "", "y", "x"]]
    prompts = [COLOUR, COLOUR, COLOUR]
    (row,) = rank_answers(prompts, answers, panel(1, 0), labels=1)
    assert row["completions"] == ["x", "y", "x"] and row["ranks"][0] == row["ranks"][2]
    (blank,) = blank_rankings(prompts, answers)
    assert blank == {"prompt": COLOUR, "completions": ["x", "y", "x"], "ranks": None, "labeller": None}


def test_a_conversation_is_asked_by_its_last_user():
    said = (Message("system", "Be kind."), Message("user", COLOUR.strip()))
    (row,), (plain,) = (rank_answers([prompt], [TEXTS], panel(1, 0), labels=1) for prompt in (said, COLOUR))
    assert row == plain | {"prompt": [turn.fields for turn in said]}
    (made,) = formats.adapt("ranking", row, True)
    assert isinstance(made, Ranking) and made.prompt == said
    assert made.completions[0] == (Message("assistant", TEXTS[0]),)
    (blank,) = blank_rankings([said], [["a", "b"]], ['[{"name": "f"}]'])
    assert blank["tools"] == [{"name": "f"}]


@pytest.mark.parametrize(
    ("people", "labels", "prompt", "says"),
    [
        (0, 3, COLOUR, "3 labels an item by 0 labellers; both must be at least 1"),
        (2, 0, COLOUR, "0 labels an item by 2 labellers"),
        (2, 1, "Hello", "'Hello' is not a prompt of the synthetic world"),
        (2, 1, (Message("system", "x"),), "'' is not a prompt of the synthetic world"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(people, labels, prompt, says):
    with pytest.raises(UserError, match=says):
        rank_answers([prompt], [["a", "b"]], panel(people, 0) if people else [], labels)


def test_rows_of_people_are_read_and_blank_ones_are_refused(tmp_path: pathlib.Path):
    rows = blank_rankings(["Q\n"], [["a", "b"]])
    file = tmp_path / "rankings.jsonl"
    filled = [rows[0] | {"ranks": ranks, "labeller": name} for ranks, name in (([1, 2], "ann"), ([2, 2], "bob"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in filled))
    assert read_rankings(file) == filled
    for bad, says in (
        ({"ranks": None}, "rankings.jsonl:3 has no ranks; fill them in"),
        ({"ranks": [1]}, "rankings.jsonl:3 can't be used .2 'completions' but 1 'ranks'.; mend it"),
        ({"ranks": [1, "x"]}, "rankings.jsonl:3 can't be used"),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in (*filled, rows[0] | bad)))
        with pytest.raises(UserError, match=says):
            read_rankings(file)


def test_training_takes_no_blank_row_for_a_ranking(tmp_path: pathlib.Path):
    """What is null is no column; a file of blank rows alone holds prompts and nothing to rank."""
    file = tmp_path / "blank.jsonl"
    rows = blank_rankings(["Q\n", "R\n"], [["a", "b"]] * 2)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (record, other) = sources.read(str(file))
    assert isinstance(record, sources.Record) and isinstance(other, sources.Record)
    with pytest.raises(Refusal, match="no column 'ranks'"):
        formats.adapt("ranking", record.columns, False)
    with pytest.raises(Refusal, match="'ranks' is not a list with entries"):
        formats.adapt("ranking", rows[0], False)
    with pytest.raises(UserError, match="has no column 'ranks', which the format 'ranking' needs"):
        formats.check("ranking", [record.columns, other.columns], str(file))


# Agreement


def ranked(*rankings, prompt="Q", who=None):
    """Rows of one prompt with answers a, b, c..."""
    names = who or range(len(rankings))
    return [
        {"prompt": prompt, "completions": list("abcdefg"[: len(r)]), "ranks": list(r), "labeller": name}
        for r, name in zip(rankings, names, strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ranked((0, 1, 2), (5, 6, 9)), 1.0),
        (ranked((0, 1, 2), (2, 1, 0)), 0.0),
        (ranked((0, 1, 2), (0, 2, 1)), 2 / 3),
        (ranked((0, 1, 2), (0, 1, 2), (0, 2, 1)), (3 + 2 + 2) / 9),
        (ranked((0, 1), (1, 1)), 0.0),  # one of them says that they are equal
        (ranked((1, 1), (0, 0)), 1.0),
        (ranked((0, 1, 2), (0, 2, 1)) + ranked((0, 1), (0, 1), prompt="R"), 3 / 4),  # over pairs, not over prompts
        (ranked((0, 1), (1, 0), (0, 1), who=("x", "x", "y")), 1 / 2),  # nobody agrees with himself
        (ranked((0, 1), (1, 0), who=(None, None)), 0.0),  # unnamed ones are of different people
    ],
)
def test_agreement_of_cases_made_by_hand(rows, expected):
    assert agreement(rows) == pytest.approx(expected)


def test_answers_are_matched_by_their_text():
    one, other = ranked((0, 1, 2), (0, 1, 2))
    other |= {"completions": ["c", "b ", "a"], "ranks": [2, 1, 0]}
    assert agreement([one, other]) == concordance([one, other]) == 1.0
    twice = [
        row | {"completions": ["a", "a", "b"], "ranks": ranks} for row, ranks in ((one, [0, 0, 1]), (other, [1, 1, 0]))
    ]
    assert agreement(twice) == concordance(twice) == 0.0  # a and its copy are not compared
    assert math.isnan(agreement([one])) and math.isnan(concordance([one])) and math.isnan(concordance([]))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([[1, 2, 3, 4]] * 3, 1.0),
        ([[1, 2, 3], [2, 3, 1], [3, 1, 2]], 0.0),
        # Sums 5, 5, 8: S = 6, m = 3, n = 3: 12 * 6 / (9 * 24)
        ([[1, 2, 3], [2, 1, 3], [2, 1, 3], [1, 2, 3]], 12 * 24 / (16 * 24)),
        ([[1, 2, 3], [2, 1, 3], [2, 3, 1]], 12 * 2 / (9 * 24)),
        # Places 1, 2, 3 and 1.5, 1.5, 3: S = 1.5^2 + 0.5^2 + 2^2 = 6.5, T = 2^3 - 2 = 6
        ([[1, 2, 3], [7, 7, 8]], 12 * 6.5 / (4 * 24 - 2 * 6)),
    ],
)
def test_kendalls_w_of_cases_made_by_hand(ranks, expected):
    assert kendall_w(np.array(ranks)) == pytest.approx(expected)


def textbook(ranks):
    """W from sums of mean places and the correction for ties, in whole loops."""
    m, n = len(ranks), len(ranks[0])
    places = [[sum(y < x for y in row) + (1 + sum(y == x for y in row)) / 2 for x in row] for row in ranks]
    sums = [sum(column) for column in zip(*places, strict=True)]
    deviation = sum((s - statistics.mean(sums)) ** 2 for s in sums)
    ties = sum(row.count(x) ** 3 - row.count(x) for row in ranks for x in set(row))
    below = m**2 * (n**3 - n) - m * ties
    return 12 * deviation / below if below else math.nan


@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=2)))
def test_kendalls_w_is_the_textbooks(ranks):
    w = kendall_w(np.array(ranks))
    assert w == pytest.approx(textbook(ranks), nan_ok=True)
    assert math.isnan(w) or -1e-9 <= w <= 1 + 1e-9


def test_people_agree_as_often_as_their_probabilities_say(items: Items):
    """Two people with the same tastes agree on a, b with the probability p^2 + (1 - p)^2."""
    people = panel(2, 3, noise=0.1, temperature=1.0)
    rows = rank_answers(*items, people, labels=2)
    expected = []
    for row in rows[::2]:
        for a, b in itertools.combinations(sorted(set(row["completions"])), 2):
            p = people[0].probability(row["prompt"], a, b)
            expected.append(p * p + (1 - p) ** 2)
    # Six pairs of a prompt are not independent: as if the prompts were all that is counted.
    assert abs(agreement(rows) - statistics.mean(expected)) < 4 * math.sqrt(0.25 / (len(rows) / 2))


def test_coins_agree_by_half_and_have_a_w_of_one_over_their_number(items: Items):
    rows = rank_answers(*items, panel(3, 0, noise=0.5), labels=3)
    assert abs(agreement(rows) - 0.5) < 0.1
    assert abs(concordance(rows) - 1 / 3) < 0.1
    sure = rank_answers(*items, panel(3, 0, noise=0.0, temperature=1e-6), labels=3)
    assert agreement(sure) > 0.97 and concordance(sure) > 0.97  # some answers are worth the same, and coins decide


def test_who_is_asked_of_pairs_is_as_it_was():
    assert labellers.asked((COLOUR.strip(), "a", "b"), 5, 3, 0) == ASKED


ASKED = [(4, 578058148263401316), (0, 578058148263401316), (3, 578058148263401316)]
