"""IPO on pairs: Azar et al. 2023, arXiv:2310.12036.

python -m experiments.train --config=configs/ipo.py --config.model.path=MODEL \
    --config.data.path=ROWS --workdir=runs/ipo
python -m experiments.train --config=configs/ipo.py:tiny --workdir=runs/ipo_tiny   # no download

The paper trains no language model. beta is what huggingface.co/blog/pref-tuning found best for IPO, in the setting
of configs/zephyr.py. warmup is in steps: 10% of one pass over the 61,135 pairs of UltraFeedback in batches of 32.
"""

from rlhf_jax import worlds
from rlhf_jax.config import Config, Evaluate, Loss, OptimizerConfig, Train

# The loss averages log-ratios over tokens, so beta is far below that of DPO.
PUBLISHED = Config(
    algorithm="preference",
    loss=Loss(name="ipo", beta=0.01),
    optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup=191),
    train=Train(batch_size=32),
    evaluate=Evaluate(every=100),
)
VARIANTS = {"default": PUBLISHED, "tiny": worlds.on(PUBLISHED, "tiny")}


def get_config(variant: str = "default") -> Config:
    """The published recipe, or its loss on a start that is made here."""
    return VARIANTS[variant]
