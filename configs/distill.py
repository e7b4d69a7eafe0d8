"""On-policy distillation (GKD), Agarwal et al. 2024, arXiv:2306.13649: a student learns its teacher's distributions.

python -m experiments.train --config=configs/distill.py --config.model.path=STUDENT --config.data.path=PROMPTS \
    --config.distill.teacher=TEACHER --workdir=runs/distill
python -m experiments.train --config=configs/distill.py:tiny --workdir=runs/distill_tiny   # no download, two minutes
"""

import dataclasses

from rlhf_jax import worlds
from rlhf_jax.algorithms.distill import DistillConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train

GENERAL = Config(
    algorithm="distill",
    loss=Loss(name="jsd"),
    rollout=RolloutConfig(max_new_tokens=128),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="linear"),
    train=Train(batch_size=64),
)


def in_world(name: str) -> Config:
    """The fine-tuned model teaches the one that it was before; the known reward is only looked at."""
    return dataclasses.replace(
        worlds.on_prompts(GENERAL, name), model=ModelConfig(path=f"world:{name}/pretrained"),
        distill=DistillConfig(f"world:{name}"), optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear"),
        train=Train(steps=120, batch_size=64), evaluate=Evaluate(every=40, rows=128),
    )  # fmt: skip


VARIANTS = {"default": GENERAL, "tiny": in_world("tiny"), "small": in_world("small")}


def get_config(variant: str = "default") -> Config:
    """For your own student, teacher and prompts, or on a start that is made here."""
    return VARIANTS[variant]
