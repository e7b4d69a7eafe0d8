"""What learning from rollouts needs around it: the sampler, the rewards, what the value begins as, text beside."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import registry, sharding
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.rollouts import Around, Models, RolloutConfig, place
from rlhf_jax.algorithms.step import INIT, Batch
from rlhf_jax.config import Config
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.steps import step_pattern
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.evaluate.step_labels import VERIFIERS
from rlhf_jax.feedback.rewards import RewardsConfig
from rlhf_jax.models import start
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.mixture import Drawable, Mixture
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.scoring import STEP_FLAG, Score, functions_of
from rlhf_jax.teacher import Teacher, open_teacher
from rlhf_jax.workdir import Policy, end_ids, of_steps, open_policy

VALUE = INIT + 1000  # purpose of a value's random weights, where the policy's are random too
REWARD_FLAG = "--config.rewards.model"


class Open(NamedTuple):
    """Gives what is opened once for all experiments of a program."""

    rewards: Callable[[str, str], Sequence[Policy]]  # of a path and its flag: a reward model, or an ensemble's members
    teacher: Callable[[Callable[[], Teacher]], Teacher]  # what the argument made when it was first asked


class Start(NamedTuple):
    """What a start is made from: all of it is checked and read before anything is compiled."""

    found: start.Start
    model: Model  # the policy
    tokenizer: Any
    encoder: Encoder
    mesh: Mesh
    examples: Sequence[dataset.Example]  # of prompts, those that are trained and those that are held out
    length: int  # most tokens of a prompt with its completion


class Value(NamedTuple):
    """The value's parameters as training starts from them."""

    shapes: Any
    make: Callable[[], Any]  # in buffers of their own


class Online(NamedTuple):
    """The surroundings of an experiment that learns from rollouts."""

    models: Models
    value: Value | None  # None for a method without one
    draw: "Draw"
    mixed: "Draw"
    score: Score
    pretrain: Loader | None
    rollout: RolloutConfig
    teacher: Teacher | None  # None for a method without one
    pieces: int  # that a rollout is read in
    scored_by: Callable[[], str] | None  # the identity of the reward model; None without one

    def describe(self, prompts: int) -> str:
        """A rollout in a line."""
        rollout, score = self.rollout, self.score
        of = (
            f"{rollout.samples} completions of each of {prompts} prompts"
            if rollout.samples > 1
            else f"{prompts} prompts"
        )
        by = f", scored by {', '.join(score.names)}" if score.names else ""
        by += "" if self.teacher is None else f", taught by {self.teacher.name}"
        return f"{of}, at most {rollout.max_new_tokens} tokens a completion{by}; {rollout.updates} updates each"

    def around(self, mesh: Mesh, held_out: bool = False) -> Around:
        """As `make_prepare` takes it."""
        return Around(self.draw, self.score, self.rollout, self._pretrain(mesh), held_out, self.pieces, self.mixed)

    def _pretrain(self, mesh: Mesh) -> Callable[[int], Batch] | None:
        loader = self.pretrain
        if loader is None:
            return None
        mine = sharding.local_rows(mesh, loader.batch_size)
        names = ("tokens", "mask", "segments", "positions", "weight")

        def batch(number: int) -> Batch:
            rows = loader.batch(number, mine)
            return sharding.place_rows({name: rows[name] for name in names}, mesh)

        return batch


def surround(config: Config, begun: Start, opened: Open) -> Online:
    """Opens reward models, a teacher and whatever the value begins as.

    Errors: UserError for whatever the user can mend.
    """
    rewards, rollout = config.rewards, config.rollout
    pieces = rollout.minibatches * config.train.microbatches
    teacher = _teacher(config, begun, opened)
    model = _reward_model(rewards, opened) if rewards.model is not None else None
    value_model, value = _value(config, begun, model, opened)
    score = Score(
        begun.encoder, begun.tokenizer, begun.examples, rewards, model, length=begun.length, pieces=pieces
    )  # fmt: skip
    named = lambda: "\n".join(one.identify() for one in opened.rewards(str(rewards.model), REWARD_FLAG))
    mixture = Mixture(begun.model, begun.model.without_adapter())
    return Online(
        Models(begun.model, value_model, None if teacher is None else teacher.model), value,
        Draw(begun, rollout, begun.model), Draw(begun, rollout, mixture), score,
        _pretrain(config, begun), rollout, teacher, pieces, None if model is None else named,
    )  # fmt: skip


def check(config: Config) -> None:
    """All that can be checked before a file is read. Errors: UserError."""
    rewards, rollout = config.rewards, config.rollout
    algorithm = ALGORITHMS[config.algorithm]
    algorithm.check(getattr(config, config.algorithm), rollout)
    if getattr(algorithm, "SCORED", True) and not (rewards.model or rewards.verifier or rewards.functions):
        raise UserError(
            "nothing says what a completion is worth; give --config.rewards.model=FOLDER, "
            "--config.rewards.functions=NAME, or both, or --config.rewards.verifier=NAME."
        )
    judges = rewards.model or rewards.verifier
    if rewards.model is not None and rewards.verifier is not None:
        raise UserError("--config.rewards.verifier takes the place of --config.rewards.model; drop one of them.")
    ignored = [
        ("weights", bool(rewards.weights), rewards.functions, "functions"),
        ("model_weight", rewards.model_weight != RewardsConfig.model_weight, judges, "model"),
        ("how", rewards.how != RewardsConfig.how, rewards.model, "model"),
        ("step_end", rewards.step_end is not None, judges, "model"),
        ("verifier", rewards.verifier is not None, rewards.step_end, "step_end"),
        ("step_score", rewards.step_score != RewardsConfig.step_score, rewards.step_end, "step_end"),
        ("step_score", rewards.step_score != RewardsConfig.step_score, rewards.model, "model"),
        ("deadline", rewards.deadline != RewardsConfig.deadline, rewards.functions, "functions"),
        ("lam", rewards.lam != RewardsConfig.lam, rewards.how == "mean_less_variance", "how=mean_less_variance"),
    ]
    for name, given, reader, what in ignored:
        if given and not reader:
            raise UserError(f"--config.rewards.{name} would be ignored without --config.rewards.{what}; drop it.")
    if rewards.functions:
        functions_of(rewards)
    if rewards.step_end is not None:
        step_pattern(rewards.step_end, STEP_FLAG)
        registry.resolve(VERIFIERS, rewards.verifier or next(iter(VERIFIERS)), "verifier")
    elif config.algorithm == "ppo" and config.ppo.credit != type(config.ppo).credit:
        raise UserError(f"--config.ppo.credit would be ignored without {STEP_FLAG}; drop it.")
    completions = config.train.batch_size * rollout.minibatches
    if completions % rollout.samples:
        raise UserError(
            f"a rollout has train.batch_size x rollout.minibatches = {completions} completions, which "
            f"--config.rollout.samples={rollout.samples} of each prompt don't divide; change one of them."
        )
    if config.data.pack:
        raise UserError("--config.data.pack packs rows that are written, and rollouts have prompts; drop it.")


# ---- rollouts


class Draw:
    """(the parameters of what is drawn from, rows of prompts, key) -> a batch of rollouts, see `rollouts.Around`."""

    def __init__(self, begun: Start, rollout: RolloutConfig, model: Drawable):
        self._mesh, self._samples = begun.mesh, rollout.samples
        self._sampler = Sampler(model, slots=rollout.slots, samples=rollout.samples)
        self._sampling = Sampling(rollout.temperature, max_new_tokens=rollout.max_new_tokens)
        self._stop_ids = begun.encoder.stop_ids(end_ids(begun.found))
        self._most = max(example.index for example in begun.examples) + 1

    def __call__(self, params: Any, rows: Batch, key: jax.Array) -> Batch:
        tokens, segments, index = (sharding.fetch(rows[name]) for name in ("tokens", "segments", "index"))
        real = np.flatnonzero(index >= 0)
        prompts = [tokens[i, 0][segments[i, 0] > 0] for i in real]
        drawn = self._sampler.generate(
            params, prompts, self._sampling, key, stop_ids=self._stop_ids, rows=self._numbers(index[real])
        )
        flat = [completion for one in drawn for completion in one]
        size, length = len(index) * self._samples, tokens.shape[-1] + self._sampling.max_new_tokens
        batch = place(prompts, flat, length, rows=size, index=index[real].tolist())
        mine = sharding.local_rows(self._mesh, size)
        return sharding.place_rows({name: column[mine] for name, column in batch.items()}, self._mesh)

    def _numbers(self, index: np.ndarray) -> list[int]:
        """What the randomness of each prompt comes from: its row, and how often the row stood here before."""
        before: Counter[int] = Counter()
        numbers = []
        for row in index.tolist():
            numbers.append(row + self._most * before[row])
            before[row] += 1
        return numbers


# ---- models


def _reward_model(config: RewardsConfig, opened: Open) -> Rewards:
    if of_steps(str(config.model), REWARD_FLAG) != (config.step_end is not None):
        says = f"{STEP_FLAG} cuts completions into steps, and {config.model} scores whole ones; drop it."
        if config.step_end is None:
            says = f"{config.model} scores steps; give {STEP_FLAG}=PATTERN, which matches the text that ends one."
        raise UserError(says)
    members = opened.rewards(str(config.model), REWARD_FLAG)
    if len(members) == 1 and config.how != "mean":
        raise UserError(
            f"--config.rewards.how={config.how} is of the members of an ensemble, and {config.model} holds one model; "
            "drop it."
        )
    subjects = [Subject("reward", one.model, one.params, one.tokenizer, one.end_ids) for one in members]
    return Rewards(f"the reward model {config.model}", subjects, how=config.how, lam=config.lam)


def _value(config: Config, begun: Start, reward: Rewards | None, opened: Open) -> tuple[Model | None, Value | None]:
    """The value model and its start; no model for a second head, nothing at all where there's none."""
    if config.algorithm != "ppo":
        return None, None
    mesh, section = begun.mesh, config.ppo
    if section.value == "head":
        shapes = {name: begun.model.with_head("score").shapes()[name] for name in ("score", "score_bias")}
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return None, Value(shapes, jax.jit(zeros, out_shardings=sharding.param_shardings(shapes, mesh)))
    # A model of steps says whether a step is right, which is no value: then the value begins as the policy.
    if section.value_path is not None or (reward is not None and config.rewards.step_end is None):
        first = _first(section.value_path, opened, reward)
        if Encoder(first.tokenizer).fingerprint != begun.encoder.fingerprint:
            raise UserError(
                "the value can't begin as a reward model with another tokenizer than the policy's; give another "
                "--config.ppo.value_path, or --config.ppo.value=head."
            )
        if first.model.shape.length < begun.length:
            raise UserError(
                f"rows may have {begun.length} tokens and the value's context is {first.model.shape.length}; "
                "lower --config.data.length or give --config.ppo.value=head."
            )
        # Trained as this run computes, whatever the reward model was computed with.
        model = dataclasses.replace(first.model, numerics=config.model.numerics())
        same = lambda x, shape: jnp.array(x, shape.dtype)  # a copy: the step donates it
        return model, Value(model.shapes(), lambda: jax.tree.map(same, first.params, model.shapes()))
    model = start.describe(begun.found, config.model.numerics(), Layout(mesh), "score")
    sharding.check_divides(model, mesh)
    if config.model.init == "checkpoint":
        read = lambda: start.load(begun.found, model, lambda path, _: sharding.param_sharding(mesh, path))
        return model, Value(model.shapes(), read)
    key, places = jax.random.fold_in(jax.random.key(config.seed), VALUE), sharding.param_shardings(model.shapes(), mesh)
    return model, Value(model.shapes(), lambda: jax.jit(model.init, out_shardings=places)(key))


def _first(path: str | None, opened: Open, reward: Rewards | None) -> Subject:
    """The model that the value begins as."""
    if path is None:
        assert reward is not None
        return reward.members[0]
    one = opened.rewards(path, "--config.ppo.value_path")[0]
    return Subject("value", one.model, one.params, one.tokenizer, one.end_ids)


def _teacher(config: Config, begun: Start, opened: Open) -> Teacher | None:
    if config.algorithm != "distill":
        return None
    read = lambda path, flag: open_policy(path, mesh=begun.mesh, flag=flag)
    teacher = str(config.distill.teacher)
    return opened.teacher(lambda: open_teacher(teacher, read, begun.model, begun.tokenizer, begun.length))


# ---- text beside


def _pretrain(config: Config, begun: Start) -> Loader | None:
    """Batches of text, as many rows as an update has."""
    paths = config.ppo.pretrain if config.algorithm == "ppo" else ()
    if not paths:
        return None
    data = Data(path=paths, eval_share=0.0, chat_template=config.data.chat_template, special=config.data.special)
    examples = dataset.load(data, begun.encoder, "demonstration", begun.length, 0).train
    longest = max(len(example.completions[0]) for example in examples)
    return Loader(
        examples, batch_size=config.train.batch_size, seed=config.seed, length=longest, buckets=(longest,)
    )  # fmt: skip
