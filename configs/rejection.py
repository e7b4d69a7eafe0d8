"""RAFT, Dong et al. 2023, arXiv:2304.06767: the best of eight answers of the policy is a demonstration.

python -m experiments.train --config=configs/rejection.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.model=runs/reward --workdir=runs/rejection
python -m experiments.train --config=configs/rejection.py:tiny --workdir=runs/rejection_tiny   # no download
"""

from rlhf_jax import worlds
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="rejection",
    loss=Loss(name="nll"),
    rollout=RolloutConfig(max_new_tokens=128, samples=8),
    optimizer=OptimizerConfig(learning_rate=2e-5, schedule="linear"),
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
