"""One experiment, composed: every section stands beside the code that it configures."""

import dataclasses
from typing import Annotated, Literal

from rlhf_jax.algorithms.distill import DistillConfig
from rlhf_jax.algorithms.group import GroupConfig
from rlhf_jax.algorithms.nash import NashConfig
from rlhf_jax.algorithms.online import OnlineConfig
from rlhf_jax.algorithms.optimizers import OPTIMIZERS
from rlhf_jax.algorithms.ppo import PpoConfig
from rlhf_jax.algorithms.preference import PreferenceConfig
from rlhf_jax.algorithms.rejection import RejectionConfig
from rlhf_jax.algorithms.reward import RewardConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.data.config import Data
from rlhf_jax.feedback.rewards import RewardsConfig
from rlhf_jax.losses import LOSSES
from rlhf_jax.metrics import LogConfig
from rlhf_jax.models.decoder import Numerics
from rlhf_jax.models.linear import Lora
from rlhf_jax.registry import generated
from rlhf_jax.sharding import MeshShape


@dataclasses.dataclass(frozen=True)
class ModelConfig(Numerics):
    """Which model is trained, and how it is computed."""

    path: Annotated[str | None, "Hugging Face folder or Hub name"] = None
    init: Annotated[Literal["checkpoint", "random"], "start from its weights, or from random ones"] = "checkpoint"
    tokenizer: Annotated[str | None, "folder or Hub name of the tokenizer; none: the model's own"] = None

    def numerics(self) -> Numerics:
        """How the model is computed, apart from which it is."""
        return Numerics(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Numerics)})


@generated(LOSSES)
class Loss:
    """What is minimised: a loss, a named sum (rpo, mpo) or a sum of names such as dpo+nll.

    A hyper-parameter left at none has each loss's own default.
    """

    name: str = "dpo"
    weights: Annotated[
        tuple[float, ...], "of the losses of a sum, such as dpo+nll; empty: 1 each, or the sum's own"
    ] = ()


@generated(OPTIMIZERS)
class OptimizerConfig:
    """How parameters move; a hyper-parameter left at none has the optimiser's own default."""

    name: str = "adamw"
    learning_rate: Annotated[float, "peak rate"] = 1e-5
    schedule: Annotated[
        Literal["constant", "linear", "cosine", "wsd"], "shape after the warm-up; all but constant end at 0"
    ] = "linear"
    warmup: Annotated[int, "steps over which the rate rises from 0 to its peak"] = 0
    decay: Annotated[float | None, "share of the steps, at their end, in which wsd falls to 0; none: 0.2"] = None
    clip_norm: Annotated[float | None, "largest norm of the gradient; none: no clipping"] = 1.0


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, and in what pieces."""

    steps: Annotated[int | None, "optimiser updates; none: one pass over the data"] = None
    batch_size: Annotated[int, "rows of an update: pairs, labelled answers, demonstrations or completions"] = 8
    microbatches: Annotated[
        int, "pieces that an update's rows are differentiated in and a rollout is measured in, to save memory"
    ] = 1
    reduce_dtype: Annotated[Literal["float32", "bfloat16"], "of gradients summed over microbatches"] = "float32"
    balance: Annotated[
        float | None, "weight of the term that spreads tokens over a mixture's experts; none: that of its config.json"
    ] = None


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluation on held-out rows while training."""

    every: Annotated[int, "steps between evaluations; 0: only before the first step and after the last"] = 100
    rows: Annotated[int | None, "most held-out rows used; none: all"] = 512
    patience: Annotated[
        int, "evaluations in a row without a lower eval/loss after which the run ends; 0: it goes on to its last step"
    ] = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    seed: Annotated[int, "of the rows' order, the held-out split and random weights"] = 0
    algorithm: Annotated[
        Literal["sft", "preference", "reward", "ppo", "group", "online", "rejection", "distill", "nash"], "what learns"
    ] = "preference"
    cache: Annotated[str, "folder of reference columns that runs share"] = "~/.cache/rlhf_jax"
    model: ModelConfig = ModelConfig()
    lora: Lora = Lora()
    data: Data = Data()
    loss: Loss = Loss()  # pyright: ignore[reportInvalidTypeForm]
    preference: PreferenceConfig = PreferenceConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PpoConfig = PpoConfig()
    group: GroupConfig = GroupConfig()
    online: OnlineConfig = OnlineConfig()
    rejection: RejectionConfig = RejectionConfig()
    distill: DistillConfig = DistillConfig()
    nash: NashConfig = NashConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()  # pyright: ignore[reportInvalidTypeForm]
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshShape = MeshShape()
    log: LogConfig = LogConfig()


# What may differ between a run and its resumption without making it another experiment.
MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "cache",
    "evaluate.",
    "checkpoint.",
    "mesh.",
    "log.",
    "data.threads",
    "rollout.slots",
    "distill.teacher",  # its identity is held, see `teacher.check_teacher`
    "rewards.deadline",
)
