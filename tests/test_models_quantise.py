"""Quantised kernels: within half a step, on the nearest level, in the bytes that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.models.quantise import LEVELS, TILE, quantise_kernel, tile, wide_kernel

SHAPE = (2, 3, 128, 10)  # layers, heads, head_dim, width: the kernel of `out`
INPUTS = (1, 2)
quantise = jax.jit(quantise_kernel, static_argnums=(1, 2))
wide = jax.jit(wide_kernel, static_argnums=1)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=8, deadline=None)


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Weights of a spread that differs between channels by powers of ten, one channel 0."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 3, shape[-1:])[(None,) * (len(shape) - 1)]
    kernel[..., rng.integers(shape[-1])] = 0
    return kernel.astype(np.float32)


def boxes(kernel: np.ndarray) -> np.ndarray:
    """[..., tiles, TILE, outputs] of the last input axis."""
    return kernel.reshape(*kernel.shape[:-2], -1, TILE, kernel.shape[-1])


@few
@given(seeds)
def test_int8_is_within_half_a_step(seed: int) -> None:
    kernel = draw(seed)
    held = quantise(jnp.asarray(kernel), INPUTS, "int8")
    assert held["values"].dtype == jnp.int8 and held["values"].shape == SHAPE
    assert held["scales"].dtype == jnp.float32 and held["scales"].shape == (2, 1, 1, 10)
    steps = np.abs(kernel.astype(np.float64) - np.asarray(wide(held, "float32"))) / np.asarray(held["scales"])
    assert steps.max() <= 0.5 + 1e-4  # of a step; the quotient is rounded too
    # No more steps than 255 from -absmax to absmax.
    largest = np.abs(kernel).max(axis=INPUTS, keepdims=True)
    np.testing.assert_allclose(held["scales"], np.where(largest > 0, largest / 127.5, 1), rtol=1e-6)


@few
@given(seeds)
def test_nf4_is_the_nearest_of_the_published_levels(seed: int) -> None:
    """By brute force in float64."""
    kernel = draw(seed)
    held = quantise(jnp.asarray(kernel), INPUTS, "nf4")
    assert held["values"].dtype == jnp.uint8 and held["values"].shape == (*SHAPE[:-1], SHAPE[-1] // 2)
    assert held["scales"].shape == (2, 3, 128 // TILE, 10)
    cut = boxes(kernel).astype(np.float64)
    largest = np.abs(cut).max(axis=-2, keepdims=True)
    np.testing.assert_array_equal(held["scales"], largest.squeeze(-2).astype(np.float32))
    levels = np.asarray(LEVELS) * np.ones((*cut.shape, 1)) * largest[..., None]
    far = np.abs(levels - cut[..., None])
    got = np.abs(boxes(np.asarray(wide(held, "float32"))) - cut)
    assert (got <= far.min(axis=-1) + 1e-6 * largest).all()


@few
@given(seeds)
def test_nf4_says_what_qwix_says(seed: int) -> None:
    """Bit for bit; qwix keeps a byte or a 4-bit number for each, ours are two in a byte."""
    kernel = jnp.asarray(draw(seed))
    ours = wide(quantise(kernel, INPUTS, "nf4"), "float32")
    theirs = qwix.dequantize(qwix.quantize(kernel, "nf4", channelwise_axes=(0, 1, 3), tiled_axes={2: TILE}))
    np.testing.assert_array_equal(ours, theirs)


def test_nf4_of_nf4_is_itself() -> None:
    once = wide(quantise(jnp.asarray(draw(0)), INPUTS, "nf4"), "float32")
    twice = wide(quantise(once, INPUTS, "nf4"), "float32")
    np.testing.assert_allclose(twice, once, rtol=1e-6, atol=0)


def test_every_level_has_its_code_and_neighbours_share_a_byte() -> None:
    kernel = jnp.tile(jnp.asarray(LEVELS, jnp.float32)[None, :, None], (1, 1, 2)).at[..., 1].multiply(-3)
    held = quantise(kernel, (1,), "nf4")
    np.testing.assert_array_equal(held["scales"], [[[1, 3]]])
    np.testing.assert_array_equal(held["values"][0, :, 0] & 15, np.arange(16))
    np.testing.assert_array_equal(wide(held, "float32")[..., 0], kernel[..., 0])


@pytest.mark.parametrize("size", [1, 2, 8, 31, 64, 80, 96, 97, 172, 254, 1536, 4096, 11008])
def test_a_tile_divides_and_is_near_its_size(size: int) -> None:
    assert size % tile(size) == 0
    assert min(size, TILE) / 2 <= tile(size) <= max(TILE, size)
    assert tile(size) == TILE if size % TILE == 0 else True


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.04), ("nf4", 0.5625)])
def test_what_a_weight_takes(kind, most: float) -> None:
    kernel = jnp.ones((1, 128, 256))
    assert sum(x.nbytes for x in jax.tree.leaves(quantise(kernel, (1,), kind))) <= most * kernel.size


def test_an_unquantised_kernel_is_only_cast() -> None:
    kernel = jnp.asarray(draw(0))
    assert wide(kernel, "bfloat16").dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide(kernel, "float32"), kernel)
