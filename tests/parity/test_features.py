"""Each feature of a checkpoint is seen in its logits, so that agreement is not one of models that ignore it alike.

A mistake is made on purpose in a model that agrees: each takes one feature away.
"""

# pyright: reportMissingImports=false

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoConfig

from rlhf_jax.models.decoder import Params
from rlhf_jax.models.experts import Experts
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.rope import Rope
from rlhf_jax.models.shape import Kind, Shape
from rlhf_jax.sharding import path_of
from tests.parity.checkpoints import CASES, EACH
from tests.parity.sides import TOLERANCE, Pair, draw_tokens, whole_rows

SHOWS = 100 * TOLERANCE
LENGTH = 64  # beyond every window, and the original length where the rope is stretched

Change = Callable[[Pair], Pair]


def _with(**fields: Any) -> Change:
    def change(pair: Pair) -> Pair:
        model, params = pair
        return dataclasses.replace(model, shape=dataclasses.replace(model.shape, **fields)), params

    return change


def _leaf(pair: Pair, change: Callable[[jax.Array], jax.Array], *path: str) -> Pair:
    model, params = pair

    def at(tree: Params, keys: tuple[str, ...]) -> Params:
        return change(tree) if not keys else {**tree, keys[0]: at(tree[keys[0]], keys[1:])}

    return model, at(params, path)


def _kinds(change: Callable[[Kind], Kind]) -> Change:
    return lambda pair: _with(kinds=tuple(map(change, pair[0].shape.kinds)))(pair)


def _ropes(**fields: Any) -> Change:
    return lambda pair: _kinds(
        lambda kind: kind if kind.rope is None else Kind(kind.window, dataclasses.replace(kind.rope, **fields))
    )(pair)


def _each(shape: Shape) -> list[Rope]:
    return [kind.rope for kind in shape.kinds if kind.rope is not None]


def _rope_on_neighbours(pair: Pair) -> Pair:
    """Pairs (x_0, x_1), (x_2, x_3) as GPT-J has them, in the place of halves."""
    shape = pair[0].shape
    size = _each(shape)[0].size(shape.head_dim)
    order = np.r_[np.arange(size).reshape(2, -1).T.reshape(-1), size : shape.head_dim]
    for name in ("query", "key"):
        pair = _leaf(pair, lambda x: x[..., order], "layers", name, "kernel")
        if shape.qkv_bias:
            pair = _leaf(pair, lambda x: x[..., order], "layers", name, "bias")
        if shape.qk_norm:
            turn = lambda x: x.reshape(x.shape[0], -1, shape.head_dim)[..., order].reshape(x.shape)
            pair = _leaf(pair, turn, "layers", f"{name}_norm")
    return pair


def _heads_in_another_group(pair: Pair) -> Pair:
    """Query head h reads group h mod G in the place of h // (H / G)."""
    shape = pair[0].shape
    order = np.arange(shape.heads).reshape(-1, shape.groups).T.reshape(-1)
    pair = _leaf(pair, lambda x: x[:, :, order], "layers", "query", "kernel")
    if shape.qkv_bias:
        pair = _leaf(pair, lambda x: x[:, order], "layers", "query", "bias")
    if shape.qk_norm == "whole":
        turn = lambda x: x.reshape(x.shape[0], -1, shape.head_dim)[:, order].reshape(x.shape)
        pair = _leaf(pair, turn, "layers", "query_norm")
    return _leaf(pair, lambda x: x[:, order], "layers", "out", "kernel")


def _norms_in_front(pair: Pair) -> Pair:
    model, params = pair
    layers = {name.replace("_post_norm", "_norm"): leaf for name, leaf in params["layers"].items()}
    return _with(norms="pre")((model, params | {"layers": layers}))


def _experts(change: Callable[[Experts], dict[str, Any]]) -> Change:
    def fields(experts: Experts | None) -> Experts:
        assert experts is not None
        return dataclasses.replace(experts, **change(experts))

    return lambda pair: _with(experts=fields(pair[0].shape.experts))(pair)


# What has it, and how it is taken away.
FEATURES: dict[str, tuple[Callable[[Shape], Any], Change]] = {
    "window": (
        lambda shape: any(kind.window for kind in shape.kinds),
        _kinds(lambda kind: dataclasses.replace(kind, window=None)),
    ),
    "the window's last token": (
        lambda shape: any(kind.window for kind in shape.kinds),
        _kinds(lambda kind: dataclasses.replace(kind, window=kind.window and kind.window - 1)),
    ),
    "which layer is of which kind": (
        lambda shape: shape.pattern,
        lambda pair: _with(pattern=pair[0].shape.pattern[1:] + pair[0].shape.pattern[:1])(pair),
    ),
    "rope base": (_each, lambda pair: _ropes(theta=2 * _each(pair[0].shape)[0].theta)(pair)),
    "rope halves": (_each, _rope_on_neighbours),
    "rope scaling": (lambda shape: any(r.kind != "default" for r in _each(shape)), _ropes(kind="default")),
    "long factors": (lambda shape: any(r.long_factor for r in _each(shape)), _ropes(original_length=10**6)),
    "warmth": (lambda shape: any(r.kind in ("yarn", "longrope") for r in _each(shape)), _ropes(attention_factor=1.0)),
    "ropes of their own": (
        lambda shape: len(set(_each(shape))) > 1,
        lambda pair: _kinds(lambda kind: Kind(kind.window, _each(pair[0].shape)[0]))(pair),
    ),
    "partial rotary": (
        lambda shape: any(r.share < 1 and r.kind == "default" for r in _each(shape)), _ropes(share=1.0)
    ),
    "layers without a rope": (
        lambda shape: _each(shape) and any(kind.rope is None for kind in shape.kinds),
        lambda pair: _kinds(lambda kind: Kind(kind.window, _each(pair[0].shape)[0]))(pair),
    ),
    "grouped heads": (lambda shape: shape.groups < shape.heads, _heads_in_another_group),
    "untied head": (lambda shape: not shape.tied, _with(tied=True)),
    "norm epsilon": (lambda shape: True, _with(norm_eps=1e-6)),
    "activation": (lambda shape: shape.activation != "relu", _with(activation="relu")),
    "norm offset": (lambda shape: shape.norm_offset, _with(norm_offset=0.0)),
    "mean of a layer norm": (lambda shape: shape.norm == "layer", _with(norm="rms")),
    "norms behind": (lambda shape: shape.norms == "sandwich", _with(norms="pre")),
    "norms in front": (lambda shape: shape.norms == "sandwich", _with(norms="post")),
    "norms behind alone": (lambda shape: shape.norms == "post", _norms_in_front),
    "norm of queries and keys": (lambda shape: shape.qk_norm, _with(qk_norm="")),
    "parallel residual": (lambda shape: shape.parallel, _with(parallel=False)),
    "sequential residual": (lambda shape: not shape.parallel and not shape.gated, _with(parallel=True)),
    "query scale": (lambda shape: shape.query_scale, _with(query_scale=None)),
    "cap of scores": (lambda shape: shape.attention_soft_cap, _with(attention_soft_cap=None)),
    "cap of logits": (lambda shape: shape.soft_cap, _with(soft_cap=None)),
    "embedding scale": (lambda shape: shape.embed_scale != 1, _with(embed_scale=1.0)),
    "learned positions": (lambda shape: shape.learned_positions, _with(learned_positions=False)),
    "all chosen experts": (lambda shape: shape.experts, _experts(lambda experts: {"chosen": experts.chosen - 1})),
    "experts' weights summing to 1 or not": (
        lambda shape: shape.experts, _experts(lambda experts: {"normalise": not experts.normalise})
    ),
    "router": (
        lambda shape: shape.experts,
        lambda pair: _leaf(pair, lambda x: x * 0.5, "layers", "experts", "router", "kernel"),
    ),
    "which expert is which": (
        lambda shape: shape.experts,
        lambda pair: _leaf(pair, lambda x: jnp.roll(x, 1, axis=1), "layers", "experts", "gate", "kernel"),
    ),
}  # fmt: skip


def _leaves(pair: Pair) -> dict[str, Change]:
    """Each norm and bias made one that does nothing."""
    model, params = pair
    out: dict[str, Change] = {}
    for keys, _ in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        norm, bias = path.endswith("_norm"), path.endswith("bias")
        # Without a rope a key's bias adds the same to all scores of a query.
        if norm or bias and (path != "layers/key/bias" or _each(model.shape)):
            still = jnp.ones_like if norm and not model.shape.norm_offset else jnp.zeros_like
            out[path] = lambda pair, path=path, still=still: _leaf(pair, still, *path.split("/"))
    return out


def _shape(case: str) -> Shape:
    kind, config = CASES[case].args
    return FAMILIES[kind].shape(AutoConfig.for_model(kind, **config).to_dict())


def _features(case: str) -> dict[str, Change]:
    """Those that no earlier case of the family has."""
    earlier = list(CASES)[: list(CASES).index(case)]
    shapes = [_shape(other) for other in earlier if CASES[other].args[0] == CASES[case].args[0]]
    news = lambda has: has(_shape(case)) and not any(has(shape) for shape in shapes)
    return {name: change for name, (has, change) in FEATURES.items() if news(has)}


def test_every_feature_shows_in_the_logits(case: str, ours: Pair) -> None:
    tokens = draw_tokens(2, LENGTH)
    right = whole_rows(ours, tokens)
    features = _features(case) | (_leaves(ours) if case in EACH else {})
    wrong = {name: whole_rows(change(ours), tokens) for name, change in features.items()}
    moves = {name: float(np.abs(logits - right).max()) for name, logits in wrong.items()}
    hidden = {name: move for name, move in moves.items() if not move > SHOWS}
    assert not hidden, f"these are not seen in the logits: {hidden}"


def test_the_cases_have_every_feature_and_family() -> None:
    shapes = [_shape(case) for case in CASES]
    for name, (has, _) in FEATURES.items():
        assert any(has(shape) for shape in shapes), name
    assert {make.args[0] for make in CASES.values()} == set(FAMILIES)
