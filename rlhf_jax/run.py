"""One experiment: built, checked, then run.

`train` is all that `python -m experiments.train` does. Everything that can be refused is refused in `build`,
before anything is compiled.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import fields, sharding
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.step import Batch, TrainState, make_state, make_step
from rlhf_jax.build import Built, build
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.config import Config
from rlhf_jax.errors import UserError
from rlhf_jax.initial import base_params, new_adapter, reference_tables, state_shapes
from rlhf_jax.metrics import Log, wilson
from rlhf_jax.workdir import check_base, evaluations, last_line, open_workdir


def use_compile_cache() -> None:
    """Keeps compiled programs on disk, so that the next run of the same shapes starts at once."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/rlhf_jax/xla"))


class Result(NamedTuple):
    """What a finished run leaves: its state, and the last lines of metrics.jsonl and eval.jsonl."""

    state: TrainState | None  # None if the run was finished already
    metrics: dict[str, float]
    evaluation: dict[str, float]


def train(config: Config, workdir: str, resume: bool = False) -> Result:
    """Trains as `config` says and leaves everything in `workdir`.

    Writes config.json, rows.jsonl (rows refused, cut or left out), metrics.jsonl (one line a step, the
    figures before that step's update), eval.jsonl, tensorboard/ and checkpoints/.

    Args:
      resume: continue from the newest whole checkpoint of the folder; start if there is none; return at once
        if the run is finished.
    Errors: UserError, before anything is compiled, for whatever the user can mend.
    """
    if not workdir:
        raise UserError("--workdir is empty; give the folder that the run writes to.")
    place = epath.Path(os.path.expanduser(workdir))
    step = open_workdir(place, config, resume)
    if step is not None and config.train.steps is not None and step >= config.train.steps:
        return _finished(place, step)
    if step is not None and patience(place, config, step).ended:
        return _finished(place, step, "its patience ran out; a higher --config.evaluate.patience goes on")
    built = build(config, place)
    if step is not None and step >= built.steps:
        return _finished(place, step)
    if jax.process_index() == 0:
        part = place / "config.json.part"  # so that a kill leaves the whole file or none
        part.write_text(json.dumps(fields.to_dict(config), indent=2) + "\n")
        part.replace(place / "config.json")
        built.data.report.write(os.fspath(place / "rows.jsonl"))
    if built.model.adapter is not None:
        check_base(place, built.start, write=jax.process_index() == 0)
    announce(built)
    return Run(built, step).train()


def _finished(workdir: epath.Path, step: int, why: str = "there is nothing left to do") -> Result:
    print(f"finished: {workdir} holds step {step}, the last; {why}")
    return Result(None, last_line(workdir / "metrics.jsonl"), last_line(workdir / "eval.jsonl"))


def announce(built: Built) -> None:
    """What is about to run: rows, buckets, and the first row as the model sees it."""
    for line in built.data.report.lines():
        print(f"data: {line}")
    buckets = built.loader.buckets(0, built.steps)
    shown = ", ".join(f"{count} batches of {length} tokens" for length, count in buckets.items())
    print(f"buckets: {shown}; one compile each")
    shape = "x".join(str(size) for size in built.mesh.shape.values())
    print(f"mesh: {shape} ({' x '.join(built.mesh.shape)}) of {built.mesh.devices.flat[0].device_kind}")
    if built.loader.packed:
        print(f"packed: {built.loader.describe()}")
    first = built.loader.examples[built.loader.rows[built.loader.order(0)][0]]
    for number, tokens in enumerate(first.completions):
        trained = built.tokenizer.decode(tokens.ids[tokens.start :])
        print(
            f"first row, {first.where}, completion {number + 1}: {len(tokens)} tokens, "
            f"{int(tokens.mask.sum())} of them trained"
        )
        print(f"  prompt  | {built.tokenizer.decode(tokens.prompt)!r}")
        print(f"  trained | {trained!r}", flush=True)


class Patience:
    """Ends a run whose held-out loss has stopped falling."""

    def __init__(self, most: int):
        self.most, self.best, self.since = most, math.inf, 0  # evaluations since the best one

    def see(self, loss: float) -> None:
        """Takes the loss of the next evaluation."""
        lower = loss < self.best
        self.best, self.since = (loss, 0) if lower else (self.best, self.since + 1)

    @property
    def ended(self) -> bool:
        return 0 < self.most <= self.since


def patience(workdir: epath.Path, config: Config, step: int) -> Patience:
    """What the evaluations of a run, up to a step, left of its patience."""
    made = Patience(config.evaluate.patience)
    for row in evaluations(workdir):
        if row["step"] <= step:
            made.see(row["eval/loss"])
    return made


class Run:
    """The training loop of one built experiment."""

    def __init__(self, built: Built, step: int | None):
        """Args: step: the checkpoint to go on from; None starts anew."""
        self.built, config = built, built.config
        rows = sharding.row_sharding(built.mesh)
        shapes = state_shapes(built)
        places = jax.tree.map(lambda x: x.sharding, shapes)
        self.checkpoints = Checkpoints(built.workdir / "checkpoints", config.checkpoint)
        self.pending: list[Batch] = []
        self.position, self.tokens, self.evaluated = 0, 0, {}
        self.scored = None  # the step of the last evaluation that a checkpoint was saved with
        self.patience = patience(built.workdir, config, -1 if step is None else step)
        if step is not None:
            restored = self.checkpoints.restore(step, shapes, rows)
            state, self.pending = restored.state, restored.pending
            host = restored.host
            self.position, self.tokens, self.evaluated = host["position"], host["tokens"], host["evaluated"]
            self.scored = self.evaluated.get("step")
            if host["data"] != built.data.fingerprint:
                raise UserError(
                    f"the rows of {', '.join(config.data.path)} are not those that {built.workdir} was started with; "
                    "put them back or give another --workdir."
                )
        self._prepare_reference()
        algorithm = ALGORITHMS[config.algorithm]
        self.prepare = algorithm.make_prepare(built.model, built.takes, self.reference)
        self.frozen = None if built.model.adapter is None else self._base()
        if step is None:
            make = lambda params, key: make_state(params, built.hyper, built.optimizer, key)
            new = jax.jit(make, out_shardings=places, donate_argnums=0)
            trained = self._base() if built.model.adapter is None else new_adapter(built)
            state = new(trained, jax.random.PRNGKey(config.seed))
        self._params = None
        self.state: TrainState = state
        self._compile(places, rows)
        self.log = Log(
            built.workdir, config.log, start=step or 0, steps=built.steps, resolved=fields.to_dict(config),
            main=jax.process_index() == 0,
        )  # fmt: skip

    def _compile(self, places: TrainState, rows: NamedSharding) -> None:
        """The jitted step and the objective's sums; both compile when they are first called."""
        built, config = self.built, self.built.config
        everywhere = NamedSharding(built.mesh, PartitionSpec())
        one_step = make_step(
            built.objective, built.optimizer, microbatches=config.train.microbatches,
            reduce_dtype=config.train.reduce_dtype, layout=built.model.layout,
        )  # fmt: skip

        def advance(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Any]:
            state, metrics = one_step(dataclasses.replace(state, frozen=frozen), batch)
            return dataclasses.replace(state, frozen=None), metrics

        # What is frozen is an argument of its own: the state's buffers are donated and these are not.
        still = jax.tree.map(lambda x: x.sharding, self.frozen)
        self.step = jax.jit(
            advance, in_shardings=(places, still, rows), out_shardings=(places, everywhere), donate_argnums=0
        )
        self.sums = jax.jit(built.objective, out_shardings=everywhere)

    def _base(self) -> Any:
        """The weights that training starts from; read once, and not at all where nothing needs them."""
        self._params = base_params(self.built) if self._params is None else self._params
        return self._params

    def _prepare_reference(self) -> None:
        """What the objective needs of the reference: columns, and for single answers its live parameters."""
        self._params, self.reference, self.tables = None, None, None
        if self.built.reads.reference:
            self.tables = reference_tables(self.built, self._base, self.position)
        if self.built.reads.form == "labelled" and self.built.model.adapter is None:
            self.reference = self.built.model, base_params(self.built)  # the state's own buffers are donated

    @property
    def whole_state(self) -> TrainState:
        """The state with what is frozen."""
        return dataclasses.replace(self.state, frozen=self.frozen)

    def _place(self, rows: Batch, held_out: bool = False) -> Batch:
        if self.tables is not None:
            rows = rows | {"ref_logprob": self.tables[held_out][rows["index"]]}
        return sharding.place_rows(rows, self.built.mesh)

    def _feed(self) -> Iterator[tuple[int, Batch]]:
        """Global batches from the data position on, built ahead on the loader's threads."""
        config = self.built.config
        local = sharding.local_rows(self.built.mesh, config.train.batch_size)
        last = self.position + self.built.steps  # a batch of rows makes one batch or more
        for number, rows in self.built.loader.iterate(self.position, last, config.data.threads, local):
            yield number, self._place(rows)

    def train(self) -> Result:
        """Runs to the last step; returns the last figures. Whatever ends it, the checkpoint under way is finished."""
        try:
            return self._train()
        finally:
            self.checkpoints.close()
            self.log.close()

    def _train(self) -> Result:
        built, config = self.built, self.built.config
        feed, queue = self._feed(), iter(self.pending)
        step, last, row = int(self.state.step), None, {}
        if step == 0:
            self._evaluate(0)
        while step < built.steps and not self.patience.ended:
            batch = next(queue, None)
            if batch is None:
                number, rows = next(feed)
                self.position, queue = number + 1, self.prepare(self.whole_state, rows)
                continue
            self.state, metrics = self.step(self.state, self.frozen, batch)
            if last is not None:  # the device is busy with this step while the one before is written down
                row = self._write(step - 1, last)
            step, last = step + 1, metrics
            due = config.evaluate.every and step % config.evaluate.every == 0
            save = step == built.steps or (config.checkpoint.every and step % config.checkpoint.every == 0)
            if save or due or step == built.steps:
                row, last = self._write(step - 1, last), None
            if due or step == built.steps:
                self._evaluate(step)
                # What would be loaded as the best must be there, and a run that ends must leave its end.
                save = save or bool(config.evaluate.patience and (self.patience.since == 0 or self.patience.ended))
            if save:
                rest = list(queue)  # they no longer read the state, so they can be made now
                queue = iter(rest)
                host = {"position": self.position, "tokens": self.tokens, "evaluated": self.evaluated}
                host["data"] = built.data.fingerprint
                # An evaluation scores one checkpoint, the first after it: of equal scores the newest would be kept.
                at = self.evaluated.get("step")
                self.checkpoints.save(step, self.state, host, rest, {} if at == self.scored else self.evaluated)
                self.scored = at
        if self.patience.ended:
            print(f"stopped: eval/loss has not fallen below {self.patience.best:.4g} {self.patience.since} times")
        return Result(self.state, row, self.evaluated)

    def _write(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        values = jax.device_get(metrics)
        tokens = int(values.pop("tokens"))
        self.tokens += tokens
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        row["num_tokens"] = self.tokens
        self.log.step(row, tokens)
        return row

    def _evaluate(self, step: int) -> None:
        """The objective on the held-out rows: sums over all of them, divided once."""
        if not self.built.held_out:
            return
        key = jax.random.PRNGKey(self.built.config.seed)
        terms, means = [], []
        for rows in self.built.rows_once(self.built.held_out, mismatched=self.built.reads.form == "labelled"):
            for batch in self.prepare(self.whole_state, self._place(rows, held_out=True)):
                sums = self.sums(self.state.params, self.frozen, self.state.hyper, batch, key)
                term, mean = jax.device_get(sums)
                terms.append(term)
                means.append(mean)
        self.evaluated = {"step": step, **summarise(terms, means), "eval/rows": len(self.built.held_out)}
        self.patience.see(self.evaluated["eval/loss"])
        best = self.built.config.checkpoint
        if best.keep_best and best.best not in self.evaluated:
            raise UserError(
                f"--config.checkpoint.best={best.best} is not a metric of the evaluation; "
                f"choose one of {', '.join(name for name in self.evaluated if name != 'step')}."
            )
        self.log.evaluation(self.evaluated)
        told = ", ".join(f"{n.removeprefix('eval/')} {x:.4g}" for n, x in self.evaluated.items() if n != "step")
        print(f"held out, step {step}: {told}", flush=True)


def summarise(terms: list[dict[str, Any]], means: list[dict[str, Any]]) -> dict[str, float]:
    """Loss and metrics of many batches from their sums, in float64; shares get their 95% interval."""

    def add(sums: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray, float]:
        total, count = (np.sum([np.asarray(s[name][i], np.float64) for s in sums], axis=0) for i in (-2, -1))
        return total, count, float(np.sum(np.where(count > 0, total / np.where(count > 0, count, 1), 0)))

    loss = sum(float(terms[0][name].weight) * add(terms, name)[2] for name in terms[0])
    out = {"eval/loss": loss} | {f"eval/{name}": add(means, name)[2] for name in means[0]}
    if "rewards/accuracies" in means[0]:
        _, count, share = add(means, "rewards/accuracies")
        low, high = wilson(share, float(count))
        out |= {"eval/rewards/accuracies_low": low, "eval/rewards/accuracies_high": high}
    return out
