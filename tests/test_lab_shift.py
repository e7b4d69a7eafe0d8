"""The study of shift: pairs, doubts and win rates against hand-made cases and counts over all pairs."""

import itertools
import json

import numpy as np
import pytest
from etils import epath

from rlhf_jax.data import world, world_rows
from rlhf_jax.data.labellers import Labeller
from rlhf_jax.lab import comparisons
from rlhf_jax.lab.findings import found, mended
from rlhf_jax.lab.studies import shift
from rlhf_jax.lab.study import Seen

PROMPTS = ["Where is the key?\n", "Who has the key?\n"]
TEXTS = [
    ["Sure! The key is in the cellar.", "The key is in the hall.", "Sure! The key is in the cellar. "],
    ["Ugh. Dan has the key.", "Dan has the key.", "Eva has the key."],
]
PERSON = Labeller(noise=0.1, length_bias=0.0, temperature=0.5)


def pairs() -> comparisons.Pairs:
    return comparisons.pairs_of(PROMPTS, TEXTS, PERSON)


# ---- comparisons


def test_all_pairs_of_different_texts_with_what_gold_and_people_make_of_them():
    made = pairs()
    assert list(zip(made.prompt, made.first, made.second, strict=True)) == [
        (0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 0, 2), (1, 1, 2),
    ]  # fmt: skip
    assert made.margin.tolist() == [3.0, -3.0, -1.0, 1.0, 2.0]
    chance = 0.1 + 0.8 / (1 + np.exp(-made.margin / 0.5))  # Bradley and Terry, a tenth turned round
    np.testing.assert_allclose(made.chance, chance, atol=1e-12)


def test_differences_are_of_the_pair_s_own_scores():
    scores = np.arange(12.0).reshape(2, 2, 3) ** 2
    made = pairs()
    expected = [[float(one[p, a] - one[p, b]) for p, a, b in zip(*made[:3], strict=True)] for one in scores]
    assert made.differences(scores).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    score, error = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.3
    told = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(score[error], score[~error])]
    assert comparisons.auroc(score, error) == pytest.approx(np.mean(told), abs=1e-12)
    assert np.isnan(comparisons.auroc(score, np.zeros(40, bool)))


def test_the_most_doubtful_are_left_out():
    doubt = np.random.default_rng(0).normal(size=50)
    keep = comparisons.kept(doubt, 0.3)
    assert keep.sum() == 35 and doubt[keep].max() < doubt[~keep].min()
    assert comparisons.kept(doubt, 0.0).all() and not comparisons.kept(doubt, 1.0).any()


def test_win_rates_are_over_every_two_answers_to_a_prompt():
    base = [["The key is in the hall."], ["Ugh. Dan has the key."]]
    told = [PERSON.probability(p, a, b[0]) for p, row, b in zip(PROMPTS, TEXTS, base, strict=True) for a in row]
    assert comparisons.won(PROMPTS, TEXTS, base, PERSON) == pytest.approx(np.mean(told))
    assert comparisons.won(PROMPTS, TEXTS, TEXTS, PERSON) == pytest.approx(0.5)
    scores = np.array([[0.0, 2.0], [1.0, -1.0]])
    assert comparisons.wins(scores, scores) == pytest.approx(0.5)
    expected = np.mean([1 / (1 + np.exp(-x)) for x in (0.0, 2.0, -2.0, 0.0)])
    assert comparisons.wins(scores, np.array([[0.0], [1.0]])) == pytest.approx(expected)


# ---- what is known of pairs


def test_a_reward_model_that_is_right_and_one_that_is_wrong():
    made = pairs()
    logit = np.log(made.chance / (1 - made.chance))
    right = shift.known(logit[None], made)
    assert right[shift.ACCURACY] == right[shift.CLEAR] == 1.0
    assert right[shift.ERROR] == pytest.approx(0, abs=1e-9) and right[shift.SURE] == pytest.approx(0, abs=1e-9)
    both = shift.known(np.stack([logit, -logit]), made)
    assert both[shift.ACCURACY] == 0.5
    confidence = np.maximum(made.chance, 1 - made.chance)
    assert both[shift.SURE] == pytest.approx(np.mean(2 * confidence - 1) / 2)  # the second says p where 1 - p is true


def test_doubts_by_hand():
    told = shift.doubts(np.array([[1.0, 3.0, -4.0], [1.0, -1.0, -2.0]]))
    assert told["disagreement"].tolist() == [0.0, 2.0, 1.0]
    assert told["closeness"].tolist() == [-1.0, -1.0, -3.0]
    assert told["ratio"].tolist() == [0.0, 2.0, pytest.approx(1 / 3)]


def test_silence_by_a_doubt_that_knows_the_errors_leaves_none():
    made = pairs()
    mean = np.array([2.0, -2.0, 2.0, 2.0, 2.0])  # wrong of the third alone
    spread = np.array([0.1, 0.1, 1.5, 0.1, 0.2])
    whole, rest = shift.abstaining(np.stack([mean + spread, mean - spread]), made, 0.2)
    assert whole[shift.WHOLE] == pytest.approx(0.8) and whole[shift.COVERAGE] == 1
    assert whole[shift.DOUBTS["disagreement"]] == whole[shift.DOUBTS["ratio"]] == 0.5
    assert whole[shift.DOUBTS["closeness"]] == 0  # all are as close
    assert rest["disagreement"] == rest["ratio"] == 1.0


# ---- rows


def test_training_pairs_are_of_the_four_answers_and_shuffled():
    texts = [["Dan has the key.", "Eva has the key.", "Ben has the key.", "Gia has the key."]]
    rows = shift.compare(["Who has the key?\n"], texts, [PERSON], 3)
    found_pairs = {frozenset((row["chosen"], row["rejected"])) for row in rows}
    assert found_pairs == {frozenset((texts[0][a], texts[0][b])) for a, b in shift.COMPARED}
    assert all(len(row["votes"]) == 1 for row in rows)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_shifted_prompts_are_of_their_split(split: world_rows.Split):
    asked = shift.shifted(40, 0, split)
    assert all(world.parse(prompt).shifted and world.held_out(prompt) == (split == "held_out") for prompt in asked)


def test_every_claim_and_remedy_is_of_what_is_measured():
    """A seed with every figure of the committed page leaves no claim and no remedy without a difference."""
    file = epath.Path(__file__).parent.parent / "docs" / "results" / "lab" / "shift.json"
    seeds = [Seen(**seed) for seed in json.loads(file.read_text())["seeds"]]
    assert all(one.difference is not None for one in found(shift.STUDY, seeds))
    assert all(one.difference is not None and None not in one.prices.values() for one in mended(shift.STUDY, seeds))
