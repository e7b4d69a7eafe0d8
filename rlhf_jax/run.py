"""One experiment: built, checked, then run.

`train` is all that `python -m experiments.train` does. Everything that can be refused is refused in `build`,
before anything is compiled.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import fields, sharding, worlds
from rlhf_jax.algorithms.step import Batch, Taught, TrainState, make_step
from rlhf_jax.build import Built, build
from rlhf_jax.checkpoint import Restored
from rlhf_jax.checks import check
from rlhf_jax.config import Config
from rlhf_jax.errors import UserError
from rlhf_jax.held_out import show, summarise, write_rows
from rlhf_jax.initial import (
    Tables,
    base_params,
    demonstration_sums,
    new_state,
    reference_tables,
    state_shapes,
    trained_params,
)
from rlhf_jax.members import Axis, Member, Way, patience
from rlhf_jax.models.decoder import Model
from rlhf_jax.teacher import check_teacher
from rlhf_jax.workdir import NOTES, check_base, check_note, last_line, open_workdir


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
    check(config)  # before a world is made
    config = worlds.provide(config, train)
    place = epath.Path(os.path.expanduser(workdir))
    step = open_workdir(place, config, resume)
    if step is not None and config.train.steps is not None and step >= config.train.steps:
        return _finished(place, step)
    if step is not None and patience(place, config, step).ended:
        return _finished(place, step, "its patience ran out; a higher --config.evaluate.patience goes on")
    built = build(config, place)
    if step is not None and step >= built.steps:
        return _finished(place, step)
    begin(built, step)
    announce(built)
    return Run([built], step).train()[0]


def begin(built: Built, step: int | None = None) -> None:
    """Writes what a run's folder holds before its first step.

    Args: step: the checkpoint that it goes on from; None: it starts, whatever an earlier start left there.
    Errors: UserError for a run that was started on other weights, with another teacher or another reward model.
    """
    place, main = built.workdir, jax.process_index() == 0
    if main and step is None:
        for note in NOTES:
            (place / note).unlink(missing_ok=True)
    _check_notes(built, write=main)
    if main:
        part = place / "config.json.part"  # so that a kill leaves the whole file or none
        part.write_text(json.dumps(fields.to_dict(built.config), indent=2) + "\n")
        part.replace(place / "config.json")
        built.data.report.write(os.fspath(place / "rows.jsonl"))


def _check_notes(built: Built, write: bool) -> None:
    """Holds a run to the models that its checkpoints don't hold: its base or reference, its teacher, what scores it."""
    place, online = built.workdir, built.online
    if built.model.adapter is not None or built.refers:
        check_base(place, built.start, write)
    if online is not None and online.teacher is not None:
        check_teacher(place, online.teacher, write)
    if online is not None and online.scored_by is not None:
        says = (
            f"the reward model {built.config.rewards.model} is not the one that {str(place)!r} was started with; put "
            "its weights back or give another --workdir."
        )
        check_note(place / "rewards", online.scored_by(), says, write)


def _finished(workdir: epath.Path, step: int, why: str = "there is nothing left to do") -> Result:
    print(f"finished: {workdir} holds step {step}, the last; {why}")
    return Result(None, last_line(workdir / "metrics.jsonl"), last_line(workdir / "eval.jsonl"))


def announce(built: Built) -> None:
    """What is about to run: rows, buckets, and the first row as the model sees it."""
    for line in built.data.report.lines():
        print(f"data: {line}")
    buckets = built.loader.buckets(0, built.batches)
    shown = ", ".join(f"{count} batches of {length} tokens" for length, count in buckets.items())
    print(f"buckets: {shown}; one compile each")
    shape = "x".join(str(size) for size in built.mesh.shape.values())
    print(f"mesh: {shape} ({' x '.join(built.mesh.shape)}) of {built.mesh.devices.flat[0].device_kind}")
    if built.loader.packed:
        print(f"packed: {built.loader.describe()}")
    if built.online is not None:
        print(f"rollouts: {built.online.describe(built.loader.batch_size)}")
    first = built.loader.examples[built.loader.rows[built.loader.order(0)][0]]
    if built.online is not None:
        print(f"first prompt, {first.where}: {built.tokenizer.decode(first.completions[0].prompt)!r}", flush=True)
        return
    used = "trained" if built.model.shape.head == "words" else "scored"
    for number, tokens in enumerate(first.completions):
        answer = built.tokenizer.decode(tokens.ids[tokens.start :])
        steps = f", {len(tokens.ends)} steps" if len(tokens.ends) else ""
        print(
            f"first row, {first.where}, completion {number + 1}: {len(tokens)} tokens, "
            f"{int(tokens.mask.sum())} of them {used}{steps}"
        )
        print(f"  prompt  | {built.tokenizer.decode(tokens.prompt)!r}")
        print(f"  {used:7} | {answer!r}", flush=True)


class Run:
    """The training loop of one built experiment, or of several that share one program, in step with each other."""

    def __init__(self, builts: Sequence[Built], step: int | None, way: Way = "map"):
        """Starts or goes on.

        Args:
          builts: one, or several that `sweep.program` says the same of.
          step: the checkpoint to go on from; None starts anew.
          way: how several take a step, see `members.Axis`.
        """
        self.built, mesh = builts[0], builts[0].mesh
        self.axis = Axis(len(builts), mesh, way)
        self.members = [Member(built, step) for built in builts]
        self.rows = sharding.row_sharding(mesh)
        shapes = state_shapes(self.built)
        places = jax.tree.map(lambda x: x.sharding, shapes)
        self.pending: list[Batch] = []
        self.position = 0
        restored = [] if step is None else [member.restore(step, shapes, self.rows) for member in self.members]
        for member, found in zip(self.members, restored, strict=False):
            self._check_rows(member, found)
        self._params: Any = None
        self._prepare_reference(restored)
        self.frozen = self._frozen()
        if restored:
            self.position = restored[0].host["position"]
            states = [found.state for found in restored]
            self.pending = [self.axis.stack(batches) for batches in zip(*(r.pending for r in restored), strict=True)]
        else:
            states = self._new_states(builts, places)
        self.state: TrainState = self.axis.stack(states)
        self._params = None
        self._compile(self.axis.places(places))
        for number, member in enumerate(self.members):
            member.open_log(step, progress=number == 0)

    def _check_rows(self, member: Member, restored: Restored) -> None:
        if restored.host["data"] != member.built.data.fingerprint:
            raise UserError(
                f"the rows of {', '.join(member.config.data.path)} are not those that {member.built.workdir} was "
                "started with; put them back or give another --workdir."
            )

    def _new_states(self, builts: Sequence[Built], places: TrainState) -> list[TrainState]:
        """The states before the first step; of several members each has weights of its own, that of one takes them."""
        adapted = self.built.model.adapter is not None
        make = jax.jit(
            lambda params, key, hyper: new_state(self.built, params, key, hyper), out_shardings=places,
            donate_argnums=0 if len(builts) == 1 or adapted else (),
        )  # fmt: skip
        numbers = lambda built: jax.tree.map(np.float32, built.hyper)
        return [
            make(trained_params(built, self._base()), jax.random.PRNGKey(built.config.seed), numbers(built))
            for built in builts
        ]

    def _compile(self, places: TrainState) -> None:
        """The jitted step, what it is fed by, and the judge's sums; each compiles when it is first called."""
        built, config, axis = self.built, self.built.config, self.axis
        everywhere, rows = NamedSharding(built.mesh, PartitionSpec()), axis.places(self.rows)
        one_step = make_step(
            built.objective, built.optimizer, microbatches=config.train.microbatches,
            reduce_dtype=config.train.reduce_dtype, layout=built.model.layout, advance=built.advance,
            skip=built.skip,
        )  # fmt: skip

        def advance(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Any]:
            state, metrics = one_step(dataclasses.replace(state, frozen=frozen), batch)
            return dataclasses.replace(state, frozen=None), metrics

        # What is frozen is an argument of its own: the state's buffers are donated and these are not.
        still = jax.tree.map(lambda x: x.sharding, self.frozen)
        self.step = jax.jit(
            axis.over(advance, shared=(1,)), in_shardings=(places, still, rows), out_shardings=(places, everywhere),
            donate_argnums=0,
        )  # fmt: skip
        self.judge = jax.jit(axis.over(built.judge, shared=(1, 4)), out_shardings=everywhere)
        self.scored = jax.jit(axis.over(demonstration_sums(built), shared=(1, 2)), out_shardings=everywhere)
        # Of (params, frozen, fixed, carry, hyper, rows) the members share what is frozen and what is fixed.
        live = lambda function: jax.jit(axis.over(function, shared=(1, 2)), out_shardings=rows)
        self.prepare, self.examine = (built.prepare(self.reference, live, held_out) for held_out in (False, True))

    def _base(self) -> Any:
        """The weights that training starts from; read once, and not at all where nothing needs them."""
        self._params = base_params(self.built) if self._params is None else self._params
        return self._params

    def _frozen(self) -> Any:
        """What no step changes: the base that an adapter adapts, and a teacher's parameters."""
        base = None if self.built.model.adapter is None else self._base()
        teacher = None if self.built.online is None else self.built.online.teacher
        return base if teacher is None else Taught(base, teacher.params)

    def _prepare_reference(self, restored: Sequence[Restored]) -> None:
        """What the objective needs of a fixed reference: columns, and for mismatched rows its live parameters."""
        self.reference: tuple[Model, Any] | None = None
        self.tables: list[Tables] = [{} for _ in self.members]
        if self.built.refers and self.built.model.adapter is None:
            self.reference = self.built.model, base_params(self.built)  # the state's own buffers are donated
        if self.built.online is not None:
            return
        if self.built.moves or not self.built.reads.reference:
            return
        first = restored[0].host["position"] if restored else 0
        self.tables = reference_tables([member.built for member in self.members], self._base, first)
        if self.built.reads.mismatched and self.built.model.adapter is None:
            self.reference = self.built.model, base_params(self.built)  # the state's own buffers are donated

    @property
    def whole_state(self) -> TrainState:
        """The state with what is frozen."""
        return dataclasses.replace(self.state, frozen=self.frozen)

    def _place(self, several: Sequence[Batch], held_out: bool = False) -> Batch:
        """The members' rows with their reference columns, on the devices."""
        with_columns = [
            rows | {name: tables[held_out][rows["index"]] for name, tables in columns.items()}
            for rows, columns in zip(several, self.tables, strict=True)
        ]
        return self.axis.place(with_columns)

    def _feed(self) -> Iterator[tuple[int, Batch]]:
        """Global batches from the data position on, built ahead on the loaders' threads."""
        config = self.built.config
        local = sharding.local_rows(self.built.mesh, self.built.loader.batch_size)
        last = self.position + self.built.batches  # more than are left, which does no harm
        each = [member.built.loader for member in self.members]
        loaders = list(dict.fromkeys(each))  # members of one seed have one
        threads = config.data.threads if len(loaders) == 1 else min(1, config.data.threads)
        for batches in zip(*(one.iterate(self.position, last, threads, local) for one in loaders), strict=True):
            rows = {loader: rows for loader, (_, rows) in zip(loaders, batches, strict=True)}
            yield batches[0][0], self._place([rows[loader] for loader in each])

    def train(self) -> list[Result]:
        """Runs to the last step; the last figures of each. Whatever ends it, checkpoints under way are finished."""
        try:
            return self._train()
        finally:
            for member in self.members:
                member.close()

    def _train(self) -> list[Result]:
        built, config = self.built, self.built.config
        feed, queue = self._feed(), iter(self.pending)
        self.pending = []  # so that what is done with isn't kept
        step, last = int(np.max(jax.device_get(self.state.step))), None
        if step == 0:
            self._evaluate(0)
        ended = False
        while step < built.steps and not (ended := self._ended()):
            batch = next(queue, None)
            if batch is None:
                number, rows = next(feed)
                self.position, queue = number + 1, self.prepare(self.whole_state, rows)
                continue
            self.state, metrics = self.step(self.state, self.frozen, batch)
            if last is not None:  # the device is busy with this step while the one before is written down
                self._write(step - 1, last)
            step, last = step + 1, metrics
            due = config.evaluate.every and step % config.evaluate.every == 0
            save = step == built.steps or (config.checkpoint.every and step % config.checkpoint.every == 0)
            if save or due or step == built.steps:
                last = self._write(step - 1, last)
            if due or step == built.steps:
                self._evaluate(step)
                # What would be loaded as the best must be there, and a run that ends must leave its end.
                lowest = any(member.patience.since == 0 for member in self.members)
                save = save or bool(config.evaluate.patience and (lowest or self._ended()))
            if save:
                rest = list(queue)  # they no longer read the state, so they can be made now
                queue = iter(rest)
                self._save(step, rest)
        if ended or self._ended():
            best = self.members[0].patience
            print(f"stopped: eval/loss has not fallen below {best.best:.4g} {best.since} times")
        pick = lambda number: self.axis.pick(self.state, number)
        return [Result(pick(number), member.row, member.evaluated) for number, member in enumerate(self.members)]

    def _ended(self) -> bool:
        """Whether patience ran out; it is a single run's alone."""
        return len(self.members) == 1 and self.members[0].patience.ended

    def _save(self, step: int, rest: list[Batch]) -> None:
        shifts = self._shifts()
        for number, member in enumerate(self.members):
            state, *pending = (self.axis.pick(tree, number) for tree in (self.state, *rest))
            member.save(step, self.position, state, pending, shifts[number])

    def _shifts(self) -> list[float]:
        """What each member's scores must be moved by, so that demonstrations score 0 on average; 0 without any."""
        totals = np.zeros((2, len(self.members)))
        for rows in self.built.rows_once(self.built.demonstrations):
            sums = self.scored(self.state.params, self.frozen, sharding.place_rows(rows, self.built.mesh))
            totals += np.reshape(np.asarray(jax.device_get(sums), np.float64), totals.shape)
        return (-totals[0] / np.maximum(totals[1], 1)).tolist()

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        for member, values in zip(self.members, self.axis.split(jax.device_get(metrics)), strict=True):
            member.write(step, values)

    def _evaluate(self, step: int) -> None:
        """The objective on the held-out rows: sums over all of them, divided once, and a line a row."""
        if not any(member.built.held_out for member in self.members):
            return
        key = jax.random.PRNGKey(self.built.config.seed)
        seen: list[list[Any]] = [[] for _ in self.members]
        for several in self._held_out():
            for batch in self.examine(self.whole_state, self._place(several, held_out=True)):
                if self.built.online is not None and not any(seen):
                    show(self.built, step, batch)
                found = self.judge(self.state.params, self.frozen, self.state.hyper, batch, key)
                for one, rows, said in zip(seen, several, self.axis.split(jax.device_get(found)), strict=True):
                    one.append((*said, rows["index"]))
        for member, found in zip(self.members, seen, strict=True):
            if member.built.held_out:
                self._note(member, step, found)

    def _held_out(self) -> Iterator[list[Batch]]:
        """The members' held-out rows, batch by batch; who has no more gets padding rows."""
        mismatched = self.built.reads.mismatched
        each = (member.built.rows_once(member.built.held_out, mismatched) for member in self.members)
        for batches in itertools.zip_longest(*each):
            some = next(batch for batch in batches if batch is not None)
            empty = jax.tree.map(np.zeros_like, some) | {"index": np.full_like(some["index"], -1)}
            yield [empty if batch is None else batch for batch in batches]

    def _note(self, member: Member, step: int, found: list[Any]) -> None:
        """What an evaluation found of one member."""
        terms, means, rows, index = (list(column) for column in zip(*found, strict=True))
        held_out = member.built.held_out
        member.evaluated = {"step": step, **summarise(terms, means), "eval/rows": len(held_out)}
        member.patience.see(member.evaluated["eval/loss"])
        best = member.config.checkpoint
        if best.keep_best and best.best not in member.evaluated:
            raise UserError(
                f"--config.checkpoint.best={best.best} is not a metric of the evaluation; "
                f"choose one of {', '.join(name for name in member.evaluated if name != 'step')}."
            )
        member.log.evaluation(member.evaluated)
        if jax.process_count() == 1:  # another process's rows are not here
            write_rows(member.built, rows, index)
        if member is self.members[0]:
            told = ", ".join(f"{n.removeprefix('eval/')} {x:.4g}" for n, x in member.evaluated.items() if n != "step")
            more = f" ({member.built.workdir.name}, of {len(self.members)})" if len(self.members) > 1 else ""
            print(f"held out, step {step}{more}: {told}", flush=True)
