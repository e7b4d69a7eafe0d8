"""Rotary positions and the ways of stretching them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of the rotary embedding, of `kind` default, linear, llama3, yarn or longrope.

    `factor` is by how much the context is stretched; `original_length` is the context before that. The
    other fields belong to one kind each and are named as in its Hugging Face config. Of each head the first
    `share` is turned.
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
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    share: float = 1.0

    def size(self, head_dim: int) -> int:
        """How many numbers of a head are turned."""
        return int(head_dim * self.share)


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


def _longrope(rope: Rope, inverse: np.ndarray, beyond: bool = False) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): each wave has a factor of its own, and warmer attention.

    Texts that go beyond the original length have other factors.
    """
    warmth = rope.attention_factor
    if warmth is None:
        warmth = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length)) if rope.factor > 1 else 1.0
    return inverse / np.asarray(rope.long_factor if beyond else rope.short_factor), warmth


KINDS = {
    "default": lambda rope, inverse: (inverse, 1.0),
    "linear": lambda rope, inverse: (inverse / rope.factor, 1.0),
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def angles(rope: Rope, head_dim: int, positions: Array, longest: Array | None = None) -> tuple[Array, Array]:
    """Sines and cosines of each position, float32 [B, T, n / 2] of n turned numbers, for int positions [B, T].

    Args:
      longest: [B, T] int, the last position of each token's text, which longrope asks for; None: no text goes
        beyond the original length.
    """
    size = rope.size(head_dim)
    inverse = 1.0 / rope.theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    frequencies, warmth = KINDS[rope.kind](rope, inverse)
    waves = jnp.asarray(frequencies, jnp.float32)[None, None]
    if rope.kind == "longrope" and longest is not None:
        far = jnp.asarray(_longrope(rope, inverse, beyond=True)[0], jnp.float32)[None, None]
        waves = jnp.where((longest >= rope.original_length)[..., None], far, waves)
    angle = positions[..., None].astype(jnp.float32) * waves
    return jnp.sin(angle) * warmth, jnp.cos(angle) * warmth


def furthest(segments: Array, positions: Array) -> Array:
    """The last position of each token's segment, [B, T] int; a segment is a run of one number."""
    length = segments.shape[1]
    ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    place = jnp.where(ends, jnp.arange(length)[None], length - 1)
    return jnp.take_along_axis(positions, jax.lax.cummin(place, axis=1, reverse=True), axis=1)


def rotate(x: Array, sines: Array, cosines: Array) -> Array:
    """Turns each pair (x_i, x_{i + n/2}) of the first n numbers of x [B, T, H, d] by its angle.

    Args:
      sines, cosines: [B, T, n / 2]; the numbers from n on stay as they are.
    """
    size = 2 * sines.shape[-1]
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    sines, cosines = sines[:, :, None], cosines[:, :, None]
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., size:]], axis=-1)
