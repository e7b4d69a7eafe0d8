"""Models that answer, criticise, revise and judge: what the stages let them do."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rlhf_jax import run, worlds
from rlhf_jax.constitutional.config import Constitutional
from rlhf_jax.data.prompts import Asked
from rlhf_jax.data.rows import Refusal, Text
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject, answer, text_of
from rlhf_jax.feedback import ai_preference, constitution, revision
from rlhf_jax.feedback.ai_preference import Form
from rlhf_jax.feedback.judge_local import LocalJudge
from rlhf_jax.feedback.revision import Revised, Written
from rlhf_jax.models.decoder import Model
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler

NO_ROOM = "the model's context had no room for it"


class Samplers:
    """Samplers by model and number of samples, each made once: models that are alike share what is compiled."""

    def __init__(self) -> None:
        self._made: dict[tuple[Model, int], Sampler] = {}

    def __call__(self, model: Model, samples: int = 1) -> Sampler:
        if (model, samples) not in self._made:
            self._made[model, samples] = Sampler(model, samples=samples)
        return self._made[model, samples]


class Writer:
    """A model that goes on behind what it is asked, a text each; its randomness is that of a place and a number."""

    def __init__(self, subject: Subject, sampling: Sampling, seed: int, samplers: Samplers):
        self._subject, self._sampling, self._seed = subject, sampling, seed
        self._encoder, self._sampler = Encoder(subject.tokenizer), samplers(subject.model)
        self.chat = self._encoder.chat
        self._stops = self._encoder.stop_ids(subject.end_ids)
        newline = subject.tokenizer.encode("\n", add_special_tokens=False)
        if not self.chat and len(newline) == 1:  # what is written ends with its line
            self._stops = (*self._stops, *newline)

    def __call__(self, asked: Sequence[Text], places: Sequence[int], number: int) -> list[Written]:
        """Errors: UserError for a tokenizer that doesn't belong to the model."""
        subject, most = self._subject, self._subject.model.shape.length - self._sampling.max_new_tokens
        out: list[Written] = []
        drawn: dict[int, np.ndarray] = {}
        for index, ids in enumerate(self._encoder.prompts(asked)):
            why = str(ids) if isinstance(ids, Refusal) else NO_ROOM if len(ids) > most else ""
            if not why:
                assert isinstance(ids, np.ndarray)
                if ids.max() >= subject.model.shape.vocab:
                    raise UserError(
                        f"the tokenizer of {subject.name} gives token {ids.max()}, but the model's vocabulary ends at "
                        f"{subject.model.shape.vocab - 1}; give a folder whose tokenizer belongs to its model."
                    )
                drawn[index] = ids
            out.append(Written(None, why=why))
        text = text_of(subject.tokenizer)
        key = jax.random.fold_in(jax.random.PRNGKey(self._seed), number)
        completions = self._sampler.generate(
            subject.params, [*drawn.values()], self._sampling, key, stop_ids=self._stops,
            rows=[places[index] for index in drawn],
        )  # fmt: skip
        for (index, ids), (one,) in zip(drawn.items(), completions, strict=True):
            out[index] = Written(text(ids, one), one.stop == "end")
        return out


def open_model(whole: Constitutional, path: str, name: str) -> Subject:
    """A model from a run, a folder, a Hub name or a world that is made already."""
    folder = os.fspath(worlds.model(path, whole.cache)) if path.startswith(worlds.PREFIX) else path
    return worlds.open_subject(name, folder)


def local(whole: Constitutional, path: str) -> str:
    """The path, or the file behind a world's name, made if it isn't there."""
    return os.fspath(worlds.file(path, whole.cache, run.train)) if path.startswith(worlds.PREFIX) else path


def draw(
    subject: Subject, asked: Sequence[Asked], sampling: Sampling, seed: int, samples: int, samplers: Samplers
) -> list[list[str]]:
    """Answers to each prompt, which its place and the seed decide. Errors: UserError as `answer`."""
    sampler, encoder = samplers(subject.model, samples), Encoder(subject.tokenizer)
    return answer(subject, encoder, sampler, [one.text for one in asked], sampling, seed).texts


def revise(
    whole: Constitutional, critic: Subject, prompts: Sequence[Text], answers: Sequence[str], samplers: Samplers
) -> list[Revised]:
    """Answers through all rounds, as the config says."""
    section = whole.revisions
    before = "" if section.examples is None else examples(section.examples)
    write = Writer(critic, section.writing, whole.seed, samplers)
    principles = constitution.read(whole.constitution, "--config.constitution")
    return revision.revise(
        prompts, answers, principles, write, rounds=section.rounds, seed=whole.seed, chat=write.chat, before=before
    )


def label(
    whole: Constitutional, revised: Subject, judge: Subject, asked: Sequence[Asked], samplers: Samplers
) -> ai_preference.Labels:
    """Two answers of the revised model to each prompt, compared under principles that are drawn."""
    section = whole.labels
    answers = draw(revised, asked, section.sampling, whole.seed, 2, samplers)
    rules = constitution.read(whole.constitution, "--config.constitution")
    principles = rules.draw("preference", whole.seed, range(len(asked)))
    form = ai_preference.read(section.template, "--config.labels.template")
    made = functools.partial(_judge, judge)
    return ai_preference.label([one.text for one in asked], answers, principles, form, made, clamp=section.clamp)


def _judge(subject: Subject, form: Form) -> LocalJudge:
    more: dict[str, Any] = {"end_ids": subject.end_ids, "options": form.options, "gap": form.gap}
    return LocalJudge(subject.name, subject.model, subject.params, subject.tokenizer, form.template, **more)


def examples(path: str) -> str:
    """What a critic reads first. Errors: UserError for a file that isn't there, or isn't text."""
    file = epath.Path(os.path.expanduser(path))
    if not file.is_file():
        raise UserError(f"there is no file {path} of examples; check --config.revisions.examples.")
    try:
        return file.read_text().strip()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give --config.revisions.examples another file.") from None
