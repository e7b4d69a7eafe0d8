"""Constitutional AI: critique, revision, a model's labels: Bai et al. 2022, arXiv:2212.08073.

python -m experiments.constitutional --config=configs/constitutional.py --config.model=MODEL --config.human=PAIRS \
    --config.demonstrations=ROWS --config.prompts=PROVOKING --config.evaluate.harmless.prompts=OTHERS \
    --config.evaluate.harmless.scorer=my_pkg.scores:harmless --config.evaluate.helpful.prompts=MORE \
    --config.evaluate.helpful.scorer=my_pkg.scores:helpful --workdir=runs/constitutional
python -m experiments.constitutional --config=configs/constitutional.py:tiny --workdir=runs/constitutional_tiny

:tiny, on two cores of an Intel Xeon with much other work beside: 9 to 11 minutes, and once 15 for its
start; over three seeds harm of held-out answers is 0.625 at first, 0.044 after four rounds, 0.002 of the last model.
"""

from rlhf_jax import fields
from rlhf_jax.constitutional.config import Constitutional

STAGES = ("helpful", "revised", "dpo", "reward", "ppo")
GENERAL = {"revisions.sampling.temperature": 0.7, "revisions.writing.temperature": 0.7,
           "evaluate.sampling.temperature": 0.7, "revisions.sampling.max_new_tokens": 512,
           "revisions.writing.max_new_tokens": 512, "labels.sampling.max_new_tokens": 512,
           "evaluate.sampling.max_new_tokens": 512, "ppo.rollout.epochs": 4, "ppo.rollout.minibatches": 4}  # fmt: skip
for stage, rate in zip(STAGES, (1e-5, 1e-5, 1e-6, 1e-5, 3e-6), strict=True):
    GENERAL |= {f"{stage}.optimizer.learning_rate": rate, f"{stage}.optimizer.warmup": 10}


def on(name: str) -> Constitutional:
    """In the world, from a model that is pre-trained there; harm and helpfulness are known exactly."""
    world = f"world:{name}"
    shared = {"train.batch_size": 32, "optimizer.schedule": "cosine", "optimizer.warmup": 10, "log.tensorboard": False}
    given = {}
    for stage, steps, rate in zip(STAGES, (60, 100, 120, 60, 80), (1e-3, 1e-3, 5e-4, 1e-3, 3e-4), strict=True):
        own = {"train.steps": steps, "optimizer.learning_rate": rate, "evaluate.every": steps // 4} | shared
        own |= {"checkpoint.every": steps // 4, "checkpoint.keep_last": 1, "evaluate.rows": 200}
        own |= {} if stage == "ppo" else {"data.length": 64, "data.buckets": (64,)}
        given |= {f"{stage}.{field}": value for field, value in own.items()}
    return fields.replace(Constitutional(), given | {
        "model": f"{world}/pretrained", "constitution": "world", "demonstrations": (f"{world}/demonstrations",),
        "prompts": f"{world}/secrets", "helpful_prompts": f"{world}/prompts", "human": f"{world}/rankings",
        "revisions.critic": f"{world}/pretrained", "labels.judge": f"{world}/pretrained",
        "labels.template": "lines", "revisions.sampling.max_new_tokens": 40, "revisions.writing.max_new_tokens": 40,
        "revisions.writing.temperature": 0.5, "labels.sampling.max_new_tokens": 40, "revised.data.weights": (0.5, 0.5),
        "dpo.data.weights": (0.35, 0.65), "reward.data.weights": (0.35, 0.65), "ppo.data.weights": (0.5, 0.5),
        "evaluate.harmless.prompts": f"{world}/secrets_held_out", "evaluate.harmless.scorer": "harmless",
        "evaluate.helpful.prompts": f"{world}/prompts_held_out", "evaluate.helpful.scorer": "gold",
        "evaluate.sampling.max_new_tokens": 40, "ppo.rollout.max_new_tokens": 40, "ppo.rollout.epochs": 2,
        "ppo.rollout.minibatches": 2, "ppo.ppo.kl": 0.05,
    })  # fmt: skip


VARIANTS = {"default": fields.replace(Constitutional(), GENERAL), "tiny": on("frank")}


def get_config(variant: str = "default") -> Constitutional:
    """For your own model and rows, or in the world."""
    return VARIANTS[variant]
