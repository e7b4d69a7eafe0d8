"""The study of DPO and PPO: its pairs off the policy, the price that it notes, and what its pictures are made of."""

import time
from collections.abc import Sequence

import pytest
from etils import epath

from rlhf_jax.data import world, world_rows
from rlhf_jax.data.world import Manner
from rlhf_jax.lab.studies import direct
from rlhf_jax.lab.study import Seen

PROMPTS = [row["prompt"] for row in world_rows.prompts(200, 3)]


def seen(seed: int, gold: float, kl: float, curves: Sequence[tuple[float, float]] = ()) -> Seen:
    figures = {name: {direct.GOLD: gold, direct.KL: kl} for name in direct.CONDITIONS}
    way = {"x": [x for x, _ in curves], "y": [y for _, y in curves]}
    return Seen(seed, 1.0, figures, {direct.PPO: way} if curves else {})


def test_people_give_two_different_answers_of_their_manner() -> None:
    first, second = direct.off_policy(PROMPTS, 5, Manner(right=1.0, rude=0.0, agree=0.0))
    assert len(first) == len(second) == len(PROMPTS)
    assert all(a != b for a, b in zip(first, second, strict=True))
    for prompt, a, b in zip(PROMPTS, first, second, strict=True):
        assert world.judge(prompt, a).correct == world.judge(prompt, b).correct == 1
    assert (first, second) == direct.off_policy(PROMPTS, 5, Manner(right=1.0, rude=0.0, agree=0.0))
    assert first != direct.off_policy(PROMPTS, 6, Manner(right=1.0, rude=0.0, agree=0.0))[0]


def test_a_mixture_takes_every_second_pair_and_no_prompt_twice() -> None:
    own = [{"prompt": name, "from": "own"} for name in "abcde"]
    others = [{"prompt": name, "from": "people"} for name in "abcd"]
    found = direct.mixed(own, others)
    assert [row["prompt"] for row in found] == ["a", "b", "c", "d"]
    assert [row["from"] for row in found] == ["own", "people", "own", "people"]


def test_what_was_trained_keeps_its_price(tmp_path: epath.Path) -> None:
    def work() -> str:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
        return "made"

    made, paid = direct.timed(epath.Path(tmp_path), "one", work)
    assert made == "made" and 0.05 <= paid < 1
    assert direct.timed(epath.Path(tmp_path), "one", lambda: "again") == ("again", paid)


def test_a_way_has_the_points_of_every_seed_and_ends_with_the_longest() -> None:
    seeds = [seen(0, 1.0, 0.5, [(0.1, 0.8), (0.2, 0.9)]), seen(1, 1.0, 0.5, [(0.3, 0.7)]), seen(2, 1.0, 0.5)]
    assert direct.way(seeds, direct.PPO) == [("", [(0.1, 0.8), (0.3, 0.7)]), ("", [(0.2, 0.9)])]


def test_the_frontier_draws_gold_over_kl() -> None:
    drawn = direct.frontier([seen(0, 1.0, 0.5, [(0.1, 0.8)]), seen(1, 2.0, 0.25, [(0.2, 0.9)])])
    assert drawn.curves["dpo, two rounds"][1] == ("", [(0.5, 1.0), (0.25, 2.0)])
    assert drawn.curves[direct.PPO] == [("", [(0.5, 1.0), (0.25, 2.0)])] * 2


@pytest.mark.parametrize("name", sorted(direct.pictures([seen(0, 1.0, 0.5, [(0.1, 0.8)])])))
def test_no_picture_is_empty(name: str) -> None:
    drawn = direct.pictures([seen(0, 1.0, 0.5, [(0.1, 0.8)])])[name]
    assert all(points for spots in drawn.curves.values() for _, points in spots)
    assert list(direct.pictures([seen(0, 1.0, 0.5)])) == ["frontier", "gold"]  # no run, no way


def test_claims_and_remedies_name_what_is_measured() -> None:
    study = direct.STUDY
    for one in (*study.phenomena, *study.remedies):
        assert {one.condition, one.than} <= set(study.conditions) and one.measure in study.measures
    assert all(set(one.prices) <= set(study.measures) for one in study.remedies)
    assert set(direct.CONDITIONS) == set(study.conditions)
