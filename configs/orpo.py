"""ORPO on pairs, from a model that was not fine-tuned, and without a reference: Hong et al. 2024, arXiv:2403.07691.

python -m experiments.train --config=configs/orpo.py --config.model.path=MODEL \
    --config.data.path=ROWS --workdir=runs/orpo
python -m experiments.train --config=configs/orpo.py:tiny --workdir=runs/orpo_tiny   # no download

As Mistral-ORPO-beta in github.com/xfactlab/orpo, with two differences: there the rate falls with the inverse square
root of the step, here along a line, and there are five passes over the data (here one: set --config.train.steps).
"""

from rlhf_jax import worlds
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data

# beta is the paper's lambda, the weight of the odds ratio beside the likelihood of the chosen answer.
PUBLISHED = Config(
    algorithm="preference",
    model=ModelConfig(compute_dtype="bfloat16", remat="full"),
    data=Data(length=2048),
    loss=Loss(name="orpo", beta=0.1),
    optimizer=OptimizerConfig(learning_rate=5e-6, schedule="linear", warmup=200),
    train=Train(batch_size=32),
    evaluate=Evaluate(every=100),
)
VARIANTS = {"default": PUBLISHED, "tiny": worlds.on(PUBLISHED, "tiny")}


def get_config(variant: str = "default") -> Config:
    """The published recipe, or its loss on a start that is made here."""
    return VARIANTS[variant]
