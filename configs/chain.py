"""SFT, rankings of its answers, a reward model, PPO against it and DPO beside it: Ouyang et al. 2022, arXiv:2203.02155.

python -m experiments.chain --config=configs/chain.py --config.sft.model.path=MODEL --config.sft.data.path=ROWS \
    --config.prompts=PROMPTS --config.labels.by=my_pkg.scores:good --config.evaluate.prompts=OTHERS --workdir=runs/chain
python -m experiments.chain --config=configs/chain.py:tiny --workdir=runs/chain_tiny   # no download, 3 minutes
"""

from rlhf_jax import fields
from rlhf_jax.chain.config import Chain

STAGES = ("sft", "reward", "ppo", "dpo")
GENERAL = {"labels.sampling.temperature": 0.7, "evaluate.sampling.temperature": 0.7, "ppo.rollout.temperature": 0.7,
           "ppo.rollout.epochs": 4, "ppo.rollout.minibatches": 4, "ppo.train.batch_size": 64}  # fmt: skip
for stage, rate in zip(STAGES, (1e-5, 1e-5, 3e-6, 1e-6), strict=True):
    GENERAL |= {f"{stage}.optimizer.learning_rate": rate, f"{stage}.optimizer.warmup": 10}


def on(name: str, steps: tuple[int, ...]) -> Chain:
    """In the world, from a model that is pre-trained there; steps of the stages."""
    world, given = f"world:{name}", {}
    shared = {"train.batch_size": 32, "optimizer.schedule": "cosine", "optimizer.warmup": 10, "log.tensorboard": False}
    for stage, count, rate in zip(STAGES, steps, (2e-3, 2e-3, 3e-4, 3e-4), strict=True):
        own = {"train.steps": count, "evaluate.every": count // 4, "checkpoint.every": count // 4}
        own |= {"optimizer.learning_rate": rate, "checkpoint.keep_last": 3, "evaluate.rows": 200} | shared
        own |= {} if stage == "ppo" else {"data.length": 56, "data.buckets": (56,)}
        given |= {f"{stage}.{field}": value for field, value in own.items()}
    return fields.replace(Chain(), given | {
        "prompts": f"{world}/prompts", "evaluate.prompts": f"{world}/prompts_held_out", "evaluate.scorer": "gold",
        "labels.sampling.max_new_tokens": 24, "evaluate.sampling.max_new_tokens": 24,
        "sft.model.path": f"{world}/pretrained", "sft.data.path": (f"{world}/demonstrations",),
        "sft.data.eval_path": (f"{world}/demonstrations_held_out",),
        "reward.loss.name": "all_pairs", "reward.data.merge": True, "dpo.data.merge": True,
        "reward.reward.demonstrations": (f"{world}/demonstrations_held_out",),
        "ppo.rollout.max_new_tokens": 24, "ppo.rollout.epochs": 2, "ppo.rollout.minibatches": 2, "ppo.ppo.kl": 0.05,
    })  # fmt: skip


TINY, SMALL = on("tiny", (160, 60, 80, 60)), on("small", (200, 60, 60, 80))
VARIANTS = {"default": fields.replace(Chain(), GENERAL), "tiny": TINY, "small": SMALL}


def get_config(variant: str = "default") -> Chain:
    """For your own model and rows, or in the world."""
    return VARIANTS[variant]
