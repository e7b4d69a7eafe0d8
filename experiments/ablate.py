"""Compares settings in one command: every combination of some fields' values, trained, judged, tabled and drawn.

python -m experiments.ablate --config=configs/dpo.py:tiny --workdir=runs/ablation \
    --sweep='loss.name=dpo,ipo,kto,simpo;loss.beta=0.03,0.1,0.3;seed=0,1,2'

Members that differ in numbers alone are trained at once. The same command again goes on where it was ended, and
writes the table from all members that are finished, on whichever machine.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import numpy as np
from etils import epath

from rlhf_jax import fields, flags, registry, run, sweep, worlds
from rlhf_jax.build import Memory
from rlhf_jax.config import Config
from rlhf_jax.data import prompts as asked
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import best_of
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.compare import Result, compare
from rlhf_jax.evaluate.intervals import paired
from rlhf_jax.evaluate.scorers import SCORERS, Scorer, plain
from rlhf_jax.report import sweep as report
from rlhf_jax.sampling.distribution import Sampling, check
from rlhf_jax.workdir import check_writable, evaluations

START = "start"  # what the model is called that all members start from
MOST_LOSSES = 64  # points of a member's loss that its line of the table shows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablate(Sampling):
    """Trains every combination of some fields' values, and writes table.jsonl, table.md and figures."""

    config: Config
    sweep: Annotated[str, "FIELD=VALUE,VALUE;FIELD=VALUE: the fields of the config that vary, and their values"]
    workdir: Annotated[str, "folder that everything is written to"]
    together: Annotated[int, "most members trained at once; fewer need less memory"] = 16
    axis: Annotated[
        Literal["map", "vmap"], "members take a step one by one in one program, or all at once, which takes more memory"
    ] = "map"
    shard: Annotated[str, "i/n: only the i-th of n parts, for n machines with one workdir"] = "1/1"
    prompts: Annotated[
        str | None, "file of prompts that members answer; none: the held-out ones of the world, if the rows are its"
    ] = None
    rows: Annotated[int | None, "most prompts used; none: all"] = None
    scorer: Annotated[
        str | None, f"{', '.join(SCORERS)}, or my_pkg.module:function, judges the answers; none: gold, of the world"
    ] = None
    samples: Annotated[int, "answers of each member to each prompt"] = 1
    best_of: Annotated[tuple[int, ...], "also the best of so many answers of the start, by the scorer"] = ()


class Judged:
    """What answers members and the start give to the same prompts, and what they are worth."""

    def __init__(self, program: Ablate, workdir: epath.Path):
        """Errors: UserError for half of what it takes, and for what can't be read."""
        world = program.config.data.eval_path + program.config.data.path
        spec = next((path for path in world if path.startswith(worlds.PREFIX)), None)
        given, scorer = program.prompts, program.scorer
        writes = program.config.algorithm != "reward"
        if not writes and (given or scorer):
            raise UserError(
                "--scorer judges what models write, and members of --config.algorithm=reward write nothing; drop it "
                "with --prompts, and judge them with experiments.rewards."
            )
        if spec is not None and given is None and writes:
            given = f"{spec.rpartition('/')[0]}/prompts_held_out"
            scorer = scorer or "gold"
        if (given is None) != (scorer is None):
            there, missing = ("prompts", "scorer") if scorer is None else ("scorer", "prompts")
            raise UserError(f"--{there} judges nothing without --{missing}; give both or neither.")
        if scorer is None and program.best_of:
            raise UserError("--best_of is judged by a scorer; give --scorer and --prompts.")
        self.program, self.workdir, self.spec = program, workdir, given
        self.scorer: Scorer | None = None if scorer is None else registry.resolve(SCORERS, scorer, "scorer")
        self.sampling = Sampling(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Sampling)})
        check(self.sampling, "--")

    def read(self) -> None:
        """The prompts; those of a world are there by now."""
        spec = str(self.spec)
        path = worlds.file(spec, self.program.config.cache) if spec.startswith(worlds.PREFIX) else spec
        self.prompts = asked.read(os.fspath(path))[: self.program.rows]

    def compare(self, subjects: Sequence[Subject], samples: int, seed: int) -> list[Result]:
        assert self.scorer is not None
        return compare(
            subjects, [row.text for row in self.prompts], asked.columns(self.prompts), self.scorer, baseline=START,
            sampling=self.sampling, samples=samples, seed=seed, tools=[row.tools for row in self.prompts],
        )  # fmt: skip

    def members(self, group: Sequence[sweep.Ready]) -> dict[str, Result]:
        """What each member of a group is worth against the start, by name."""
        built = group[0].built
        start = worlds.open_subject(START, str(built.config.model.path))
        subjects = [worlds.open_subject(one.member.name, os.fspath(one.built.workdir)) for one in group]
        results = self.compare([start, *subjects], self.program.samples, 0)[1:]
        for one, result in zip(group, results, strict=True):
            _write(one.built.workdir / "answers.jsonl", self._answers(result))
        return {result.name: result for result in results}

    def _answers(self, result: Result) -> list[dict[str, Any]]:
        number = lambda values: np.asarray(values).tolist()
        return [
            {"prompt": plain(row.text), "answers": result.texts[i], "scores": number(result.scores[i])}
            | {"kl": None if result.kls is None else number(result.kls[i]), "tokens": number(result.lengths[i])}
            for i, row in enumerate(self.prompts)
        ]

    def best_of(self, model: str, seeds: Sequence[int]) -> None:
        """best_of.jsonl: the best of n answers of the start by the scorer, a line for each n and seed."""
        if not self.program.best_of:
            return
        lines = []
        for seed in seeds:
            (drawn,) = self.compare([worlds.open_subject(START, model)], max(self.program.best_of), seed)
            for n in self.program.best_of:
                score = paired({"score": best_of.best_of(drawn.scores, n)})["score"]
                name = f"best of n by {self.program.scorer or 'gold'}"
                lines.append({"n": n, "seed": seed, "score": score._asdict(), "kl": best_of.kl(n), "name": name})
        _write(self.workdir / "best_of.jsonl", lines)


def _write(file: epath.Path, lines: Sequence[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    part = file.parent / f"{file.name}.part"
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(file)


def _read(file: epath.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def line(one: sweep.Ready, seconds: float, result: Result | None) -> dict[str, Any]:
    """A finished member's line of the table."""
    steps, held_out = _read(one.built.workdir / "metrics.jsonl"), evaluations(one.built.workdir)
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(len(steps), MOST_LOSSES))})
    judged = {name: getattr(result, name, None) for name in ("score", "gain", "wins", "kl", "tokens")}
    plain_value = lambda value: list(value) if isinstance(value, tuple) else value
    return {
        "member": one.member.name,
        "sweep": {name: plain_value(value) for name, value in one.member.values.items()},
        "seed": one.built.config.seed,
        "loss": dict(sweep.effective(one.built.config)),
        "steps": len(steps),
        "seconds": round(seconds, 2),
        "losses": [[steps[i]["step"], steps[i]["loss"]] for i in shown],
        "train": steps[-1],
        "eval": held_out[-1] if held_out else {},
        "first_eval": held_out[0] if held_out else {},
        **{name: value and value._asdict() for name, value in judged.items()},
        "ended": None if result is None else result.ended,
        "workdir": f"members/{one.built.workdir.name}",
    }


def train(program: Ablate, workdir: epath.Path, members: Sequence[sweep.Planned], judged: Judged) -> None:
    """Trains and judges the members that are not finished; each leaves result.jsonl, its line, when it is."""
    ready = sweep.ready(members, workdir, Memory())
    judges = judged.scorer is not None
    if judges:
        judged.read()
    for number, group in enumerate(groups := sweep.groups(ready, program.together)):
        print(f"group {number + 1} of {len(groups)}", flush=True)
        began = time.monotonic()
        sweep.train_group(group, program.axis)
        seconds = (time.monotonic() - began) / len(group)
        results = judged.members(group) if judges else {}
        for one in group:
            made = line(one, seconds, results.get(one.member.name))
            _write(one.built.workdir / "result.jsonl", [made])


def main(program: Ablate) -> None:
    """Runs it."""
    if not program.workdir:
        raise UserError("--workdir is empty; give the folder that everything is written to.")
    for name in ("samples", "rows", "together"):
        if (value := getattr(program, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} is not allowed; it must be at least 1.")
    if any(n < 1 for n in program.best_of):
        raise UserError(f"--best_of={fields.text(program.best_of)} is not allowed; give numbers of at least 1.")
    members = sweep.expand(program.sweep, program.config)
    mine = sweep.shard(members, program.shard)
    run.use_compile_cache()
    workdir = epath.Path(os.path.expanduser(program.workdir))
    check_writable(workdir, "workdir", "--workdir")
    judged = Judged(program, workdir)
    if judged.scorer is not None and any(member.config.model.init == "random" for member in members):
        raise UserError(
            "members are judged against the model that they start from, and --config.model.init=random has none; drop "
            "--scorer and --prompts, or start from a checkpoint."
        )
    told = {
        member.name: workdir / "members" / sweep.folder(workdir, member).name / "result.jsonl" for member in members
    }
    left = [member for member in mine if not told[member.name].exists()]
    print(f"{len(members)} members, {len(mine)} of them here, {len(mine) - len(left)} finished before", flush=True)
    if left:
        train(program, workdir, left, judged)
    if program.best_of and not (workdir / "best_of.jsonl").exists() and program.shard.startswith("1/"):
        seeds = sorted({member.config.seed for member in members})
        config = worlds.provide(program.config, run.train)
        judged.read()
        judged.best_of(str(config.model.path), seeds)
    lines = [found for file in told.values() for found in _read(file)]
    _write(workdir / "table.jsonl", lines)
    print(report.markdown(lines))
    for path in [workdir / "table.jsonl", *report.write(lines, workdir)]:
        print(f"wrote {path}")
    if len(lines) < len(members):
        print(f"{len(members) - len(lines)} members are not finished; they are other parts', or run this again")


if __name__ == "__main__":
    flags.run(main, Ablate)
