"""Every loss: reference values, laws, an independent float64 oracle, gradients by finite differences."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.losses import LOSSES
from rlhf_jax.losses.preference import PREFERENCE, MeanPair, Pair, PolicyPair, cpo, dpo, hinge, ipo, orpo, simpo
from rlhf_jax.losses.ranked import RANKED, Ranked, dpo_pl
from rlhf_jax.losses.supervised import SUPERVISED, Tokens, dft, nll
from rlhf_jax.losses.unpaired import UNPAIRED, Answer, kto


def f32(*columns: Any) -> list[jax.Array]:
    return [jnp.asarray(column, jnp.float32) for column in columns]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


# ---- reference values


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Any]:
    return json.loads((shared / "golden/reference_values.json").read_text())


def golden_pair(golden: dict[str, Any]) -> Pair:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len")
    return Pair(*f32(*(golden["inputs"]["dpo"][name] for name in names)))


@pytest.mark.parametrize(("name", "loss"), [("sigmoid", dpo), ("hinge", hinge), ("ipo", ipo)])
def test_pairs_have_the_reference_values(golden, name, loss):
    expected = golden["values"]["dpo"][name]["per_seq"]
    found = loss(golden_pair(golden), beta=0.1)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("k", [0.0, 0.7])
def test_kto_has_the_reference_values(golden, k):
    pair = golden_pair(golden)
    logprob, ref = jnp.concatenate([pair.chosen, pair.rejected]), jnp.concatenate([pair.ref_chosen, pair.ref_rejected])
    answer = Answer(logprob, ref, jnp.arange(4) < 2, jnp.full(4, k))
    found = kto(answer, beta=0.1, desirable_weight=1.0, undesirable_weight=1.5)
    expected = np.concatenate([np.ravel(part) for part in golden["values"]["kto"][f"kto kl={k}"]["losses"]])
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_losses_without_a_reference_have_the_reference_values(golden):
    pair, expected = golden_pair(golden), golden["values"]
    means = MeanPair(pair.chosen / pair.chosen_len, pair.rejected / pair.rejected_len)
    sums = PolicyPair(pair.chosen, pair.rejected, pair.chosen_len, pair.rejected_len)
    close = lambda found, values: np.testing.assert_allclose(found, values, rtol=2e-6, atol=2e-6)
    close(simpo(means, beta=0.1, margin=0.5), expected["cpo"]["simpo(avg logp,gamma=.5,beta=.1)"]["per_seq"])
    close(cpo(sums, beta=0.1, alpha=0.0), expected["cpo"]["sigmoid"]["per_seq"])
    close(cpo(sums, beta=0.1, alpha=0.0, label_smoothing=0.1), expected["cpo"]["sigmoid ls=0.1"]["per_seq"])
    close(cpo(sums, beta=0.1, alpha=0.5) - cpo(sums, beta=0.1, alpha=0.0), -0.5 * means.chosen)
    means = MeanPair(*f32(*np.asarray(expected["orpo"]["avg_logp"])))  # chosen, rejected
    odds = np.asarray(expected["orpo"]["OR term -beta*logsigmoid(log_odds)"])
    close(orpo(means, beta=0.1), -means.chosen + odds)


# ---- an oracle that shares no code, float64


def dpo64(p: list[np.ndarray], beta: float, label_smoothing: float) -> np.ndarray:
    d = beta * (p[0] - p[2] - p[1] + p[3])
    return -(1 - label_smoothing) * log_sigmoid(d) - label_smoothing * log_sigmoid(-d)


def ipo64(p: list[np.ndarray], beta: float, length_normalised: bool) -> np.ndarray:
    lengths = (p[4], p[5]) if length_normalised else (1, 1)
    return ((p[0] - p[2]) / lengths[0] - (p[1] - p[3]) / lengths[1] - 0.5 / beta) ** 2


def hinge64(p: list[np.ndarray], beta: float) -> np.ndarray:
    return np.maximum(0, 1 - beta * (p[0] - p[2] - p[1] + p[3]))


def log_odds64(mean: np.ndarray) -> np.ndarray:
    return mean - np.log(-np.expm1(mean))


def orpo64(p: list[np.ndarray], beta: float) -> np.ndarray:
    return -p[0] - beta * log_sigmoid(log_odds64(p[0]) - log_odds64(p[1]))


def simpo64(p: list[np.ndarray], beta: float, margin: float) -> np.ndarray:
    return -log_sigmoid(beta * (p[0] - p[1]) - margin)


def cpo64(p: list[np.ndarray], beta: float, alpha: float, label_smoothing: float) -> np.ndarray:
    d = beta * (p[0] - p[1])
    smooth = -(1 - label_smoothing) * log_sigmoid(d) - label_smoothing * log_sigmoid(-d)
    return smooth - alpha * p[0] / p[2]


def dpo_pl64(p: list[np.ndarray], beta: float) -> np.ndarray:
    """Stage by stage, from the best down, over the completions that are there."""
    out = []
    for logprob, ref, rank, present in zip(*p, strict=True):
        reward = {i: beta * (logprob[i] - ref[i]) for i in np.flatnonzero(present)}
        worse = {i: [r for j, r in reward.items() if rank[j] > rank[i]] for i in reward}
        out.append(sum(np.log(np.exp(reward[i]) + np.sum(np.exp(worse[i]))) - reward[i] for i in reward))
    return np.asarray(out)


def kto64(p: list[np.ndarray], beta: float, desirable_weight: float, undesirable_weight: float) -> np.ndarray:
    x = beta * (p[0] - p[1] - p[3])
    return np.where(p[2], desirable_weight / (1 + np.exp(x)), undesirable_weight / (1 + np.exp(-x)))


def nll64(p: list[np.ndarray], z_loss: float) -> np.ndarray:
    return -p[0] + z_loss * p[1] ** 2


def dft64(p: list[np.ndarray]) -> np.ndarray:
    return -np.exp(p[0]) * p[0]


RNG = np.random.default_rng(0)
PAIR = [*-RNG.uniform(5, 60, (4, 8)), *RNG.integers(1, 20, (2, 8)).astype(float)]
ANSWER = [-RNG.uniform(5, 60, 8), -RNG.uniform(5, 60, 8), RNG.random(8) < 0.5, RNG.uniform(0, 3, 8)]
POLICY = [PAIR[0], PAIR[1], *PAIR[4:]]
MEANS = [np.append(-RNG.uniform(0.05, 6, 6), [-1e-4, -30.0]), -RNG.uniform(0.05, 6, 8)]
RANKS = np.array([[0, 1, 2, 3], [2, 0, 0, 1], [1, 1, 0, 9], [0, 1, 9, 9]], float)
GROUP = [*-RNG.uniform(5, 60, (2, 4, 4)), RANKS, RANKS < 9]
TOKENS = [-RNG.uniform(0.1, 5, (2, 4)), RNG.uniform(1, 9, (2, 4))]
CASES: dict[str, tuple[type, list[np.ndarray], Callable, dict[str, Any]]] = {
    "dpo": (Pair, PAIR, dpo64, {"beta": 0.3, "label_smoothing": 0.2}),
    "ipo": (Pair, PAIR, ipo64, {"beta": 0.3, "length_normalised": False}),
    "ipo by token": (Pair, PAIR, ipo64, {"beta": 0.3, "length_normalised": True}),
    "hinge": (Pair, PAIR, hinge64, {"beta": 0.02}),
    "orpo": (MeanPair, MEANS, orpo64, {"beta": 0.3}),
    "simpo": (MeanPair, MEANS, simpo64, {"beta": 2.5, "margin": 1.25}),
    "cpo": (PolicyPair, POLICY, cpo64, {"beta": 0.1, "alpha": 0.7, "label_smoothing": 0.2}),
    "dpo_pl": (Ranked, GROUP, dpo_pl64, {"beta": 0.1}),
    "kto": (Answer, ANSWER, kto64, {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}),
    "nll": (Tokens, TOKENS, nll64, {"z_loss": 0.1}),
    "dft": (Tokens, TOKENS, dft64, {}),
}


def test_every_loss_has_an_oracle():
    assert {name.split()[0] for name in CASES} == set(LOSSES) == {*SUPERVISED, *PREFERENCE, *RANKED, *UNPAIRED}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_agree_with_the_oracle(name):
    columns, inputs, oracle, numbers = CASES[name]
    loss = LOSSES[name.split()[0]]
    as_arrays = columns(*(jnp.asarray(x) if x.dtype == bool else jnp.asarray(x, jnp.float32) for x in inputs))
    np.testing.assert_allclose(loss(as_arrays, **numbers), oracle(inputs, **numbers), rtol=2e-5, atol=1e-6)
    for place in (0, 1) if "rejected" in columns._fields else (0,):  # the policy's own columns

        def with_one(x: jax.Array, field: str = columns._fields[place]) -> jax.Array:
            return jnp.sum(loss(as_arrays._replace(**{field: x}), **numbers))

        gradient = jax.grad(with_one)(as_arrays[place])
        step, shape = 1e-5, inputs[place].shape
        # A loss of a row of several completions is moved one column at a time.
        ways = [np.ones(shape)] if columns is not Ranked else [np.arange(shape[1]) == k for k in range(shape[1])]
        slopes = []
        for way in ways:
            moved = ([x + sign * step * (i == place) * way for i, x in enumerate(inputs[:2])] for sign in (1, -1))
            up, down = (oracle(first + inputs[2:], **numbers) for first in moved)
            slopes.append((up - down) / (2 * step))
        slope = slopes[0] if len(ways) == 1 else np.stack(slopes, axis=1)
        if name == "dft":  # the weight is held fixed
            slope = -np.exp(inputs[0])
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)


# ---- laws

NATS = st.lists(st.floats(-50, -1, width=32), min_size=4, max_size=4)
BETA = st.floats(1 / 64, 1, width=32)


def pair_of(logprobs: list[float], ref: list[float] | None = None) -> Pair:
    chosen, rejected, *others = f32(*([x] for x in logprobs))
    ref_chosen, ref_rejected = others if ref is None else f32(*([x] for x in ref))
    return Pair(chosen, rejected, ref_chosen, ref_rejected, *f32([5.0], [7.0]))


@settings(max_examples=25, deadline=None)
@given(NATS, BETA)
def test_the_first_step_at_the_reference(logprobs, beta):
    at = pair_of(logprobs, ref=logprobs[:2])
    np.testing.assert_allclose(dpo(at, beta=beta), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(hinge(at, beta=beta), 1.0)
    np.testing.assert_allclose(ipo(at, beta=beta), (0.5 / beta) ** 2, rtol=1e-6)
    answer = Answer(at.chosen, at.chosen, jnp.array([True]), jnp.zeros(1))
    np.testing.assert_allclose(kto(answer, beta=beta), 0.5)


@settings(max_examples=25, deadline=None)
@given(NATS, BETA)
def test_swapping_flips_the_margin_and_a_common_shift_changes_nothing(logprobs, beta):
    pair = pair_of(logprobs)
    swapped = Pair(pair.rejected, pair.chosen, pair.ref_rejected, pair.ref_chosen, pair.rejected_len, pair.chosen_len)
    np.testing.assert_allclose(swapped.margin, -pair.margin)
    whole = dpo(pair, beta=beta, label_smoothing=1.0)
    np.testing.assert_allclose(whole, dpo(swapped, beta=beta), rtol=1e-6, atol=1e-7)
    moved = pair._replace(chosen=pair.chosen + 8, ref_chosen=pair.ref_chosen + 8)
    for loss in (dpo, ipo, hinge):
        np.testing.assert_allclose(loss(moved, beta=beta), loss(pair, beta=beta), rtol=1e-3, atol=1e-4)


def test_no_gradient_reaches_ktos_baseline_or_dfts_weight():
    one = jnp.ones(1)
    gradient = jax.grad(lambda k: jnp.sum(kto(Answer(-one, -2 * one, one > 0, k))))(one)
    np.testing.assert_array_equal(gradient, 0)
    tokens = Tokens(-jnp.ones((1, 1)), jnp.ones((1, 1)))
    slope = jax.grad(lambda x: dft(Tokens(x, tokens.logsumexp))[0, 0])(tokens.logprobs)
    np.testing.assert_allclose(slope, -math.exp(-1))
    np.testing.assert_allclose(nll(tokens), 1.0)


def test_orpo_is_finite_where_a_completion_is_certain_or_impossible():
    edges = MeanPair(*f32([0.0, -1e-30, -200.0, 0.0], [-3.0, -200.0, -1e-30, 0.0]))
    value, slopes = jax.value_and_grad(lambda pair: jnp.sum(orpo(pair)))(edges)
    assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)


@settings(max_examples=25, deadline=None)
@given(NATS, BETA)
def test_a_ranking_of_two_is_a_pair_and_absent_completions_change_nothing(logprobs, beta):
    pair = pair_of(logprobs)
    two = lambda *columns: jnp.stack(columns, axis=1)
    policy, ref = two(pair.chosen, pair.rejected), two(pair.ref_chosen, pair.ref_rejected)
    rank, present = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
    expected = dpo(pair, beta=beta)
    np.testing.assert_allclose(dpo_pl(Ranked(policy, ref, rank, present), beta=beta), expected, rtol=1e-5, atol=1e-6)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 2)))
    more = Ranked(pad(policy), pad(ref), pad(rank), pad(present))
    np.testing.assert_allclose(dpo_pl(more, beta=beta), expected, rtol=1e-5, atol=1e-6)


def test_a_row_without_completions_has_no_loss_and_no_gradient():
    nothing = jnp.full((1, 3), -jnp.inf)
    empty = Ranked(nothing, nothing, jnp.zeros((1, 3)), jnp.zeros((1, 3), bool))
    value, slope = jax.value_and_grad(lambda x: jnp.sum(dpo_pl(empty._replace(logprob=x))))(empty.logprob)
    assert value == 0 and not np.asarray(slope).any()
