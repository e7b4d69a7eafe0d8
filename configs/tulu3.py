"""Tulu 3, 8B: DPO with log-ratios averaged over tokens: Lambert et al. 2024, arXiv:2411.15124.

python -m experiments.train --config=configs/tulu3.py --workdir=runs/tulu3
python -m experiments.train --config=configs/tulu3.py:tiny --workdir=runs/tulu3_tiny   # no download

warmup is in steps: 10% of one pass over about 270,000 pairs in batches of 128. The 70B model was trained at a rate of
2e-7.
"""

from rlhf_jax import worlds
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data

# Downloads the model and the rows.
PUBLISHED = Config(
    algorithm="preference",
    model=ModelConfig(path="allenai/Llama-3.1-Tulu-3-8B-SFT", compute_dtype="bfloat16", remat="full"),
    data=Data(path=("allenai/llama-3.1-tulu-3-8b-preference-mixture",), length=2048),
    loss=Loss(name="dpo_norm", beta=5.0),
    optimizer=OptimizerConfig(learning_rate=5e-7, schedule="linear", warmup=211),
    train=Train(batch_size=128),
    evaluate=Evaluate(every=200),
)
VARIANTS = {"default": PUBLISHED, "tiny": worlds.on(PUBLISHED, "tiny")}


def get_config(variant: str = "default") -> Config:
    """The published recipe, or its loss on a start that is made here."""
    return VARIANTS[variant]
