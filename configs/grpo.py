"""GRPO with verifiable rewards as for DeepSeek-R1: Shao et al. 2024, arXiv:2402.03300, and arXiv:2501.12948.

python -m experiments.train --config=configs/grpo.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.functions=gsm8k --workdir=runs/grpo
python -m experiments.train --config=configs/grpo.py:tiny --workdir=runs/grpo_tiny   # no download
"""

from rlhf_jax import worlds
from rlhf_jax.algorithms.group import Baseline, GroupConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="group",
    loss=Loss(name="grpo"),
    rollout=RolloutConfig(max_new_tokens=1024, samples=16, minibatches=16),
    group=GroupConfig(baseline=Baseline(name="grpo"), kl=0.001),
    optimizer=OptimizerConfig(learning_rate=3e-6, schedule="constant"),
    train=Train(batch_size=512),
)
VARIANTS = {
    "default": GENERAL,
    "tiny": worlds.on_prompts(GENERAL, "tiny"),
    "small": worlds.on_prompts(GENERAL, "small"),
}


def get_config(variant: str = "default") -> Config:
    """For your own model and prompts, or on a start that is made here, whose reward is known."""
    return VARIANTS[variant]
