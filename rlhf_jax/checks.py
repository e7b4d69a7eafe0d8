"""What a config says by itself, checked before a file is read."""

import math
from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from rlhf_jax import fields, metrics, objective, registry, sharding, surround
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.optimizers import OPTIMIZERS, make_schedule
from rlhf_jax.algorithms.step import Optimizer
from rlhf_jax.config import Config
from rlhf_jax.errors import UserError
from rlhf_jax.ops.layout import Layout


def _optimizer(config: Config) -> tuple[Callable[[int], Optimizer], dict[str, float]]:
    """The optimiser for a number of steps, and its numbers."""
    section = config.optimizer
    make = registry.resolve(OPTIMIZERS, section.name, "optimizer")
    numbers = registry.arguments("optimizer", make, section)
    clip = float("inf") if section.clip_norm is None else section.clip_norm
    numbers |= {"learning_rate": section.learning_rate, "clip_norm": clip}
    if section.decay is not None and section.schedule != "wsd":
        raise UserError(
            f"schedule {section.schedule!r} would ignore decay; drop --config.optimizer.decay or choose "
            "--config.optimizer.schedule=wsd."
        )
    decay = 0.2 if section.decay is None else section.decay
    return lambda steps: Optimizer(make, make_schedule(section.schedule, steps, section.warmup, decay)), numbers


# What a number may be, and the fields that hold it to that. Every other number must be finite at least.
ALLOWED: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda x: x >= 1,
        (
            "train.batch_size", "train.microbatches", "train.steps", "checkpoint.keep_last", "model.chunk",
            "loss.cap", "preference.sync_every", "reward.members", "rollout.max_new_tokens", "rollout.samples",
            "rollout.epochs", "rollout.minibatches", "rollout.slots",
        ),
    ),
    "at least 0": (
        lambda x: x >= 0,
        (
            "checkpoint.every", "checkpoint.keep_best", "evaluate.every", "evaluate.rows", "evaluate.patience",
            "data.threads", "train.balance", "optimizer.warmup", "optimizer.learning_rate", "optimizer.weight_decay",
            "loss.weights", "loss.desirable_weight", "loss.undesirable_weight", "loss.z_loss", "loss.centre",
            "loss.clip_low", "loss.clip_high", "ppo.kl", "ppo.value_weight", "ppo.pretrain_weight", "rewards.lam",
            "online.explore",
        ),
    ),
    "above 0": (
        lambda x: x > 0,
        (
            "loss.beta", "optimizer.clip_norm", "loss.length", "loss.temperature", "loss.temperature_negative",
            "rollout.temperature", "ppo.kl_target", "ppo.kl_horizon", "ppo.value_clip", "ppo.stop_kl",
            "rewards.deadline",
        ),
    ),
    "above 0 and at most 1": (
        lambda x: 0 < x <= 1,
        ("optimizer.decay", "preference.sync_mix"),
    ),
    "above 0 and below 1": (lambda x: 0 < x < 1, ("loss.tau",)),
    "from 0 to 1": (lambda x: 0 <= x <= 1, ("preference.length_alpha", "loss.neutral", "ppo.gamma", "ppo.lam")),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, ("optimizer.b1", "optimizer.b2", "optimizer.momentum")),
    "at least 0 and below 0.5": (lambda x: 0 <= x < 0.5, ("loss.label_smoothing",)),
    "from 0 to 4294967295": (lambda x: 0 <= x < 2**32, ("seed",)),
}  # fmt: skip
# What is allowed in the place of that, where a loss means something else by the field.
OF_LOSS: dict[tuple[str, str], tuple[str, Callable[[float], bool]]] = {
    ("jsd", "loss.beta"): ("from 0 to 1", lambda x: 0 <= x <= 1),
}


def _check_values(config: Config) -> None:
    """Errors: UserError naming the first field whose value means nothing, and what is allowed."""
    finite = "finite", math.isfinite
    rules = {name: (says, test) for says, (test, names) in ALLOWED.items() for name in names}
    rules |= {field: rule for (loss, field), rule in OF_LOSS.items() if loss == config.loss.name}
    for leaf in fields.leaves(config):
        several = leaf.value if isinstance(leaf.value, tuple) else (leaf.value,)
        numbers = [x for x in several if isinstance(x, int | float) and not isinstance(x, bool)]
        given = f"--config.{leaf.path}={fields.text(leaf.value)}"
        for says, test in (finite, rules.get(leaf.path, finite)):
            if not all(map(test, numbers)):
                raise UserError(f"{given} is not allowed; it must be {says}.")
        if "" in several:
            raise UserError(f"{given} is empty; give a value or drop the flag.")


def _check_patience(config: Config) -> None:
    if not config.evaluate.patience:
        return
    if not config.evaluate.every:
        raise UserError("--config.evaluate.patience counts evaluations, and --config.evaluate.every=0 makes none.")
    best = config.checkpoint
    if not best.keep_best or (best.best, best.best_mode) != ("eval/loss", "min"):
        raise UserError(
            "--config.evaluate.patience keeps the checkpoint with the lowest eval/loss; leave "
            "--config.checkpoint.keep_best at 1 or more, and best and best_mode as they are."
        )


def _check_batch(config: Config, form: str, shards: int) -> None:
    train = config.train
    if config.data.pack and config.data.buckets:
        raise UserError(
            f"--config.data.buckets={fields.text(config.data.buckets)} would be ignored: packed rows have one length, "
            "data.length; drop it or --config.data.pack."
        )
    each, told = 1, ""
    if form == "prompt" and ALGORITHMS[config.algorithm].ROW == "prompt":
        each = config.rollout.samples
        told = f" of rows that stand for rollout.samples={each} completions"
    if train.batch_size % (each * shards * train.microbatches):
        raise UserError(
            f"train.batch_size={train.batch_size} does not divide into {train.microbatches} microbatches{told} over "
            f"{shards} row shards (mesh data x fsdp x expert); make it a multiple of "
            f"{each * shards * train.microbatches}."
        )
    prompts = train.batch_size * config.rollout.minibatches // config.rollout.samples
    if form == "prompt" and prompts % shards:
        raise UserError(
            f"a rollout has train.batch_size x rollout.minibatches / rollout.samples = {prompts} prompts, which don't "
            f"divide over {shards} row shards (mesh data x fsdp x expert); raise --config.train.batch_size."
        )


class Checked(NamedTuple):
    """What a config says by itself."""

    chosen: objective.Chosen
    make_optimizer: Callable[[int], Optimizer]
    rates: dict[str, float]
    mesh: Mesh


def check(config: Config) -> Checked:
    """All that can be checked before a file is read.

    Errors: UserError for whatever the user can mend.
    """
    _check_values(config)
    _check_patience(config)
    if config.reward.members > 1:
        raise UserError(
            f"--config.reward.members={config.reward.members} is an ensemble, which python -m experiments.train trains "
            "(from Python: rlhf_jax.sweep.train_ensemble); leave it at 1 here."
        )
    metrics.check(config.log)
    chosen = objective.choose(config)
    if chosen.reads.form == "prompt":
        surround.check(config)
    make_optimizer, rates = _optimizer(config)
    if config.model.path is None:
        raise UserError("no model to train; give --config.model.path=FOLDER_OR_HUB_NAME.")
    mesh = sharding.make_mesh(config.mesh)
    if config.model.attention == "splash" and mesh.devices.flat[0].platform != "tpu":
        raise UserError("--config.model.attention=splash runs on TPUs alone; choose auto, dense or blocked.")
    _check_batch(config, chosen.reads.form, Layout(mesh).shards)
    return Checked(chosen, make_optimizer, rates, mesh)
