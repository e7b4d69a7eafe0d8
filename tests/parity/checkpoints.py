"""Checkpoints that transformers makes, drawn so that a mistake in reading or computing them shows.

A freshly initialised model hides most mistakes: its biases are 0, its norms 1, its attention nearly uniform
and so blind to positions. Here every weight, bias and norm is random, scores have a standard deviation of
about 3, and each checkpoint is saved in several files.
"""

# pyright: reportMissingImports=false

import functools
import pathlib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
LENGTH = 128
SCORES = 3.0  # standard deviation of the attention scores
WINDOW = 8

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=LENGTH, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# The norm's epsilon is large enough to be seen in the logits.
LLAMA: dict[str, Any] = SIZES | dict(tie_word_embeddings=False, rms_norm_eps=0.05)
QWEN: dict[str, Any] = LLAMA | dict(tie_word_embeddings=True, max_window_layers=1, sliding_window=WINDOW)
GEMMA: dict[str, Any] = LLAMA | dict(
    tie_word_embeddings=True, head_dim=12, query_pre_attn_scalar=20, sliding_window=WINDOW, num_hidden_layers=4
)
EXPERTS: dict[str, Any] = LLAMA | dict(head_dim=12, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
GPT2: dict[str, Any] = dict(
    vocab_size=VOCAB, n_embd=64, n_inner=112, n_layer=3, n_head=8, n_positions=LENGTH, layer_norm_epsilon=0.05,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
NEOX: dict[str, Any] = SIZES | dict(
    num_key_value_heads=None, num_attention_heads=4, layer_norm_eps=0.05, tie_word_embeddings=False
)


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **fields}}


DEFAULT = _rope("default")
LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
LONG = dict(original_max_position_embeddings=32) | _rope(
    "longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.5, 2.5], long_factor=[1.2, 3.0, 6.0]
)
GEMMA3_ROPES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
}


def make(kind: str, config: dict[str, Any]) -> PreTrainedModel:
    """A model of this family with weights as transformers draws them."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), attn_implementation="eager")


Make = functools.partial[PreTrainedModel]  # its arguments are the family and the config


def _case(kind: str, base: dict[str, Any], **config: Any) -> Make:
    return functools.partial(make, kind, base | config)


LOCAL, GLOBAL = "sliding_attention", "full_attention"
CASES: dict[str, Make] = {
    "llama": _case("llama", LLAMA, **DEFAULT),
    "llama3": _case("llama", LLAMA, **LLAMA3),
    "llama-linear-tied": _case("llama", LLAMA, tie_word_embeddings=True, **_rope("linear", factor=4.0)),
    "llama-yarn": _case("llama", LLAMA, **YARN),
    "llama-biases": _case("llama", LLAMA, attention_bias=True, mlp_bias=True, **LLAMA3),
    "llama-wide-heads": _case("llama", LLAMA, num_attention_heads=4, head_dim=24, **LLAMA3),
    "mistral": _case("mistral", LLAMA, sliding_window=WINDOW, **DEFAULT),
    "mistral-whole": _case("mistral", LLAMA, sliding_window=None, **DEFAULT),
    "qwen2-tied": _case("qwen2", QWEN, **DEFAULT),
    "qwen2-untied": _case("qwen2", QWEN, tie_word_embeddings=False, **DEFAULT),
    "qwen2-yarn": _case("qwen2", QWEN, **YARN),
    "qwen2-windows": _case("qwen2", QWEN, use_sliding_window=True, **DEFAULT),
    "qwen3": _case("qwen3", QWEN, head_dim=12, **DEFAULT),
    "qwen3-windows": _case(
        "qwen3", QWEN, head_dim=12, attention_bias=True, use_sliding_window=True, layer_types=[LOCAL, GLOBAL, LOCAL],
        tie_word_embeddings=False, **YARN,
    ),
    "gemma2": _case("gemma2", GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **DEFAULT),
    "gemma3": _case("gemma3_text", GEMMA, layer_types=[LOCAL, LOCAL, GLOBAL, LOCAL], **GEMMA3_ROPES),
    "olmo2": _case("olmo2", LLAMA, **DEFAULT),
    "phi3": _case("phi3", LLAMA, sliding_window=WINDOW, **_rope("default", partial_rotary_factor=0.5)),
    "phi3-longrope": _case("phi3", LLAMA, **LONG),
    "smollm3": _case("smollm3", LLAMA, no_rope_layers=[1, 0, 1], tie_word_embeddings=True, **DEFAULT),
    "smollm3-windows": _case(
        "smollm3", LLAMA, no_rope_layer_interval=2, attention_bias=True, mlp_bias=True, use_sliding_window=True,
        sliding_window=WINDOW, **DEFAULT,
    ),
    "mixtral": _case("mixtral", LLAMA, num_local_experts=4, num_experts_per_tok=2, **DEFAULT),
    "qwen3-moe": _case("qwen3_moe", EXPERTS, norm_topk_prob=True, **DEFAULT),
    "qwen3-moe-raw": _case("qwen3_moe", EXPERTS, norm_topk_prob=False, attention_bias=True, **YARN),
    "gpt2": _case("gpt2", GPT2),
    "gpt2-untied": _case("gpt2", GPT2, tie_word_embeddings=False, scale_attn_weights=False, n_inner=None),
    "pythia": _case("gpt_neox", NEOX, **_rope("default", partial_rotary_factor=0.25)),
    "pythia-sequential": _case(
        "gpt_neox", NEOX, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new",
        **_rope("default", partial_rotary_factor=0.5),
    ),
}  # fmt: skip


# One of each family with what is special to it, for what doesn't depend on the rest; the logits are of all.
EACH = (
    "llama3", "llama-yarn", "llama-biases", "mistral", "qwen2-windows", "qwen3-windows", "gemma2", "gemma3", "olmo2",
    "phi3-longrope", "smollm3-windows", "mixtral", "qwen3-moe-raw", "gpt2", "pythia",
)  # fmt: skip


def draw(model: PreTrainedModel, seed: int = 0) -> None:
    """Draws every parameter anew, in place."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    scores = (0.0, (SCORES / width) ** 0.5)
    norm = (0.0 if model.config.model_type.startswith("gemma") else 1.0, 0.3)
    spread = {
        **dict.fromkeys(("q_proj.weight", "k_proj.weight", "qkv_proj.weight", "c_attn.weight"), scores),
        **dict.fromkeys(("query_key_value.weight",), scores),
        **dict.fromkeys(("embed_tokens.weight", "wte.weight", "wpe.weight", "embed_in.weight"), (0.0, 0.3)),
        **dict.fromkeys(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"), norm),
        "bias": (0.0, 0.5),
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            known = [value for suffix, value in spread.items() if name.endswith(suffix)]
            mean, deviation = known[0] if known else (0.0, parameter.shape[-1] ** -0.5)
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))


def load(folder: pathlib.Path) -> PreTrainedModel:
    """A folder's model in torch, float32, no dropout."""
    load = AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, attn_implementation="eager").eval()
