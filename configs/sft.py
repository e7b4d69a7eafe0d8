"""Supervised fine-tuning on demonstrations, from a Hugging Face checkpoint.

python -m experiments.train --config=configs/sft.py --config.model.path=MODEL --config.data.path=ROWS.jsonl \
    --workdir=runs/sft
"""

from rlhf_jax.config import Config, Loss, OptimizerConfig, Train


def get_config() -> Config:
    """Sets no hyper-parameter of the loss, so that changing its name alone always works."""
    return Config(
        algorithm="sft",
        loss=Loss(name="nll"),
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup=10),
        train=Train(batch_size=8),
    )
