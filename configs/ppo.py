"""PPO against a reward model with the details of Huang et al. 2024, arXiv:2403.17031 (N+).

python -m experiments.train --config=configs/ppo.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.model=runs/reward --workdir=runs/ppo
python -m experiments.train --config=configs/ppo.py:tiny --workdir=runs/ppo_tiny   # no download
"""

from rlhf_jax import worlds
from rlhf_jax.algorithms.ppo import PpoConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="ppo",
    loss=Loss(name="ppo"),
    rollout=RolloutConfig(max_new_tokens=53, temperature=0.7, epochs=4),
    ppo=PpoConfig(kl=0.05),
    optimizer=OptimizerConfig(learning_rate=3e-6, schedule="linear", eps=1e-5),
    train=Train(batch_size=512, microbatches=8),
)
VARIANTS = {
    "default": GENERAL,
    "tiny": worlds.on_prompts(GENERAL, "tiny"),
    "small": worlds.on_prompts(GENERAL, "small"),
}


def get_config(variant: str = "default") -> Config:
    """For your own model and prompts, or on a start that is made here, whose reward is known."""
    return VARIANTS[variant]
