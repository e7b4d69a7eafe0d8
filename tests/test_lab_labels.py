"""The studies of labels: noise, tastes, and rankings against pairs."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax import fields
from rlhf_jax.config import Config
from rlhf_jax.data import labellers, world
from rlhf_jax.lab.studies import kwise, noise, tastes

PROMPT = "Where is the key?\n"
RIGHT, WRONG, PADDED = (
    "The key is in the cellar.",
    "The key is in the hall.",
    "Sure! The key is in the cellar. That is all.",
)


# Noise


@pytest.mark.parametrize("method", noise.METHODS)
def test_every_method_is_told_what_the_page_says(method):
    knobs = noise.Knobs(steps=40, beta=0.5, looser=0.125)
    for level in noise.LEVELS[method]:
        changes = noise.changes_of(method, level, knobs)
        config = fields.replace(Config(), changes)
        assert config.loss.beta == (0.125 if method == "looser" else 0.5)
        assert config.loss.label_smoothing == (level if method in noise.SAME else None)
        if method == "one pass":
            assert config.train.steps == 10


def test_without_noise_what_is_told_of_it_is_dpo():
    for method in noise.SAME:
        assert noise.named(method, 0.0) == noise.named("dpo", 0.0)
        assert noise.named(method, 0.4) == f"{method} 40%"


def test_the_share_of_right_labels_leaves_ties_out():
    rows = [{"gold_margin": margin} for margin in (1.0, -0.1, 0.0, 2.0, 0.0)]
    assert noise.right(rows) == pytest.approx(200 / 3)


# Tastes


def test_the_groups_lean_as_far_to_either_side_of_gold_without_a_price_of_words():
    many, few = tastes.groups(3, tastes.Knobs(taste=0.25))
    for group, lean in ((many, 0.25), (few, -0.25)):
        for one in group:
            short, long = (one.value(PROMPT, text) for text in ("Sure! " + RIGHT, "Sure! " + RIGHT + " That is all."))
            assert long - short == pytest.approx(3 * lean)
    assert len({one.seed for one in many + few}) == 10  # slips of their own


@pytest.mark.parametrize("share", [0.0, 0.2, 0.25, 0.5, 1.0])
def test_the_minority_has_its_share_spread_evenly(share):
    here = tastes.parted(200, share)
    assert here.sum() == 200 * share
    assert {int(part.sum()) for part in np.split(here, 10)} <= {int(20 * share), round(20 * share)}


def test_pooled_rows_are_labelled_by_whose_turn_it_is():
    many, few = ([{"chosen": f"{who}{place}"} for place in range(10)] for who in "ab")
    told = [row["chosen"] for row in tastes.pooled(many, few, 0.2)]
    assert told == ["a0", "a1", "a2", "a3", "b4", "a5", "a6", "a7", "a8", "b9"]


def test_scores_decide_which_answer_is_chosen():
    pairs = [{"prompt": PROMPT, "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(3)]
    told = tastes.by_scores(pairs, np.array([[1.0, 0.5], [0.25, 0.25], [-2.0, -1.0]]))
    assert [(row["chosen"], row["rejected"]) for row in told] == [("c0", "r0"), ("r2", "c2")]


def test_gains_and_regrets_against_the_groups_own_models():
    value = lambda many, few: (
        {tastes.MANY: many, tastes.FEW: few} | dict.fromkeys((tastes.GOLD, tastes.WORDS, tastes.KL), 0.0)
    )
    raw = {
        tastes.START: value(1.0, -2.0), tastes.OWN_MANY: value(3.0, -3.0), tastes.OWN_FEW: value(0.5, -0.5),
        tastes.POOLED: value(2.5, -2.25),
    }  # fmt: skip
    told = tastes.figures_of(raw[tastes.POOLED], raw, 0.25)
    assert (told[tastes.MANY], told[tastes.FEW], told[tastes.WORSE]) == (1.5, -0.25, -0.25)
    assert told[tastes.AVERAGE] == pytest.approx(0.75 * 1.5 - 0.25 * 0.25)
    assert (told[tastes.LOST_MANY], told[tastes.LOST_FEW], told[tastes.GAP]) == (0.5, 1.75, 1.25)
    both = tastes.served([raw[tastes.OWN_MANY] | {tastes.GOLD: 1.0}, raw[tastes.OWN_FEW] | {tastes.GOLD: 2.0}], 0.25)
    assert (both[tastes.MANY], both[tastes.FEW], both[tastes.GOLD]) == (3.0, -0.5, 1.25)


# Rankings and pairs


def test_the_first_two_different_answers_are_compared_as_they_are_ranked():
    row = {"prompt": PROMPT, "completions": [WRONG, WRONG, RIGHT, PADDED], "ranks": [2.0, 2.0, 1.0, 0.0]}
    assert kwise.first_two([row]) == [{"prompt": PROMPT, "chosen": RIGHT, "rejected": WRONG}]


def test_comparisons_are_what_labels_tell_apart():
    ranking = {"ranks": [2.0, 2.0, 1.0, 0.0]}
    assert kwise.comparisons([ranking, {"chosen": RIGHT, "rejected": WRONG}]) == 5 + 1


def test_a_reward_model_is_judged_on_pairs_of_different_gold_and_on_what_it_picks():
    worth = np.array([[2.0, 0.0, 0.0], [1.0, 3.0, 2.0]])
    scores = np.array([[0.5, 0.4, 0.5], [0.0, 1.0, 2.0]])  # right, a tie; right, right, wrong
    told = kwise.judged(scores, worth)
    assert told[kwise.ACCURACY] == pytest.approx(100 * 3.5 / 5)
    assert kwise.judged(scores[1:], worth[1:])[kwise.PICKED] == 2.0
    assert kwise.judged(worth, worth) == {kwise.ACCURACY: 100.0, kwise.PICKED: 2.5}


def test_all_conditions_hold_the_same_rankings():
    asked = [f"Where is the {thing}?\n" for thing in list(world.FACTS)[:12]]
    texts = [
        [f"The {p.split()[-1][:-2]} is in the {place}." for place in ("hall", "attic", "cellar", "shed")] for p in asked
    ]
    rows = kwise.rows_of(asked, texts, labellers.panel(5, 0), 0)
    whole = rows[kwise.PL]
    assert all(rows[name] is whole for name in (kwise.ALL, kwise.APART)) and len(whole) == 12
    assert rows[kwise.HALF] == whole[:6]
    assert kwise.comparisons(rows[kwise.PAIRS]) == len(whole)


@pytest.mark.parametrize("name", [name for name in kwise.STUDY.conditions if name != kwise.START])
def test_updates_read_as_many_answers(name):
    config = fields.replace(Config(), dict(kwise.way(name)))
    assert config.train.batch_size * (2 if config.loss.name == "bradley_terry" else kwise.ANSWERS) == 64


@pytest.mark.parametrize("study", [noise.STUDY, tastes.STUDY, kwise.STUDY], ids=lambda study: study.name)
def test_claims_and_remedies_name_what_the_study_declares(study):
    for claim in study.phenomena:
        assert claim.measure in study.measures and {claim.condition, claim.than} <= {*study.conditions, None}
    for remedy in study.remedies:
        assert {remedy.measure, *remedy.prices} <= {*study.measures}
        assert {remedy.condition, remedy.than} <= {*study.conditions}
    assert dataclasses.is_dataclass(study.knobs)
