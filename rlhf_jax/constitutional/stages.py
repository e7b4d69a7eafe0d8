"""The stages one after the other, and what may change between two calls."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from rlhf_jax import run, worlds
from rlhf_jax.chain import stage as chain
from rlhf_jax.chain.stages import FREE
from rlhf_jax.config import MAY_CHANGE_ON_RESUME
from rlhf_jax.constitutional import checks, human, writing
from rlhf_jax.constitutional.config import HUMAN, STAGES, Constitutional, after, filled
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.feedback import ai_preference, revision
from rlhf_jax.workdir import open_policy

RECORD = "constitutional.json"
REVISIONS, REVISED, LABELS = "revisions.jsonl", "demonstrations.jsonl", "ai.jsonl"
# Stages that a field outside all sections decides.
OF_PAIRS = ("dpo", "reward", "helpful_dpo", "helpful_reward")
DECIDES: Mapping[str, tuple[str, ...]] = {
    "seed": tuple(STAGES), "model": ("helpful", "revised"), "constitution": ("revisions", "labels"),
    "demonstrations": ("helpful", "revised"), "prompts": ("revisions", "labels", "ppo", "helpful_ppo"),
    "human": OF_PAIRS, "human_probability": OF_PAIRS, "helpful_prompts": ("ppo", "helpful_ppo"),
}  # fmt: skip


class Products(NamedTuple):
    """What the stages left: models that write, and the rows between them; None for rows that nothing needed."""

    helpful: str
    revised: str
    final: str
    helpful_only: str | None  # None where people said nothing
    revisions: str | None
    labels: str | None
    human: str | None


# Resuming


def made_with(leaf: str, place: epath.Path) -> str | None:
    """A stage that has begun and that the value of this field decides."""
    section, _, name = leaf.partition(".")
    found: list[str] = []
    if section == "inputs":
        found = [*after(name)] if name in STAGES else []
    elif section in DECIDES:
        found = [stage for one in DECIDES[section] for stage in (one, *after(one))]
    elif not name.startswith(FREE):
        for stage in (stage for stage, one in STAGES.items() if one.section == section):
            # A run itself says what of its own config may change while nothing is made from it.
            trains = STAGES[stage].algorithm is not None
            own = [] if trains and name.startswith(MAY_CHANGE_ON_RESUME) else [stage]
            found += [*own, *after(stage)]
    return next((stage for stage in found if begun(place, stage)), None)


def begun(place: epath.Path, stage: str) -> bool:
    """Whether a stage has left something to go on from."""
    marks = {"revisions": (REVISIONS,), "labels": (LABELS,)}.get(stage, ("config.json", "members"))
    return any((place / stage / mark).exists() for mark in marks)


# Running


def train(whole: Constitutional, workdir: str) -> Products:
    """Runs the stages that aren't finished; what all of them left.

    Errors: UserError for whatever the user can mend, before the first stage as far as it can be seen there.
    """
    if not workdir:
        raise UserError("--workdir is empty; give the folder that everything is written to.")
    if jax.process_count() > 1:
        raise UserError(
            f"constitutional AI runs on one process, and here are {jax.process_count()}; train its stages there one by "
            "one, with python -m experiments.train, and name what they leave in --config.inputs.*."
        )
    place = epath.Path(os.path.expanduser(workdir))
    checks.check(whole)
    checks.check_made(whole)
    chain.hold(place, whole, RECORD, lambda leaf: made_with(leaf, place))
    return _Stages(whole, place).run()


class _Stages:
    """The stages of one workdir; `left` is what each of them left, by its name."""

    def __init__(self, whole: Constitutional, place: epath.Path):
        self.whole, self.place, self.samplers = whole, place, writing.Samplers()
        self.left: dict[str, str] = {name: given for name, given in whole.input_of.items() if given is not None}

    def run(self) -> Products:
        whole = self.whole
        for name in ("revisions", "labels"):
            if name in self.left:
                self.left[name] = writing.local(whole, self.left[name])
        self.left["helpful"] = self._start("helpful")
        if whole.human is not None:
            self.left["human"] = self._people(whole.human)
        does = {"revisions": self._revisions, "revised": lambda: self._start("revised"), "labels": self._labels}
        for stage in (*([] if "revised" in whole.made else ["revised"]), *whole.made):
            if stage != "helpful":
                self.left[stage] = does[stage]() if stage in does else self._trained(stage)
        only = self.left[f"helpful_{whole.final}"] if whole.has_helpful_only else None
        rows = {name: self.left.get(name) for name in ("revisions", "labels", "human")}
        return Products(self.left["helpful"], self.left["revised"], self.left[whole.final], only, **rows)

    def _trained(self, stage: str) -> str:
        section = STAGES[stage].section
        return chain.train(filled(self.whole, stage, self.left), self.place / stage, stage, section)

    def _start(self, stage: str) -> str:
        """The folder of a model that others start from: a run is written out as one."""
        given, flag = self.left.get(stage), f"--config.inputs.{stage}"
        if given is not None and given.startswith(worlds.PREFIX):
            return os.fspath(worlds.model(given, self.whole.cache, run.train, flag))
        if given is not None and not chain.is_run(given):
            return given
        policy = open_policy(given or self._trained(stage), flag=flag)
        return chain.model_folder(policy, self.place / stage)

    def _people(self, path: str) -> str:
        """People's pairs in the form of the others. Errors: UserError where a stage was made with other ones."""
        chat = Encoder(self._model(self.left["helpful"], "helpful").tokenizer).chat
        rows = human.read(writing.local(self.whole, path), self.whole.human_probability, chat)
        file = self.place / HUMAN
        if file.exists() and [json.dumps(row) for row in rows] != file.read_text().splitlines():
            made = [stage for one in OF_PAIRS for stage in (one, *after(one)) if begun(self.place, stage)]
            if made:
                raise UserError(
                    f"the pairs in {path} of --config.human are not those in {file}, and {made[0]} is made with these; "
                    f"put {path} back as it was, give another --workdir, or delete {self.place / made[0]} and what was "
                    "made from it."
                )
        return os.fspath(_write(file, rows))

    def _revisions(self) -> str:
        """Answers of the helpful model through all rounds; the file of the last ones, to imitate."""
        section, folder = self.whole.revisions, self.place / "revisions"
        if not (folder / REVISIONS).exists():
            print(f"\nrevisions: {section.rounds} rounds of critique and revision, in {folder}", flush=True)
            asked = checks.provoking(self.whole, section.rows)
            helpful = self._model(self.left["helpful"], "helpful")
            critic = helpful if section.critic is None else self._model(section.critic, "critic")
            first = writing.draw(helpful, asked, section.sampling, self.whole.seed, 1, self.samplers)
            answers = [texts[0] for texts in first]
            found = writing.revise(self.whole, critic, [one.text for one in asked], answers, self.samplers)
            rows = [*revision.demonstrations(found)]
            if not rows:
                raise UserError(
                    f"revisions: no answer was revised ({revision.told(found)}); raise "
                    "--config.revisions.writing.max_new_tokens, or give another --config.revisions.critic."
                )
            _write(folder / REVISED, rows)
            _write(folder / REVISIONS, [one.row for one in found])
            print(f"revisions: {revision.told(found)}", flush=True)
        return os.fspath(folder / REVISED)

    def _labels(self) -> str:
        """Pairs of answers of the revised model, compared by a model."""
        section, folder = self.whole.labels, self.place / "labels"
        if not (folder / LABELS).exists():
            print(f"\nlabels: a model compares two answers to each prompt, in {folder}", flush=True)
            asked = checks.provoking(self.whole, section.rows)
            revised = self._model(self.left["revised"], "revised")
            judge = self._model(section.judge or self.left["helpful"], "judge")
            found = writing.label(self.whole, revised, judge, asked, self.samplers)
            if not found.rows:
                raise UserError(
                    f"labels: no pair has a verdict ({ai_preference.told(found, len(asked))}); give another "
                    "--config.labels.judge, or raise --config.labels.sampling.temperature."
                )
            _write(folder / LABELS, found.rows)
            print(f"labels: {ai_preference.told(found, len(asked))}", flush=True)
        return os.fspath(folder / LABELS)

    def _model(self, path: str, name: str) -> Subject:
        return writing.open_model(self.whole, path, name)


def _write(file: epath.Path, rows: Sequence[Mapping[str, Any]]) -> epath.Path:
    """Rows as JSON lines, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.parent / f"{file.name}.part"
    worlds.write(part, [dict(row) for row in rows])
    part.replace(file)
    return file
