"""Nash-MD, Munos et al. 2023, arXiv:2312.00886: to be preferred to a mixture of the policy and its reference.

python -m experiments.train --config=configs/nash_md.py --config.model.path=SFT_MODEL --config.data.path=PROMPTS \
    --config.rewards.model=runs/reward --workdir=runs/nash_md
python -m experiments.train --config=configs/nash_md.py:tiny --workdir=runs/nash_md_tiny   # no download
"""

from rlhf_jax import worlds
from rlhf_jax.algorithms.nash import NashConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="nash",
    loss=Loss(name="reinforce"),
    rollout=RolloutConfig(max_new_tokens=128, samples=2),
    nash=NashConfig(mixture=0.125, kl=0.008),
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
