"""XPO, Xie et al. 2024, arXiv:2405.21046: online DPO of an answer of the policy and one of the reference, and explores.

python -m experiments.train --config=configs/xpo.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.model=runs/reward --workdir=runs/xpo
python -m experiments.train --config=configs/xpo.py:tiny --workdir=runs/xpo_tiny   # no download
"""

from rlhf_jax import worlds
from rlhf_jax.algorithms.online import OnlineConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="online",
    loss=Loss(name="dpo", beta=0.1),
    rollout=RolloutConfig(max_new_tokens=128, samples=2),
    online=OnlineConfig(explore=1e-5),
    optimizer=OptimizerConfig(learning_rate=5e-7, schedule="constant", warmup=150),
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
