"""The config of constitutional AI, its stages, and what of their configs is filled in."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from rlhf_jax import fields
from rlhf_jax.config import Config, Loss
from rlhf_jax.data.config import Data
from rlhf_jax.evaluate.scorers import SCORERS
from rlhf_jax.feedback.ai_preference import GENERAL, TEMPLATES
from rlhf_jax.feedback.constitution import SHIPPED
from rlhf_jax.sampling.distribution import Sampling

PROBABILITY = "probability"  # the column of chances in what is written here
HUMAN = "human.jsonl"  # people's pairs in that form
NAMED_SCORERS = f"{', '.join(SCORERS)}, or my_pkg.module:function"


class Stage(NamedTuple):
    """One stage: the section of its config, what trains there (None: nothing), and the stages that it is made from."""

    section: str
    algorithm: str | None
    of: tuple[str, ...] = ()


STAGES: Mapping[str, Stage] = {
    "helpful": Stage("helpful", "sft"),
    "revisions": Stage("revisions", None, ("helpful",)),
    "revised": Stage("revised", "sft", ("revisions",)),
    "labels": Stage("labels", None, ("helpful", "revised")),
    "dpo": Stage("dpo", "preference", ("revised", "labels")),
    "reward": Stage("reward", "reward", ("revised", "labels")),
    "ppo": Stage("ppo", "ppo", ("revised", "reward")),
    # The same method from the helpful model, on people's pairs alone.
    "helpful_dpo": Stage("dpo", "preference", ("helpful",)),
    "helpful_reward": Stage("reward", "reward", ("helpful",)),
    "helpful_ppo": Stage("ppo", "ppo", ("helpful", "helpful_reward")),
}
WAYS = {"dpo": ("dpo", "helpful_dpo"), "ppo": ("reward", "ppo", "helpful_reward", "helpful_ppo")}  # by `final`
# Fields of sections that are filled in, with the flag of what they are filled from.
OWN = {"seed": "seed", "cache": "cache", "model.init": "model"}
PAIRS = {"model.path": "inputs.revised", "data.path": "inputs.labels", "data.probability": "inputs.labels"}
FILLED: Mapping[str, Mapping[str, str]] = {
    "helpful": OWN | {"model.path": "model", "data.path": "demonstrations"},
    "revised": OWN | {"model.path": "model", "data.path": "demonstrations"},
    "dpo": OWN | PAIRS,
    "reward": OWN | PAIRS,
    "ppo": OWN | {"model.path": "inputs.revised", "data.path": "prompts", "rewards.model": "inputs.reward"},
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is there already: naming it leaves its stage out, and the stage's section is not read."""

    helpful: Annotated[str | None, "model that answers helpfully: run, RUN@STEP, model folder or Hub name"] = None
    revisions: Annotated[str | None, "file of answers to imitate in the place of revisions"] = None
    revised: Annotated[str | None, "model trained on revisions: as inputs.helpful"] = None
    labels: Annotated[str | None, "file of pairs with a column probability in the place of a model's labels"] = None
    reward: Annotated[str | None, "reward model from both labels: run, folder of an ensemble, model folder"] = None
    final: Annotated[str | None, "model that is compared as the last one: as inputs.helpful"] = None
    helpful_only: Annotated[str | None, "model that it is compared with: as inputs.helpful"] = None


@dataclasses.dataclass(frozen=True)
class Revisions:
    """How answers of the helpful model are drawn, criticised and revised."""

    rounds: Annotated[int, "of critique and revision"] = 4
    rows: Annotated[int | None, "most prompts used; none: all"] = None
    critic: Annotated[str | None, "model that criticises and revises: as inputs.helpful; none: the helpful one"] = None
    examples: Annotated[str | None, "text file of critiques and revisions that it reads first; none: it reads none"] = (
        None
    )
    sampling: Annotated[Sampling, "of the first answers"] = Sampling()
    writing: Annotated[Sampling, "of critiques and revisions"] = Sampling()


@dataclasses.dataclass(frozen=True)
class Labels:
    """How pairs of answers of the revised model are drawn and compared by a model."""

    rows: Annotated[int | None, "most prompts used; none: all"] = None
    judge: Annotated[str | None, "model that compares: as inputs.helpful; none: the helpful one"] = None
    template: Annotated[
        str, f"{', '.join(TEMPLATES)} (for the world's models), or a text file of what the judge is asked"
    ] = GENERAL
    clamp: Annotated[bool, "chances are brought to between 0.4 and 0.6: of chosen from 0.5 to 0.6"] = False
    sampling: Sampling = Sampling()


@dataclasses.dataclass(frozen=True)
class Side:
    """One thing that models are compared by."""

    prompts: Annotated[str, "file of prompts that nothing was trained on"] = ""
    rows: Annotated[int | None, "most prompts used; none: all"] = None
    scorer: Annotated[str | None, f"{NAMED_SCORERS}; the higher the better"] = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How the models are compared at the end: harmlessness and helpfulness are two things."""

    harmless: Side = Side()
    helpful: Side = Side()
    samples: Annotated[int, "answers of each model to each prompt"] = 4
    sampling: Sampling = Sampling()


@dataclasses.dataclass(frozen=True)
class Constitutional:
    """Critique and revision, a model's preferences, and DPO or PPO on them and people's, by a constitution."""

    seed: Annotated[int, "of every stage"] = 0
    cache: Annotated[str, "folder of starts and reference columns that runs share"] = Config.cache
    model: Annotated[str | None, "pre-trained model that both supervised stages start from"] = None
    constitution: Annotated[str, f"principles: {', '.join(SHIPPED)} or a .toml file"] = "general"
    demonstrations: Annotated[tuple[str, ...], "files of helpful answers to imitate"] = ()
    prompts: Annotated[str, "file of prompts that provoke harm: answers to them are revised and compared"] = ""
    human: Annotated[str | None, "file of pairs or rankings by people, of what is helpful; none: there are none"] = None
    human_probability: Annotated[str | None, "its column of chances or votes for chosen; none: chosen is better"] = None
    helpful_prompts: Annotated[str | None, "file of other prompts that PPO learns on as well; none: no others"] = None
    final: Annotated[Literal["dpo", "ppo"], "the last stage: on the labels, or against a reward model of them"] = "dpo"
    inputs: Inputs = Inputs()
    helpful: Config = Config(algorithm="sft", loss=Loss(name="nll"))
    revisions: Revisions = Revisions()
    revised: Config = Config(algorithm="sft", loss=Loss(name="nll"))
    labels: Labels = Labels()
    dpo: Config = Config(algorithm="preference", loss=Loss(name="dpo"))
    reward: Config = Config(algorithm="reward", loss=Loss(name="bradley_terry"))
    ppo: Config = Config(algorithm="ppo", loss=Loss(name="ppo"))
    evaluate: Evaluation = Evaluation()

    @property
    def input_of(self) -> dict[str, str | None]:
        """What is named in the place of each stage's product."""
        given = {name: value for name, value in vars(self.inputs).items() if name in STAGES}
        only = f"helpful_{self.final}"
        return dict.fromkeys(STAGES) | given | {self.final: self.inputs.final, only: self.inputs.helpful_only}

    @property
    def made(self) -> tuple[str, ...]:
        """The stages that are done here: those that lead to what is compared and that no input replaces."""
        named = {stage for stage, given in self.input_of.items() if given is not None}
        wanted = {"helpful", "revised", self.final, *([f"helpful_{self.final}"] if self.has_helpful_only else [])}
        for stage in reversed([*STAGES]):
            if stage in wanted - named:
                wanted |= {*STAGES[stage].of}
        return tuple(stage for stage in STAGES if stage in wanted - named)

    @property
    def has_helpful_only(self) -> bool:
        """Whether there is anything to make the model from that the last one is compared with, or it is there."""
        return self.human is not None or self.inputs.helpful_only is not None


def after(stage: str) -> tuple[str, ...]:
    """The stages that are made from what a stage makes, whichever comes between."""
    found = {stage}
    for name, one in STAGES.items():
        if found & {*one.of}:
            found.add(name)
    return tuple(name for name in STAGES if name in found - {stage})


def filled(whole: Constitutional, stage: str, products: Mapping[str, str]) -> Config:
    """The config of a stage that trains, with all that is filled in.

    Args:
      products: what the stages that it is made from left, and people's pairs as `human`.
    """
    section, algorithm, _ = STAGES[stage]
    only = stage.startswith("helpful_")
    given: dict[str, Any] = {"seed": whole.seed, "cache": whole.cache}
    if algorithm == "sft":
        paths = (*([] if stage == "helpful" else [products["revisions"]]), *whole.demonstrations)
        given |= {"model.path": whole.model, "data.path": paths}
    else:
        given["model.path"] = products["helpful" if only else "revised"]
    if algorithm in ("preference", "reward"):
        both = {} if only else {"labels": products["labels"]}
        both |= {"human": products["human"]} if whole.human is not None else {}
        given |= {"data.path": tuple(both.values()), "data.probability": PROBABILITY}
    if algorithm == "ppo":
        others = () if whole.helpful_prompts is None else (whole.helpful_prompts,)
        paths = others or (whole.prompts,) if only else (whole.prompts, *others)
        given |= {"data.path": paths, "rewards.model": products[STAGES[stage].of[1]]}
    if only:  # shares are of both labels, and of both prompts
        given["data.weights"] = Data.weights
    return fields.replace(getattr(whole, section), given)
