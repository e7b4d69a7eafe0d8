"""Every loss against an independent float64 oracle, its gradient by finite differences of it, and sorted pairs."""

import inspect
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import losses
from rlhf_jax.losses.distillation import DISTILLATION
from rlhf_jax.losses.policy import POLICY as OF_POLICIES
from rlhf_jax.losses.preference import (
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
from rlhf_jax.losses.reward import REWARD, ScoredAnswer, ScoredSteps, ScoreGroup, ScorePair, ScoreRanking
from rlhf_jax.losses.supervised import SUPERVISED, SmoothTokens, Tokens
from rlhf_jax.losses.unpaired import UNPAIRED, Answer, BareAnswer, ShiftedAnswer
from rlhf_jax.registry import PER_ROW
from tests.oracles import (
    Oracle,
    all_pairs64,
    alphapo64,
    aot64,
    aot_unpaired64,
    apo_down64,
    apo_zero64,
    bco64,
    bco_pair64,
    bradley_terry64,
    cpo64,
    dft64,
    discopop64,
    dpo64,
    dpo_norm64,
    dpo_pl64,
    exo64,
    hinge64,
    ipo64,
    kto64,
    logistic64,
    nca64,
    nll64,
    orpo64,
    outcome64,
    plackett_luce64,
    process64,
    robust64,
    simpo64,
    smooth_nll64,
    sppo64,
)


def f32(*columns: Any) -> list[jax.Array]:
    return [jnp.asarray(column, jnp.float32) for column in columns]


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
SCORES = [nats(-4, 4, 4, 4), RNG.random((4, 4, 4)), RANKS < 9]
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
    "bradley_terry": Case(ScorePair, RATIOS[:2], bradley_terry64, SMOOTH | {"margin": 0.5, "centre": 0.1}),
    "all_pairs": Case(ScoreGroup, SCORES, all_pairs64, {"centre": 0.1}),
    "plackett_luce": Case(ScoreRanking, [SCORES[0], RANKS, RANKS < 9], plackett_luce64, {}),
    "outcome": Case(ScoredAnswer, [RATIOS[0], RNG.random(8) < 0.5], outcome64, {}),
    "process": Case(ScoredSteps, [nats(-4, 4, 4, 4), RNG.choice([0, 0.5, 1], (4, 4))], process64, {"neutral": 0.8}),
    "nll": Case(Tokens, TOKENS, nll64, {"z_loss": 0.1}),
    "dft": Case(Tokens, TOKENS, dft64, {}),
    "smooth_nll": Case(SmoothTokens, [TOKENS[0], TOKENS[0] - TOKENS[1]], smooth_nll64, SMOOTH),
}
ELSEWHERE = {*OF_POLICIES, *DISTILLATION}  # see test_policy_losses.py and test_distill.py
LOSSES = {name: loss for name, loss in losses.LOSSES.items() if name not in ELSEWHERE}
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
POLICYS_OWN = {"chosen", "rejected", "margin", "logprob", "logprobs", "logsumexp", "mean_logprobs", "score"}
FIXED = {"partner", "chosen_partner", "rejected_partner", "baseline", "shift"}


def columns_of(case: Case, dtype: Any) -> Any:
    return case.columns(*(jnp.asarray(x, None if x.dtype == bool else dtype) for x in case.inputs))


def derivative(oracle: Oracle, inputs: list[np.ndarray], place: int, way: np.ndarray, **numbers: Any) -> np.ndarray:
    """Of every row along `way`, by differences of the fourth order: exact to about 1e-9 at this step."""
    step = 1e-4
    at = lambda k: oracle([x + k * step * way if i == place else x for i, x in enumerate(inputs)], **numbers)
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def test_every_loss_has_an_oracle():
    assert {name.split()[0] for name in CASES} == set(LOSSES) == {*SUPERVISED, *PREFERENCE, *RANKED, *UNPAIRED, *REWARD}


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
        count = slope.shape[1] if case.columns in (Ranked, ScoreGroup, ScoreRanking) else 0
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
