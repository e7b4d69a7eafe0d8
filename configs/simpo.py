"""SimPO on pairs, without a reference: Meng et al. 2024, arXiv:2405.14734.

python -m experiments.train --config=configs/simpo.py --config.model.path=MODEL \
    --config.data.path=ROWS --workdir=runs/simpo
python -m experiments.train --config=configs/simpo.py:tiny --workdir=runs/simpo_tiny   # no download

As llama-3-8b-base-simpo.yaml in github.com/princeton-nlp/SimPO. warmup is in steps: 10% of one pass over the 61,135
pairs of UltraFeedback in batches of 128.
"""

from rlhf_jax import worlds
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data

# margin is the paper's gamma: beta times a gamma_beta_ratio of 0.5.
PUBLISHED = Config(
    algorithm="preference",
    model=ModelConfig(compute_dtype="bfloat16", remat="full"),
    data=Data(length=2048),
    loss=Loss(name="simpo", beta=2.0, margin=1.0),
    optimizer=OptimizerConfig(learning_rate=6e-7, schedule="cosine", warmup=48),
    train=Train(batch_size=128),
    evaluate=Evaluate(every=400),
)
VARIANTS = {"default": PUBLISHED, "tiny": worlds.on(PUBLISHED, "tiny")}


def get_config(variant: str = "default") -> Config:
    """The published recipe, or its loss on a start that is made here."""
    return VARIANTS[variant]
