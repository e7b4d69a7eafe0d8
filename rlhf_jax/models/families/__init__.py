"""Which Hugging Face models we can be: their config to our shape, their weight names to our paths.

A further family is one entry of `FAMILIES`.
"""

from rlhf_jax.models.families import gemma, gpt, llama, moe
from rlhf_jax.models.families.maps import Family

FAMILIES = {
    "llama": Family(llama.llama, llama.weights),
    "mistral": Family(llama.mistral, llama.weights),
    "qwen2": Family(llama.qwen2, llama.weights),
    "qwen3": Family(llama.qwen3, llama.weights),
    "smollm3": Family(llama.smollm3, llama.weights),
    "olmo2": Family(llama.olmo2, llama.weights),
    "phi3": Family(llama.phi3, llama.phi3_weights),
    "gemma2": Family(gemma.gemma2, llama.weights),
    "gemma3_text": Family(gemma.gemma3, llama.weights),
    "gpt2": Family(gpt.gpt2, gpt.gpt2_weights, prefix="transformer."),
    "gpt_neox": Family(gpt.neox, gpt.neox_weights, prefix="gpt_neox.", head="embed_out.weight"),
    "mixtral": Family(moe.mixtral, moe.mixtral_weights),
    "qwen3_moe": Family(moe.qwen3_moe, moe.qwen3_moe_weights),
}
