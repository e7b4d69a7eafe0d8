"""The chain's config, and what of it the chain fills in."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from rlhf_jax import fields
from rlhf_jax.config import Config, Loss
from rlhf_jax.data.labellers import Labeller
from rlhf_jax.evaluate.scorers import SCORERS
from rlhf_jax.sampling.distribution import Sampling

STAGES = ("sft", "labels", "reward", "ppo", "dpo")
WORLD, PEOPLE = "world", "people"  # who may rank, beside scorers
# Fields of a stage that the chain fills in, with the flag of what they are filled from.
OWN = {"seed": "seed", "cache": "cache"}
BEGINS = {"model.path": "inputs.sft", "model.init": "inputs.sft"}
FILLED: Mapping[str, Mapping[str, str]] = {
    "sft": OWN,
    "reward": OWN | BEGINS | {"data.path": "inputs.labels"},
    "ppo": OWN | BEGINS | {"data.path": "prompts", "rewards.model": "inputs.reward"},
    "dpo": OWN | BEGINS | {"data.path": "inputs.labels"},
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is there already: naming it leaves its stage out, and the stage's section is not read."""

    sft: Annotated[str | None, "model that the others start from: run, RUN@STEP, model folder or Hub name"] = None
    labels: Annotated[str | None, "file of rankings or pairs"] = None
    reward: Annotated[str | None, "reward model: run, folder of an ensemble, model folder or Hub name"] = None
    ppo: Annotated[str | None, "model that is compared as PPO's: as inputs.sft"] = None
    dpo: Annotated[str | None, "model that is compared as DPO's: as inputs.sft"] = None


@dataclasses.dataclass(frozen=True)
class Labels:
    """How answers of the SFT model are drawn and ranked."""

    by: Annotated[
        str,
        f"who ranks: {WORLD} (its simulated people, on prompts of the synthetic world), {PEOPLE} (the chain stops at a "
        "file for them to fill in), or a scorer with noise, my_pkg.module:function",
    ] = WORLD
    rows: Annotated[int | None, "most prompts used; none: all"] = None
    answers: Annotated[int, "answers to each prompt"] = 4
    rankings: Annotated[int, "of the answers to a prompt, each by another person or with noise of its own"] = 3
    labellers: Annotated[int, "simulated people in the panel"] = 5
    labeller: Annotated[Labeller, "each of the panel; its seed is the panel's"] = Labeller()
    scale: Annotated[float, "of a scorer: the difference that 73% of rankings follow; 0: all follow every one"] = 1.0
    sampling: Sampling = Sampling()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How the models are compared at the end."""

    prompts: Annotated[str, "file of prompts that nothing was trained on"] = ""
    rows: Annotated[int | None, "most prompts used; none: all"] = None
    samples: Annotated[int, "answers of each model to each prompt"] = 4
    best_of: Annotated[int, "answers of the SFT model of which the reward model picks the best"] = 16
    scorer: Annotated[
        str | None, f"a known reward: {', '.join(SCORERS)}, or my_pkg.module:function; none: there is none"
    ] = None
    sampling: Sampling = Sampling()


@dataclasses.dataclass(frozen=True)
class Chain:
    """SFT, rankings, a reward model, PPO against it and DPO beside it, compared."""

    seed: Annotated[int, "of every stage"] = 0
    cache: Annotated[str, "folder of starts and reference columns that runs share"] = Config.cache
    prompts: Annotated[str, "file of prompts that are answered for the rankings, and that PPO learns on"] = ""
    inputs: Inputs = Inputs()
    sft: Config = Config(algorithm="sft", loss=Loss(name="nll"))
    labels: Labels = Labels()
    reward: Config = Config(algorithm="reward", loss=Loss(name="bradley_terry"))
    ppo: Config = Config(algorithm="ppo", loss=Loss(name="ppo"))
    dpo: Config = Config(algorithm="preference", loss=Loss(name="dpo"))
    evaluate: Evaluation = Evaluation()

    @property
    def made(self) -> tuple[str, ...]:
        """The stages that are done here: those that no input replaces and that something needs."""
        left = {stage for stage in STAGES if getattr(self.inputs, stage) is None}
        return tuple(stage for stage in STAGES if stage in left and (stage != "labels" or left & {"reward", "dpo"}))


def filled(chain: Chain, stage: str, products: Mapping[str, str]) -> Config:
    """The config of a stage that trains, with all that the chain fills in."""
    given: dict[str, Any] = {"seed": chain.seed, "cache": chain.cache}
    if stage != "sft":
        given["model.path"] = products["sft"]
    if stage in ("reward", "dpo"):
        given["data.path"] = (products["labels"],)
    if stage == "ppo":
        given |= {"data.path": (chain.prompts,), "rewards.model": products["reward"]}
    return fields.replace(getattr(chain, stage), given)
