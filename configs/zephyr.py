"""Zephyr: DPO of a 7B model on UltraFeedback: Tunstall et al. 2023, arXiv:2310.16944.

python -m experiments.train --config=configs/zephyr.py --workdir=runs/zephyr
python -m experiments.train --config=configs/zephyr.py:tiny --workdir=runs/zephyr_tiny   # no download

One pass, with the beta of the recipe that was released, github.com/huggingface/alignment-handbook, whose rate falls
with a cosine. The rate falls along a line in the paper. warmup is in steps: 10% of 61,135 pairs in batches of 32.
"""

from rlhf_jax import worlds
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data

# Downloads the model and the rows.
PUBLISHED = Config(
    algorithm="preference",
    model=ModelConfig(path="alignment-handbook/zephyr-7b-sft-full", compute_dtype="bfloat16", remat="full"),
    data=Data(path=("HuggingFaceH4/ultrafeedback_binarized",), split="train_prefs", length=1024),
    loss=Loss(name="dpo", beta=0.01),
    optimizer=OptimizerConfig(learning_rate=5e-7, schedule="linear", warmup=191),
    train=Train(batch_size=32),
    evaluate=Evaluate(every=100),
)
VARIANTS = {"default": PUBLISHED, "tiny": worlds.on(PUBLISHED, "tiny")}


def get_config(variant: str = "default") -> Config:
    """The published recipe, or its loss on a start that is made here."""
    return VARIANTS[variant]
