"""Checkpoints that transformers makes, drawn so that a mistake in reading or computing them shows.

A freshly initialised model hides most mistakes: its biases are 0, its norms 1, its attention nearly uniform
and so blind to positions. Here every weight, bias and norm is random, scores have a standard deviation of
about 3, and each checkpoint is saved in several files.
"""

# pyright: reportMissingImports=false

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 97
LENGTH = 128
SCORES = 3.0  # standard deviation of the attention scores

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=LENGTH, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# The norm's epsilon is large enough to be seen in the logits.
LLAMA: dict[str, Any] = SIZES | dict(tie_word_embeddings=False, rms_norm_eps=0.05)
QWEN2: dict[str, Any] = SIZES | dict(tie_word_embeddings=True, rms_norm_eps=0.05)


def _rope(kind: str, **fields: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **fields}}


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint: how transformers makes it, and what it has beside the common features."""

    make: Callable[[], PreTrainedModel]
    features: tuple[str, ...] = ()


def _llama(*features: str, **config: Any) -> Case:
    return Case(lambda: LlamaForCausalLM(LlamaConfig(**(LLAMA | config))), features)


def _qwen2(*features: str, **config: Any) -> Case:
    return Case(lambda: Qwen2ForCausalLM(Qwen2Config(**(QWEN2 | config))), features)


QKV = ("bias of query", "bias of key", "bias of value")
CASES = {
    "llama": _llama("untied head", **_rope("default")),
    "llama3": _llama("untied head", "rope scaling", **LLAMA3),
    "llama-linear-tied": _llama("rope scaling", tie_word_embeddings=True, **_rope("linear", factor=4.0)),
    "llama-yarn": _llama("untied head", "rope scaling", **YARN),
    "llama-biases": _llama(
        "untied head", *QKV, "bias of out", "bias of gate", "bias of up", "bias of down",
        attention_bias=True, mlp_bias=True, **LLAMA3,
    ),
    "llama-wide-heads": _llama("untied head", "rope scaling", num_attention_heads=4, head_dim=24, **LLAMA3),
    "qwen2-tied": _qwen2(*QKV, **_rope("default")),
    "qwen2-untied": _qwen2("untied head", *QKV, tie_word_embeddings=False, **_rope("default")),
    "qwen2-yarn": _qwen2("rope scaling", *QKV, **YARN),
}  # fmt: skip


def draw(model: PreTrainedModel, seed: int = 0) -> None:
    """Draws every parameter anew, in place."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    spread = {
        "q_proj.weight": (0.0, (SCORES / width) ** 0.5),
        "k_proj.weight": (0.0, (SCORES / width) ** 0.5),
        "embed_tokens.weight": (0.0, 0.3),
        "norm.weight": (1.0, 0.3),
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
