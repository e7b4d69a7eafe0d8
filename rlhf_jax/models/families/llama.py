"""Llama and the families that keep its names: Mistral, Qwen 2 and 3, SmolLM 3, OLMo 2 and Phi 3."""

from rlhf_jax.errors import UserError
from rlhf_jax.models.families import read
from rlhf_jax.models.families.maps import HEADS, OUT, TURN, Weight, linear, plain, under
from rlhf_jax.models.families.read import FULL, SLIDES, Config
from rlhf_jax.models.shape import Kind, Shape

LAYER = "model.layers.{i}."
FIRST = (plain("model.embed_tokens.weight", "embedding"), plain("model.norm.weight", "final_norm"))


def _alike(config: Config, kind: Kind) -> list[Kind]:
    return [kind] * config["num_hidden_layers"]


def llama(config: Config) -> Shape:
    """Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783."""
    bias = bool(config.get("attention_bias", False))
    features = dict(qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))
    return read.shape(config, _alike(config, Kind(rope=read.rope(config))), **features)


def mistral(config: Config) -> Shape:
    """Jiang et al. 2023, arXiv:2310.06825: a sliding window in every layer, or in none if it is null."""
    if len(set(config.get("layer_types") or ())) > 1:
        raise UserError("layer_types of several kinds are not supported in a mistral config.")
    if "sliding_window" not in config:
        config = {**config, "sliding_window": 4096}
    return read.shape(config, _alike(config, Kind(read.window(config), read.rope(config))))


def _qwen_layers(config: Config) -> list[Kind]:
    """The first max_window_layers see everything, those above a window; or as layer_types says."""
    config = {"sliding_window": 4096, **config}
    windowed = bool(config.get("use_sliding_window", False)) and config["sliding_window"] is not None
    first = config.get("max_window_layers", 28)
    default = [SLIDES if windowed and i >= first else FULL for i in range(config["num_hidden_layers"])]
    windows, rope = {FULL: None, SLIDES: read.window(config)}, read.rope(config)
    return [Kind(windows[kind], rope) for kind in read.layer_types(config, default, windowed)]


def qwen2(config: Config) -> Shape:
    """Yang et al. 2024, arXiv:2407.10671."""
    return read.shape(config, _qwen_layers(config), qkv_bias=True)


def qwen3(config: Config) -> Shape:
    """Yang et al. 2025, arXiv:2505.09388: each head's query and key are normed."""
    bias = bool(config.get("attention_bias", False))
    features = dict(head_dim=config.get("head_dim") or 128, qkv_bias=bias, out_bias=bias, qk_norm="head")
    return read.shape(config, _qwen_layers(config), **features)


def weights(shape: Shape) -> tuple[Weight, ...]:
    """The tensors of Llama, Mistral, Qwen 2, Qwen 3 and SmolLM 3."""
    attention = [
        *linear(LAYER + "self_attn.q_proj", "query", shape.qkv_bias, HEADS, HEADS),
        *linear(LAYER + "self_attn.k_proj", "key", shape.qkv_bias, HEADS, HEADS),
        *linear(LAYER + "self_attn.v_proj", "value", shape.qkv_bias, HEADS, HEADS),
        *linear(LAYER + "self_attn.o_proj", "out", shape.out_bias, OUT),
    ]
    if shape.qk_norm:
        attention += [
            plain(LAYER + "self_attn.q_norm.weight", "layers", "query_norm"),
            plain(LAYER + "self_attn.k_norm.weight", "layers", "key_norm"),
        ]
    mlp = [
        *linear(LAYER + "mlp.gate_proj", "gate", shape.mlp_bias, TURN),
        *linear(LAYER + "mlp.up_proj", "up", shape.mlp_bias, TURN),
        *linear(LAYER + "mlp.down_proj", "down", shape.mlp_bias, TURN),
    ]
    return (*FIRST, *norms(shape), *attention, *mlp, *head(shape))


def head(shape: Shape) -> list[Weight]:
    """The word head, if it has weights of its own."""
    return [plain("lm_head.weight", "head")] if shape.own_head else []


def norms(shape: Shape) -> list[Weight]:
    """The norms of a layer, which have other names where they stand behind attention and MLP."""
    names = {
        "pre": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
        "post": {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"},
        "sandwich": {
            "input_layernorm": "attention_norm", "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_post_norm",
        },
    }  # fmt: skip
    return [plain(f"{LAYER}{theirs}.weight", "layers", ours) for theirs, ours in names[shape.norms].items()]


def smollm3(config: Config) -> Shape:
    """Bakouch et al. 2025: no rotation in every fourth layer (NoPE; Yang et al. 2025, arXiv:2501.18795)."""
    layers = config["num_hidden_layers"]
    interval = config.get("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)]
    if len(turned) < layers:
        raise UserError(f"no_rope_layers names {len(turned)} layers, but num_hidden_layers is {layers}.")
    windowed = bool(config.get("use_sliding_window", False)) and config.get("sliding_window") is not None
    types = read.layer_types(config, [SLIDES if windowed and not turned[i] else FULL for i in range(layers)], windowed)
    windows, rope = {FULL: None, SLIDES: read.window(config)}, read.rope(config, theta=2_000_000.0)
    kinds = [Kind(windows[kind], rope if turn else None) for kind, turn in zip(types, turned, strict=False)]
    bias = bool(config.get("attention_bias", False))
    tied = bool(config.get("tie_word_embeddings", True))
    features = dict(tied=tied, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))
    return read.shape({"num_key_value_heads": 4, **config}, kinds, **features)


def olmo2(config: Config) -> Shape:
    """OLMo et al. 2024, arXiv:2501.00656: norms behind attention and MLP, and over all queries and all keys."""
    bias = bool(config.get("attention_bias", False))
    features = dict(norms="post", qk_norm="whole", qkv_bias=bias, out_bias=bias)
    config = {"rms_norm_eps": 1e-5, **config}
    return read.shape(config, _alike(config, Kind(rope=read.rope(config))), **features)


def phi3(config: Config) -> Shape:
    """Abdin et al. 2024, arXiv:2404.14219; longrope is Ding et al. 2024, arXiv:2402.13753."""
    stated = read.stated_rope(config)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind in ("su", "yarn"):  # what older checkpoints call it
        kind = "longrope"
    config = {
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, **config,
    }  # fmt: skip
    rope = read.rope(config, {**stated, "rope_type": kind})
    return read.shape(config, _alike(config, Kind(read.window(config), rope)))


def phi3_weights(shape: Shape) -> tuple[Weight, ...]:
    """As Llama's, with query, key and value in one tensor, and gate and up in another."""
    heads = lambda shape: [n * shape.head_dim for n in (shape.heads, shape.groups, shape.groups)]
    halves = lambda shape: [shape.mlp_width] * 2
    return (
        *FIRST,
        *norms(shape),
        *linear(LAYER + "self_attn.qkv_proj", ("query", "key", "value"), False, under(HEADS, heads)),
        *linear(LAYER + "self_attn.o_proj", "out", False, OUT),
        *linear(LAYER + "mlp.gate_up_proj", ("gate", "up"), False, under(TURN, halves)),
        *linear(LAYER + "mlp.down_proj", "down", False, TURN),
        *head(shape),
    )
