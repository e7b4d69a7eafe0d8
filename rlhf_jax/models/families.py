"""Which Hugging Face models we can be: their config to our shape, their weight names to our paths.

A further family is one entry of `FAMILIES`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.decoder import ACTIVATIONS, Shape
from rlhf_jax.models.rope import KINDS, Rope

Map = Callable[[np.ndarray, Shape], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor of theirs: its name ({i} is the layer), our path, and the way there and back."""

    theirs: str
    ours: tuple[str, ...]
    load: Map
    save: Map

    @property
    def stacked(self) -> bool:
        """Whether there is one a layer, ours being a stack of them."""
        return "{i}" in self.theirs


@dataclasses.dataclass(frozen=True)
class Family:
    """A reader of configs and a table of weights."""

    shape: Callable[[Mapping[str, Any]], Shape]
    weights: Callable[[Shape], tuple[Weight, ...]]


def _same(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x


def _turn(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.T


def _split(x: np.ndarray, shape: Shape) -> np.ndarray:
    """[heads * head_dim, D] -> [D, heads, head_dim], and a bias [heads * head_dim] -> [heads, head_dim]."""
    heads = x.reshape(-1, shape.head_dim, *x.shape[1:])
    return np.moveaxis(heads, -1, 0) if x.ndim == 2 else heads


def _join(x: np.ndarray, shape: Shape) -> np.ndarray:
    x = np.moveaxis(x, 0, -1) if x.ndim == 3 else x
    return x.reshape(-1, *x.shape[2:])


def _split_out(x: np.ndarray, shape: Shape) -> np.ndarray:
    """[D, heads * head_dim] -> [heads, head_dim, D]."""
    return x.T.reshape(-1, shape.head_dim, x.shape[0])


def _join_out(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).T


def _linear(theirs: str, ours: str, bias: bool, load: Map, save: Map, bias_too: bool = False) -> list[Weight]:
    """A kernel and, if there is one, its bias; `bias_too`: the bias is split into heads like the kernel."""
    path, name = ("layers", ours), f"model.layers.{{i}}.{theirs}"
    out = [Weight(f"{name}.weight", (*path, "kernel"), load, save)]
    if bias:
        maps = (load, save) if bias_too else (_same, _same)
        out.append(Weight(f"{name}.bias", (*path, "bias"), *maps))
    return out


def _llama_weights(shape: Shape) -> tuple[Weight, ...]:
    plain = lambda theirs, *ours: Weight(theirs, ours, _same, _same)
    layer = "model.layers.{i}."
    out = [
        plain("model.embed_tokens.weight", "embedding"),
        plain("model.norm.weight", "final_norm"),
        plain(layer + "input_layernorm.weight", "layers", "attention_norm"),
        plain(layer + "post_attention_layernorm.weight", "layers", "mlp_norm"),
        *_linear("self_attn.q_proj", "query", shape.qkv_bias, _split, _join, bias_too=True),
        *_linear("self_attn.k_proj", "key", shape.qkv_bias, _split, _join, bias_too=True),
        *_linear("self_attn.v_proj", "value", shape.qkv_bias, _split, _join, bias_too=True),
        *_linear("self_attn.o_proj", "out", shape.out_bias, _split_out, _join_out),
        *_linear("mlp.gate_proj", "gate", shape.mlp_bias, _turn, _turn),
        *_linear("mlp.up_proj", "up", shape.mlp_bias, _turn, _turn),
        *_linear("mlp.down_proj", "down", shape.mlp_bias, _turn, _turn),
    ]
    return tuple(out if shape.tied else [*out, plain("lm_head.weight", "head")])


def _rope(config: Mapping[str, Any]) -> Rope:
    """Reads rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind not in KINDS:
        raise UserError(f"rope_type {kind!r} is not supported; the supported ones are {', '.join(KINDS)}.")
    context = config.get("max_position_embeddings", 2048)
    fields = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate")
    return Rope(
        theta=stated.get("rope_theta") or config.get("rope_theta") or 10_000.0,
        kind=kind,
        factor=stated.get("factor") or 1.0,
        original_length=stated.get("original_max_position_embeddings") or context,
        **{field: stated[field] for field in fields if stated.get(field) is not None},
    )


def _shape(config: Mapping[str, Any], **features: Any) -> Shape:
    """The fields that every family of this kind shares; `features` are a family's own."""
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UserError(f"hidden_act {activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}.")
    heads = config["num_attention_heads"]
    return Shape(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        length=config.get("max_position_embeddings", 2048),
        rope=_rope(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=activation,
        spread=config.get("initializer_range", 0.02),
        **features,
    )


def _llama(config: Mapping[str, Any]) -> Shape:
    bias = bool(config.get("attention_bias", False))
    return _shape(
        config, tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)),
    )  # fmt: skip


def _qwen2(config: Mapping[str, Any]) -> Shape:
    windowed = config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ())
    if windowed and (config.get("sliding_window") or 0) < config.get("max_position_embeddings", 2048):
        raise UserError("use_sliding_window is not supported; set it to false in config.json if rows are shorter.")
    return _shape(config, tied=bool(config.get("tie_word_embeddings", False)), qkv_bias=True)


FAMILIES = {
    "llama": Family(_llama, _llama_weights),
    "qwen2": Family(_qwen2, _llama_weights),
}
