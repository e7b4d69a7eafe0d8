"""The study of labels of steps and of results: what it reads in solutions, its rows, its picks and votes."""

import itertools

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.lab.studies import process
from rlhf_jax.lab.study import Seen

SUM = "What is 3 + 4 - 2?\n"
RIGHT, SLIP, BARE = "3 + 4 = 7, 7 - 2 = 5. It is 5.", "3 + 4 = 8, 8 - 2 = 6. It is 6.", "It is 5."
LUCKY = "3 + 4 = 8, 8 - 2 = 5. It is 5."  # two slips that take each other back


def test_the_result_is_the_only_number_outside_the_steps() -> None:
    assert [process.result(SUM, text) for text in (RIGHT, SLIP, BARE, LUCKY)] == ["5", "6", "5", "5"]
    assert process.result(SUM, "3 + 4 = 7, 7 - 2 = 5.") is None
    assert process.result(SUM, "It is 5 or 6.") is None
    assert process.result(SUM, "") is None


def test_steps_make_up_the_solution() -> None:
    assert process.steps_of(RIGHT) == ["3 + 4 = 7,", " 7 - 2 = 5.", " It is 5."]
    assert process.steps_of(" ") == ["."]


def test_the_same_solutions_are_judged_by_steps_and_by_results() -> None:
    rows = process.judged([SUM], [[RIGHT, LUCKY, RIGHT, SLIP, " "]])
    assert [row["labels"] for row in rows] == [[True, True, True], [False, False, False], [False, False, False]]
    assert [row["right"] for row in rows] == [True, True, False]
    told = process.outcomes(rows)
    assert [(row["completion"], row["label"]) for row in told] == [(RIGHT, True), (LUCKY, True), (SLIP, False)]
    assert process.judgements(rows) == 9


def test_what_solutions_are_worth() -> None:
    drawn = process.look([SUM], [[RIGHT, SLIP, BARE, LUCKY]])
    np.testing.assert_array_equal(drawn.right, [[1, 0, 1, 1]])
    # The bare result leaves a step out, so as a step it is wrong.
    np.testing.assert_array_equal(drawn.steps, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(drawn.lucky, [[0, 0, 1, 1]])


def test_the_best_of_n_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    scores, worth = rng.normal(size=(2, 5)), rng.integers(0, 2, (2, 5)).astype(float)
    for n in (1, 2, 4, 5):
        each = [
            worth[row][max(subset, key=lambda at, row=row: scores[row][at])]
            for row in range(2)
            for subset in itertools.combinations(range(5), n)
        ]
        assert process.best(scores, worth, n) == pytest.approx(np.mean(each), abs=1e-12)


def test_a_weighted_vote_counts_chances_and_not_solutions_without_a_result() -> None:
    assert process.weighted_vote(["4", "5", "5", None], np.log([0.5, 0.2, 0.2, 0.9])) == "4"
    assert process.weighted_vote(["4", "5", "5", None], np.log([0.3, 0.2, 0.2, 0.9])) == "5"
    assert process.weighted_vote([None, None], np.zeros(2)) is None
    drawn = process.look([SUM], [[RIGHT, SLIP, SLIP]])
    assert process.voted(drawn, np.log([[0.9, 0.2, 0.2]])) == {process.RIGHT: 1.0}
    assert process.voted(drawn, np.log([[0.3, 0.2, 0.2]])) == {process.RIGHT: 0.0}


def test_curves_end_where_the_tables_do() -> None:
    drawn = process.look([SUM] * 2, [[RIGHT, SLIP, SLIP, BARE], [SLIP, SLIP, SLIP, RIGHT]])
    scores = np.asarray([[0.4, 0.1, 0.2, 0.3], [0.4, 0.1, 0.2, 0.3]])
    curves = process.by_n(drawn, {process.PROCESS: scores}, 0)
    assert curves[process.PROCESS]["x"] == [1, 2, 4]
    assert curves[process.PROCESS]["y"][0] == pytest.approx(3 / 8)
    assert curves[process.PROCESS]["y"][-1] == process.picked(drawn, scores)[process.RIGHT] == 0.5
    # Two of four against two of four is a coin; three against one is lost.
    assert curves[process.VOTE]["y"][-1] == pytest.approx(0.25)


def test_pictures_hold_every_seed() -> None:
    seeds = [
        Seen(seed, 1.0, {process.ANY: {process.LUCKY: 0.1}}, {process.VOTE: {"x": [1, 2], "y": [0.3, 0.1 * seed]}})
        for seed in range(2)
    ]
    drawn = process.pictures(seeds[:1] + seeds[1:])
    assert drawn["right"].curves[process.VOTE] == [("", [(0.0, 0.3), (0.0, 0.3)]), ("", [(1.0, 0.0), (1.0, 0.1)])]
    assert list(drawn["right"].x_names) == ["1", "2"]


def test_fewer_solutions_than_the_tables_need_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4"):
        process.Knobs(samples=3)


def test_claims_and_remedies_name_what_is_measured() -> None:
    study = process.STUDY
    for one in (*study.phenomena, *study.remedies):
        assert {one.condition, one.than} <= set(study.conditions) and one.measure in study.measures
    assert all(set(one.prices) <= set(study.measures) for one in study.remedies)
