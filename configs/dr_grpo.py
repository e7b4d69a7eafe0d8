"""Dr. GRPO, Liu et al. 2025, arXiv:2503.20783: neither the length of a row nor the spread of a group divides.

python -m experiments.train --config=configs/dr_grpo.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.functions=gsm8k --workdir=runs/dr_grpo
python -m experiments.train --config=configs/dr_grpo.py:tiny --workdir=runs/dr_grpo_tiny   # no download
"""

from rlhf_jax import worlds
from rlhf_jax.algorithms.group import Baseline, GroupConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="group",
    loss=Loss(name="dr_grpo", length=1024.0),
    rollout=RolloutConfig(max_new_tokens=1024, samples=8, minibatches=8),
    group=GroupConfig(baseline=Baseline(name="dr_grpo")),
    optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant"),
    train=Train(batch_size=128),
)
VARIANTS = {
    "default": GENERAL,
    "tiny": worlds.on_prompts(GENERAL, "tiny"),
    "small": worlds.on_prompts(GENERAL, "small"),
}


def get_config(variant: str = "default") -> Config:
    """For your own model and prompts, or on a start that is made here, whose reward is known."""
    return VARIANTS[variant]
