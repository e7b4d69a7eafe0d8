"""Gemma 2 and 3: scaled embeddings, norms of weight 1 + w on both sides, local and global layers."""

from typing import Any

from rlhf_jax.models.families import read
from rlhf_jax.models.families.read import FULL, SLIDES, Config
from rlhf_jax.models.shape import Kind, Shape

DEFAULTS = {"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": 4096}


def _shape(config: Config, ropes: dict[str, Any], default: list[str], **features: Any) -> Shape:
    """What both have; `ropes` of each layer type."""
    read.require(config, use_bidirectional_attention=False)
    bias = bool(config.get("attention_bias", False))
    windows = {SLIDES: read.window(config), FULL: None}
    types = read.layer_types(config, default, config["sliding_window"] is not None)
    return read.shape(
        config, [Kind(windows[kind], ropes[kind]) for kind in types],
        norms="sandwich", norm_offset=1.0, embed_scale=config["hidden_size"] ** 0.5,
        query_scale=config.get("query_pre_attn_scalar", 256) ** -0.5, qkv_bias=bias, out_bias=bias,
        activation=read.activation(config, "hidden_activation", "gelu_pytorch_tanh"), **features,
    )  # fmt: skip


def gemma2(config: Config) -> Shape:
    """Gemma Team 2024, arXiv:2408.00118: every other layer is local, scores and logits are capped."""
    config = {**DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **config}
    rope = read.rope(config)
    return _shape(
        config, {SLIDES: rope, FULL: rope},
        [FULL if i % 2 else SLIDES for i in range(config["num_hidden_layers"])],
        attention_soft_cap=config["attn_logit_softcapping"], soft_cap=config["final_logit_softcapping"],
    )  # fmt: skip


def gemma3(config: Config) -> Shape:
    """Gemma Team 2025, arXiv:2503.19786: five local layers to a global one, each with its rope, and normed heads."""
    config = {**DEFAULTS, **config}
    read.require(config, attn_logit_softcapping=None)  # which transformers reads and then forgets
    ropes = config.get("rope_parameters") or {}
    whole = {
        "rope_theta": config.get("rope_theta") or 1e6,
        **(ropes.get(FULL) or {}),
        **(config.get("rope_scaling") or {}),
    }
    local = {"rope_theta": config.get("rope_local_base_freq") or 1e4, **(ropes.get(SLIDES) or {})}
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return _shape(
        config, {SLIDES: read.rope(config, local), FULL: read.rope(config, whole)},
        [SLIDES if (i + 1) % period else FULL for i in range(config["num_hidden_layers"])],
        qk_norm="head", soft_cap=config.get("final_logit_softcapping"),
    )  # fmt: skip
