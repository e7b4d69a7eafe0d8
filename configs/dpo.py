"""DPO, IPO, hinge, ORPO, SimPO, CPO or KTO on preference rows, from a Hugging Face checkpoint.

python -m experiments.train --config=configs/dpo.py --config.model.path=MODEL --config.data.path=ROWS \
    --config.loss.name=dpo --workdir=runs/dpo
"""

from rlhf_jax.config import Config, Evaluate, Loss, OptimizerConfig, Train


def get_config() -> Config:
    """Sets no hyper-parameter of the loss, so that changing its name alone always works."""
    return Config(
        algorithm="preference",
        loss=Loss(name="dpo"),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="linear", warmup=10),
        train=Train(batch_size=8),
        evaluate=Evaluate(every=100),
    )
