"""The study of over-optimisation: what it makes of runs, answers and scores, against hand-made ones; nothing trains."""

import itertools
import math

import numpy as np
import pytest

from rlhf_jax.data.labellers import Labeller
from rlhf_jax.errors import UserError
from rlhf_jax.lab import estimates, findings
from rlhf_jax.lab.studies import STUDIES
from rlhf_jax.lab.studies import overoptimisation as study
from rlhf_jax.lab.study import Seen

PROMPT = "What is 3 + 4?\n"
RIGHT, WRONG = "Sure! 3 + 4 = 7. It is 7.", "Ugh. 3 + 4 = 9. It is 9."


def run_of(gold, kl=None, halves=None, proxy=None, liked=None) -> study.Run:
    gold = np.asarray(gold, float)
    ramp = np.arange(len(gold), dtype=float)
    pick = lambda given, other: other if given is None else np.asarray(given, float)
    return study.Run(pick(kl, ramp), pick(halves, np.stack([gold, gold])), pick(proxy, ramp), pick(liked, gold))


# People, asked along the way


def test_people_like_good_answers_as_often_as_the_labeller_says_and_see_the_share_asked():
    texts = [f"{answer} {'x' * (i % 40)}{i}" for i in range(2000) for answer in (RIGHT,)]
    told = study.liked([PROMPT] * len(texts), texts)
    seen = [one for one in told if one is not None]
    assert len(seen) / len(texts) == pytest.approx(study.ASKED, abs=4 * (study.ASKED / len(texts)) ** 0.5)
    person = Labeller()
    expected = [
        0.15 + 0.7 / (1 + math.exp(-(person.value(PROMPT, text) - study.BAR) / 0.5))
        for text, one in zip(texts, told, strict=True)
        if one is not None
    ]
    assert np.mean(seen) == pytest.approx(np.mean(expected), abs=4 * 0.5 / len(seen) ** 0.5)


def test_people_say_the_same_of_the_same_answer_and_prefer_right_ones():
    prompts = [f"What is {a} + {b}?\n" for a, b in itertools.product(range(6), repeat=2)] * 20
    spaces = [" " * (i // 36) for i in range(len(prompts))]
    rate = lambda texts: np.mean([one for one in study.liked(prompts, texts) if one is not None])
    sums = [tuple(map(int, prompt[8:-2].split(" + "))) for prompt in prompts]
    right = [f"Sure! {a} + {b} = {a + b}. It is {a + b}." for a, b in sums]
    wrong = [f"Ugh. {a} + {b} = {a + b + 1}. It is {a + b + 1}." for a, b in sums]
    assert study.liked(prompts, right) == study.liked(prompts, [s + t for s, t in zip(spaces, right, strict=True)])
    assert rate(right) > 0.5 > rate(wrong)


# Along a run


def test_near_is_the_mean_of_three_moved_inwards_at_the_ends():
    values = np.asarray([0.0, 1.0, 2.0, 6.0, 7.0])
    assert [estimates.near(values, place) for place in range(5)] == [1, 1, 3, 5, 5]
    assert estimates.near(np.asarray([4.0, 6.0]), 1) == 5, "a run shorter than a window is one"
    assert estimates.near(np.asarray([1.0, math.nan, 3.0]), 1) == 2, "rollouts without a figure aren't counted"


def test_the_highest_place_is_that_of_the_highest_mean_not_of_one_lucky_rollout():
    assert estimates.highest(np.asarray([0, 5, 0, 0, 2, 3, 2, 0], float)) == 5
    assert estimates.highest(np.asarray([0, math.nan, 1, 3, 3, 4], float)) == 4, "no place is one that nobody saw"


def test_the_height_of_a_run_that_only_varies_by_chance_is_its_mean():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 2, 20))
    own = [estimates.height(halves) for halves in noise]
    naive = [max(estimates.near(halves.mean(axis=0), place) for place in range(20)) for halves in noise]
    error = float(np.std(own)) / len(own) ** 0.5
    assert abs(np.mean(own)) < 4 * error and np.mean(naive) > 0.5, "the usual maximum is far too high"


def test_a_height_is_found_where_there_is_one():
    gold = -((np.arange(11) - 6.0) ** 2)
    assert estimates.height(np.stack([gold, gold])) == pytest.approx(-2 / 3)


@pytest.mark.parametrize(("kl", "place"), [([0, 1, 2, 4, 2], 2), ([0, 1, 2], 2), ([5, 6], 0), ([0, 3.5, 0], 0)])
def test_the_stop_is_the_last_policy_before_the_kl_is_over_the_budget(kl, place):
    assert estimates.stopped(np.asarray(kl, float), 3.0) == place


def test_the_order_is_the_rank_correlation_with_the_place():
    assert estimates.order(np.asarray([0.1, 0.2, 5])) == pytest.approx(1)
    assert estimates.order(np.asarray([3.0, 2, 1])) == pytest.approx(-1)
    # Spearman's 1 - 6 sum of squared differences of ranks / (n (n^2 - 1)), of the places 1 to 4 and the ranks 1 3 2 4
    assert estimates.order(np.asarray([1.0, 7, 3, 9])) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_curves_are_fitted_as_far_as_they_reach_and_at_least_to_three_points():
    assert estimates.within([0, 1, 4, 2, 3], [5, 6, 7, 8, 9], 10.0) == ([0, 1, 2, 3], [5, 6, 8, 9])
    assert estimates.within([0, 5, 6, 7], [1, 2, 3, 4], 10.0) == ([0, 5, 6], [1, 2, 3])


def test_beyond_its_reach_gold_may_level_off():
    d = np.linspace(0, 8, 40)
    gained = np.where(d**2 <= study.REACH, d * (2 - d), -2.0)
    told = study.fitted("best_of", d.tolist(), gained.tolist())
    assert told[study.R2] == pytest.approx(1) and told[study.TURN] == pytest.approx(1) and told[study.ALL] < 0.7
    near = d**2 <= study.REACH
    other = estimates.fit("policy", d[near].tolist(), gained[near].tolist())
    assert told[study.OWN] == pytest.approx(1 - other.r2)


@pytest.mark.parametrize("wrong", [{"rollouts": 5}, {"answers": 63}, {"drawn": 2}])
def test_settings_without_a_curve_are_refused(wrong):
    with pytest.raises(UserError, match="give no curve"):
        study.Knobs(**wrong)


def test_the_figures_of_a_run_that_follows_the_published_curve():
    kl = np.linspace(0, 25, 400)
    d = np.sqrt(kl)
    run = run_of(0.5 + d * (1.0 - 0.6 * np.log(np.where(d > 0, d, 1))), kl=kl, proxy=np.linspace(0, 4, 400))
    told = study.told(run, 0.5, 7)
    turn = math.exp(1.0 / 0.6 - 1)
    assert told[study.TURN] == pytest.approx(turn, rel=0.02) and told[study.R2] > 0.98
    assert told[study.OVER] == pytest.approx(told[study.R2] - 0.9)
    assert told[study.RISE] == pytest.approx(0.6 * turn, rel=0.01)  # d (alpha - beta log d) at its turn is beta d
    assert told[study.FALL] == pytest.approx(0.6 * turn - 5 * (1 - 0.6 * math.log(5)), abs=0.02)
    assert told[study.ORDER] == pytest.approx(1) and told[study.AFTER] == pytest.approx(
        4 * (1 - turn**2 / 25), abs=0.05
    )
    assert told[study.KL] == pytest.approx(25, abs=0.2) and told[study.PAID] == 7


def test_points_are_two_rollouts_each_and_a_negative_kl_is_none():
    run = run_of([1, 3, 5, 7, 9], kl=[-0.3, 0.1, 3.0, 5.0, 9.0], proxy=[0, 2, 4, 6, 8])
    d, gained, proxy = run.points(1.0)
    assert d.tolist() == [0, 2] and gained.tolist() == [1, 5] and proxy.tolist() == [1, 5]


def test_a_run_is_read_from_two_updates_a_rollout():
    columns = ([1, 3, 5, 7], [2, 4, 6, 8], [0, 0.2, 1, 3], [0.5, math.nan, 1.0, 0.0])
    trace = {name: np.asarray(x, float) for name, x in zip(study.METRICS, columns, strict=True)}
    run = study.read(trace, np.asarray([[-1.0, 3.0]]))  # mean 1, standard deviation 2
    assert run.halves.tolist() == [[1, 5], [3, 7]] and run.gold.tolist() == [2, 6]
    assert run.proxy.tolist() == [1, 3] and run.liked.tolist() == [0.5, 0.5]
    np.testing.assert_allclose(run.kl, [0.1, 2])


# Best of n


def test_the_best_of_n_against_every_subset():
    rng = np.random.default_rng(1)
    scores, truth = rng.normal(size=(2, 3, 6))
    figures, curves = study.picked(scores, truth, 5)
    sizes = [1, 2, 3, 4, 6]
    subsets = [list(itertools.combinations(range(6), n)) for n in sizes]
    best = lambda of: [
        np.mean([[row[max(s, key=lambda i, by=by: by[i])] for s in some] for row, by in zip(of, scores, strict=True)])
        for some in subsets
    ]
    worth, proxy = np.asarray(best(truth)), np.asarray(best(scores))
    d = np.sqrt([math.log(n) - (n - 1) / n for n in sizes])
    np.testing.assert_allclose(curves[study.GOLD]["x"], d)
    np.testing.assert_allclose(curves[study.GOLD]["y"], (worth - truth.mean()) / truth.std(), atol=1e-12)
    np.testing.assert_allclose(curves[study.PROXY]["y"], (proxy - scores.mean()) / scores.std(), atol=1e-12)
    assert figures[study.GOLD] == pytest.approx(worth[-1]) and figures[study.PAID] == 5
    assert figures[study.FALL] - figures[study.HEIGHT] == pytest.approx(-worth[-1])
    assert figures[study.HEIGHT] - figures[study.RISE] == pytest.approx(truth.mean())
    assert figures[study.ORDER] == pytest.approx(1) and figures[study.KL] == pytest.approx(d[-1] ** 2)
    columns = np.stack([d, -(d**2)], axis=1)
    alpha, beta = np.linalg.lstsq(columns, worth - truth.mean(), rcond=None)[0]
    if alpha > 0 and beta > 0:
        assert figures[study.TURN] == pytest.approx(alpha / (2 * beta))


def test_where_the_best_of_n_is_highest_one_half_of_the_prompts_says_and_the_other_measures():
    scores = np.tile(np.arange(4.0), (2, 1))
    truth = np.asarray([[0, 1, 2, 3], [3, 2, 1, 0]], float)  # for one prompt more is better, for the other worse
    figures, _ = study.picked(scores, truth, 0)
    assert figures[study.HEIGHT] == pytest.approx(0.75), "the mean of 0, at n = 4, and 1.5, at n = 1"
    assert figures[study.GOLD] == pytest.approx(1.5)


# The page


def seen(seed: int) -> Seen:
    curve = {"x": [0.0, 1.0, 2.0, 3.0, 4.0], "y": [0.0, 1.0 + seed, 1.0, 0.5, 0.5]}
    names = [*(study.FEW, study.MANY, study.PRICED, study.FRESH), *(study.BEST_FEW, study.BEST_MANY, study.BEST_SMALL)]
    figures = {name: dict.fromkeys(study.STUDY.measures, 1.0 + seed) for name in study.STUDY.conditions}
    return Seen(seed, 1.0, figures, {f"{kind}, {n}": curve for kind in (study.GOLD, study.PROXY) for n in names})


def test_pictures_have_every_seed_and_the_curve_fitted_to_the_means_as_far_as_it_reaches():
    seeds = [seen(0), seen(1)]
    drawn = study.pictures(seeds)
    turn = drawn["turn"].curves
    assert [len(points) for _, points in turn[f"{study.GOLD}, {study.FEW}"]] == [2] * 5
    points = dict(one for _, one in (spot for spot in turn[f"fitted to gold, {study.FEW}"]) for one in one)
    d = np.asarray([1.0, 2.0, 3.0])  # that at 4 is too far
    columns = np.stack([d, -d * np.log(d)], axis=1)
    alpha, beta = np.linalg.lstsq(columns, [1.5, 1.0, 0.5], rcond=None)[0]
    assert max(points) == 3 and points[0.0] == 0
    assert points[3.0] == pytest.approx(3 * (alpha - beta * math.log(3)))
    left = np.sum((columns @ [alpha, beta] - [1.5, 1, 0.5]) ** 2) + 0.0  # and the point at 0, which is met
    r2 = 1 - left / np.sum((np.asarray([0, 1.5, 1, 0.5]) - 0.75) ** 2)
    assert f"{study.FEW} {r2:.2f}" in drawn["turn"].note
    assert len({picture.title for picture in drawn.values()}) == len(drawn)


def test_the_study_names_only_what_it_declares():
    own = STUDIES["overoptimisation"]
    for claim in own.phenomena:
        assert {claim.condition, claim.than or claim.condition} <= set(own.conditions) and claim.measure in own.measures
    for remedy in own.remedies:
        assert {remedy.condition, remedy.than} <= set(own.conditions)
        assert {remedy.measure, *remedy.prices} <= set(own.measures)
    assert len(findings.found(own, [seen(0), seen(1)])) == len(own.phenomena)
