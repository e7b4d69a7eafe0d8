"""SmolLM3, 3B: APO-zero on pairs with and without reasoning. The loss: D'Oosterlinck et al. 2024, arXiv:2408.06266.

python -m experiments.train --config=configs/smollm3.py --config.model.path=MODEL \
    --config.data.path=ROWS --workdir=runs/smollm3
python -m experiments.train --config=configs/smollm3.py:tiny --workdir=runs/smollm3_tiny   # no download

As recipes/smollm3/dpo/apo.yaml in github.com/huggingface/alignment-handbook, from the revision it-SFT of
HuggingFaceTB/SmolLM3-3B-checkpoints on HuggingFaceTB/smoltalk2 (config Preference). There the rate ends at a tenth of
its peak, here at 0; its warm-up is 10% of the steps, so set warmup to a tenth of yours.
"""

from rlhf_jax import worlds
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data

# Rows of reasoning are long.
PUBLISHED = Config(
    algorithm="preference",
    model=ModelConfig(compute_dtype="bfloat16", remat="full"),
    data=Data(length=24576),
    loss=Loss(name="apo_zero", beta=0.05),
    optimizer=OptimizerConfig(learning_rate=1e-6, schedule="cosine", warmup=100, clip_norm=0.2),
    train=Train(batch_size=32),
    evaluate=Evaluate(every=0),
)
VARIANTS = {"default": PUBLISHED, "tiny": worlds.on(PUBLISHED, "tiny")}


def get_config(variant: str = "default") -> Config:
    """The published recipe, or its loss on a start that is made here."""
    return VARIANTS[variant]
