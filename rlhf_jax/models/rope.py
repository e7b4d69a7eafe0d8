"""Rotary positions and the ways of stretching them."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of the rotary embedding, of `kind` default, linear, llama3 or yarn.

    `factor` is by how much the context is stretched; `original_length` is the context before that. The
    other fields belong to one kind each and are named as in its Hugging Face config.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


def _llama3(rope: Rope, inverse: np.ndarray) -> tuple[np.ndarray, float]:
    """Llama 3.1: long waves are stretched, short ones kept, those between are blended."""
    turns = rope.original_length * inverse / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return (1 - smooth) * inverse / rope.factor + smooth * inverse, 1.0


def _yarn(rope: Rope, inverse: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, Eq. 23): a ramp over dimensions, and warmer attention."""
    size = len(inverse)

    def dimension(turns: float) -> float:
        return size * math.log(rope.original_length / (turns * 2 * math.pi)) / math.log(rope.theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * size - 1)
    ramp = np.clip((np.arange(size) - low) / max(high - low, 0.001), 0, 1)
    warmth = rope.attention_factor
    if warmth is None:
        warmth = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    return inverse * (1 - ramp) + inverse / rope.factor * ramp, warmth


KINDS = {
    "default": lambda rope, inverse: (inverse, 1.0),
    "linear": lambda rope, inverse: (inverse / rope.factor, 1.0),
    "llama3": _llama3,
    "yarn": _yarn,
}


def angles(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Sines and cosines of each position, float32 [B, T, head_dim / 2], for int positions [B, T]."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    frequencies, warmth = KINDS[rope.kind](rope, inverse)
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    return jnp.sin(angle) * warmth, jnp.cos(angle) * warmth


def rotate(x: Array, sines: Array, cosines: Array) -> Array:
    """Turns each pair (x_i, x_{i + d/2}) of x [B, T, H, d] by its angle; sines, cosines [B, T, d / 2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sines, cosines = sines[:, :, None], cosines[:, :, None]
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
