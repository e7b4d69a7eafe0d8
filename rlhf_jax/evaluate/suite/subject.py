"""A model of this project as what is examined: language models, which weigh and write, and reward models."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.data.rows import Message, Refusal, Text
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject, text_of
from rlhf_jax.evaluate.rewards import Rewards, combine
from rlhf_jax.evaluate.suite.items import Asked, finite
from rlhf_jax.feedback.judge_local import LocalJudge
from rlhf_jax.feedback.judges import Pair, Template, Verdict, both
from rlhf_jax.models.decoder import Model
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler, bucket, number_of

ROWS = 32  # options that are weighed at a time
OPTIONS = 8  # single tokens that are read behind one row
SHORTEST = 64  # the smallest length that rows are filled up to
AGAIN = re.compile(r"\n(?:Question|Q):")  # what a model without a chat template goes on with when its answer is over


class Span(NamedTuple):
    """A row of tokens of which those from `start` on are weighed."""

    ids: np.ndarray  # int32 [n]
    start: int


class LanguageModel:
    """Weighs options and writes answers.

    With a chat template a text is a user's message and the option the whole answer to it, without the end of the turn;
    without one the option stands behind the text and a space, tokenised apart.
    """

    writes = True

    def __init__(
        self,
        subject: Subject,
        template: Template,
        *,
        sampling: Sampling,
        seed: int = 0,
        chat_template: str | None = None,
    ):
        """Args:
        subject: with a word head, on a mesh.
        template: what it is asked as a judge.
        sampling, seed: of what it writes; an answer depends on its prompt and the seed alone.
        chat_template: Jinja file in the place of the tokenizer's own.
        """
        self.name, self._subject, self._sampling, self._seed = subject.name, subject, sampling, seed
        self._encoder = Encoder(subject.tokenizer, chat_template)
        self._sampler = Sampler(subject.model, samples=1)
        self._judge = LocalJudge(
            subject.name, subject.model, subject.params, subject.tokenizer, template, end_ids=subject.end_ids,
            chat_template=chat_template,
        )  # fmt: skip
        self._text = text_of(subject.tokenizer)

    def likelihoods(self, asked: Sequence[Asked]) -> list[float | Refusal]:
        """Rows of like length are weighed together; a length compiles once. Errors: UserError as `check_ids`."""
        spans = self.spans(asked)
        found: list[float | Refusal] = [span if isinstance(span, Refusal) else 0.0 for span in spans]
        rows = {place: span for place, span in enumerate(spans) if isinstance(span, Span)}
        for place, value in zip(rows, logprobs(self._subject, list(rows.values())), strict=True):
            found[place] = finite(value, "likelihood")
        return found

    def spans(self, asked: Sequence[Asked]) -> list[Span | Refusal]:
        """Each text with its option as tokens, or why there are none."""
        context, spans = self._subject.model.shape.length, []
        items = [(*self._texts(one), "", (len(self._option(one)),)) for one in asked]
        for row in self._encoder.encode_many(items):
            if isinstance(row, Refusal):
                spans.append(row)
                continue
            stop = int(row.ends[-1]) + 1
            check_ids(self._subject, row.ids)
            over = Refusal(f"{stop} tokens, over the context of {context}")
            spans.append(Span(row.ids[:stop], row.start) if stop <= context else over)
        return spans

    def answers(self, asked: Sequence[Asked]) -> list[str | Refusal]:
        """A text that leaves no room for the longest answer is refused."""
        context, room = self._subject.model.shape.length, self._sampling.max_new_tokens
        texts: list[Text] = [(Message("user", a.prompt),) if self._encoder.chat else a.plain for a in asked]
        found: list[str | Refusal] = []
        rows: dict[int, np.ndarray] = {}
        for place, ids in enumerate(self._encoder.prompts(texts)):
            if isinstance(ids, Refusal):
                found.append(ids)
                continue
            check_ids(self._subject, ids)
            over = f"{len(ids)} tokens and {room} new ones, over the context of {context}"
            found.append("" if len(ids) + room <= context else Refusal(over))
            if found[-1] == "":
                rows[place] = ids
        drawn = self._sampler.generate(
            self._subject.params, list(rows.values()), self._sampling, jax.random.PRNGKey(self._seed),
            stop_ids=self._encoder.stop_ids(self._subject.end_ids), rows=[number_of(ids) for ids in rows.values()],
        )  # fmt: skip
        for (place, ids), (one,) in zip(rows.items(), drawn, strict=True):
            text = self._text(ids, one)
            found[place] = (text if self._encoder.chat else AGAIN.split(text, maxsplit=1)[0]).strip()
        return found

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return self._judge(pairs)

    def scores(self, asked: Sequence[Asked]) -> list[float | Refusal]:
        raise TypeError(f"{self.name} is a language model and has no scores")

    def _option(self, one: Asked) -> str:
        return one.option if self._encoder.chat else f" {one.option}"

    def _texts(self, one: Asked) -> tuple[Text, Text]:
        if self._encoder.chat:
            return (Message("user", one.prompt),), (Message("assistant", self._option(one)),)
        return one.plain, self._option(one)


class Likelihood(NamedTuple):
    """What a model says of the weighed tokens of a row."""

    logprob: float  # nats
    greedy: bool  # whether each of them is the likeliest there, so that temperature 0 would write them


def check_ids(subject: Subject, ids: np.ndarray) -> None:
    """Errors: UserError for a tokenizer that doesn't belong to the model."""
    vocab = subject.model.shape.vocab
    if ids.max(initial=0) >= vocab:
        raise UserError(
            f"the tokenizer of {subject.name} gives token {ids.max()}, but the model's vocabulary ends at "
            f"{vocab - 1}; give a folder whose tokenizer belongs to its model."
        )


def logprobs(subject: Subject, rows: Sequence[Span]) -> list[float]:
    """The log-probability of the weighed tokens of each row, nats, in the order of the rows."""
    return [one.logprob for one in likelihoods(subject, rows)]


def likelihoods(subject: Subject, rows: Sequence[Span]) -> list[Likelihood]:
    """Of each row, in their order. The last token is only weighed, so a row may have one more than the context.

    Options of a single token behind the same text, such as letters, are read from one pass over it.
    """
    one = [number for number, row in enumerate(rows) if row.start == len(row.ids) - 1]
    several = [number for number, row in enumerate(rows) if row.start < len(row.ids) - 1]
    out = np.zeros((len(rows), 2), np.float64)
    if several:
        out[several] = _in_rows(subject, [rows[number] for number in several], _whole)
    places: dict[bytes, list[int]] = {}
    for number in one:
        same = places.setdefault(rows[number].ids[:-1].tobytes(), [])
        same.append(number)
    # The texts, each with what may follow: as many tokens as fit a row of them, or several rows of the same text.
    texts, follow = [], []
    for numbers in places.values():
        for start in range(0, len(numbers), OPTIONS):
            texts.append(Span(rows[numbers[start]].ids[:-1], 0))
            follow.append(numbers[start : start + OPTIONS])
    tokens = np.zeros((len(texts), OPTIONS), np.int32)
    for place, numbers in enumerate(follow):
        tokens[place, : len(numbers)] = [rows[number].ids[-1] for number in numbers]
    told = _in_rows(subject, texts, _next, tokens)
    for numbers, values in zip(follow, told, strict=True):
        out[numbers] = values[: len(numbers)]
    return [Likelihood(logprob, greedy == 1) for logprob, greedy in out.tolist()]


def _in_rows(subject: Subject, rows: Sequence[Span], read: Any, tokens: np.ndarray | None = None) -> list[Any]:
    """What `read` gives for each row; those of like length are read together, and a length compiles once."""
    model, mesh = subject.model, subject.model.layout.mesh
    assert mesh is not None
    size = -(-ROWS // model.layout.shards) * model.layout.shards
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        count, most = len(row.ids), max(len(row.ids), model.shape.length)
        by_length.setdefault(bucket(max(count, SHORTEST), most), []).append(number)
    out: list[Any] = [None] * len(rows)
    for length, numbers in sorted(by_length.items()):
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            batch = _batch([rows[number] for number in part], size, length)
            if tokens is not None:
                batch["options"] = np.zeros((size, OPTIONS), np.int32)
                batch["options"][: len(part)] = tokens[part]
            mine = {name: column[sharding.local_rows(mesh, size)] for name, column in batch.items()}
            told = sharding.fetch(read(model, subject.params, sharding.place_rows(mine, mesh)))
            for number, value in zip(part, told[: len(part)].astype(np.float64), strict=True):
                out[number] = value
    return out


@functools.partial(jax.jit, static_argnums=0)
def _whole(model: Model, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    """Of each row the log-probability of its weighed tokens, and 1 if all of them are the likeliest, [B, 2]."""
    told = model.token_stats(params, rows, want=("logprobs", "greedy"))
    greedy = jnp.all((told.greedy == 1) | ~rows["mask"], axis=1)
    return jnp.stack([told.logprobs.sum(axis=1), greedy.astype(jnp.float32)], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _next(model: Model, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    """Of each row each option's log-probability as its next token, and 1 if it is the likeliest, [B, OPTIONS, 2]."""
    hidden = model.apply(params, rows["tokens"], rows["segments"], rows["positions"])
    last = jnp.maximum(rows["segments"].sum(axis=1) - 1, 0)  # an empty row has no last token
    logits = model.logits(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]
    told = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), rows["options"], axis=1)
    return jnp.stack([told, rows["options"] == jnp.argmax(logits, axis=-1)[:, None]], axis=-1)


def _batch(rows: Sequence[Span], size: int, length: int) -> dict[str, np.ndarray]:
    """Rows for `token_stats`, [size, length], filled up with empty ones."""
    tokens, mask = np.zeros((size, length), np.int32), np.zeros((size, length), np.bool_)
    segments = np.zeros((size, length), np.int32)
    for place, row in enumerate(rows):
        end = len(row.ids)
        tokens[place, :end], segments[place, :end], mask[place, row.start : end] = row.ids, 1, True
    positions = np.where(segments > 0, np.arange(length, dtype=np.int32)[None], 0)
    return {"tokens": tokens, "segments": segments, "positions": positions, "mask": mask}


class RewardModel:
    """Scores answers; it neither weighs nor writes."""

    writes = False

    def __init__(self, rewards: Rewards):
        self.name, self._rewards = rewards.name, rewards

    def scores(self, asked: Sequence[Asked]) -> list[float | Refusal]:
        """Each option behind its text as training has it; what is over the context is refused, not cut."""
        encoder, context = self._rewards.encoder, self._rewards.length
        message = lambda role, text: (Message(role, text),)
        chat = lambda a: (message("user", a.prompt), message("assistant", a.option))
        rows = encoder.encode_many([chat(a) if encoder.chat else (a.plain, f" {a.option}") for a in asked])
        found: list[float | Refusal] = []
        kept: dict[int, np.ndarray] = {}
        for place, row in enumerate(rows):
            if isinstance(row, Refusal):
                found.append(row)
                continue
            fits = len(row.ids) <= context
            found.append(0.0 if fits else Refusal(f"{len(row.ids)} tokens, over the context of {context}"))
            if fits:
                kept[place] = row.ids
        scores = combine(self._rewards.scores(list(kept.values())), "mean") if kept else []
        for place, score in zip(kept, scores, strict=True):
            found[place] = finite(float(score), "score")
        return found

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """As a judge that knows no order: the answer with the higher score is better."""
        asked = [
            Asked(str(p.prompt), f"Question: {p.prompt}\nAnswer:", str(x)) for p in pairs for x in (p.first, p.second)
        ]
        told = iter(self.scores(asked))
        verdicts = []
        for first in told:
            second = next(told)
            if isinstance(first, Refusal) or isinstance(second, Refusal):
                verdicts.append(both(None, None, str(first if isinstance(first, Refusal) else second)))
            else:
                chance = (1.0 + np.sign(first - second)) / 2
                verdicts.append(Verdict(float(chance)))
        return verdicts

    def likelihoods(self, asked: Sequence[Asked]) -> list[float | Refusal]:
        raise TypeError(f"{self.name} is a reward model and has no likelihoods")

    def answers(self, asked: Sequence[Asked]) -> list[str | Refusal]:
        raise TypeError(f"{self.name} is a reward model and writes nothing")
