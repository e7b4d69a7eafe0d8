"""Rotary positions against the published formulas, written out in float64, and the laws they obey."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.models.rope import Rope, angles, furthest, rotate

SIZE = 16
ROPES = {
    "default": Rope(theta=500.0),
    "linear": Rope(theta=10_000.0, kind="linear", factor=4.0),
    "llama3": Rope(
        theta=500_000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
    ),
    "yarn": Rope(theta=10_000.0, kind="yarn", factor=16.0, original_length=4096),
    "yarn, a ramp of fractions": Rope(
        theta=10_000.0, kind="yarn", factor=4.0, original_length=2048, beta_fast=16.0, truncate=False
    ),
    "yarn, attention as it was": Rope(
        theta=10_000.0, kind="yarn", factor=4.0, original_length=4096, attention_factor=1.0
    ),
}
ROPES["longrope"] = Rope(
    theta=10_000.0, kind="longrope", factor=4.0, original_length=4096,
    short_factor=tuple(1 + 0.1 * i for i in range(8)), long_factor=tuple(1 + i * i for i in range(8)),
)  # fmt: skip
every = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


# ---- the formulas, one frequency at a time: wave length and share of interpolation as their authors have them


def default(rope: Rope, theta: float, i: int) -> float:
    """Su et al. 2021, arXiv:2104.09864: the base to the power of -2 i / d."""
    return theta


def linear(rope: Rope, theta: float, i: int) -> float:
    """Chen et al. 2023, arXiv:2306.15595: position m becomes m / s."""
    return theta / rope.factor


def llama3(rope: Rope, theta: float, i: int) -> float:
    """`apply_scaling` of Meta's llama-models."""
    wave = 2 * math.pi / theta
    if wave < rope.original_length / rope.high_freq_factor:
        return theta
    if wave > rope.original_length / rope.low_freq_factor:
        return theta / rope.factor
    smooth = (rope.original_length / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - smooth) * theta / rope.factor + smooth * theta


def yarn(rope: Rope, theta: float, i: int) -> float:
    """`YaRNScaledRotaryEmbedding` of Peng et al. 2023, arXiv:2309.00071."""

    def correction_dim(rotations: float) -> float:
        return SIZE * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, SIZE - 1)
    extrapolated = 1 - min(max((i - low) / (high - low), 0), 1)
    return theta / rope.factor * (1 - extrapolated) + theta * extrapolated


def longrope(rope: Rope, theta: float, i: int) -> float:
    """Ding et al. 2024, arXiv:2402.13753: each wave by a factor of its own."""
    return theta / rope.short_factor[i]


FORMULAS = {"default": default, "linear": linear, "llama3": llama3, "yarn": yarn, "longrope": longrope}


def frequencies(rope: Rope) -> list[float]:
    return [FORMULAS[rope.kind](rope, rope.theta ** (-2 * i / SIZE), i) for i in range(SIZE // 2)]


def warmth(rope: Rope) -> float:
    """YaRN's scale of queries and keys, Eq. 22: sqrt(1 / t) = 0.1 ln s + 1; LongRoPE's sqrt(1 + ln s / ln L)."""
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length))
    if rope.kind != "yarn" or rope.attention_factor == 1:
        return 1.0
    return 0.1 * math.log(rope.factor) + 1


def turned(rope: Rope, x: np.ndarray, position: int) -> np.ndarray:
    """x [d] as complex numbers of its two halves, each times e^(i m theta)."""
    halves = x[: SIZE // 2] + 1j * x[SIZE // 2 :]
    halves = halves * np.exp(1j * position * np.array(frequencies(rope))) * warmth(rope)
    return np.concatenate([halves.real, halves.imag])


def rotated(rope: Rope, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x [B, T, H, d] by the code under test."""
    return np.asarray(rotate(jnp.asarray(x, jnp.float32), *angles(rope, SIZE, jnp.asarray(positions))))


@every
def test_the_angles_are_the_published_ones(rope: Rope) -> None:
    """To float32 rounding of an angle, which at position 8,191 is of the order of 1e-3."""
    positions = np.array([[0, 1, 2, 63, 500, 2048, 8191]])
    sines, cosines = (np.asarray(x, np.float64)[0] for x in angles(rope, SIZE, jnp.asarray(positions)))
    angle = positions[0][:, None] * np.array(frequencies(rope))
    slack = 2e-7 * (1 + np.abs(angle))
    assert (np.abs(sines - np.sin(angle) * warmth(rope)) <= slack).all()
    assert (np.abs(cosines - np.cos(angle) * warmth(rope)) <= slack).all()


@every
def test_a_rotation_is_the_oracles(rope: Rope) -> None:
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 3, 2, SIZE)), np.array([[0, 7, 90], [3, 0, 300]])
    expected = [[[turned(rope, x[b, t, h], positions[b, t]) for h in range(2)] for t in range(3)] for b in range(2)]
    np.testing.assert_allclose(rotated(rope, x, positions), expected, rtol=0, atol=2e-4)


@every
def test_position_zero_turns_nothing(rope: Rope) -> None:
    x = np.random.default_rng(1).standard_normal((1, 2, 3, SIZE)).astype(np.float32)
    expected = x * np.float32(warmth(rope))
    np.testing.assert_array_equal(rotated(rope, x, np.zeros((1, 2), int)), expected)


@every
@settings(max_examples=10, deadline=None)
@given(query=st.integers(0, 400), key=st.integers(0, 400), shift=st.integers(0, 400), seed=st.integers(0, 2**32 - 1))
def test_a_score_depends_on_the_distance_alone(rope: Rope, query: int, key: int, shift: int, seed: int) -> None:
    q, k = np.random.default_rng(seed).standard_normal((2, SIZE))
    rows = np.array([[query, key], [query + shift, key + shift]])
    pair = rotated(rope, np.broadcast_to(np.stack([q, k])[None, :, None], (2, 2, 1, SIZE)), rows)
    scores = np.sum(pair[:, 0] * pair[:, 1], axis=-1)
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_short_waves_are_kept_and_long_ones_stretched(kind: str) -> None:
    """Of all kinds but linear, which stretches each alike."""
    rope = ROPES[kind]
    sines, cosines = angles(rope, SIZE, jnp.ones((1, 1), jnp.int32))
    plain = rope.theta ** (-np.arange(0, SIZE, 2) / SIZE)
    stretch = plain / np.arctan2(sines, cosines)[0, 0]
    assert stretch[0] == pytest.approx(rope.factor if kind == "linear" else 1, rel=1e-5)
    assert stretch[-1] == pytest.approx(rope.factor, rel=1e-5)
    assert (np.diff(stretch) > -1e-4).all()
    between = (stretch > 1.01) & (stretch < rope.factor / 1.01)
    assert between.any() == (kind != "linear")


def test_a_text_beyond_the_original_length_has_the_long_factors() -> None:
    """All its tokens from the first on; a shorter one beside it in the row keeps the short factors."""
    rope = dataclasses.replace(ROPES["longrope"], original_length=4)
    lengths = (4, 5, 2)
    segments = np.repeat([1, 2, 0], lengths)[None]
    positions = np.concatenate([*map(np.arange, lengths)])[None]
    sines, _ = angles(rope, SIZE, jnp.asarray(positions), furthest(jnp.asarray(segments), jnp.asarray(positions)))
    factors = np.where(segments[0][:, None] == 2, rope.long_factor, rope.short_factor)
    angle = positions[0][:, None] * rope.theta ** (-np.arange(0, SIZE, 2) / SIZE) / factors
    np.testing.assert_allclose(sines[0], np.sin(angle) * warmth(rope), rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 11), max_size=4, unique=True))
def test_the_furthest_position_is_the_last_of_the_segment(cuts: list[int]) -> None:
    lengths = np.diff([0, *sorted(cuts), 12])
    segments = np.repeat(np.arange(len(lengths)), lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    got = furthest(jnp.asarray(segments), jnp.asarray(positions))
    np.testing.assert_array_equal(got[0], np.repeat(lengths - 1, lengths))


def test_a_share_of_a_head_is_turned_like_a_smaller_head() -> None:
    rope = Rope(theta=500.0, share=0.5)
    x, positions = np.random.default_rng(0).standard_normal((2, 3, 2, SIZE)), np.array([[0, 7, 90], [3, 0, 300]])
    got = rotated(rope, x, positions)
    turn = angles(Rope(theta=500.0), SIZE // 2, jnp.asarray(positions))
    np.testing.assert_array_equal(got[..., : SIZE // 2], rotate(jnp.asarray(x[..., : SIZE // 2], jnp.float32), *turn))
    np.testing.assert_array_equal(got[..., SIZE // 2 :], x[..., SIZE // 2 :].astype(np.float32))


def test_bfloat16_is_turned_in_float32() -> None:
    """And rounded once, at the end."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 4, 1, SIZE)), jnp.bfloat16)
    turn = angles(ROPES["default"], SIZE, jnp.asarray([[0, 5, 77, 300]]))
    got = rotate(x, *turn)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, rotate(x.astype(jnp.float32), *turn).astype(jnp.bfloat16))
