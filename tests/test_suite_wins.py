"""Win rates: both orders, ties a half, and length taken out of them, against a fit by brute force."""

import json
import math
import pathlib

import numpy as np
import pytest

from rlhf_jax.data.rows import Refusal
from rlhf_jax.evaluate.suite.items import Against, Item
from rlhf_jax.evaluate.suite.wins import RIDGE, controlled, extrapolated, wins, won
from rlhf_jax.feedback.judges import Verdict, both
from tests.examined import Made


def drawn(count: int, theta: float, phi: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Wins by the model of the fit."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(10, 2000, (count, 2)).astype(np.float64)
    difference = lengths[:, 0] - lengths[:, 1]
    chance = 1 / (1 + np.exp(-theta - phi * np.tanh(difference / difference.std())))
    return (rng.random(count) < chance).astype(np.float64), lengths


@pytest.mark.parametrize(
    ("ahead", "behind", "wanted"), [(0.9, 0.8, 1), (0.9, 0.1, 0.5), (0.2, 0.4, 0), (0.5, 0.5, 0.5), (0.5, 0.9, 0.75)]
)
def test_a_pair_is_asked_in_both_orders_and_a_tie_is_a_half(ahead, behind, wanted):
    assert won(both(ahead, behind)) == wanted and won(both(1 - ahead, 1 - behind)) == 1 - wanted


def test_a_verdict_without_orders_counts_once_and_none_not_at_all():
    assert won(Verdict(0.7)) == 1.0 and won(Verdict(0.5)) == 0.5 and won(both(None, 0.4, "too long")) is None
    assert won(both(math.nan, 0.4)) is None and won(Verdict(math.nan)) is None


def test_the_fit_is_the_maximum_of_its_likelihood():
    values, lengths = drawn(60, 0.4, 1.0)
    values[:5] = 0.5
    difference = lengths[:, 0] - lengths[:, 1]
    x = np.tanh(difference / difference.std())
    theta, phi = np.meshgrid(np.linspace(-1, 2, 601), np.linspace(-1, 3, 801), indexing="ij")
    z = theta[..., None] + phi[..., None] * x
    loss = np.sum(np.logaddexp(0, z) - values * z, axis=-1) + RIDGE / 2 * (theta**2 + phi**2)
    best = np.unravel_index(loss.argmin(), loss.shape)
    found = controlled(values, lengths)
    assert np.log(found.rate.mean / (1 - found.rate.mean)) == pytest.approx(theta[best], abs=0.005)
    assert found.length == pytest.approx(phi[best], abs=0.005)


def test_length_alone_wins_nothing_when_it_is_controlled():
    values, lengths = drawn(2000, 0.0, 3.0)
    longer = lengths[:, 0] > lengths[:, 1]
    kept = np.concatenate([np.flatnonzero(longer), np.flatnonzero(~longer)[:250]])  # ours are mostly the longer ones
    found = controlled(values[kept], lengths[kept])
    assert values[kept].mean() > 0.65 and found.rate.low < 0.5 < found.rate.high and found.length > 2


def test_two_models_turned_round_have_one_less_it():
    values, lengths = drawn(200, 0.7, 0.5)
    one, other = controlled(values, lengths), controlled(1 - values, lengths[:, ::-1])
    assert one.rate.mean + other.rate.mean == pytest.approx(1, abs=1e-9)
    assert one.rate.low + other.rate.high == pytest.approx(1, abs=1e-6)


def test_it_is_finite_where_one_side_wins_everything_or_lengths_are_equal():
    lengths = np.full((20, 2), 7.0)
    assert 0.98 < controlled(np.ones(20), lengths).rate.mean < 1
    assert controlled(np.full(20, 0.5), lengths).rate.mean == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("lengths", "share"),
    [
        ([(3, 3)] * 20, None),  # all equal: as they are is what it would be at equal length
        ([(3, 3)] * 10 + [(3, 9)] * 10, None),
        ([(3, 9)] * 9 + [(9, 3)], None),
        ([(3, 9)] * 19 + [(3, 3)], "0%"),
        ([(9, 3)] * 19 + [(3, 3)], "95%"),
        ([], None),
    ],
)
def test_equal_lengths_are_no_extrapolation(lengths, share):
    wanted = (
        "" if share is None else f"length_controlled extrapolates: ours is the longer answer to {share} of the prompts"
    )
    assert extrapolated(lengths) == wanted


def test_published_judgements_are_freed_of_length(shared: pathlib.Path):
    # A real judge's verdicts on gpt-3.5-turbo-0301, whose answers are short: without length it wins more.
    file = shared / "data/alpaca-eval-judges/gpt-3.5-turbo-0301.weighted_alpaca_eval_gpt4_turbo.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    values = np.asarray([row["preference"] - 1 for row in rows])
    lengths = np.asarray([(len(row["output_2"]), len(row["output_1"])) for row in rows], np.float64)
    found = controlled(values, lengths)
    assert values.mean() == pytest.approx(0.119, abs=0.001)
    assert found.rate.low > values.mean() and found.length > 0
    assert "4% of the prompts" in extrapolated([(int(own), int(other)) for own, other in lengths])


def test_wins_are_those_of_the_judge_and_what_has_no_verdict_is_left_out():
    items = [Item(f"f:{n}", f"p{n}") for n in range(6)]
    ours = Made("ours", write=lambda a: Refusal("too long") if a.prompt == "p4" else f"long answer to {a.prompt}")
    theirs = Made("theirs", write=lambda a: f"to {a.prompt}")
    said = {"p0": (0.9, 0.8), "p1": (0.9, 0.2), "p2": (0.1, 0.3), "p3": (None, 0.5), "p5": (math.nan, 0.5)}
    seen = []

    def judge(pairs):
        seen.extend((pair.first, pair.second) for pair in pairs)
        return [both(*said[pair.prompt], why="no letter") for pair in pairs]

    found = wins(items, ours, 0, Against("theirs", theirs.answers, judge))
    rate, length = found.figures
    assert rate.values == {"f:0": 1.0, "f:1": 0.5, "f:2": 0.0} and rate.chance == length.chance == 0.5
    not_judged = {"f:3": "not judged, no letter", "f:5": "not judged, its probability is not a number"}
    assert found.left == {"f:4": "too long"} | not_judged
    assert seen[0] == ("long answer to p0", "to p0") and found.samples[0]["other"] == "to p0"
    assert wins(items, theirs, 0, Against("theirs", theirs.answers, judge)).figures == []
