"""PPO-ptx of InstructGPT, Ouyang et al. 2022, arXiv:2203.02155: PPO that also learns from pre-training text.

python -m experiments.train --config=configs/instructgpt.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.model=runs/reward --config.ppo.pretrain=TEXT --workdir=runs/instructgpt
python -m experiments.train --config=configs/instructgpt.py:tiny --workdir=runs/instructgpt_tiny   # no download
"""

import dataclasses

from rlhf_jax import worlds
from rlhf_jax.algorithms.ppo import PpoConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="ppo",
    loss=Loss(name="ppo"),
    rollout=RolloutConfig(max_new_tokens=1000, epochs=1, minibatches=8),
    ppo=PpoConfig(kl=0.02, missing_end="subtract", missing_end_score=0.0, pretrain_weight=27.8),
    optimizer=OptimizerConfig(learning_rate=9e-6, schedule="constant", warmup=80, b2=0.95),
    train=Train(batch_size=64),
)


def on(name: str) -> Config:
    """On a start that is made here."""
    ptx = dataclasses.replace(GENERAL.ppo, pretrain=(f"world:{name}/documents",), pretrain_weight=1.0)
    return dataclasses.replace(worlds.on_prompts(GENERAL, name), ppo=ptx)


VARIANTS = {"default": GENERAL, "tiny": on("tiny"), "small": on("small")}


def get_config(variant: str = "default") -> Config:
    """For your own model and prompts, or on a start that is made here, whose reward is known."""
    return VARIANTS[variant]
