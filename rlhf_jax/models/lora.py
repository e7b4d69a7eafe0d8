"""Adapters of a model: attached, split from its base and joined with it, quantised under and merged into.

The train state holds the adapter's leaves as `params` and the base as `frozen`, two trees with the same paths;
what a model's functions take is both, joined.
"""

import dataclasses
import difflib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.errors import UserError
from rlhf_jax.models.decoder import Model, Params
from rlhf_jax.models.linear import Lora
from rlhf_jax.models.quantise import is_quantised, quantise_kernel, wide_kernel

LEAVES = ("lora_a", "lora_b")
SCORE = ("score", "score_bias")  # trained whole beside an adapter, whose base keeps the ones it was read with
MAPS = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
"""Every map that may carry an adapter, and how many axes of its kernel, after that of the layers, are inputs."""


def maps(model: Model) -> dict[str, tuple[int, ...]]:
    """The kernels' shapes, layers first, of the model's linear maps; the experts of a mixture are none of them."""
    layers = model.without_adapter().shapes()["layers"]
    return {name: layers[name]["kernel"].shape for name in MAPS if "kernel" in layers.get(name, {})}


def sides(name: str, kernel: tuple[int, ...]) -> tuple[int, int]:
    """How many inputs and outputs a map has."""
    split = 1 + MAPS[name]
    return math.prod(kernel[1:split]), math.prod(kernel[split:])


def attach(lora: Lora, model: Model) -> Model:
    """The model with this adapter, its targets and alpha resolved; the model itself if the rank is 0.

    Errors: UserError, naming the flag, for what cannot be.
    """
    if lora.rank == 0:
        told = {"alpha": lora.alpha is not None, "targets": lora.targets, "rslora": lora.rslora}
        told["base"] = lora.base != "full"
        for name, on in told.items():
            if on:
                raise UserError(f"--config.lora.{name} is set, but no adapter is; set --config.lora.rank too.")
        return model
    if lora.rank < 0:
        raise UserError(f"--config.lora.rank is {lora.rank}; it is 1 or more, or 0 to train every weight.")
    if lora.alpha is not None and not 0 < lora.alpha < math.inf:
        raise UserError(f"--config.lora.alpha is {lora.alpha}; it must be above 0.")
    found = maps(model)
    for name in lora.targets:
        if name in MAPS and name not in found:
            mixture = "the maps of a mixture of experts cannot carry an adapter"
            reason = mixture if model.shape.experts is not None else "the model has none"
            raise UserError(f"--config.lora.targets names {name}, but {reason}; choose from {', '.join(found)}.")
        if name not in MAPS:
            near = difflib.get_close_matches(name, found, 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(
                f"--config.lora.targets names {name!r}, which is no linear map of the model{meant}; "
                f"choose from {', '.join(found)}."
            )
    odd = [name for name, shape in found.items() if shape[-1] % 2]
    if lora.base == "nf4" and odd:
        raise UserError(f"--config.lora.base=nf4 needs an even last axis of {odd[0]}, {found[odd[0]]}; choose int8.")
    targets = tuple(name for name in found if name in lora.targets or not lora.targets)
    for name in targets:
        least = min(sides(name, found[name]))
        if lora.rank > least:
            raise UserError(
                f"--config.lora.rank is {lora.rank}, more than {least}, the smaller side of {name}; "
                "choose a smaller rank or other --config.lora.targets."
            )
    return dataclasses.replace(model, adapter=dataclasses.replace(lora, alpha=lora.resolved_alpha, targets=targets))


# ---- two trees and one


def split(params: Params) -> tuple[Params, Params]:
    """The adapter's leaves, a score among them, and the base's, each a tree with the same paths."""
    if not isinstance(params, dict):
        return {}, params
    own = (*LEAVES, *SCORE)
    adapter = {name: leaf for name, leaf in params.items() if name in own}
    base = {}
    for name, part in params.items():
        if name in own:
            continue
        inner, rest = split(part)
        if inner:
            adapter[name] = inner
        base[name] = rest
    return adapter, base


def join(adapter: Params, base: Params) -> Params:
    """The tree that a model with an adapter takes; what both have is the adapter's."""
    joined = dict(base)
    for name, part in adapter.items():
        joined[name] = join(part, base[name]) if isinstance(part, dict) else part
    return joined


def init_adapter(model: Model, key: Array) -> Params:
    """A new adapter, which changes nothing yet; jit it with out_shardings: the base's weights are not made.

    A score in it is 0; see `with_score`.
    """
    return split(model.init(key))[0]


def with_score(adapter: Params, base: Params) -> Params:
    """The adapter with copies of the base's score, so that one of a reward model changes nothing either."""
    return {**adapter, **{name: jnp.copy(base[name]) for name in SCORE if name in base}}


# ---- the base


def quantise_leaf(path: tuple[str, ...], leaf: Array, kind: str) -> Any:
    """What stands at `path` of a base of this kind: a dict for a kernel of `MAPS`, else the leaf as it is."""
    if kind == "full" or len(path) != 3 or path[0] != "layers" or path[1] not in MAPS or path[2] != "kernel":
        return leaf
    inputs = tuple(range(1, 1 + MAPS[path[1]]))
    return quantise_kernel(leaf, inputs, kind)  # pyright: ignore[reportArgumentType]


def quantise(model: Model, base: Params) -> Params:
    """The base as the model's adapter wants it held; jit it, or call `quantise_leaf` leaf by leaf."""
    kind = "full" if model.adapter is None else model.adapter.base
    name = lambda key: str(key.key)
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: quantise_leaf(tuple(map(name, keys)), leaf, kind), base)


def base_shapes(model: Model) -> Params:
    """The base's shapes and dtypes, quantised as the model's adapter says."""
    return jax.eval_shape(lambda params: quantise(model, params), model.without_adapter().shapes())


def merge(model: Model, adapter: Params, base: Params) -> tuple[Model, Params]:
    """The plain model that says the same, W + scale A B in each map and the adapter's score, in the parameters' dtype.

    A quantised base is made wide first, all of it: the merged model is as large as the one it came from.
    """
    assert model.adapter is not None, "the model has no adapter"
    dtype, scale = jnp.dtype(model.numerics.param_dtype), model.adapter.scale
    layers = dict(base["layers"])
    for name in layers:
        if name not in MAPS or "kernel" not in layers[name]:
            continue
        kernel, factors = layers[name]["kernel"], adapter["layers"].get(name)
        if factors is not None:
            kernel = wide_kernel(kernel, jnp.float32) + scale * product(factors)
        if factors is not None or is_quantised(kernel):
            layers[name] = {**layers[name], "kernel": wide_kernel(kernel, dtype)}
    score = {name: adapter[name] for name in SCORE if name in adapter}
    return model.without_adapter(), {**base, **score, "layers": layers}


def product(factors: Params) -> Array:
    """A B of every layer, float32 and of the kernel's shape."""
    a, b = (factors[name].astype(jnp.float32) for name in LEAVES)
    dimensions = (((a.ndim - 1,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, precision=jax.lax.Precision.HIGHEST)
