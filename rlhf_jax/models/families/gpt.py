"""GPT-2 and GPT-NeoX (Pythia): LayerNorm, a plain MLP, and query, key and value in one tensor."""

from rlhf_jax.errors import UserError
from rlhf_jax.models.families import read
from rlhf_jax.models.families.maps import HEADS, INTERLEAVED, OUT, SAME, TURN, Weight, linear, plain, turned, under
from rlhf_jax.models.families.read import Config
from rlhf_jax.models.shape import Kind, Shape

QKV = ("query", "key", "value")


def gpt2(config: Config) -> Shape:
    """Radford et al. 2019: learned positions, nothing is turned."""
    read.require(
        config, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False, add_cross_attention=False
    )
    width, heads = config["n_embd"], config["n_head"]
    if width % heads:
        raise UserError(f"n_embd {width} is not a multiple of n_head {heads}.")
    ours = {
        "vocab_size": config["vocab_size"], "hidden_size": width, "num_hidden_layers": config["n_layer"],
        "num_attention_heads": heads, "intermediate_size": config.get("n_inner") or 4 * width,
        "max_position_embeddings": config.get("n_positions", 1024), "rms_norm_eps": 1e-5,
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "initializer_range": config.get("initializer_range", 0.02),
    }  # fmt: skip
    return read.shape(
        ours, [Kind(rope=None)] * config["n_layer"],
        norm="layer", norm_eps=config.get("layer_norm_epsilon", 1e-5), gated=False, learned_positions=True,
        qkv_bias=True, out_bias=True, mlp_bias=True,
        query_scale=None if config.get("scale_attn_weights", True) else 1.0,
        activation=read.activation(config, "activation_function", "gelu_new"),
    )  # fmt: skip


def neox(config: Config) -> Shape:
    """Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023 (Pythia), arXiv:2304.01373."""
    bias = bool(config.get("attention_bias", True))
    share = config.get("rotary_pct")
    rope = read.rope(config, theta=config.get("rotary_emb_base") or 10_000.0, share=0.25 if share is None else share)
    return read.shape(
        config, [Kind(rope=rope)] * config["num_hidden_layers"],
        norm="layer", norm_eps=config.get("layer_norm_eps", 1e-5), gated=False,
        parallel=bool(config.get("use_parallel_residual", True)), qkv_bias=bias, out_bias=bias, mlp_bias=True,
        activation=read.activation(config, default="gelu"),
    )  # fmt: skip


def _norm(theirs: str, *ours: str) -> list[Weight]:
    return [plain(f"{theirs}.weight", *ours), plain(f"{theirs}.bias", *ours[:-1], f"{ours[-1]}_bias")]


def gpt2_weights(shape: Shape) -> tuple[Weight, ...]:
    """Matrices are [in, out], as its Conv1D has them."""
    layer = "transformer.h.{i}."
    thirds = lambda shape: [shape.width] * 3
    joined = under(HEADS, thirds)
    out = (
        plain("transformer.wte.weight", "embedding"),
        plain("transformer.wpe.weight", "positions", "embedding"),
        *_norm("transformer.ln_f", "final_norm"),
        *_norm(layer + "ln_1", "layers", "attention_norm"),
        *_norm(layer + "ln_2", "layers", "mlp_norm"),
        *linear(layer + "attn.c_attn", QKV, True, turned(joined), joined),
        *linear(layer + "attn.c_proj", "out", True, turned(OUT)),
        *linear(layer + "mlp.c_fc", "up", True, SAME),
        *linear(layer + "mlp.c_proj", "down", True, SAME),
    )
    return (*out, plain("lm_head.weight", "head")) if shape.own_head else out


def neox_weights(shape: Shape) -> tuple[Weight, ...]:
    """Of each head the query, the key and the value, then those of the next."""
    layer = "gpt_neox.layers.{i}."
    out = (
        plain("gpt_neox.embed_in.weight", "embedding"),
        *_norm("gpt_neox.final_layer_norm", "final_norm"),
        *_norm(layer + "input_layernorm", "layers", "attention_norm"),
        *_norm(layer + "post_attention_layernorm", "layers", "mlp_norm"),
        *linear(layer + "attention.query_key_value", QKV, shape.qkv_bias, INTERLEAVED, INTERLEAVED),
        *linear(layer + "attention.dense", "out", shape.out_bias, OUT),
        *linear(layer + "mlp.dense_h_to_4h", "up", True, TURN),
        *linear(layer + "mlp.dense_4h_to_h", "down", True, TURN),
    )
    return (*out, plain("embed_out.weight", "head")) if shape.own_head else out
