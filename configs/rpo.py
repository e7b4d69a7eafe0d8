"""Iterative RPO: DPO plus the likelihood of the chosen answer, per token: Pang et al. 2024, arXiv:2404.19733.

python -m experiments.train --config=configs/rpo.py --config.model.path=MODEL \
    --config.data.path=ROWS --workdir=runs/rpo
python -m experiments.train --config=configs/rpo.py:tiny --workdir=runs/rpo_tiny   # no download

One iteration: the paper samples answers from the model, takes pairs of a right and a wrong one, trains at most 5,000
steps, keeps the best checkpoint by held-out accuracy, and does it again from there.
"""

from rlhf_jax import worlds
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train

# rpo is dpo + nll, each with weight 1.
PUBLISHED = Config(
    algorithm="preference",
    model=ModelConfig(compute_dtype="bfloat16", remat="full"),
    loss=Loss(name="rpo", beta=0.1),
    optimizer=OptimizerConfig(learning_rate=7e-7, schedule="constant"),
    train=Train(steps=5000, batch_size=16),
    evaluate=Evaluate(every=500),
)
VARIANTS = {"default": PUBLISHED, "tiny": worlds.on(PUBLISHED, "tiny")}


def get_config(variant: str = "default") -> Config:
    """The published recipe, or its loss on a start that is made here."""
    return VARIANTS[variant]
