"""RLOO, Ahmadian et al. 2024, arXiv:2402.14740: REINFORCE against the mean of the other completions of a prompt.

python -m experiments.train --config=configs/rloo.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.model=runs/reward --workdir=runs/rloo
python -m experiments.train --config=configs/rloo.py:tiny --workdir=runs/rloo_tiny   # no download
"""

from rlhf_jax import worlds
from rlhf_jax.algorithms.group import Baseline, GroupConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="group",
    loss=Loss(name="reinforce"),
    rollout=RolloutConfig(max_new_tokens=128, samples=4),
    group=GroupConfig(baseline=Baseline(name="rloo"), kl=0.05, kl_in="reward"),
    optimizer=OptimizerConfig(learning_rate=1e-6, schedule="linear"),
    train=Train(batch_size=256),
)
VARIANTS = {
    "default": GENERAL,
    "tiny": worlds.on_prompts(GENERAL, "tiny"),
    "small": worlds.on_prompts(GENERAL, "small"),
}


def get_config(variant: str = "default") -> Config:
    """For your own model and prompts, or on a start that is made here, whose reward is known."""
    return VARIANTS[variant]
