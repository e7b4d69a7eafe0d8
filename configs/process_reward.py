"""A reward model of steps, whose score is the log-odds that a step is right: Lightman et al. 2023, arXiv:2305.20050.

python -m experiments.train --config=configs/process_reward.py --config.model.path=SFT_MODEL \
    --config.data.path=ROWS --workdir=runs/process
python -m experiments.train --config=configs/process_reward.py:tiny --workdir=runs/process_tiny   # no download

ROWS have prompt, completions (the steps, as they follow each other) and labels, or ratings of -1, 0 and 1; a neutral
step is trained as right unless --config.loss.neutral says otherwise. The same rows train an outcome model with
--config.loss.name=outcome.

tiny: 21 s on two cores of an Intel Xeon; 55% of held-out steps are judged rightly after its 60 updates, too few.
"""

import dataclasses

from rlhf_jax import worlds
from rlhf_jax.config import Config, Evaluate, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="reward",
    loss=Loss(name="process"),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup=10),
    train=Train(batch_size=16),
    evaluate=Evaluate(every=100),
)


def on(name: str) -> Config:
    """On sums of the world, step by step."""
    made, rows = worlds.on(GENERAL, name), f"world:{name}/stepwise"
    return dataclasses.replace(made, data=dataclasses.replace(made.data, path=(rows,), eval_path=(f"{rows}_held_out",)))


VARIANTS = {"default": GENERAL, "tiny": on("tiny"), "small": on("small")}


def get_config(variant: str = "default") -> Config:
    """For your own model and rows, or on a start that is made here."""
    return VARIANTS[variant]
