"""The distribution a token is drawn from: filters against an oracle in float64, the draw against the exact law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.errors import UserError
from rlhf_jax.sampling import distribution
from rlhf_jax.sampling.distribution import Sampling, check, draw, filtered, knobs

VOCAB = 150  # more than two blocks, and not a multiple of one
LAST = float(np.nextafter(np.float32(1), np.float32(0)))

_draw = jax.jit(draw)
_filtered = jax.jit(filtered)


def logits_of(seed: int, rows: int = 1, spread: float = 3.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).normal(size=(rows, VOCAB))).astype(np.float32)


def oracle(logits: np.ndarray, sampling: Sampling, seen: np.ndarray | None = None) -> np.ndarray:
    """Probabilities of one row, float64, filter by filter on sorted copies, as the words of the papers say."""
    z = logits.astype(np.float64)
    if seen is not None:
        z = np.where(seen, np.where(z > 0, z / sampling.repetition_penalty, z * sampling.repetition_penalty), z)
    z = z / sampling.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    if sampling.top_k:
        p = np.where(p >= np.sort(p)[::-1][: sampling.top_k].min(), p, 0)
        p /= p.sum()
    if sampling.top_p < 1:
        order = np.argsort(-p)
        count = int(np.searchsorted(np.cumsum(p[order]), sampling.top_p)) + 1
        p = np.where(np.isin(np.arange(len(p)), order[:count]), p, 0)
        p /= p.sum()
    p = np.where(p >= sampling.min_p * p.max(), p, 0)
    return p / p.sum()


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=1.5, top_k=7),
    Sampling(top_p=0.83),
    Sampling(min_p=0.11),
    Sampling(temperature=0.7, top_k=20, top_p=0.6, min_p=0.05),
    Sampling(top_k=1),
    Sampling(top_p=1e-6),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_kept_set_and_its_probabilities_are_the_oracles(sampling):
    for seed in range(20):
        logits = logits_of(seed)
        kept = np.asarray(_filtered(jnp.asarray(logits) / sampling.temperature, knobs(sampling, ())))[0]
        expected = oracle(logits[0], sampling)
        np.testing.assert_array_equal(kept > -np.inf, expected > 0)
        np.testing.assert_allclose(jax.nn.softmax(kept), expected, atol=1e-6)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_evenly_spread_numbers_draw_each_token_by_its_probability(sampling):
    # The draw inverts the distribution function, so N even numbers give each token N p times, to within one.
    count = 4000
    logits = np.repeat(logits_of(3), count, axis=0)
    uniform = ((np.arange(count) + 0.5) / count).astype(np.float32)
    drawn = _draw(logits, np.zeros(logits.shape, bool), uniform, knobs(sampling, ()))
    expected = oracle(logits[0], sampling)
    counts = np.bincount(np.asarray(drawn.token), minlength=VOCAB)
    assert np.abs(counts - count * expected).max() <= 1.01
    np.testing.assert_allclose(drawn.behaviour, np.log(expected[drawn.token]), atol=1e-5)
    full = oracle(logits[0], Sampling(temperature=sampling.temperature))
    np.testing.assert_allclose(drawn.logprob, np.log(full[drawn.token]), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, LAST, width=32), st.integers(1, VOCAB))
def test_no_token_of_probability_zero_is_ever_drawn(seed, uniform, top_k):
    logits = logits_of(seed, spread=30.0)  # most probabilities are 0 in float32
    drawn = _draw(
        logits, np.zeros(logits.shape, bool), np.full(1, uniform, np.float32), knobs(Sampling(top_k=top_k), ())
    )
    assert np.exp(logits[0, drawn.token[0]] - logits.max()) > 0
    assert np.isfinite(drawn.behaviour[0])


@pytest.mark.parametrize("uniform", [0.0, LAST])
def test_the_ends_of_the_interval_draw_the_first_and_the_last_token_kept(uniform):
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, [5, 70, 140]] = 0.0
    token = _draw(logits, np.zeros(logits.shape, bool), np.full(1, uniform, np.float32), knobs(Sampling(), ())).token[0]
    assert token == (5 if uniform == 0 else 140)


def test_temperature_zero_takes_the_likeliest_token():
    logits = logits_of(0, rows=32)
    drawn = _draw(logits, np.zeros(logits.shape, bool), np.zeros(32, np.float32), knobs(Sampling(temperature=0.0), ()))
    np.testing.assert_array_equal(drawn.token, logits.argmax(axis=1))
    np.testing.assert_array_equal(drawn.behaviour, 0)
    np.testing.assert_allclose(drawn.logprob, np.max(jax.nn.log_softmax(logits), axis=1), atol=1e-6)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_of_seen_tokens_and_leaves_the_old_logprobs(penalty):
    sampling = Sampling(temperature=0.8, repetition_penalty=penalty)
    logits = np.repeat(logits_of(1), 500, axis=0)
    seen = np.repeat(np.random.default_rng(0).random((1, VOCAB)) < 0.5, 500, axis=0)
    uniform = np.random.default_rng(1).random(500).astype(np.float32)
    drawn = _draw(logits, seen, uniform, knobs(sampling, ()))
    expected = oracle(logits[0], sampling, seen[0])
    np.testing.assert_allclose(drawn.behaviour, np.log(expected[drawn.token]), atol=1e-5)
    whole = oracle(logits[0], Sampling(temperature=0.8))
    np.testing.assert_allclose(drawn.logprob, np.log(whole[drawn.token]), atol=1e-5)


def test_another_number_is_the_same_program():
    run = jax.jit(functools.partial(draw))
    for number, sampling in enumerate([*SAMPLINGS, Sampling(temperature=0.0, repetition_penalty=1.2)]):
        logits = logits_of(number)
        run(logits, logits > 0, np.full(1, 0.5, np.float32), knobs(sampling, tuple(range(number + 1))))
    programs = run._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    assert programs == 2  # one, and one more for a ninth token that ends a row


@pytest.mark.parametrize("name", distribution.ALLOWED)
def test_a_number_that_means_nothing_is_one_sentence(name):
    with pytest.raises(UserError, match=rf"--sampling\.{name}=-1 is not allowed; it must be "):
        check(Sampling(**{name: -1}))
