"""Five reward models in one program, each on rows drawn anew: Coste et al. 2024, arXiv:2310.02743.

python -m experiments.train --config=configs/ensemble.py --config.model.path=SFT_MODEL --config.data.path=ROWS \
    --workdir=runs/ensemble
python -m experiments.train --config=configs/ensemble.py:tiny --workdir=runs/ensemble_tiny   # no download

Members differ in their head, their rows and the order of these. Their folders, members/seed=N, are runs that stand
alone; experiments.rewards and experiments.evaluate --reward take the ensemble's folder and say what its members say
together: their mean, their minimum, or their mean less their variance.
tiny: 31 s on two cores of an Intel Xeon; seed 0's accuracy on 190 held-out pairs goes to 0.62.
"""

import dataclasses

from rlhf_jax import worlds
from rlhf_jax.algorithms.reward import RewardConfig
from rlhf_jax.config import Config, Evaluate, Loss, OptimizerConfig, Train

GENERAL = Config(
    algorithm="reward",
    loss=Loss(name="bradley_terry"),
    reward=RewardConfig(members=5, head="normal"),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup=10),
    train=Train(batch_size=16),
    evaluate=Evaluate(every=100),
)


def bootstrapped(config: Config) -> Config:
    """Each member on rows of its own."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, bootstrap=True))


VARIANTS = {name: bootstrapped(worlds.on(GENERAL, name)) for name in ("tiny", "small")}
VARIANTS["default"] = bootstrapped(GENERAL)


def get_config(variant: str = "default") -> Config:
    """For your own model and rows, or on a start that is made here."""
    return VARIANTS[variant]
