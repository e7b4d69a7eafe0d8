"""Online DPO, Guo et al. 2024, arXiv:2402.04792: the better of two answers of the policy against the worse one.

python -m experiments.train --config=configs/online_dpo.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.model=runs/reward --workdir=runs/online_dpo
python -m experiments.train --config=configs/online_dpo.py:tiny --workdir=runs/online_dpo_tiny   # no download
"""

from rlhf_jax import worlds
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="online",
    loss=Loss(name="dpo", beta=0.1),
    rollout=RolloutConfig(max_new_tokens=128, temperature=0.9, samples=2),
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
