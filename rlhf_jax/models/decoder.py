"""One decoder for every family: pre-norm blocks of grouped attention and a gated MLP.

The layers are one stacked tree (their leading axis is the layer) run by a scan, so that the program and its
compile time do not grow with depth. `Model` is what the rest of the project sees: pure functions of
(params, arrays), params a plain nested dict.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.models import attention
from rlhf_jax.models.rope import Rope, angles, rotate
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import Head, Stat, TokenStats, token_logprobs

Params = Any  # a nested dict of arrays
Dtype = Literal["float32", "bfloat16"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a decoder is, apart from its numbers."""

    vocab: int
    width: int
    layers: int
    heads: int
    groups: int  # key-value heads
    head_dim: int
    mlp_width: int
    length: int  # the context, tokens
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    soft_cap: float | None = None  # of the final logits
    spread: float = 0.02  # standard deviation of random weights


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How it is computed: dtypes, attention back end, what the backward pass makes again."""

    param_dtype: Annotated[Dtype, "of weights and optimiser moments"] = "float32"
    compute_dtype: Annotated[Dtype, "of activations and matrix products, which accumulate in float32"] = "float32"
    attention: Annotated[
        Literal["auto", "dense", "blocked", "splash"],
        "auto: splash on TPUs from 128 tokens on; else blocked, or dense up to 64 tokens",
    ] = "auto"
    remat: Annotated[
        Literal["none", "dots", "full"],
        "what the backward pass makes again: nothing, all but matrix products, or each whole layer",
    ] = "none"
    chunk: Annotated[int, "tokens of one data shard whose logits are alive at a time"] = 1024


class Cache(NamedTuple):
    """Keys, already turned by their positions, and values of S tokens a row: [L, B, G, S, d], or a layer's."""

    keys: Array
    values: Array


REMAT = {
    "none": lambda block: block,
    "dots": lambda block: nn.remat(
        block, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "full": lambda block: nn.remat(block, prevent_cse=False),
}


class _Module(nn.Module):
    shape: Shape
    numerics: Numerics
    layout: Layout

    def dense(self, name: str, features: int | tuple[int, ...], bias: bool, axis: Any = -1, deep: bool = False):
        """A linear map; `deep` ones end a residual branch and start smaller, by 1 / sqrt(2 layers)."""
        scale = self.shape.spread / (2 * self.shape.layers) ** 0.5 if deep else self.shape.spread
        return nn.DenseGeneral(
            features, axis=axis, use_bias=bias, name=name, kernel_init=nn.initializers.normal(scale),
            dtype=self.numerics.compute_dtype, param_dtype=jnp.dtype(self.numerics.param_dtype),
        )  # fmt: skip

    def norm(self, name: str, x: Array) -> Array:
        """Root-mean-square norm, computed in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""
        scale = self.param(name, nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.numerics.param_dtype))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.shape.norm_eps)
        dtype = jnp.dtype(self.numerics.compute_dtype)
        return wide.astype(dtype) * scale.astype(dtype)[None, None]


class Block(_Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x [B, T, D]. Also the new keys and values, if it keeps them."""

    keep: bool = False

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None, context: tuple[Array, Array, Array]) -> tuple[Array, Any]:
        shape, layout = self.shape, self.layout
        seen, sines, cosines = context
        y = self.norm("attention_norm", x)
        q = self.dense("query", (shape.heads, shape.head_dim), shape.qkv_bias)(y)
        k = self.dense("key", (shape.groups, shape.head_dim), shape.qkv_bias)(y)
        v = self.dense("value", (shape.groups, shape.head_dim), shape.qkv_bias)(y)
        q, k = rotate(q, sines, cosines), rotate(k, sines, cosines)
        q, k, v = (layout.constrain(part, "rows", None, "heads", None) for part in (q, k, v))
        if cache is None:
            y = attention.BACKENDS[self.numerics.attention](q, k, v, seen, layout)
        else:
            y = attention.cached(q, k, v, cache.keys, cache.values, seen)
        x = x + self.dense("out", shape.width, shape.out_bias, axis=(-2, -1), deep=True)(y)
        y = self.norm("mlp_norm", x)
        gate = self.dense("gate", shape.mlp_width, shape.mlp_bias)(y)
        up = self.dense("up", shape.mlp_width, shape.mlp_bias)(y)
        y = layout.constrain(ACTIVATIONS[shape.activation](gate) * up, "rows", None, "mlp")
        x = x + self.dense("down", shape.width, shape.mlp_bias, deep=True)(y)
        kept = Cache(jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)) if self.keep else None
        return layout.constrain(x, "rows", None, None), kept


class Decoder(_Module):
    """Tokens to hidden states, after the final norm, and each layer's keys and values if it keeps them."""

    keep: bool = False

    @nn.compact
    def __call__(
        self, tokens: Array, seen: Array, positions: Array, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        shape, numerics = self.shape, self.numerics
        init = nn.initializers.normal(shape.spread)
        dtype = jnp.dtype(numerics.param_dtype)
        table = self.param("embedding", init, (shape.vocab, shape.width), dtype)
        if not shape.tied:
            self.param("head", init, (shape.vocab, shape.width), dtype)
        # Looked up whole along its width: the partitioner can't look up a table that is cut both ways.
        x = jnp.take(self.layout.constrain(table, "vocab", None), tokens, axis=0).astype(numerics.compute_dtype)
        x = self.layout.constrain(x, "rows", None, None)
        sines, cosines = angles(shape.rope, shape.head_dim, positions)
        stack = nn.scan(
            REMAT[numerics.remat](Block), variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(0, nn.broadcast), length=shape.layers,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        layers = stack(shape, numerics, self.layout, self.keep, name="layers")
        x, kept = layers(x, cache, (seen, sines, cosines))
        return self.norm("final_norm", x), kept


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder as pure functions of its parameters. Hashable: a jitted function may close over it.

    `source` is the JSON text of the Hugging Face config it was made from, so that it can be written back.
    """

    shape: Shape
    numerics: Numerics = Numerics()
    layout: Layout = Layout()
    source: str = ""

    @property
    def _module(self) -> Decoder:
        return Decoder(self.shape, self.numerics, self.layout)

    def shapes(self) -> Params:
        """The parameters as shapes and dtypes; nothing is computed, nor compiled."""
        return jax.eval_shape(self.init, jax.eval_shape(jax.random.key, 0))

    def init(self, key: Array) -> Params:
        """Random parameters; jit it with out_shardings to make each piece where it belongs."""
        blank = jnp.zeros((self.layout.shards, 2), jnp.int32)  # a row a shard, as some back ends want
        return self._module.init(key, blank, blank, blank)["params"]

    def apply(self, params: Params, tokens: Array, segments: Array, positions: Array) -> Array:
        """Hidden states [B, T, D] in the compute dtype, after the final norm.

        Args:
          tokens: [B, T] int, ids below `shape.vocab`.
          segments: [B, T] int; a token sees only tokens of its own segment; 0 is padding.
          positions: [B, T] int, from 0 within each segment.
        """
        hidden, _ = self._module.apply({"params": params}, tokens, segments, positions)  # type: ignore[misc]
        return hidden

    def prefill(self, params: Params, tokens: Array, segments: Array, positions: Array) -> tuple[Array, Cache]:
        """`apply`, and the keys and values of every token, in the compute dtype, [L, B, G, T, d]."""
        module = Decoder(self.shape, self.numerics, self.layout, keep=True)
        return module.apply({"params": params}, tokens, segments, positions)  # type: ignore[return-value]

    def decode(
        self, params: Params, tokens: Array, positions: Array, cache: Cache, visible: Array
    ) -> tuple[Array, Cache]:
        """One token a row behind those of a cache.

        Args:
          tokens, positions: [B] int, the token and its place in its row.
          cache: of S tokens, [L, B, G, S, d], in any order: their positions are in the keys.
          visible: [B, S] bool, which of them the row's token sees, besides itself.
        Returns: the hidden states [B, D] as `apply` gives them, and the token's own keys and values
          [L, B, G, 1, d], which the caller puts into the cache.
        """
        module = Decoder(self.shape, self.numerics, self.layout, keep=True)
        hidden, new = module.apply({"params": params}, tokens[:, None], visible, positions[:, None], cache)  # type: ignore[misc]
        return hidden[:, 0], new  # type: ignore[return-value]

    def head(self, params: Params) -> Head:
        """The output head, in the compute dtype."""
        kernel = params["embedding" if self.shape.tied else "head"]
        return Head(kernel.astype(self.numerics.compute_dtype))

    def logits(self, params: Params, hidden: Array) -> Array:
        """All logits, float32 [B, T, V]: for tests and single tokens; objectives use `logprobs`."""
        logits = jnp.einsum("btd,vd->btv", hidden, self.head(params).kernel, preferred_element_type=jnp.float32)
        return logits if self.shape.soft_cap is None else (
            self.shape.soft_cap * jnp.tanh(logits / self.shape.soft_cap)
        )  # fmt: skip

    def token_stats(
        self,
        params: Params,
        rows: dict[str, Array],
        *,
        temperature: float | Array = 1.0,
        want: tuple[Stat, ...] = ("logprobs",),
    ) -> TokenStats:
        """What the model says of each masked token given those before it, float32 [B, T].

        Entry t is about token t, read from the hidden state of t - 1; a segment's first token has no such
        state and gives 0.

        Args:
          rows: tokens, segments, positions [B, T] int and mask [B, T] bool, True where asked.
        """
        hidden = self.apply(params, rows["tokens"], rows["segments"], rows["positions"])
        ahead = lambda x: jnp.roll(x, -1, axis=1)
        same = (ahead(rows["segments"]) == rows["segments"]).at[:, -1].set(False)
        stats = token_logprobs(
            hidden, self.head(params), ahead(rows["tokens"]), ahead(rows["mask"]) & same,
            temperature=temperature, soft_cap=self.shape.soft_cap, want=want,
            chunk=self.numerics.chunk, layout=self.layout,
        )  # fmt: skip
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), stats)
