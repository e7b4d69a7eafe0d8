"""One decoder for every family: blocks of attention and an MLP, with the features that a `Shape` names.

The layers are one stacked tree (their leading axis is the layer) run by a scan, so that the program and its
compile time do not grow with depth. `Model` is what the rest of the project sees: pure functions of
(params, arrays), params a plain nested dict.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal, NamedTuple, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.models import attention
from rlhf_jax.models.experts import Experts, Mixture
from rlhf_jax.models.linear import Linear, Lora
from rlhf_jax.models.rope import angles, furthest, rotate
from rlhf_jax.models.shape import ACTIVATIONS, Shape
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import Head, Stat, TokenStats, ahead, token_logprobs

Params = Any  # a nested dict of arrays
Dtype = Literal["float32", "bfloat16"]


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
    adapter: Lora | None = None

    def dense(self, name: str, features: int | tuple[int, ...], bias: bool, axis: Any = -1, deep: bool = False):
        """A linear map; `deep` ones end a residual branch and start smaller, by 1 / sqrt(2 layers)."""
        scale = self.shape.spread / (2 * self.shape.layers) ** 0.5 if deep else self.shape.spread
        lora = self.adapter if self.adapter is not None and name in self.adapter.targets else Lora()
        return Linear(
            (features,) if isinstance(features, int) else features, inputs=1 if axis == -1 else len(axis), bias=bias,
            name=name, kernel_init=nn.initializers.normal(scale), dtype=jnp.dtype(self.numerics.compute_dtype),
            param_dtype=jnp.dtype(self.numerics.param_dtype), rank=lora.rank, scale=lora.scale,
        )  # fmt: skip

    def norm(self, name: str, x: Array) -> Array:
        """The norm of the last axis, computed in float32.

        Root-mean-square (Zhang and Sennrich 2019, arXiv:1910.07467), or with the mean taken off and a bias (Ba et
        al. 2016, arXiv:1607.06450). A weight with an offset multiplies in float32 too, as Gemma has it.
        """
        shape, dtype = self.shape, jnp.dtype(self.numerics.compute_dtype)
        leaf = lambda name, init: self.param(name, init, (x.shape[-1],), jnp.dtype(self.numerics.param_dtype))
        spread = lambda weight, dtype: weight.astype(dtype).reshape((1,) * (x.ndim - 1) + weight.shape)
        scale = leaf(name, nn.initializers.zeros if shape.norm_offset else nn.initializers.ones)
        wide = x.astype(jnp.float32)
        if shape.norm == "layer":
            wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + shape.norm_eps)
        if shape.norm_offset:
            return (wide * (shape.norm_offset + spread(scale, jnp.float32))).astype(dtype)
        y = wide.astype(dtype) * spread(scale, dtype)
        return y + spread(leaf(f"{name}_bias", nn.initializers.zeros), dtype) if shape.norm == "layer" else y


class Context(NamedTuple):
    """What all layers read alike."""

    seen: Array  # segments [B, T]; with a cache how far before the token each cached one stands [B, S]
    turns: tuple[Array, Array] | None  # sines and cosines [B, T, n]; of each kind [K, B, T, n] if there are several


class Block(_Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x [B, T, D].

    The norms may stand behind attention and MLP, or on both sides of them, and both may read the same x.
    Also what was asked for: the new keys and values (`keep`), each token's balance of the experts (`weigh`).
    """

    keep: bool = False
    weigh: bool = False

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None, kind: Array | None, context: Context) -> tuple[Array, Any]:
        shape = self.shape
        same = lambda name, x: x
        before, behind = {
            "pre": (self.norm, same), "post": (same, self.norm), "sandwich": (self.norm, self.norm)
        }[shape.norms]  # fmt: skip
        y, kept = self.attention(before("attention_norm", x), cache, kind, context)
        middle = x + behind("attention_post_norm", y)
        y, balance = before("mlp_norm", x if shape.parallel else middle), None
        if shape.experts is None:
            y = self.mlp(y)
        else:
            y, balance = self.mixture(y, shape.experts, context.seen if self.weigh else None)
        x = middle + behind("mlp_post_norm", y)
        return self.layout.constrain(x, "rows", None, None), (kept, balance)

    def attention(
        self, x: Array, cache: Cache | None, kind: Array | None, context: Context
    ) -> tuple[Array, Cache | None]:
        """Attention in a layer of this kind (None: there is one), and its keys and values if they are kept."""
        shape, layout = self.shape, self.layout
        q = self.dense("query", (shape.heads, shape.head_dim), shape.qkv_bias)(x)
        k = self.dense("key", (shape.groups, shape.head_dim), shape.qkv_bias)(x)
        v = self.dense("value", (shape.groups, shape.head_dim), shape.qkv_bias)(x)
        if shape.qk_norm:
            flat = lambda x: x.reshape(*x.shape[:2], -1) if shape.qk_norm == "whole" else x
            q = self.norm("query_norm", flat(q)).reshape(q.shape)
            k = self.norm("key_norm", flat(k)).reshape(k.shape)
        if context.turns is not None:
            turn = context.turns if kind is None else jax.tree.map(lambda x: x[kind], context.turns)
            q, k = rotate(q, *turn), rotate(k, *turn)
        q, k, v = (layout.constrain(part, "rows", None, "heads", None) for part in (q, k, v))
        y = self.look(q, k, v, cache, kind, context.seen)
        kept = Cache(jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)) if self.keep else None
        return self.dense("out", shape.width, shape.out_bias, axis=(-2, -1), deep=True)(y), kept

    def look(self, q: Array, k: Array, v: Array, cache: Cache | None, kind: Array | None, seen: Array) -> Array:
        """The attention back end with the layer's window, [B, T, H, d]."""
        shape = self.shape
        form = attention.Form(shape.query_scale, shape.attention_soft_cap)
        windows = [one.window for one in shape.kinds]
        if cache is not None:
            limits = jnp.asarray([jnp.iinfo(jnp.int32).max if window is None else window for window in windows])
            near = jnp.where(seen < limits[0 if kind is None else kind], seen, 0)
            return attention.cached(q, k, v, cache.keys, cache.values, near, form)
        # Windows are static, so that a back end can leave out what no query sees: one branch for each.
        # A window as long as the rows is none.
        windows = [window if window is not None and window < q.shape[1] else None for window in windows]
        distinct = list(dict.fromkeys(windows))
        run = functools.partial(attention.BACKENDS[self.numerics.attention], layout=self.layout)
        branches = [functools.partial(run, form=form._replace(window=window)) for window in distinct]
        if kind is None or len(branches) == 1:
            return branches[0](q, k, v, seen)
        branch = jnp.asarray([distinct.index(window) for window in windows], jnp.int32)[kind]
        return jax.lax.switch(branch, branches, q, k, v, seen)

    def mlp(self, y: Array) -> Array:
        """down(act(gate y) * up y), or down(act(up y)) without a gate."""
        shape, act = self.shape, ACTIVATIONS[self.shape.activation]
        up = lambda name: self.dense(name, shape.mlp_width, shape.mlp_bias)(y)
        y = act(up("gate")) * up("up") if shape.gated else act(up("up"))
        y = self.layout.constrain(y, "rows", None, "mlp")
        return self.dense("down", shape.width, shape.mlp_bias, deep=True)(y)

    def mixture(self, y: Array, experts: Experts, segments: Array | None) -> tuple[Array, Array | None]:
        shape, numerics = self.shape, self.numerics
        spread = shape.spread, shape.spread / (2 * shape.layers) ** 0.5
        dtypes = jnp.dtype(numerics.param_dtype), jnp.dtype(numerics.compute_dtype)
        layer = Mixture(experts, ACTIVATIONS[shape.activation], spread, dtypes, self.layout, name="experts")
        return layer(y, segments)


def _turns(shape: Shape, positions: Array, longest: Array) -> tuple[Array, Array] | None:
    """Sines and cosines of each kind of layer, stacked if there are several; None if no kind turns."""
    distinct = dict.fromkeys(kind.rope for kind in shape.kinds if kind.rope is not None)
    if not distinct:
        return None
    ropes = {rope: angles(rope, shape.head_dim, positions, longest) for rope in distinct}
    sines, cosines = next(iter(ropes.values()))
    still = jnp.zeros_like(sines), jnp.ones_like(cosines)
    every = [still if kind.rope is None else ropes[kind.rope] for kind in shape.kinds]
    return every[0] if len(every) == 1 else jax.tree.map(lambda *parts: jnp.stack(parts), *every)


class Decoder(_Module):
    """Tokens to hidden states, after the final norm; each layer's keys and values, and its balance, as asked for."""

    keep: bool = False
    weigh: bool = False

    @nn.compact
    def __call__(
        self, tokens: Array, seen: Array, positions: Array, cache: Cache | None = None
    ) -> tuple[Array, Cache | None, Array | None]:
        shape, numerics = self.shape, self.numerics
        init = nn.initializers.normal(shape.spread)
        dtype = jnp.dtype(numerics.param_dtype)
        table = self.param("embedding", init, (shape.vocab, shape.width), dtype)
        if shape.own_head:
            self.param("head", init, (shape.vocab, shape.width), dtype)
        if shape.head == "score":
            self.param("score", nn.initializers.zeros, (shape.width,), dtype)
            self.param("score_bias", nn.initializers.zeros, (), dtype)
        # Looked up whole along its width: the partitioner can't look up a table that is cut both ways.
        x = jnp.take(self.layout.constrain(table, "vocab", None), tokens, axis=0).astype(numerics.compute_dtype)
        if shape.embed_scale != 1:
            x *= jnp.asarray(shape.embed_scale, x.dtype)
        if shape.learned_positions:
            table = nn.Embed(
                shape.length, shape.width, embedding_init=init, param_dtype=dtype, name="positions"
            ).embedding
            # Padding may stand anywhere.
            x += jnp.take(self.layout.constrain(table, None, None), positions, axis=0, mode="clip").astype(x.dtype)
        x = self.layout.constrain(x, "rows", None, None)
        stack = nn.scan(
            REMAT[numerics.remat](Block), variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast), length=shape.layers,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        layers = stack(shape, numerics, self.layout, self.adapter, self.keep, self.weigh, name="layers")
        context = Context(seen, _turns(shape, positions, furthest(seen, positions) if cache is None else positions))
        kinds = jnp.asarray(shape.pattern, jnp.int32) if len(shape.kinds) > 1 else None
        x, (kept, balance) = layers(x, cache, kinds, context)
        return self.norm("final_norm", x), kept, balance


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder as pure functions of its parameters. Hashable: a jitted function may close over it.

    `source` is the JSON text of the Hugging Face config it was made from, so that it can be written back.
    With an `adapter` the parameters hold its leaves too (`lora.join`); without it the same functions run on the
    base, whose kernels may be quantised.
    """

    shape: Shape
    numerics: Numerics = Numerics()
    layout: Layout = Layout()
    source: str = ""
    adapter: Lora | None = None

    def without_adapter(self) -> "Model":
        """The base: the same model with its adapter switched off."""
        return dataclasses.replace(self, adapter=None)

    def with_head(self, head: Literal["words", "score"]) -> "Model":
        """The same model with this head."""
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, head=head))

    @property
    def _module(self) -> Decoder:
        return Decoder(self.shape, self.numerics, self.layout, self.adapter)

    def shapes(self) -> Params:
        """The parameters as shapes and dtypes; nothing is computed, nor compiled."""
        return _shapes(self)

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
        hidden, _, _ = self._module.apply({"params": params}, tokens, segments, positions)  # type: ignore[misc]
        return hidden

    def blank(self, rows: int, columns: int) -> tuple[Array, Cache]:
        """Zeros in the form of what decoding carries: hidden states [B, D] and a cache of S tokens, [L, B, G, S, d]."""
        shape, dtype = self.shape, jnp.dtype(self.numerics.compute_dtype)
        cached = jnp.zeros((shape.layers, rows, shape.groups, columns, shape.head_dim), dtype)
        return jnp.zeros((rows, shape.width), dtype), Cache(cached, cached)

    def prefill(self, params: Params, tokens: Array, segments: Array, positions: Array) -> tuple[Array, Cache]:
        """`apply`, and the keys and values of every token, in the compute dtype, [L, B, G, T, d]."""
        module = self._module.clone(keep=True)
        hidden, cache, _ = module.apply({"params": params}, tokens, segments, positions)  # type: ignore[misc]
        return hidden, cache  # type: ignore[return-value]

    def decode(
        self, params: Params, tokens: Array, positions: Array, cache: Cache, distance: Array
    ) -> tuple[Array, Cache]:
        """One token a row behind those of a cache.

        Args:
          tokens, positions: [B] int, the token and its place in its row.
          cache: of S tokens, [L, B, G, S, d], in any order: their positions are in the keys.
          distance: [B, S] int, how many tokens before the row's new one each of them stands; 0 or less: it is
            not seen. Layers with a window see those that are nearer than it.
        Returns: the hidden states [B, D] as `apply` gives them, and the token's own keys and values
          [L, B, G, 1, d], which the caller puts into the cache.
        """
        module = self._module.clone(keep=True)
        hidden, new, _ = module.apply({"params": params}, tokens[:, None], distance, positions[:, None], cache)  # type: ignore[misc]
        return hidden[:, 0], new  # type: ignore[return-value]

    def head(self, params: Params) -> Head:
        """The word head, in the compute dtype. Errors: ValueError if there is a score in its place."""
        if self.shape.head != "words":
            raise ValueError("a model with a score head says nothing of words; read it with `score`")
        return Head(params["embedding" if self.shape.tied else "head"].astype(self.numerics.compute_dtype))

    def logits(self, params: Params, hidden: Array) -> Array:
        """All logits, float32 [B, T, V]: for tests and single tokens; objectives use `logprobs`."""
        logits = jnp.einsum("btd,vd->btv", hidden, self.head(params).kernel, preferred_element_type=jnp.float32)
        cap = self.shape.soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

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
          want: balance is that of the experts (`experts.balance`), averaged over layers; it is about token t
            where it stands, of every token that isn't padding, whatever the mask. score is that of `score`, by
            a score head that the parameters hold beside that of words.
        """
        head = self.head(params)
        hidden, balance = self.states(params, rows, "balance" in want)
        targets, asked = ahead(rows)
        stats = token_logprobs(
            hidden, head, targets, asked,
            temperature=temperature, soft_cap=self.shape.soft_cap,
            want=tuple(stat for stat in want if stat not in ("balance", "score")), chunk=self.numerics.chunk,
            layout=self.layout,
        )  # fmt: skip
        if "score" in want:
            stats = stats._replace(score=jnp.where(asked, _scores(params, hidden), 0))
        stats = jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), stats)
        return stats if balance is None else stats._replace(balance=balance)

    @overload
    def score(self, params: Params, rows: dict[str, Array], balance: Literal[False] = False) -> Array: ...
    @overload
    def score(self, params: Params, rows: dict[str, Array], balance: bool) -> Any: ...

    def score(self, params: Params, rows: dict[str, Array], balance: bool = False) -> Any:
        """The score read at every token, hidden . score + score_bias, float32 [B, T]; 0 at padding.

        Args:
          rows: tokens, segments, positions [B, T] int.
          balance: also return that of the experts, as `token_stats` gives it.
        Errors: ValueError for a model of words.
        """
        if self.shape.head != "score":
            raise ValueError("a model with a word head has no score to give; see `with_head`")
        hidden, weights = self.states(params, rows, balance)
        scores = jnp.where(rows["segments"] != 0, _scores(params, hidden), 0)
        return (scores, weights) if balance else scores

    def states(self, params: Params, rows: dict[str, Array], weigh: bool = False) -> tuple[Array, Array | None]:
        """Hidden states as `apply`, and each token's balance of the experts [B, T] if asked for."""
        module = self._module.clone(weigh=weigh)
        inputs = rows["tokens"], rows["segments"], rows["positions"]
        hidden, _, balance = module.apply({"params": params}, *inputs)  # type: ignore[misc]
        if weigh and balance is None:
            raise ValueError("a model without experts has no balance to give")
        return hidden, None if balance is None else jnp.mean(balance, axis=0)


def _scores(params: Params, hidden: Array) -> Array:
    """hidden . score + score_bias, float32 [B, T]."""
    kernel, bias = (params[name].astype(jnp.float32) for name in ("score", "score_bias"))
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST) + bias


@functools.lru_cache(maxsize=32)
def _shapes(model: Model) -> Params:
    return jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
