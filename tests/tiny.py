"""A tiny model folder with a tokenizer, and rows for it, written where a test asks."""

import json
import pathlib
import random
from typing import Any

import jax
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.models import checkpoint as hf

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 260, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "initializer_range": 0.3,
}  # fmt: skip
WORDS = "red green blue one two three sun moon star cat dog bird".split()


MIXTURE = CONFIG | {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
}  # fmt: skip


def write_model(folder: pathlib.Path, config: dict[str, Any] = CONFIG) -> pathlib.Path:
    """Random weights, and a tokenizer of bytes without a chat template."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = hf.describe(epath.Path(folder))
    hf.write(epath.Path(folder), model, jax.jit(model.init)(jax.random.key(1)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: number for number, letter in enumerate(alphabet, start=2)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_pairs(file: pathlib.Path, count: int = 48) -> pathlib.Path:
    """Preference rows of uneven length, each with a prompt of its own."""
    rng = random.Random(0)
    words = lambda most: " ".join(rng.choices(WORDS, k=rng.randint(1, most)))
    rows = [{"prompt": f"{i} {words(3)}:", "chosen": " " + words(5), "rejected": " " + words(3)} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
