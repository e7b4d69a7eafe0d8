"""An experiment from its config: everything that can be refused is refused here, before anything is compiled."""

import dataclasses
import math
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from etils import epath
from jax.sharding import Mesh

from rlhf_jax import fields, metrics, objective, registry, sharding
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.optimizers import OPTIMIZERS, make_schedule
from rlhf_jax.algorithms.parts import Part
from rlhf_jax.algorithms.step import Batch, Objective, Optimizer, Reads
from rlhf_jax.config import Config
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.loader import Loader, once
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint, lora, start
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.layout import Layout

T = TypeVar("T")


class Memory:
    """What several experiments of one program read alike, such as rows: made once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when this key was first asked for."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


class Built(NamedTuple):
    """An experiment that was checked and is ready to compile."""

    config: Config
    workdir: epath.Path
    mesh: Mesh
    model: Model
    start: start.Start  # the folders of the initial checkpoint
    tokenizer: Any
    data: dataset.Dataset
    held_out: tuple[dataset.Example, ...]
    demonstrations: tuple[dataset.Example, ...]  # whose mean score a checkpoint moves to 0
    loader: Loader
    parts: tuple[Part, ...]  # the losses
    reads: Reads  # what they ask of the data
    optimizer: Optimizer
    hyper: dict[str, Any]
    steps: int

    @property
    def moves(self) -> bool:
        """Whether the reference moves."""
        return self.config.preference.sync_every is not None

    # What the algorithm makes of this experiment.

    def _of_algorithm(self, what: str, *more: Any) -> Any:
        return getattr(ALGORITHMS[self.config.algorithm], what)(*more)

    @property
    def _section(self) -> Any:
        """The algorithm's own part of the config."""
        return getattr(self.config, self.config.algorithm, None)

    @property
    def objective(self) -> Objective:
        """What is differentiated."""
        return self._of_algorithm("make_objective", self.model, self.parts, self._section)

    @property
    def judge(self) -> Callable[..., Any]:
        """The objective, and what is said of single rows."""
        return self._of_algorithm("make_judge", self.model, self.parts, self._section)

    def prepare(self, reference: Any, compiled: Callable[..., Any]) -> Callable[..., Iterator[Batch]]:
        """Batches from rows."""
        return self._of_algorithm("make_prepare", self.model, self.parts, self._section, reference, compiled)

    def carry(self, params: Any) -> Any:
        """The algorithm's own state at the start."""
        return self._of_algorithm("make_carry", self.parts, self._section, params)

    @property
    def advance(self) -> Callable[..., Any] | None:
        """How that state moves; None if there is none."""
        return self._of_algorithm("make_advance", self.parts, self._section)

    @property
    def fresh_head(self) -> bool:
        """Whether the score head is a new one, which no checkpoint has."""
        return self.model.shape.head == "score" and not (
            self.config.model.init == "checkpoint" and start.scores(self.start)
        )

    def rows_once(self, examples: Sequence[dataset.Example], mismatched: bool = False) -> Iterator[Batch]:
        """Every example once, in batches of the training size, this process's rows."""
        size = self.config.train.batch_size
        return once(
            examples, batch_size=size, length=self.loader.length, buckets=self.config.data.buckets,
            mismatched=mismatched, pack=self.config.data.pack, rows=sharding.local_rows(self.mesh, size),
        )  # fmt: skip


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
            "preference.sync_every", "reward.members",
        ),
    ),
    "at least 0": (
        lambda x: x >= 0,
        (
            "checkpoint.every", "checkpoint.keep_best", "evaluate.every", "evaluate.rows", "evaluate.patience",
            "data.threads", "train.balance", "optimizer.warmup", "optimizer.learning_rate", "optimizer.weight_decay",
            "loss.weights", "loss.desirable_weight", "loss.undesirable_weight", "loss.z_loss", "loss.centre",
        ),
    ),
    "above 0": (lambda x: x > 0, ("loss.beta", "optimizer.clip_norm")),
    "above 0 and at most 1": (
        lambda x: 0 < x <= 1,
        ("optimizer.decay", "preference.sync_mix"),
    ),
    "above 0 and below 1": (lambda x: 0 < x < 1, ("loss.tau",)),
    "from 0 to 1": (lambda x: 0 <= x <= 1, ("preference.length_alpha", "loss.neutral")),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, ("optimizer.b1", "optimizer.b2", "optimizer.momentum")),
    "at least 0 and below 0.5": (lambda x: 0 <= x < 0.5, ("loss.label_smoothing",)),
    "from 0 to 4294967295": (lambda x: 0 <= x < 2**32, ("seed",)),
}  # fmt: skip


def _check_values(config: Config) -> None:
    """Errors: UserError naming the first field whose value means nothing, and what is allowed."""
    finite = "finite", math.isfinite
    rules = {name: (says, test) for says, (test, names) in ALLOWED.items() for name in names}
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


def _check_batch(config: Config, shards: int) -> None:
    train = config.train
    if config.data.pack and config.data.buckets:
        raise UserError(
            f"--config.data.buckets={fields.text(config.data.buckets)} would be ignored: packed rows have one length, "
            "data.length; drop it or --config.data.pack."
        )
    if train.batch_size % (shards * train.microbatches):
        raise UserError(
            f"train.batch_size={train.batch_size} does not divide into {train.microbatches} microbatches over "
            f"{shards} row shards (mesh data x fsdp x expert); make it a multiple of {shards * train.microbatches}."
        )


def _balance(config: Config, model: Model) -> dict[str, float]:
    """The weight of the experts' load-balancing term, as a hyper-parameter; none for a model without experts."""
    wanted, experts = config.train.balance, model.shape.experts
    if experts is not None:
        return {"balance": experts.balance if wanted is None else wanted}
    if wanted is not None:
        raise UserError(
            f"--config.train.balance={wanted} is of mixtures of experts and this model has none; drop the flag."
        )
    return {}


def tokenizer_folder(found: start.Start, other: str | None = None) -> epath.Path:
    """Where the tokenizer is: in `other` if given, else with the adapter if it has one of its own, or the model."""
    if other:
        return checkpoint.folder(other, "--config.model.tokenizer")
    return found.with_file("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(folder: epath.Path) -> Any:
    """The tokenizer of a model folder. Errors: UserError where there is none."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(folder))
    except Exception as error:  # a broken tokenizer.json raises whatever its reader stumbled over
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(
            f"{folder} holds no tokenizer that transformers can read ({reason}); "
            "give one with --config.model.tokenizer=FOLDER."
        ) from error


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
    make_optimizer, rates = _optimizer(config)
    if config.model.path is None:
        raise UserError("no model to train; give --config.model.path=FOLDER_OR_HUB_NAME.")
    mesh = sharding.make_mesh(config.mesh)
    if config.model.attention == "splash" and mesh.devices.flat[0].platform != "tpu":
        raise UserError("--config.model.attention=splash runs on TPUs alone; choose auto, dense or blocked.")
    _check_batch(config, Layout(mesh).shards)
    return Checked(chosen, make_optimizer, rates, mesh)


def build(config: Config, workdir: epath.Path, memory: Memory | None = None) -> Built:
    """Reads and checks everything that a run needs, and compiles nothing.

    Args:
      memory: what other experiments of the program have read already.
    Errors: UserError for whatever the user can mend.
    """
    memory = memory or Memory()
    chosen, make_optimizer, rates, mesh = check(config)
    found, model = memory.get(
        ("model", config.algorithm, config.model, config.lora, config.mesh), lambda: _model(config, mesh)
    )
    length = model.shape.length if config.data.length is None else config.data.length
    if length > model.shape.length:
        raise UserError(
            f"data.length={length} is more than the model's context of {model.shape.length} tokens; lower it."
        )
    tokenizer, encoder = memory.get(("encoder", config.model, config.data), lambda: _encoder(config, found))
    form = cast(Any, chosen.reads.form)
    rows = memory.get(
        ("rows", config.model, config.data, form), lambda: dataset.read(config.data, encoder, form, length)
    )
    split_seed = config.seed if config.data.split_seed is None else config.data.split_seed
    which = config.model, config.data, form, split_seed
    data = memory.get(("split", *which), lambda: dataset.split(rows, config.data, split_seed))
    _check_data(data, model, chosen)
    if config.reward.head != "zero" and config.model.init == "checkpoint" and start.scores(found):
        raise UserError(
            f"--config.reward.head={config.reward.head} would be ignored: {found.base} has a score head already; "
            "drop it."
        )
    held_out = _held_out(config, data, chosen.reads)
    demonstrations = _demonstrations(config, encoder, length)
    size, mismatched = config.train.batch_size, chosen.reads.mismatched
    loader = memory.get(
        ("loader", *which, config.seed, size, mismatched), lambda: _loader(config, data, form, length, mismatched)
    )
    steps = config.train.steps or -(-len(loader.rows) // config.train.batch_size)
    hyper = {**chosen.hyper, "optimizer": rates, **_balance(config, model)}
    return Built(
        config, workdir, mesh, model, found, tokenizer, data, held_out, demonstrations, loader, chosen.parts,
        chosen.reads, make_optimizer(steps), hyper, steps,
    )  # fmt: skip


DEMONSTRATIONS = 256  # the first of them are enough for a mean


def _demonstrations(config: Config, encoder: Encoder, length: int) -> tuple[dataset.Example, ...]:
    """What the scores of a reward model are measured from."""
    paths = config.reward.demonstrations
    if not paths:
        return ()
    data = dataclasses.replace(Data(), path=paths, chat_template=config.data.chat_template, special=config.data.special)
    read = dataset.read(data, encoder, "demonstration", length)
    return dataset.split(read, dataclasses.replace(data, eval_share=0.0), 0).train[:DEMONSTRATIONS]


def _loader(config: Config, data: dataset.Dataset, form: str, length: int, mismatched: bool) -> Loader:
    examples = dataset.unpaired(data.train) if form == "labelled" else data.train
    if config.data.bootstrap:
        examples = dataset.bootstrap(examples, config.seed)
    return Loader(
        examples, batch_size=config.train.batch_size, seed=config.seed, length=length,
        buckets=config.data.buckets, weights=config.data.weights,
        mismatched=mismatched, pack=config.data.pack,
    )  # fmt: skip


def _model(config: Config, mesh: Mesh) -> tuple[start.Start, Model]:
    """Where the model lies, and the model with its adapter, checked against the weights and the mesh."""
    found = start.find(str(config.model.path))
    head = ALGORITHMS[config.algorithm].HEAD
    plain = start.describe(found, config.model.numerics(), Layout(mesh), head)
    if config.model.init == "checkpoint":
        start.check(found, plain)
    model = lora.attach(config.lora, plain)
    if model.adapter is not None and config.model.init == "random":
        raise UserError(
            "--config.lora.rank adapts the weights of a checkpoint, and --config.model.init=random has none; drop one."
        )
    sharding.check_divides(model, mesh)
    return found, model


def _encoder(config: Config, found: start.Start) -> tuple[Any, Encoder]:
    """The tokenizer, and how it is used."""
    tokenizer, data = load_tokenizer(tokenizer_folder(found, config.model.tokenizer)), config.data
    return tokenizer, Encoder(tokenizer, data.chat_template, train_on=data.train_on, special=data.special)


def _check_data(data: dataset.Dataset, model: Model, chosen: objective.Chosen) -> None:
    examples = (*data.train, *data.evaluation)
    largest = max(int(c.ids.max()) for e in examples for c in e.completions)
    if largest >= model.shape.vocab:
        raise UserError(
            f"the tokenizer gives token {largest}, but the model's vocabulary ends at {model.shape.vocab - 1}; "
            "check --config.model.tokenizer."
        )
    for part in chosen.parts:
        _, allowed = objective.LIMITS.get((part.name, "label_smoothing"), ("", lambda _: True))
        # As the column of a batch is: a chance of 1 - 1e-9 is 1 there.
        sure = next((e.where for e in examples if not allowed(float(1 - np.float32(e.probability)))), None)
        if "label_smoothing" in part.by_row and sure is not None:
            raise UserError(
                f"{sure}: the loss {part.name!r} has no value for a label without doubt, which "
                "--config.data.probability gives; choose another --config.loss.name or mend the rows."
            )


def _held_out(config: Config, data: dataset.Dataset, reads: Reads) -> tuple[dataset.Example, ...]:
    """The held-out rows that are used."""
    held_out = data.evaluation[: config.evaluate.rows]
    if config.evaluate.patience and not held_out:
        raise UserError(
            "--config.evaluate.patience needs held-out rows and there are none; give --config.data.eval_path, or raise "
            "--config.data.eval_share or --config.evaluate.rows."
        )
    # Held-out pairs stay pairs for a loss of single answers, so that its accuracy means the same.
    if reads.form == "labelled" and len({len(example.completions) for example in held_out}) > 1:
        held_out = dataset.unpaired(held_out)
    if reads.mismatched and len({example.prompt for example in held_out}) == 1:
        raise UserError(
            "the held-out rows have one prompt, but this loss puts each answer behind another's prompt; "
            "raise --config.data.eval_share or give --config.data.eval_path."
        )
    return held_out
