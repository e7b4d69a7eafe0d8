"""Several models on the same prompts, each against one of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.rows import Text
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Answers, Subject, answer, logprobs
from rlhf_jax.evaluate.intervals import Estimate, paired
from rlhf_jax.evaluate.scorers import Scorer, score
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler


class Result(NamedTuple):
    """What one model is worth; every estimate is a mean over prompts with its 95% interval."""

    name: str
    texts: list[list[str]]  # for each prompt, its samples
    scores: np.ndarray  # [prompts, samples]
    score: Estimate
    gain: Estimate  # score above the baseline's, of the same prompts
    wins: Estimate  # share of pairs of answers, one of each model, that score higher; a tie counts a half
    kl: Estimate | None  # nats an answer: sum over its tokens of log policy - log baseline, sampled from the policy
    tokens: Estimate  # of an answer, the one that ended it included
    ended: float  # share of answers that ended by themselves
    kls: np.ndarray | None  # [prompts, samples] log policy - log baseline of each answer, nats
    lengths: np.ndarray  # [prompts, samples] tokens of each answer, the one that ended it included


def has_kl(sampling: Sampling) -> bool:
    """Whether answers drawn so are an unbiased sample of the policy at its temperature."""
    whole = sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0 and sampling.repetition_penalty == 1
    return whole and sampling.temperature > 0


def compare(
    subjects: Sequence[Subject],
    prompts: Sequence[Text],
    columns: Mapping[str, Sequence[Any]],
    scorer: Scorer,
    *,
    baseline: str,
    sampling: Sampling = Sampling(),
    samples: int = 1,
    seed: int = 0,
    chat_template: str | None = None,
    tools: Sequence[str] | None = None,
) -> list[Result]:
    """Answers, scores and compares, in the order of the subjects.

    The KL is left out where the baseline has another tokenizer, or where the sampling is not that of the whole
    softmax: it would be the KL of no distribution.

    Args:
      columns: other columns of the prompts' rows, for the scorer.
      tools: what each prompt offers, JSON text, "" for none; None: none do.
      baseline: the name of the subject that the others are held against.
    Errors: UserError for an unknown baseline, two subjects of one name, and what `answer` and `score` refuse.
    """
    names = [subject.name for subject in subjects]
    if baseline not in names or len(set(names)) < len(names):
        raise UserError(f"the baseline {baseline!r} must be one of the models, whose names must differ: {names}.")
    encoders = [Encoder(subject.tokenizer, chat_template) for subject in subjects]
    base = names.index(baseline)
    samplers = {model: Sampler(model, samples=samples) for model in {subject.model for subject in subjects}}
    drawn = [
        answer(subject, encoder, samplers[subject.model], prompts, sampling, seed, tools)
        for subject, encoder in zip(subjects, encoders, strict=True)
    ]
    scores = [np.asarray(score(scorer, prompts, answers.texts, columns)) for answers in drawn]
    kls: list[np.ndarray | None] = []
    for subject, encoder, answers in zip(subjects, encoders, drawn, strict=True):
        same = encoder.fingerprint == encoders[base].fingerprint and has_kl(sampling)
        kls.append(_kl(subject, subjects[base], answers, sampling.temperature) if same else None)
    estimates = paired(_columns(names, drawn, scores, kls, base), seed=seed)
    results = []
    for name, answers, values, kl in zip(names, drawn, scores, kls, strict=True):
        said: Any = {part: estimates.get(f"{name}\n{part}") for part in ("score", "gain", "wins", "kl", "tokens")}
        ended = float(np.mean([c.stop == "end" for row in answers.completions for c in row]))
        results.append(Result(name, answers.texts, values, **said, ended=ended, kls=kl, lengths=_lengths(answers)))
    return results


def _kl(subject: Subject, baseline: Subject, answers: Answers, temperature: float) -> np.ndarray:
    """For each prompt and answer log policy - log baseline."""
    if subject is baseline:
        return np.zeros([len(answers.texts), len(answers.texts[0])])
    own, other = (np.asarray(logprobs(by, answers, temperature)) for by in (subject, baseline))
    return own - other


def _lengths(answers: Answers) -> np.ndarray:
    return np.asarray([[len(completion.tokens) for completion in row] for row in answers.completions])


def _columns(
    names: Sequence[str],
    drawn: Sequence[Answers],
    scores: Sequence[np.ndarray],
    kls: Sequence[np.ndarray | None],
    base: int,
) -> dict[str, np.ndarray]:
    """A number a prompt for everything that is estimated."""
    columns = {}
    for name, answers, values, kl in zip(names, drawn, scores, kls, strict=True):
        columns[f"{name}\nscore"] = values.mean(axis=1)
        columns[f"{name}\ngain"] = values.mean(axis=1) - scores[base].mean(axis=1)
        columns[f"{name}\nwins"] = win_shares(values, scores[base])
        columns[f"{name}\ntokens"] = _lengths(answers).mean(axis=1)
        if kl is not None:
            columns[f"{name}\nkl"] = kl.mean(axis=1)
    return columns


def win_shares(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """For each prompt, the share of pairs of answers that ours win; a tie counts a half.

    >>> print(win_shares(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])))
    [0.875]
    """
    difference = ours[:, :, None] - theirs[:, None, :]
    return np.mean((np.sign(difference) + 1) / 2, axis=(1, 2))
