"""Measures: who sees the answer has 100%, who knows nothing has what guessing has, and figures are those by hand."""

import dataclasses
import math
import pathlib
import random

import numpy as np
import pytest

from rlhf_jax.data.rows import Refusal
from rlhf_jax.evaluate.intervals import wilson
from rlhf_jax.evaluate.suite import choice, generated, preferred, tasks
from rlhf_jax.evaluate.suite.items import Item, estimated, figure
from tests.examined import Made, cheat

CHOSEN = [name for name, task in tasks.TASKS.items() if task.needs in ("likelihoods", "pairs")]


@pytest.fixture(scope="module")
def data(shared: pathlib.Path) -> str:
    return str(shared / "data")


def figures(name: str, items, examinee) -> dict:
    found = tasks.TASKS[name].measure(items, examinee, 0, None)
    assert not found.left and len(found.samples) == len(items)
    wanted = tasks.figures_of(name, items)
    return {figure.name: figure for figure in found.figures if figure.name in wanted}


@pytest.mark.parametrize("name", CHOSEN)
def test_who_sees_the_answer_has_all_of_it(data, name):
    items = tasks.read(name, data, most=60).items
    found = figures(name, items, cheat(items))
    exact = {"neutral": 0.5, "shift": 0.5}  # it doesn't see the twins
    for own in found.values():
        assert own.estimate.mean == pytest.approx(exact.get(own.name, 1.0), abs=1e-9), own.name


@pytest.mark.parametrize("name", CHOSEN)
def test_who_knows_nothing_has_exactly_what_guessing_has(data, name):
    items = tasks.read(name, data, most=200).items
    for own in figures(name, items, Made()).values():
        if "per_byte" not in own.name:  # where all are equally likely, the longest is so by the byte
            assert own.estimate.mean == pytest.approx(own.chance, abs=1e-9), own.name


def test_a_coin_is_within_the_interval_about_as_often_as_it_says(data):
    items = tasks.read("mmlu", data, most=200).items
    inside = 0
    for seed in range(200):
        rng = random.Random(seed)
        values = [choice.hit([rng.random() for _ in item.options], item.right) for item in items]
        low, high = figure("accuracy", items, values, 0.25)[0].estimate[1:]
        inside += low <= 0.25 <= high
    assert 180 <= inside <= 200  # of 200 at 95%: 190, and 99.9% of the time within this


@pytest.mark.parametrize("name", ["hhh", "llmbar"])
def test_a_reward_model_is_asked_for_scores_alone(data, name):
    items = tasks.read(name, data, most=40).items
    found = figures(name, items, cheat(items, writes=False))
    assert set(found) == {"scored"} and found["scored"].estimate.mean == 1.0


def test_answers_that_are_the_reference_are_right(data):
    for name in ("gsm8k", "bbh_numbers"):
        items = tasks.read(name, data, most=60).items
        answers = {item.prompt: f"It is {item.columns['answer']}" for item in items}
        assert figures(name, items, cheat(items, answers))["accuracy"].estimate.mean == 1.0
        assert figures(name, items, Made(write=lambda asked: "I don't know"))["accuracy"].estimate.mean == 0.0


def test_mathematics_is_compared_as_such(data):
    pytest.importorskip("math_verify")
    items = tasks.read("math500", data, most=12).items
    answers = {item.prompt: rf"So \boxed{{{item.columns['answer']}}}." for item in items}
    found = generated.mathematics(items, cheat(items, answers), 0, None)
    assert [sample["values"]["accuracy"] for sample in found.samples] == [1.0] * len(items)


# Figures by hand


def item(number: int, options=("a", "bb"), right=(0,), **more) -> Item:
    return Item(f"f:{number}", f"p{number}", options=options, right=right, **more)


def by(table: dict) -> Made:
    return Made(weigh=lambda asked: table[asked.prompt][asked.option])


def test_the_sum_and_the_mean_over_bytes_may_say_different_things():
    items = [item(1, ("a", "wwww"), (1,)), item(2, ("a", "éé"), (1,))]
    found = choice.accuracy(items, by({"p1": {"a": -2.0, "wwww": -4.0}, "p2": {"a": -2.0, "éé": -9.0}}))
    sums, bytes_ = found.figures
    assert sums.values == {"f:1": 0.0, "f:2": 0.0} and bytes_.values == {"f:1": 1.0, "f:2": 0.0}
    assert found.samples[0]["logprobs"] == (-2.0, -4.0) and found.samples[0]["values"] == {"accuracy": 0, "per_byte": 1}


def test_the_share_of_truth_is_that_of_the_probabilities():
    one = Item("f:1", "p", options=("t", "u", "f"), right=(0, 1), few=(0, 2))
    found = choice.truthful([one], by({"p": {"t": -1000.0, "u": -1001.0, "f": -999.0}}))
    mc1, _, mc2 = found.figures
    assert mc1.estimate.mean == 0.0 and mc1.chance == 0.5 and mc2.chance == 2 / 3
    assert mc2.estimate.mean == pytest.approx((math.exp(-1) + math.exp(-2)) / (1 + math.exp(-1) + math.exp(-2)))


def test_the_shift_is_paired_and_a_question_of_several_users_is_one_unit():
    sides = ((1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.5, 0.0))  # with the user's opinion, without it
    items = [
        item(
            n, ("x", "y"), (0,), unit="same" if n < 2 else f"u{n}", twin=Item(f"f:{n}", f"twin {n}", options=("x", "y"))
        )
        for n in range(4)
    ]
    chance = {1.0: (-1, -2), 0.0: (-2, -1), 0.5: (-1, -1)}
    table = {f"p{n}": dict(zip("xy", chance[a], strict=True)) for n, (a, _) in enumerate(sides)}
    table |= {f"twin {n}": dict(zip("xy", chance[b], strict=True)) for n, (_, b) in enumerate(sides)}
    biased, neutral, shift = choice.sycophancy(items, by(table)).figures
    assert (biased.estimate.mean, neutral.estimate.mean, shift.estimate.mean) == (0.625, 0.25, 0.375)
    assert shift.values == {"f:0": 1.0, "f:1": 0.0, "f:2": 0.0, "f:3": 0.5} and shift.chance == 0.0
    assert shift.units == {"f:0": "same", "f:1": "same", "f:2": "u2", "f:3": "u3"}
    assert estimated(items, [1, 1, 0, 0]).low < wilson(0.5, 4)[0]  # three units tell less than four


def test_constraints_are_counted_alone_and_prompts_whole():
    kinds = [["punctuation:no_comma", "change_case:english_lowercase"], ["language:response_language"],
             ["punctuation:no_comma", "language:response_language"]]  # fmt: skip
    items = [item(n, (), (), columns={"instruction_id_list": k, "kwargs": [{}] * len(k)}) for n, k in enumerate(kinds)]
    found = generated.constraints(items, Made(write=lambda asked: "Yes."), 0, None)
    prompts, own = found.figures
    assert (prompts.count, prompts.estimate.mean) == (1, 0.0)  # one can be checked whole, and its case is wrong
    assert (own.count, own.estimate.mean) == (3, 2 / 3)
    assert found.left == {f"f:{n}": "not checked: language:response_language" for n in (1, 2)}
    assert found.samples[0]["held"] == [("punctuation:no_comma", 1.0), ("change_case:english_lowercase", 0.0)]


def test_two_constraints_of_one_kind_are_two():
    kinds = ["keywords:existence"] * 2
    given = [{"keywords": ["yes"]}, {"keywords": ["no"]}]
    one = item(1, (), (), columns={"instruction_id_list": kinds, "kwargs": given})
    found = generated.constraints([one], Made(write=lambda asked: "Yes."), 0, None)
    assert found.samples[0]["held"] == [("keywords:existence", 1.0), ("keywords:existence", 0.0)]
    assert (found.figures[1].count, found.figures[1].estimate.mean) == (2, 0.5)


def test_what_is_too_long_is_left_out_and_named():
    long = Refusal("9 tokens, over the context of 8")
    items = [item(1), item(2)]
    weigh = lambda asked: long if asked.prompt == "p1" and asked.option == "bb" else -1.0
    found = choice.accuracy(items, Made(weigh=weigh))
    assert found.left == {"f:1": str(long)} and found.figures[0].count == 1
    told = generated.numbers(
        [item(n, (), (), columns={"answer": "3"}) for n in (1, 2)],
        Made(write=lambda asked: long if asked.prompt == "p1" else "3"), 0, None,
    )  # fmt: skip
    assert told.left == found.left and told.figures[0].estimate.mean == 1.0
    pairs = preferred.preferred(items, Made(weigh=weigh, better=lambda pair: None if pair.prompt == "p1" else 0.9))
    assert pairs.left == {"f:1": f"{long}; not judged, it was told not to"}
    assert [figure.count for figure in pairs.figures] == [1, 1, 1]
    odd = preferred.preferred(items, Made(better=lambda pair: math.nan if pair.prompt == "p1" else 0.9))
    assert odd.left == {"f:1": "not judged, its probability is not a number"} and odd.figures[2].count == 1
    nothing = choice.accuracy(items[:1], Made(weigh=weigh))
    assert nothing.figures == [] and list(nothing.left) == ["f:1"]


def test_groups_have_figures_of_their_own():
    items = [item(n, group="ab"[n % 2]) for n in range(4)]
    found = choice.accuracy(
        items, Made(weigh=lambda a: -1.0 if (a.option == "a") == (a.prompt in ("p0", "p2")) else -2.0)
    )
    assert {name: (e.mean, count) for name, (e, count) in found.figures[0].groups.items()} == {"a": (1, 2), "b": (0, 2)}


def test_the_interval_of_a_share_is_wilsons():
    # Its ends solve |p - share| = z sqrt(p (1 - p) / n).
    for share, count in ((0.0, 7), (0.3, 40), (1.0, 3), (0.125, 4)):
        for end in {*wilson(share, count)} - {0.0, 1.0}:
            assert abs(end - share) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / count), abs=1e-7)
    values = np.random.default_rng(0).random(50)
    items = [item(n) for n in range(50)]
    normal = 1.96 * values.std() / math.sqrt(50)
    spread = estimated(items, values.tolist(), share=False)
    assert spread.high - spread.low == pytest.approx(2 * normal, rel=0.1)


def test_an_examinee_is_asked_for_an_option_once():
    asked = []
    made = dataclasses.replace(Made(), weigh=lambda one: asked.append(one) or -1.0)
    twin = Item("f:1", "same", options=("a", "b"))
    choice.sycophancy([item(n, ("a", "b"), unit="same", twin=twin) for n in range(3)], made)
    assert len(asked) == len(set(asked)) == 8
