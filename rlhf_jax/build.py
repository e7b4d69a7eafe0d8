"""An experiment from its config: everything that can be refused is refused here, before anything is compiled."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from etils import epath
from jax.sharding import Mesh

from rlhf_jax import objective, sharding, surround
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.parts import Part
from rlhf_jax.algorithms.rollouts import Models
from rlhf_jax.algorithms.step import Batch, Objective, Optimizer, Reads
from rlhf_jax.checks import check
from rlhf_jax.config import Config
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.loader import Loader, once
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora, start
from rlhf_jax.models.decoder import Model
from rlhf_jax.models.tokenizers import load_tokenizer, tokenizer_folder
from rlhf_jax.ops.layout import Layout
from rlhf_jax.workdir import open_rewards

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
    online: surround.Online | None  # what surrounds rollouts; None for what learns from rows

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
    def _models(self) -> Model | Models:
        return self.model if self.online is None else self.online.models

    @property
    def objective(self) -> Objective:
        """What is differentiated."""
        return self._of_algorithm("make_objective", self._models, self.parts, self._section)

    @property
    def judge(self) -> Callable[..., Any]:
        """The objective, and what is said of single rows."""
        return self._of_algorithm("make_judge", self._models, self.parts, self._section)

    def prepare(
        self, reference: Any, compiled: Callable[..., Any], held_out: bool = False
    ) -> Callable[..., Iterator[Batch]]:
        """Batches from rows, or from held-out rows."""
        around = () if self.online is None else (self.online.around(self.mesh, held_out),)
        return self._of_algorithm(
            "make_prepare", self._models, self.parts, self._section, reference, compiled, *around
        )  # fmt: skip

    def carry(self, params: Any, hyper: Any) -> Any:
        """The algorithm's own state at the start."""
        return self._of_algorithm("make_carry", self.parts, self._section, params, hyper)

    @property
    def advance(self) -> Callable[..., Any] | None:
        """How that state moves; None if there is none."""
        return self._of_algorithm("make_advance", self.parts, self._section)

    @property
    def skip(self) -> Callable[..., Any] | None:
        """Which steps are left out; None if none is."""
        return self._of_algorithm("make_skip", self.parts, self._section)

    @property
    def refers(self) -> bool:
        """Whether there is a fixed reference, beside a policy that learns from rollouts."""
        return self.online is not None and self._of_algorithm("refers", self._section)

    @property
    def batches(self) -> int:
        """Batches of rows that all steps take."""
        return -(-self.steps // _updates(self.config, self.reads))

    @property
    def fresh_head(self) -> bool:
        """Whether the score head is a new one, which no checkpoint has."""
        return self.model.shape.head == "score" and not (
            self.config.model.init == "checkpoint" and start.scores(self.start)
        )

    def rows_once(self, examples: Sequence[dataset.Example], mismatched: bool = False) -> Iterator[Batch]:
        """Every example once, in batches of the training size, this process's rows."""
        size = _rows(self.config, self.reads) // _rounds(self.config)
        return once(
            examples, batch_size=size, length=self.loader.length, buckets=self.config.data.buckets,
            mismatched=mismatched, pack=self.config.data.pack, rows=sharding.local_rows(self.mesh, size),
        )  # fmt: skip


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
    length, most = _lengths(config, model, chosen.reads)
    read, form = (config.algorithm, config.model, config.data), cast(Any, chosen.reads.form)
    tokenizer, encoder = memory.get(("encoder", *read), lambda: _encoder(config, found))
    rows = memory.get(("rows", *read, form, most), lambda: dataset.read(config.data, encoder, form, most))
    split_seed = config.seed if config.data.split_seed is None else config.data.split_seed
    which = *read, form, most, split_seed
    data = memory.get(("split", *which), lambda: dataset.split(rows, config.data, split_seed))
    _check_data(data, model, chosen)
    if config.reward.head != "zero" and config.model.init == "checkpoint" and start.scores(found):
        raise UserError(
            f"--config.reward.head={config.reward.head} would be ignored: {found.base} has a score head already; "
            "drop it."
        )
    held_out = _held_out(config, data, chosen.reads)
    demonstrations = _demonstrations(config, encoder, length)
    size, mismatched = _rows(config, chosen.reads), chosen.reads.mismatched
    loader = memory.get(
        ("loader", *which, config.seed, size, mismatched), lambda: _loader(config, data, chosen.reads, most, size)
    )
    steps = config.train.steps or -(-len(loader.rows) // size) * _updates(config, chosen.reads)
    hyper = {**chosen.hyper, "optimizer": rates, **_balance(config, model)}
    begun = surround.Start(found, model, tokenizer, encoder, mesh, (*data.train, *data.evaluation), length)
    opened = surround.Open(
        lambda path, flag: memory.get(("rewards", path, config.mesh), lambda: open_rewards(path, mesh=mesh, flag=flag)),
        lambda make: memory.get(("teacher", config.distill.teacher, config.model, config.mesh, length), make),
    )
    around = surround.surround(config, begun, opened) if form == "prompt" else None
    return Built(
        config, workdir, mesh, model, found, tokenizer, data, held_out, demonstrations, loader, chosen.parts,
        chosen.reads, make_optimizer(steps), hyper, steps, around,
    )  # fmt: skip


def _lengths(config: Config, model: Model, reads: Reads) -> tuple[int, int]:
    """Most tokens of a row, and of what is read of it: of a prompt, whose completion needs room."""
    length = model.shape.length if config.data.length is None else config.data.length
    if length > model.shape.length:
        raise UserError(
            f"data.length={length} is more than the model's context of {model.shape.length} tokens; lower it."
        )
    if reads.form != "prompt":
        return length, length
    new = config.rollout.max_new_tokens
    if new > length - 2:
        raise UserError(
            f"rollout.max_new_tokens={new} leaves no room for a prompt in rows of {length} tokens; lower it, or raise "
            "--config.data.length as far as the model's context allows."
        )
    return length, length - new


def _updates(config: Config, reads: Reads) -> int:
    """Updates that a batch of rows gives."""
    return config.rollout.updates if reads.form == "prompt" else 1


def _rows(config: Config, reads: Reads) -> int:
    """Rows of a batch, as the loader gives it."""
    if reads.form != "prompt":
        return config.train.batch_size
    return config.train.batch_size * config.rollout.minibatches // config.rollout.samples * _rounds(config)


def _rounds(config: Config) -> int:
    """As many times the prompts of a rollout are read for one, so that groups can be replaced."""
    return config.group.rounds


DEMONSTRATIONS = 256  # the first of them are enough for a mean


def _demonstrations(config: Config, encoder: Encoder, length: int) -> tuple[dataset.Example, ...]:
    """What the scores of a reward model are measured from."""
    paths = config.reward.demonstrations
    if not paths:
        return ()
    data = dataclasses.replace(Data(), path=paths, chat_template=config.data.chat_template, special=config.data.special)
    read = dataset.read(data, encoder, "demonstration", length)
    return dataset.split(read, dataclasses.replace(data, eval_share=0.0), 0).train[:DEMONSTRATIONS]


def _loader(config: Config, data: dataset.Dataset, reads: Reads, length: int, size: int) -> Loader:
    examples = dataset.unpaired(data.train) if reads.form == "labelled" else data.train
    if config.data.bootstrap:
        examples = dataset.bootstrap(examples, config.seed)
    if reads.form == "prompt":  # the longest there is, so that short prompts get short rows
        length = max(len(example.completions[0]) for example in (*data.train, *data.evaluation))
    return Loader(
        examples, batch_size=size, seed=config.seed, length=length, buckets=config.data.buckets,
        weights=config.data.weights, mismatched=reads.mismatched, pack=config.data.pack,
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
    writes = ALGORITHMS[config.algorithm].HEAD == "words"
    return tokenizer, Encoder(
        tokenizer, data.chat_template, train_on=data.train_on, special=data.special, trailing=writes
    )  # fmt: skip


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
