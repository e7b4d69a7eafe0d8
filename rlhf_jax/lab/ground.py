"""What one seed of a study stands on: a start of the world of its own, and what is trained and measured from there.

Everything that is trained has a name, lies in the seed's folder under it, and is not trained again when the seed is
run once more.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rlhf_jax import fields, run, sweep, worlds
from rlhf_jax.algorithms.ppo import PpoConfig
from rlhf_jax.algorithms.reward import RewardConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data import labellers, world
from rlhf_jax.data.config import Data
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.answers import Answers, Subject, answer, logprobs
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.metrics import LogConfig
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.workdir import open_policy, open_rewards

Row = dict[str, Any]
Changes = Mapping[str, Any]  # fields of a config by their dotted path
NONE: Changes = types.MappingProxyType({})
QUIET = LogConfig(tensorboard=False, progress=False)
DEMONSTRATIONS = 128  # held-out ones whose mean score a reward model is set to 0 by
START = "start"  # the name of the model that everything begins with
PRETRAINED = worlds.PRETRAINED  # and of what that was fine-tuned from


class Ground:
    """One seed: the start `world:NAME@SEED`, its rows, and models trained from it.

    Seeds share nothing but the world's facts: each has its own documents, demonstrations, start and labellers.
    """

    def __init__(
        self, folder: epath.Path, seed: int, *, start: str = "tiny", cache: str = "~/.cache/rlhf_jax",
        samplers: dict[Any, Sampler] | None = None,
    ):  # fmt: skip
        """Args:
        folder: of the seed; made if it isn't there.
        start: a recipe of rlhf_jax/world_recipes.py; the start is made if the cache doesn't hold it.
        samplers: those of other seeds, so that nothing compiles twice; filled.
        Errors: UserError as `worlds.folder`.
        """
        self.folder, self.seed, self.start, self.cache = epath.Path(folder), seed, f"{start}@{seed}", cache
        self.folder.mkdir(parents=True, exist_ok=True)
        self._samplers = {} if samplers is None else samplers
        self._subjects: dict[str, Subject] = {}
        worlds.folder(self.start, cache, run.train)

    # Rows

    def rows(self, part: str) -> list[Row]:
        """Rows of the start, such as `answers` or `prompts_held_out` (worlds.FILES)."""
        return worlds.read(worlds.file(f"world:{self.start}/{part}", self.cache))

    def prompts(self, part: str = "prompts_held_out", most: int | None = None) -> list[str]:
        """The prompts of such a file, each once, in its order."""
        return list(dict.fromkeys(row["prompt"] for row in self.rows(part)))[:most]

    def path(self, part: str) -> str:
        """The file of such rows."""
        return os.fspath(worlds.file(f"world:{self.start}/{part}", self.cache))

    def write(self, name: str, rows: Sequence[Row]) -> str:
        """Rows of the study's own; the path of their file. Raises ValueError for none."""
        if not rows:
            raise ValueError(f"there are no rows {name!r} to write")
        worlds.write(file := self.folder / f"{name}.jsonl", rows)
        return os.fspath(file)

    def people(self, count: int = 5, **knobs: Any) -> list[labellers.Labeller]:
        """Simulated people of this seed with the same tastes (the fields of Labeller)."""
        return labellers.panel(count, self.seed, **knobs)

    def pairs(self, people: Sequence[labellers.Labeller], part: str = "answers", labels: int = 1) -> list[Row]:
        """The start's own pairs of answers, labelled anew by these people, `labels` of them a pair."""
        rows = self.rows(part)
        asked, a, b = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
        return labellers.label_pairs(asked, a, b, people, labels, self.seed)

    # Training

    def model(self, name: str = START) -> str:
        """The folder of a model: the start's, that before fine-tuning, or that of what was trained under a name."""
        given = {START: worlds.folder, PRETRAINED: worlds.pretrained}
        return os.fspath(given[name](self.start, self.cache) / "model" if name in given else self.folder / name)

    def exported(self, name: str) -> str:
        """A trained model as a folder that others can be trained from, as `model.path`."""
        return os.fspath(worlds.export(self.model(name), self.folder / f"{name}-exported"))

    def config(self, **sections: Any) -> Config:
        """A quiet run of this seed from the start that evaluates nothing and keeps its last step."""
        base = Config(
            seed=self.seed, cache=self.cache, model=ModelConfig(path=self.model()), evaluate=Evaluate(every=0),
            checkpoint=CheckpointConfig(every=0, keep_last=1), log=QUIET,
        )  # fmt: skip
        return dataclasses.replace(base, **sections)

    def trained(self, name: str, config: Config, changes: Changes = NONE) -> str:
        """Trains under a name as a config with changes says; the run's folder."""
        with contextlib.redirect_stdout(io.StringIO()):
            run.train(fields.replace(config, dict(changes)), self.model(name), resume=True)
        return self.model(name)

    def sft(self, name: str, rows: str, steps: int = 60, changes: Changes = NONE) -> Subject:
        """Fine-tunes the start on demonstrations, the file `rows`."""
        config = self.config(
            algorithm="sft", loss=Loss(name="nll"), data=Data(path=(rows,), eval_share=0.0, **worlds.LENGTH),
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup=10),
            train=Train(steps=steps, batch_size=32),
        )  # fmt: skip
        self.trained(name, config, changes)
        return self.subject(name)

    def preference(self, name: str, rows: str, steps: int = 60, changes: Changes = NONE) -> Subject:
        """A preference method (DPO unless changed) on pairs, the file `rows`, in updates of about 16 pairs."""
        tuning = worlds.recipe_of(self.start).preference
        config = self.config(
            algorithm="preference", loss=Loss(name="dpo"),
            data=Data(path=(rows,), eval_share=0.0, length=tuning.length, pack=True),
            optimizer=OptimizerConfig(learning_rate=tuning.rate, schedule="cosine", warmup=10),
            train=Train(steps=steps, batch_size=tuning.batch_size),
        )  # fmt: skip
        self.trained(name, config, changes)
        return self.subject(name)

    def reward(self, name: str, rows: str, steps: int = 80, members: int = 1, changes: Changes = NONE) -> Rewards:
        """A reward model from pairs, the file `rows`, in updates of 32 pairs; several on bootstrapped rows.

        The held-out demonstrations have the mean score 0, so that scores of several mean the same.
        """
        demonstrations = self.write("demonstrations_held_out", self.rows("demonstrations_held_out")[:DEMONSTRATIONS])
        config = self.config(
            algorithm="reward", loss=Loss(name="bradley_terry"),
            data=Data(path=(rows,), eval_share=0.0, bootstrap=members > 1, **worlds.LENGTH),
            reward=RewardConfig(head="normal", members=members, demonstrations=(demonstrations,)),
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup=10),
            train=Train(steps=steps, batch_size=32),
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            changed = fields.replace(config, dict(changes))
            (sweep.train_ensemble if members > 1 else run.train)(changed, self.model(name), resume=True)
        return self.rewards(name)

    def ppo(self, name: str, reward: str | None, steps: int = 80, changes: Changes = NONE) -> Subject:
        """PPO from the start against a trained reward model, or, with None, what the changes name.

        Rollouts of 64 answers to the training prompts, four updates each, at a KL price of 0.05 nats; the gold reward
        is looked at beside and doesn't count.
        """
        config = self.config(
            algorithm="ppo", loss=Loss(name="ppo"), ppo=PpoConfig(kl=0.05),
            data=Data(path=(self.path("prompts"),), eval_share=0.0),
            rollout=RolloutConfig(max_new_tokens=24, temperature=1.0, epochs=4),
            optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear", eps=1e-5),
            train=Train(steps=steps, batch_size=64),
        )  # fmt: skip
        scored = {"rewards.functions": ("gold",), "rewards.weights": (0.0,)}
        if reward is not None:
            scored |= {"rewards.model": self.model(reward)}
        self.trained(name, config, scored | dict(changes))
        return self.subject(name)

    def trace(self, name: str, metrics: Sequence[str], every: int) -> dict[str, list[float]]:
        """Metrics of a run's rollouts, the mean over the `every` updates of each."""
        lines = (epath.Path(self.model(name)) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        mean = lambda metric, at: float(np.mean([row[metric] for row in rows[at : at + every]]))
        return {metric: [mean(metric, at) for at in range(0, len(rows), every)] for metric in metrics}

    # Measuring

    def subject(self, name: str = START) -> Subject:
        """A model that writes, by the name under which it was trained; opened once."""
        if name not in self._subjects:
            policy = open_policy(self.model(name))
            self._subjects[name] = Subject(name, policy.model, policy.params, policy.tokenizer, policy.end_ids)
        return self._subjects[name]

    def rewards(self, name: str) -> Rewards:
        """A trained reward model, or ensemble, by its name."""
        opened = open_rewards(self.model(name))
        return Rewards(name, [Subject(name, one.model, one.params, one.tokenizer) for one in opened])

    def answers(
        self, subject: Subject, prompts: Sequence[str], samples: int = 4, seed: int = 7, temperature: float = 1.0
    ) -> Answers:
        """Answers to each prompt; at the temperature 0 each is the likeliest token by token, and one is enough."""
        if (key := (subject.model, samples)) not in self._samplers:
            self._samplers[key] = Sampler(subject.model, samples=samples)
        sampling = dataclasses.replace(worlds.SAMPLING, temperature=temperature)
        return answer(subject, Encoder(subject.tokenizer), self._samplers[key], prompts, sampling, seed)

    def kl(self, subject: Subject, answers: Answers, base: Subject | None = None) -> float:
        """The KL of a model from another, the start unless one is given, nats an answer, from its own answers.

        Unbiased, and below 0 by chance.
        """
        own, other = (np.asarray(logprobs(one, answers, 1.0)) for one in (subject, base or self.subject()))
        return float(np.mean(own - other))

    def scores(self, rewards: Rewards, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> np.ndarray:
        """[members, prompts, samples] scores; an empty answer, which can't be scored, counts as a full stop."""
        flat = [(prompt, text.strip() or ".") for prompt, row in zip(prompts, texts, strict=True) for text in row]
        told = rewards.scores([row.ids for row in rewards.encode(*zip(*flat, strict=True))])
        return told.reshape(len(told), len(prompts), -1)


def gold(prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """[prompts, samples] gold rewards, from -3 to 3 (docs/world.md)."""
    return np.asarray([[world.judge(p, text).total for text in row] for p, row in zip(prompts, texts, strict=True)])


def words(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """[prompts, samples] lengths in words."""
    return np.asarray([[float(world.length(text)) for text in row] for row in texts])


def agrees(prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """[prompts, samples] 1 where a wrong opinion of the user's is repeated, 0 where not, nan where there is none."""
    told = [[world.agrees(p, text) for text in row] for p, row in zip(prompts, texts, strict=True)]
    return np.asarray([[math.nan if one is None else float(one) for one in row] for row in told])


def accuracy(rewards: Rewards, pairs: Sequence[Row]) -> np.ndarray:
    """[members] shares of pairs, of different gold, of which the member scores the better answer higher; ties a half.

    Args: pairs: rows with chosen, rejected and gold_margin, as `Ground.pairs` has them.
    """
    held = [row for row in pairs if row["gold_margin"]]
    prompts = [row["prompt"] for row in held for _ in range(2)]
    texts = [row[name].strip() or "." for row in held for name in ("chosen", "rejected")]
    told = rewards.scores([row.ids for row in rewards.encode(prompts, texts)])
    by = (told[:, ::2] - told[:, 1::2]) * np.sign([row["gold_margin"] for row in held])
    return ((by > 0) + 0.5 * (by == 0)).mean(axis=1)
