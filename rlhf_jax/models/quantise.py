"""Frozen kernels in 8 or 4 bits: quantised once, made wide again where they are used.

A quantised kernel is a dict in the kernel's place: `values` and `scales`, both of the kernel's rank, so that
the kernel's partition rule is theirs too. The kernel is values * scales, each scale over a box of values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

Kind = Literal["int8", "nf4"]
TILE = 64  # inputs that share a scale of nf4
# The 16 levels of 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def tile(size: int) -> int:
    """How many of `size` inputs share a scale: a divisor of them, `TILE` or the nearest that isn't much smaller.

    >>> tile(4096), tile(96), tile(172), tile(254), tile(16)
    (64, 48, 43, 127, 16)
    """
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below = max(n for n in divisors if n <= TILE)
    return below if 2 * below >= min(size, TILE) else min(n for n in divisors if n > TILE)


def quantise_kernel(kernel: Array, inputs: Sequence[int], kind: Kind) -> dict[str, Array]:
    """The quantised form of a kernel.

    int8: 255 steps from -absmax to absmax of each output channel. nf4: the nearest of `LEVELS`, which are the
    quantiles of a normal distribution, times the absmax of a tile along the last input axis; two neighbours
    along the last axis share a byte, whatever the device does with 4-bit types.

    Args:
      kernel: [layers, inputs..., outputs...], floating.
      inputs: its input axes; the last axis is none of them and is of even size for nf4.
    Returns: values, int8 or uint8 [..., outputs / 2], and scales, float32.
    """
    wide = kernel.astype(jnp.float32)
    if kind == "int8":
        import qwix

        channels = [axis for axis in range(kernel.ndim) if axis not in inputs]
        array = qwix.quantize(wide, jnp.int8, channelwise_axes=channels)
        return {"values": array.qvalue, "scales": array.scale}
    axis = inputs[-1]
    boxes = _boxes(wide, axis, tile(kernel.shape[axis]))
    scales = jnp.max(jnp.abs(boxes), axis=axis + 1, keepdims=True)
    unit = (boxes / jnp.where(scales > 0, scales, 1)).reshape(kernel.shape)
    bounds = [(low + high) / 2 for low, high in zip(LEVELS, LEVELS[1:], strict=False)]
    # A level is as far up as there are midpoints below: elementwise, so that no device needs another's piece.
    codes = sum((unit > bound).astype(jnp.uint8) for bound in bounds)
    pairs = jnp.asarray(codes).reshape(*kernel.shape[:-1], -1, 2)
    return {"values": pairs[..., 0] | pairs[..., 1] << 4, "scales": scales.squeeze(axis + 1)}


def wide_kernel(kernel: Any, dtype: Any) -> Array:
    """A kernel, quantised or not, as an array of `dtype`."""
    if not is_quantised(kernel):
        return kernel.astype(dtype)
    values, scales = kernel["values"], kernel["scales"]
    if values.dtype == jnp.int8:
        import qwix

        return qwix.dequantize(qwix.QArray(values, scales)).astype(dtype)
    codes = jnp.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
    units = jnp.take(jnp.asarray(LEVELS, jnp.float32), codes.astype(jnp.int32), axis=0)
    axis = next((i for i, size in enumerate(scales.shape) if size != codes.shape[i]), None)
    if axis is None:  # tiles of one
        return (units * scales).astype(dtype)
    boxes = _boxes(units, axis, codes.shape[axis] // scales.shape[axis])
    return (boxes * jnp.expand_dims(scales, axis + 1)).reshape(codes.shape).astype(dtype)


def is_quantised(kernel: Any) -> bool:
    """Whether a kernel is the dict of a quantised one."""
    return isinstance(kernel, Mapping)


def _boxes(x: Array, axis: int, size: int) -> Array:
    """The axis cut into tiles: [..., tiles, size, ...]."""
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
