"""A tiny config of each family, with every feature that it can have."""

from typing import Any

SIZES: dict[str, Any] = dict(
    vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=24, max_position_embeddings=32,
)  # fmt: skip
GEMMA = SIZES | dict(head_dim=6, query_pre_attn_scalar=9, sliding_window=4)
LONGROPE = dict(type="longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 5.0], original_max_position_embeddings=16)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | dict(attention_bias=True, mlp_bias=True),
    "mistral": SIZES | dict(sliding_window=4),
    "qwen2": SIZES | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": SIZES | dict(head_dim=6, tie_word_embeddings=True),
    "gemma2": GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": GEMMA | dict(sliding_window_pattern=2, rope_scaling=dict(rope_type="linear", factor=2.0)),
    "olmo2": SIZES,
    "phi3": SIZES | dict(sliding_window=4, rope_scaling=LONGROPE, original_max_position_embeddings=16),
    "smollm3": SIZES | dict(no_rope_layers=[1, 0]),
    "gpt2": dict(vocab_size=24, n_embd=16, n_layer=2, n_head=4, n_positions=32),
    "gpt_neox": SIZES | dict(rotary_pct=0.5, num_key_value_heads=None),
}
CONFIGS = {kind: {"model_type": kind} | config for kind, config in CONFIGS.items()}
