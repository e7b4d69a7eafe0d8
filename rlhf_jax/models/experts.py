"""A mixture of experts in the place of the MLP: a router, a grouped matrix product, a measure of balance.

Every token goes to the experts that its router ranks highest, whatever their load: there is no capacity and
no token is dropped, so that a token's result doesn't depend on what else is in its batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.layout import Layout

Activation = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Experts:
    """What takes the place of a layer's MLP; `balance` is the weight that its config gives the balance term."""

    count: int
    chosen: int  # of them for each token
    width: int  # of one expert's MLP
    normalise: bool = True  # whether the weights of the chosen ones are made to sum to 1
    balance: float = 0.0


class Kernels(NamedTuple):
    """A layer's weights, or a device's share of them; expert e is down[e](act(gate[e] x) * up[e] x)."""

    router: Array  # [D, E]
    gate: Array  # [E, D, F]
    up: Array  # [E, D, F]
    down: Array  # [E, F, D]


class Routing(NamedTuple):
    """Where the tokens go: of N tokens to E experts, k each."""

    probs: Array  # [..., E] float32, the router's softmax
    chosen: Array  # [..., k] int32, experts, the likeliest first
    weights: Array  # [..., k] float32, of their sum


class Mixture(nn.Module):
    """`mixture` with parameters of its own: router, gate, up and down, a kernel each."""

    experts: Experts
    activation: Activation
    spread: tuple[float, float]  # standard deviation of random weights, and of those that end a residual branch
    dtypes: tuple[Any, Any]  # of parameters, of computation
    layout: Layout

    @nn.compact
    def __call__(self, x: Array, segments: Array | None) -> tuple[Array, Array | None]:
        count, width, inner = self.experts.count, x.shape[-1], self.experts.width
        plain, deep = self.spread
        kernels = Kernels(
            router=self._kernel("router", plain, width, count),
            gate=self._kernel("gate", plain, count, width, inner),
            up=self._kernel("up", plain, count, width, inner),
            down=self._kernel("down", deep, count, inner, width),
        )
        return mixture(x, kernels, self.experts, self.activation, segments, self.layout)

    def _kernel(self, name: str, spread: float, *shape: int) -> Array:
        make = lambda key: {"kernel": nn.initializers.normal(spread)(key, shape, self.dtypes[0])}
        return self.param(name, make)["kernel"].astype(self.dtypes[1])


def mixture(
    x: Array, kernels: Kernels, experts: Experts, activation: Activation, segments: Array | None, layout: Layout
) -> tuple[Array, Array | None]:
    """The weighted sum of each token's experts, [B, T, D], and each token's `balance` if there are segments.

    On a mesh the experts are cut over its expert axis, each of them over tensor, and rows over data, fsdp and
    expert: the devices along the expert axis send each other their tokens, each runs its own experts on all of
    them, and the sums go back to where the tokens came from.

    Args:
      x: [B, T, D], whose rows the mesh divides; products accumulate in float32.
      segments: [B, T] int, 0 is padding; None: no balance.
    """
    into, out = layout.spec("experts", None, "mlp"), layout.spec("experts", "mlp", None)
    places: Any = kernels._replace(router=layout.spec(None, None), gate=into, up=into, down=out)
    rows, wide = layout.spec("rows", None), layout.spec("rows", None, None)
    local = functools.partial(_local, experts, activation, layout)
    return layout.per_shard(local, inputs=(wide, rows, places), output=(wide, rows))(x, segments, kernels)


def _local(
    experts: Experts, activation: Activation, layout: Layout, x: Array, segments: Array | None, kernels: Kernels
) -> tuple[Array, Array | None]:
    """One device's rows, of which the others along the expert axis get a copy."""
    routing = route(x, kernels.router, experts)
    weigh = None if segments is None else balance(routing.probs, routing.chosen, segments)
    flat = lambda part: layout.gather(part.reshape(-1, part.shape[-1]), "experts")
    first = layout.index("experts") * kernels.gate.shape[0]
    y = _run(flat(x), flat(routing.chosen) - first, flat(routing.weights), kernels, activation)
    y = layout.scatter_sum(layout.sum(y, "mlp"), "experts")
    return y.reshape(x.shape).astype(x.dtype), weigh


def route(x: Array, router: Array, experts: Experts) -> Routing:
    """The k likeliest experts of each token and their weights, for x [..., D] and router [D, E].

    p = softmax(x router) over all experts, in float32; a chosen one's weight is its p, over the sum of the
    chosen ones' p if they are normalised.
    References: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024 (Mixtral), arXiv:2401.04088, Eq. 2.
    """
    probs = jax.nn.softmax(jnp.einsum("...d,de->...e", x, router, preferred_element_type=jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probs, experts.chosen)
    if experts.normalise:
        weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(probs, chosen, weights)


def _run(x: Array, chosen: Array, weights: Array, kernels: Kernels, activation: Activation) -> Array:
    """The share of each token's sum that these experts make, float32 [N, D].

    Args:
      x: [N, D].
      chosen: [N, k] int, counted from the first of these experts; others are below 0 or above the last.
    """
    count, (tokens, k) = kernels.gate.shape[0], chosen.shape
    ours = jnp.where((chosen >= 0) & (chosen < count), chosen, count).reshape(-1)  # the others' come last
    sizes = jnp.sum(ours[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)
    room = tokens * min(k, count)  # all that these experts can get: a token never chooses one of them twice
    order = jnp.argsort(ours, stable=True)
    place, used = jnp.argsort(order), jnp.sum(sizes)
    # Rows behind the groups are filled with zeros and never read: what a product leaves there is undefined.
    there = jnp.where(jnp.arange(room) < used, order[:room], tokens * k)
    back = jnp.where(place < used, place, room)
    rows = _pick(jnp.repeat(x, k, axis=0), there, back)
    inner = activation(jax.lax.ragged_dot(rows, kernels.gate, sizes)) * jax.lax.ragged_dot(rows, kernels.up, sizes)
    y = _pick(jax.lax.ragged_dot(inner, kernels.down, sizes), back, there)
    return jnp.einsum("nkd,nk->nd", y.reshape(tokens, k, -1), weights, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _pick(x: Array, there: Array, back: Array) -> Array:
    """x[there], 0 where `there` is past the end; `back` is the way back, so that the gradient is a look-up too.

    A gradient that adds rows up would do so in another order each time on some devices.
    """
    return jnp.take(x, there, axis=0, mode="fill", fill_value=0)


def _pick_forward(x: Array, there: Array, back: Array) -> tuple[Array, tuple[Array, Array]]:
    return _pick(x, there, back), (there, back)


def _pick_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    there, back = residuals
    return _pick(gradient, back, there), None, None


_pick.defvjp(_pick_forward, _pick_backward)


def balance(probs: Array, chosen: Array, segments: Array) -> Array:
    """How much the router favours experts that the token's own segment already loads, float32 [B, T].

    Of a token t in a segment of n tokens: E sum_e (c_e / n) p_e(t), where c_e is how many of the segment's
    tokens chose e, without a gradient, and p_e(t) is the router's softmax over all E experts. Its mean over a
    segment is E sum_e (c_e / n) mean_t p_e(t), which is transformers' load_balancing_loss_func of that
    sequence: k where the load is even, whatever the p, and E for k = 1 where all go to one expert for sure.
    It is made of one segment, so that packing, padding, microbatches and the mesh change nothing; padding
    gives 0.

    Args:
      probs: [B, T, E] float32.
      chosen: [B, T, k] int, k experts of each token.
      segments: [B, T] int, a segment being a run of one positive number; 0 is padding.
    References: Fedus et al. 2021 (Switch), arXiv:2101.03961, Eq. 4; per sequence as in DeepSeek-AI 2024
      (DeepSeek-V3), arXiv:2412.19437, Eq. 17-20, which also divides by k.
    """
    count, length = probs.shape[-1], segments.shape[1]
    place = jnp.arange(length)[None]
    border = segments[:, 1:] != segments[:, :-1]
    begins = jnp.pad(border, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(border, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    stop = jax.lax.cummin(jnp.where(ends, place, length - 1), axis=1, reverse=True) + 1
    hits = jnp.sum(jax.nn.one_hot(chosen, count, dtype=jnp.int32), axis=-2)
    before = jnp.pad(jnp.cumsum(hits, axis=1), ((0, 0), (1, 0), (0, 0)))  # [B, T + 1, E]
    upto = lambda index: jnp.take_along_axis(before, index[..., None], axis=1)
    load = (upto(stop) - upto(start)) / (stop - start)[..., None]
    return jnp.where(segments > 0, count * jnp.sum(load * probs, axis=-1), 0)
