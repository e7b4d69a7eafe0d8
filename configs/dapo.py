"""DAPO, Yu et al. 2025, arXiv:2503.14476: a higher clip, token means, dynamic sampling, a price of being late.

python -m experiments.train --config=configs/dapo.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.functions=gsm8k --workdir=runs/dapo
python -m experiments.train --config=configs/dapo.py:tiny --workdir=runs/dapo_tiny   # no download
"""

import dataclasses

from rlhf_jax import worlds
from rlhf_jax.algorithms.group import GroupConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="group",
    loss=Loss(name="dapo"),
    rollout=RolloutConfig(max_new_tokens=1024, samples=16, minibatches=16),
    group=GroupConfig(overlong=256, rounds=3),
    optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant", warmup=320, weight_decay=0.1),
    train=Train(batch_size=512),
)


def on(name: str) -> Config:
    """On a start that is made here, whose answers are short."""
    return dataclasses.replace(worlds.on_prompts(GENERAL, name), group=GroupConfig(overlong=8, rounds=3))


VARIANTS = {"default": GENERAL, "tiny": on("tiny"), "small": on("small")}


def get_config(variant: str = "default") -> Config:
    """For your own model and prompts, or on a start that is made here, whose reward is known."""
    return VARIANTS[variant]
