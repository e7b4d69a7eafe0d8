"""KTO on answers that were liked or not, or on pairs taken apart: Ethayarajh et al. 2024, arXiv:2402.01306.

python -m experiments.train --config=configs/kto.py --config.model.path=MODEL \
    --config.data.path=ROWS --workdir=runs/kto
python -m experiments.train --config=configs/kto.py:tiny --workdir=runs/kto_tiny   # no download

Where liked and disliked answers are not equally many, set --config.loss.desirable_weight or undesirable_weight so
that weight times number is about the same for both.
"""

from rlhf_jax import worlds
from rlhf_jax.config import Config, Evaluate, Loss, OptimizerConfig, Train

# The rate and the warm-up of the authors' code, github.com/ContextualAI/HALOs; ten times the rate of DPO.
PUBLISHED = Config(
    algorithm="preference",
    loss=Loss(name="kto", beta=0.1),
    optimizer=OptimizerConfig(learning_rate=5e-6, schedule="constant", warmup=150),
    train=Train(batch_size=32),
    evaluate=Evaluate(every=100),
)
VARIANTS = {"default": PUBLISHED, "tiny": worlds.on(PUBLISHED, "tiny")}


def get_config(variant: str = "default") -> Config:
    """The published recipe, or its loss on a start that is made here."""
    return VARIANTS[variant]
