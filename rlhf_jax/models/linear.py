"""Linear maps, and what an adapter adds to them (Hu et al. 2021, arXiv:2106.09685).

A map with an adapter gives x W + b + scale (x A) B, its kernel W frozen: A and B are of low rank, and their
product, which is as large as W, is never made. W may be quantised; it is then made wide for one product at a time.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.models.quantise import is_quantised, wide_kernel


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is trained in place of the whole model: a low-rank adapter of its linear maps."""

    rank: Annotated[int, "of each adapter; 0: none, every weight is trained"] = 0
    alpha: Annotated[
        float | None, "adapters are scaled by alpha / rank; none: twice the rank, or 8 with lora.rslora"
    ] = None
    targets: Annotated[
        tuple[str, ...], "maps with an adapter, of query, key, value, out, gate, up, down; empty: all that can have one"
    ] = ()
    rslora: Annotated[bool, "scale by alpha / sqrt(rank), so that alpha needn't change with the rank"] = False
    base: Annotated[Literal["full", "int8", "nf4"], "how the frozen weights of linear maps are held"] = "full"

    @property
    def resolved_alpha(self) -> float:
        """`alpha`, or its default."""
        return self.alpha if self.alpha is not None else 8.0 if self.rslora else 2.0 * self.rank

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.resolved_alpha / max(1.0, math.sqrt(self.rank) if self.rslora else self.rank)


class Linear(nn.Module):
    """x [..., inputs...] -> [..., features...]; kernel [inputs..., features...], bias [features...].

    With an adapter: lora_a [inputs..., rank], drawn as PEFT draws it, and lora_b [rank, features...], 0, so that
    a new adapter changes nothing.
    """

    features: tuple[int, ...]
    inputs: int  # how many of the last axes of x are its input
    bias: bool
    kernel_init: Callable[..., Array]
    dtype: Any
    param_dtype: Any
    rank: int = 0  # of the adapter; 0: none
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        sizes = x.shape[x.ndim - self.inputs :]
        x = x.astype(self.dtype)
        y = self._product(x, self._kernel(sizes))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, self.param_dtype)
            y += bias.astype(self.dtype).reshape((1,) * (y.ndim - len(self.features)) + self.features)
        if self.rank:
            bound = 1 / math.sqrt(math.prod(sizes))  # Kaiming's for a = sqrt(5)
            uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
            a = self.param("lora_a", uniform, (*sizes, self.rank), self.param_dtype)
            b = self.param("lora_b", nn.initializers.zeros, (self.rank, *self.features), self.param_dtype)
            low = jnp.tensordot(x, a.astype(self.dtype), self.inputs)
            y += self.scale * jnp.tensordot(low, b.astype(self.dtype), 1)
        return y

    def _kernel(self, sizes: tuple[int, ...]) -> Any:
        """The kernel's array or, if the tree holds a quantised one, its dict."""
        held = self.get_variable("params", "kernel")
        if is_quantised(held):
            return held
        shape = (*sizes, *self.features)
        flat = (math.prod(sizes), math.prod(self.features))  # initialisers take the sides of a matrix
        draw = lambda key: self.kernel_init(key, flat, self.param_dtype).reshape(shape)
        return self.param("kernel", draw)

    def _product(self, x: Array, kernel: Any) -> Array:
        multiply = lambda x, kernel: jnp.tensordot(x, wide_kernel(kernel, self.dtype), self.inputs)
        if is_quantised(kernel):
            # Else the wide kernels of all layers would be kept for the backward pass.
            multiply = jax.checkpoint(multiply, prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
        return multiply(x, kernel)
