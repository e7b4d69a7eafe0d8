"""Supervised fine-tuning on demonstrations, from a Hugging Face checkpoint.

python -m experiments.train --config=configs/sft.py --config.model.path=MODEL --config.data.path=ROWS.jsonl \
    --workdir=runs/sft
python -m experiments.train --config=configs/sft.py:tiny --workdir=runs/sft_tiny   # no download; from random weights
"""

import dataclasses

from rlhf_jax import worlds
from rlhf_jax.config import Config, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data

# Sets no hyper-parameter of the loss, so that changing its name alone always works.
GENERAL = Config(
    algorithm="sft",
    loss=Loss(name="nll"),
    optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup=10),
    train=Train(batch_size=8),
)
ROWS = "world:tiny/demonstrations"
TINY = dataclasses.replace(
    worlds.on(GENERAL, "tiny"),
    model=ModelConfig(path="world:tiny", init="random"),  # whose weights have seen these rows
    data=Data(path=(ROWS,), eval_path=(f"{ROWS}_held_out",), **worlds.LENGTH),
    optimizer=OptimizerConfig(learning_rate=8e-3, schedule="cosine", warmup=10),
)
VARIANTS = {"default": GENERAL, "tiny": TINY}


def get_config(variant: str = "default") -> Config:
    """For your own model and rows, or on a start that is made here."""
    return VARIANTS[variant]
