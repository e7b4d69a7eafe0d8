"""GSPO, Zheng et al. 2025, arXiv:2507.18071: the ratio of a whole completion, clipped as a whole.

python -m experiments.train --config=configs/gspo.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.functions=gsm8k --workdir=runs/gspo
python -m experiments.train --config=configs/gspo.py:tiny --workdir=runs/gspo_tiny   # no download
"""

from rlhf_jax import worlds
from rlhf_jax.algorithms.group import GroupConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="group",
    loss=Loss(name="gspo"),
    rollout=RolloutConfig(max_new_tokens=1024, samples=8, minibatches=4),
    group=GroupConfig(),
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
