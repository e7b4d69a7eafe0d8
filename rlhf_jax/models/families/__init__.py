"""Which Hugging Face models we can be: their config to our shape, their weight names to our paths.

A further family is one entry of `FAMILIES`.
"""

from rlhf_jax.models.families import gemma, gpt, llama, moe
from rlhf_jax.models.families.maps import Family

FAMILIES = {
    "llama": Family(llama.llama, llama.weights, "Llama"),
    "mistral": Family(llama.mistral, llama.weights, "Mistral"),
    "qwen2": Family(llama.qwen2, llama.weights, "Qwen2"),
    "qwen3": Family(llama.qwen3, llama.weights, "Qwen3"),
    "smollm3": Family(llama.smollm3, llama.weights, "SmolLM3"),
    "olmo2": Family(llama.olmo2, llama.weights, "Olmo2", token=False),
    "phi3": Family(llama.phi3, llama.phi3_weights, "Phi3"),
    "gemma2": Family(gemma.gemma2, llama.weights, "Gemma2"),
    "gemma3_text": Family(gemma.gemma3, llama.weights, "Gemma3Text", token=False),
    "gpt2": Family(gpt.gpt2, gpt.gpt2_weights, "GPT2", prefix="transformer.", classifier="classifier"),
    "gpt_neox": Family(
        gpt.neox, gpt.neox_weights, "GPTNeoX", prefix="gpt_neox.", head="embed_out.weight", classifier="classifier"
    ),
    "mixtral": Family(moe.mixtral, moe.mixtral_weights, "Mixtral"),
    "qwen3_moe": Family(moe.qwen3_moe, moe.qwen3_moe_weights, "Qwen3Moe"),
}
