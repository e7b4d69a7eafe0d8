"""Every loss against an independent float64 oracle, its gradient by finite differences of it, and sorted pairs."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.losses import LOSSES
from rlhf_jax.losses.preference import (
    PER_ROW,
    PREFERENCE,
    MeanPair,
    Pair,
    PolicyPair,
    SortedMargins,
    SortedRatios,
    aot_unpaired,
    orpo,
    partners,
)  # fmt: skip
from rlhf_jax.losses.ranked import RANKED, Ranked
from rlhf_jax.losses.supervised import SUPERVISED, SmoothTokens, Tokens
from rlhf_jax.losses.unpaired import UNPAIRED, Answer, BareAnswer, ShiftedAnswer


def f32(*columns: Any) -> list[jax.Array]:
    return [jnp.asarray(column, jnp.float32) for column in columns]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(log_sigmoid(x))


# ---- oracles that share no code, float64; p is the list of columns

Oracle = Callable[..., np.ndarray]


def logistic64(x: np.ndarray, e: float) -> np.ndarray:
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def mapped64(u: np.ndarray, divergence: str = "reverse_kl", divergence_alpha: float = 0.5) -> np.ndarray:
    """f'(t) at t = exp(u), from each divergence's f, less what it is at 1."""
    t = np.exp(u)
    return {
        "reverse_kl": lambda: u,
        "forward_kl": lambda: 1 - 1 / t,
        "js": lambda: np.log(2 * t / (1 + t)),
        "alpha": lambda: (t ** (divergence_alpha - 1) - 1) / (divergence_alpha - 1),
    }[divergence]()


def ratios64(p: list[np.ndarray], **how: Any) -> tuple[np.ndarray, np.ndarray]:
    return mapped64(p[0] - p[2], **how), mapped64(p[1] - p[3], **how)


def margin64(p: list[np.ndarray], **how: Any) -> np.ndarray:
    return np.subtract(*ratios64(p, **how))


def dpo64(p, beta, label_smoothing, margin, **how):
    return logistic64(beta * margin64(p, **how) - margin, label_smoothing)


def robust64(p, beta, label_smoothing, **how):
    x, e = beta * margin64(p, **how), label_smoothing
    return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)


def ipo64(p, beta, length_normalised, **how):
    a, b = ratios64(p, **how)
    lengths = (p[4], p[5]) if length_normalised else (1, 1)
    return (a / lengths[0] - b / lengths[1] - 0.5 / beta) ** 2


def hinge64(p, beta, margin, **how):
    return np.maximum(0, margin - beta * margin64(p, **how))


def exo64(p, beta, label_smoothing, **how):
    """The Kullback-Leibler divergence of two distributions over two answers, as a sum over both."""
    x = beta * margin64(p, **how)
    q = np.stack([np.exp(x), np.ones_like(x)]) / (1 + np.exp(x))
    label = np.stack([np.full_like(x, 1 - label_smoothing), np.full_like(x, label_smoothing)])
    return np.sum(q * np.log(q / label), axis=0)


def nca64(p, beta):
    a, b = ratios64(p)
    return -log_sigmoid(beta * a) - 0.5 * log_sigmoid(-beta * a) - 0.5 * log_sigmoid(-beta * b)


def bco_pair64(p, beta):
    a, b = ratios64(p)
    return -log_sigmoid(beta * a) - log_sigmoid(-beta * b)


def sppo64(p, beta):
    a, b = ratios64(p)
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2


def apo_zero64(p, beta):
    a, b = ratios64(p)
    return 1 - sigmoid(beta * a) + sigmoid(beta * b)


def apo_down64(p, beta):
    a, b = ratios64(p)
    return sigmoid(beta * a) + 1 - sigmoid(beta * (a - b))


def discopop64(p, beta, tau, **how):
    x = beta * margin64(p, **how)
    m = sigmoid(x / tau)
    return (1 - m) * -log_sigmoid(x) + m * np.exp(-x)


def dpo_norm64(p, beta, **how):
    a, b = ratios64(p, **how)
    return -log_sigmoid(beta * (a / p[4] - b / p[5]))


def aot64(p, beta, label_smoothing):
    return logistic64(beta * (p[0] - p[1]), label_smoothing)


def aot_unpaired64(p, beta, label_smoothing):
    above, below = (logistic64(beta * x, label_smoothing) for x in (p[0] - p[2], p[3] - p[1]))
    return (above + below) / 2


def log_odds64(mean: np.ndarray) -> np.ndarray:
    return mean - np.log(-np.expm1(mean))


def orpo64(p, beta):
    return -p[0] - beta * log_sigmoid(log_odds64(p[0]) - log_odds64(p[1]))


def simpo64(p, beta, margin):
    return -log_sigmoid(beta * (p[0] - p[1]) - margin)


def alphapo64(p, beta, margin, alpha):
    chosen, rejected = ((1 - np.exp(mean) ** -alpha) / alpha for mean in p)
    return -log_sigmoid(beta * (chosen - rejected) - margin)


def cpo64(p, beta, alpha, label_smoothing):
    return logistic64(beta * (p[0] - p[1]), label_smoothing) - alpha * p[0] / p[2]


def dpo_pl64(p, beta):
    """Stage by stage, from the best down, over the completions that are there."""
    out = []
    for logprob, ref, rank, present in zip(*p, strict=True):
        reward = {i: beta * (logprob[i] - ref[i]) for i in np.flatnonzero(present)}
        worse = {i: [r for j, r in reward.items() if rank[j] > rank[i]] for i in reward}
        out.append(sum(np.log(np.exp(reward[i]) + np.sum(np.exp(worse[i]))) - reward[i] for i in reward))
    return np.asarray(out)


def kto64(p, beta, desirable_weight, undesirable_weight):
    x = beta * (p[0] - p[1] - (p[3] if len(p) > 3 else 0))
    return np.where(p[2], desirable_weight / (1 + np.exp(x)), undesirable_weight / (1 + np.exp(-x)))


def bco64(p, beta):
    x = beta * (p[0] - p[1]) - p[3]
    return np.where(p[2], np.log1p(np.exp(-x)), np.log1p(np.exp(x)))


def nll64(p, z_loss):
    return -p[0] + z_loss * p[1] ** 2


def dft64(p):
    return -np.exp(p[0]) * p[0]


def smooth_nll64(p, label_smoothing):
    return -(1 - label_smoothing) * p[0] - label_smoothing * p[1]


# ---- cases

RNG = np.random.default_rng(0)


def nats(low: float, high: float, *shape: int) -> np.ndarray:
    """Multiples of 1/64, which float32 and its differences hold exactly."""
    return np.round(RNG.uniform(low, high, shape) * 64) / 64


LENGTHS = RNG.integers(1, 20, (2, 8)).astype(float)
POLICY = [*nats(-60, -5, 2, 8), *LENGTHS]
PAIR = [*POLICY[:2], *(POLICY[:2] + nats(-5, 5, 2, 8)), *LENGTHS]
RATIOS = [*nats(-9, 9, 4, 8)]
BARE = [*nats(-60, -5, 2, 8), RNG.random(8) < 0.5]
MEANS = [np.append(nats(-6, -0.05, 6), [-1 / 64, -30.0]), nats(-6, -0.05, 8)]
RANKS = np.array([[0, 1, 2, 3], [2, 0, 0, 1], [1, 1, 0, 9], [0, 1, 9, 9]], float)
GROUP = [*nats(-60, -5, 2, 4, 4), RANKS, RANKS < 9]
TOKENS = [nats(-5, -0.1, 2, 4), nats(1, 9, 2, 4)]


class Case(NamedTuple):
    columns: type
    inputs: list[np.ndarray]
    oracle: Oracle
    numbers: dict[str, Any]


BETA, SMOOTH, WEIGHTS = {"beta": 0.3}, {"label_smoothing": 0.2}, {"desirable_weight": 1.2, "undesirable_weight": 0.7}
# Of each loss one case, or several with a word behind its name.
CASES: dict[str, Case] = {
    "dpo": Case(Pair, PAIR, dpo64, BETA | SMOOTH | {"margin": 0.5}),
    "robust": Case(Pair, PAIR, robust64, BETA | SMOOTH),
    "ipo": Case(Pair, PAIR, ipo64, BETA | {"length_normalised": True}),
    "ipo sums": Case(Pair, PAIR, ipo64, BETA | {"length_normalised": False}),
    "hinge": Case(Pair, PAIR, hinge64, {"beta": 0.17, "margin": 0.9}),
    "exo": Case(Pair, PAIR, exo64, BETA | SMOOTH),
    "nca": Case(Pair, PAIR, nca64, BETA),
    "bco_pair": Case(Pair, PAIR, bco_pair64, BETA),
    "sppo": Case(Pair, PAIR, sppo64, BETA),
    "apo_zero": Case(Pair, PAIR, apo_zero64, BETA),
    "apo_down": Case(Pair, PAIR, apo_down64, BETA),
    "discopop": Case(Pair, PAIR, discopop64, BETA | {"tau": 0.4}),
    "dpo_norm": Case(Pair, PAIR, dpo_norm64, {"beta": 5.0}),
    "aot": Case(SortedMargins, RATIOS[:2], aot64, BETA | SMOOTH),
    "aot_unpaired": Case(SortedRatios, RATIOS, aot_unpaired64, BETA | SMOOTH),
    "orpo": Case(MeanPair, MEANS, orpo64, BETA),
    "simpo": Case(MeanPair, MEANS, simpo64, {"beta": 2.5, "margin": 1.25}),
    "alphapo": Case(MeanPair, MEANS, alphapo64, {"beta": 2.5, "margin": 1.25, "alpha": 0.2}),
    "cpo": Case(PolicyPair, POLICY, cpo64, {"beta": 0.1, "alpha": 0.7} | SMOOTH),
    "dpo_pl": Case(Ranked, GROUP, dpo_pl64, {"beta": 0.1}),
    "kto": Case(Answer, [*BARE, nats(0, 3, 8)], kto64, BETA | WEIGHTS),
    "kto_zero": Case(BareAnswer, BARE, kto64, BETA | WEIGHTS),
    "bco": Case(ShiftedAnswer, [*BARE, nats(-2, 2, 8)], bco64, BETA),
    "nll": Case(Tokens, TOKENS, nll64, {"z_loss": 0.1}),
    "dft": Case(Tokens, TOKENS, dft64, {}),
    "smooth_nll": Case(SmoothTokens, [TOKENS[0], TOKENS[0] - TOKENS[1]], smooth_nll64, SMOOTH),
}
TAKES = {name: inspect.signature(loss).parameters for name, loss in LOSSES.items()}
CASES |= {
    f"{name} {divergence}": case._replace(
        numbers=case.numbers | {"beta": 0.05, "divergence": divergence, "divergence_alpha": 0.3}
    )
    for name, case in CASES.items()
    if "divergence" in TAKES[name.split()[0]]
    for divergence in get_args(TAKES[name.split()[0]]["divergence"].annotation)
}
# What is differentiated where it isn't the value: the part that a loss holds fixed is fixed.
DIFFERENTIATED: dict[str, Oracle] = {
    "dft": lambda p: -np.exp(TOKENS[0]) * p[0],
    "aot_unpaired": lambda p, **numbers: 2 * aot_unpaired64(p, **numbers),
}
POLICYS_OWN = {"chosen", "rejected", "margin", "logprob", "logprobs", "logsumexp", "mean_logprobs"}
FIXED = {"partner", "chosen_partner", "rejected_partner", "baseline", "shift"}


def columns_of(case: Case, dtype: Any) -> Any:
    return case.columns(*(jnp.asarray(x, None if x.dtype == bool else dtype) for x in case.inputs))


def derivative(oracle: Oracle, inputs: list[np.ndarray], place: int, way: np.ndarray, **numbers: Any) -> np.ndarray:
    """Of every row along `way`, by differences of the fourth order: exact to about 1e-9 at this step."""
    step = 1e-4
    at = lambda k: oracle([x + k * step * way if i == place else x for i, x in enumerate(inputs)], **numbers)
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def test_every_loss_has_an_oracle():
    assert {name.split()[0] for name in CASES} == set(LOSSES) == {*SUPERVISED, *PREFERENCE, *RANKED, *UNPAIRED}


@pytest.mark.parametrize("name", CASES)
def test_the_value_is_the_oracles(name):
    case = CASES[name]
    found = LOSSES[name.split()[0]](columns_of(case, jnp.float32), **case.numbers)
    np.testing.assert_allclose(found, case.oracle(case.inputs, **case.numbers), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_oracles(name):
    case = CASES[name]
    loss, oracle = LOSSES[name.split()[0]], DIFFERENTIATED.get(name, case.oracle)
    with jax.enable_x64(True):
        columns = columns_of(case, jnp.float64)
        moving = {field: x for field, x in columns._asdict().items() if field in POLICYS_OWN | FIXED}
        total = lambda moving: jnp.sum(loss(columns._replace(**moving), **case.numbers))
        slopes = {field: np.asarray(slope) for field, slope in jax.grad(total)(moving).items()}
    for field, slope in slopes.items():
        if field in FIXED:
            np.testing.assert_array_equal(slope, 0)
            continue
        place = case.columns._fields.index(field)
        # A loss of a row of several completions is moved one column at a time.
        count = slope.shape[1] if case.columns is Ranked else 0
        ways = np.eye(count) if count else [np.ones(slope.shape)]
        parts = [derivative(oracle, case.inputs, place, way, **case.numbers) for way in ways]
        expected = np.stack(parts, axis=1) if count else parts[0]
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-9)


def per_row(name: str) -> list[str]:
    hints = get_type_hints(LOSSES[name], include_extras=True)
    return [argument for argument, hint in hints.items() if PER_ROW in getattr(hint, "__metadata__", ())]


@pytest.mark.parametrize("name", [name for name in LOSSES if per_row(name)])
def test_a_number_a_row_is_that_number_in_its_row(name):
    case, columns = CASES[name], columns_of(CASES[name], jnp.float32)
    for argument in per_row(name):
        numbers = RNG.uniform(0.05, 0.45, len(columns[0])).astype(np.float32)
        together = LOSSES[name](columns, **case.numbers | {argument: jnp.asarray(numbers)})
        alone = [LOSSES[name](columns, **case.numbers | {argument: float(x)})[i] for i, x in enumerate(numbers)]
        np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-7)


def test_orpo_keeps_its_precision_next_to_certainty():
    near = [-(2.0 ** -np.arange(7, 23, 3)), np.full(6, -1.5)]
    for p in (near, near[::-1]):
        np.testing.assert_allclose(orpo(MeanPair(*f32(*p)), beta=0.3), orpo64(p, 0.3), rtol=2e-5)


# ---- sorted pairs

COLUMN = st.lists(st.integers(-64, 64), min_size=6, max_size=6)


@settings(max_examples=25, deadline=None)
@given(COLUMN, COLUMN, st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from([np.nan, -99.0, 0.0, np.inf]))
def test_partners_have_the_same_rank(values, others, present, poison):
    weight = np.asarray(present, np.float32)
    poisoned = [np.where(present, column, poison).astype(np.float32) for column in (values, others)]
    found = np.asarray(partners(*f32(*poisoned, weight)))
    expected, real = np.zeros(6), np.flatnonzero(present)
    by_rank = sorted(others[i] for i in real)
    for rank, i in enumerate(sorted(real, key=lambda i: (values[i], i))):
        expected[i] = by_rank[rank]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_aot_unpaired_descends_the_loss_of_the_whole_sorted_batch(smoothing):
    """Although each side's partners are fixed columns: value and gradient of the sum over ranks of f(a_(k) - b_(k))."""
    numbers = {"beta": 0.3, "label_smoothing": smoothing}

    def whole(p: list[np.ndarray]) -> np.ndarray:
        return logistic64(0.3 * (np.sort(p[0]) - np.sort(p[1])), smoothing)

    a, b = sides = nats(-9, 9, 2, 8)
    with jax.enable_x64(True):
        found = [partners(jnp.asarray(x), jnp.asarray(y), jnp.ones(8)) for x, y in ((a, b), (b, a))]
        total = lambda sides: jnp.sum(aot_unpaired(SortedRatios(*sides, *found), **numbers))
        value, slopes = jax.value_and_grad(total)((jnp.asarray(a), jnp.asarray(b)))
    np.testing.assert_allclose(value, whole([a, b]).sum(), rtol=1e-9)
    for place, slope in enumerate(slopes):
        expected = [derivative(whole, [*sides], place, way).sum() for way in np.eye(8)]
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-9)
