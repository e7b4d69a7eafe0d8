"""A language model of this project as a judge: the chance of the option is read from its log-probabilities."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.data.rows import Message, Refusal, Text
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judges import OPTIONS, Pair, Template, Verdict, both, clamped
from rlhf_jax.models.decoder import Model
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Completion, Sampler, bucket, number_of

ROWS = 32  # that are read at a time
SHORTEST = 64  # the smallest length that rows are filled up to
TOO_LONG = "longer than the judge's context"


class Span(NamedTuple):
    """A row of tokens of which some are read, those from `start` to before `stop`."""

    ids: np.ndarray  # int32 [n]
    start: int
    stop: int


class LocalJudge:
    """Asks a model which of two answers is better, in both orders, and reads the chance of " A" against " B".

    In one order it is P(" A") / (P(" A") + P(" B")), each the product over the tokens of the whole option behind the
    question and the cue; the verdict is the mean of both orders. With a template of reasoning the model first writes a
    rationale, which its cue ends, and the chance of each order is clamped to 0.4..0.6 before the mean. A rationale
    depends on its question and the seed alone.

    With a chat template the question is a user's message and rationale, cue and option are the answer to it; without
    one all of it is one text.

    References: Lee et al. 2023, arXiv:2309.00267; Bai et al. 2022, arXiv:2212.08073, sec. 4.1.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        params: Any,
        tokenizer: Any,
        template: Template,
        *,
        end_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
        seed: int = 0,
        chat_template: str | None = None,
        options: tuple[str, str] = OPTIONS,
        gap: str = "\n\n",
    ):
        """Args:
        name: what messages call it.
        model: with a word head, on a mesh.
        end_ids: tokens that end a rationale, besides those of the tokenizer.
        sampling: how rationales are drawn; None: as `Sampling` has it. Read with a template of reasoning alone.
        seed: of the rationales.
        chat_template: Jinja file in the place of the tokenizer's own.
        options: what stands behind the cue for the answer shown first and for the other.
        gap: what stands between question and cue where there is no chat template.
        """
        self.name, self.model, self.params, self.template = name, model, params, template
        self._encoder, self._shown, self._gap = Encoder(tokenizer, chat_template), options, gap
        self._tokenizer, self._seed = tokenizer, seed
        self._end_ids, self._sampling = tuple(end_ids), sampling or Sampling()
        self._sampler = Sampler(model, slots=ROWS) if template.reasoning else None

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Errors: UserError for a tokenizer that doesn't belong to the model."""
        asked = [self.template.fill(pair, swapped) for pair in pairs for swapped in (False, True)]
        # A question that is asked twice has one answer: so equal answers are as good as each other, to the bit.
        said = self._chances(list(dict.fromkeys(asked)))
        verdicts = []
        for ahead, behind in zip(asked[::2], asked[1::2], strict=True):
            (first, why), (second, other) = said[ahead], said[behind]
            verdicts.append(both(first, None if second is None else 1 - second, why or other))
        return verdicts

    def _chances(self, asked: Sequence[str]) -> Mapping[str, tuple[float | None, str]]:
        """Of each question the chance that the answer shown first is better, or None and why."""
        before, failed = self._begun(asked)
        rows: list[Span] = []
        places: dict[str, int] = {}
        for question, begun in before.items():
            spans = self._options(question, begun)
            if isinstance(spans, str):
                failed[question] = spans
            else:
                places[question] = len(rows)
                rows += spans
        logprobs = self._logprobs(rows)
        said: dict[str, tuple[float | None, str]] = {question: (None, why) for question, why in failed.items()}
        for question, place in places.items():
            chance = _sigmoid(logprobs[place] - logprobs[place + 1])
            said[question] = clamped(chance) if self.template.reasoning else chance, ""
        return said

    # What is asked

    def _begun(self, asked: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """How the answer to each question begins, up to the option; and the questions that can't be asked, with why."""
        cue, failed = self.template.cue, {}
        if self._sampler is None:
            return dict.fromkeys(asked, cue), failed
        most = self.model.shape.length - self._sampling.max_new_tokens
        prompts: dict[str, np.ndarray] = {}
        for question, ids in zip(asked, self._encoder.prompts([self._prompt(one) for one in asked]), strict=True):
            if isinstance(ids, Refusal):
                failed[question] = str(ids)
            elif len(ids) > most:
                failed[question] = TOO_LONG
            else:
                self._check(ids)
                prompts[question] = ids
        rationales = zip(prompts, self._rationales(list(prompts.values())), strict=True)
        return {question: f"{text}\n\n{cue}" if text else cue for question, text in rationales}, failed

    def _rationales(self, prompts: Sequence[np.ndarray]) -> list[str]:
        assert self._sampler is not None
        # The number that its randomness comes from is the question's own, whatever stands beside it.
        numbers = [number_of(ids) for ids in prompts]
        drawn = self._sampler.generate(
            self.params, prompts, self._sampling, jax.random.PRNGKey(self._seed),
            stop_ids=self._encoder.stop_ids(self._end_ids), rows=numbers,
        )  # fmt: skip
        return [self._text(ids, one) for ids, (one,) in zip(prompts, drawn, strict=True)]

    def _text(self, prompt: np.ndarray, completion: Completion) -> str:
        """What was written, up to the cue if the model wrote that too."""
        tokens = completion.tokens[: len(completion.tokens) - (completion.stop == "end")]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = self._tokenizer.decode(prompt.tolist(), **options)
        text = self._tokenizer.decode([*prompt.tolist(), *tokens.tolist()], **options)[len(before) :]
        return text.partition(self.template.cue)[0].strip()

    def _prompt(self, question: str) -> Text:
        return (Message("user", question),) if self._encoder.chat else f"{question}{self._gap}"

    def _options(self, question: str, begun: str) -> list[Span] | str:
        """The row of each option, or why there is none."""
        spans = []
        for option in self._shown:
            answer: Text = (Message("assistant", begun + option),) if self._encoder.chat else begun + option
            try:
                # The option is the second of two steps, so that its tokens are known and nobody else's.
                ends = len(begun), len(begun) + len(option)
                row = self._encoder.encode(self._prompt(question), answer, ends=ends)
            except Refusal as refusal:
                return str(refusal)
            span = _span(row)
            self._check(span.ids)
            if len(span.ids) > self.model.shape.length:
                return TOO_LONG
            spans.append(span)
        return spans

    def _check(self, ids: np.ndarray) -> None:
        if ids.max() >= self.model.shape.vocab:
            raise UserError(
                f"the tokenizer of {self.name} gives token {ids.max()}, but the model's vocabulary ends at "
                f"{self.model.shape.vocab - 1}; give a folder whose tokenizer belongs to its model."
            )

    # What the model says

    def _logprobs(self, rows: Sequence[Span]) -> list[float]:
        """The log-probability of the tokens of each row that are read, nats, in the order of the rows.

        Rows of like length are read together; a length compiles once.
        """
        mesh = self.model.layout.mesh
        assert mesh is not None
        size = -(-ROWS // self.model.layout.shards) * self.model.layout.shards
        by_length: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            length = bucket(max(len(row.ids), SHORTEST), self.model.shape.length)
            by_length.setdefault(length, []).append(number)
        out = np.zeros(len(rows), np.float64)
        for length, numbers in sorted(by_length.items()):
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                batch = _batch([rows[number] for number in part], size, length)
                mine = {name: column[sharding.local_rows(mesh, size)] for name, column in batch.items()}
                told = sharding.fetch(_logprob(self.model, self.params, sharding.place_rows(mine, mesh)))
                out[part] = told[: len(part)]
        return out.tolist()


@functools.partial(jax.jit, static_argnums=0)
def _logprob(model: Model, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    return model.token_stats(params, rows).logprobs.sum(axis=1)


def _batch(rows: Sequence[Span], size: int, length: int) -> dict[str, np.ndarray]:
    """Rows for `token_stats`, [size, length], filled up with empty ones."""
    tokens, mask = np.zeros((size, length), np.int32), np.zeros((size, length), np.bool_)
    segments = np.zeros((size, length), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row.ids)], segments[place, : len(row.ids)] = row.ids, 1
        mask[place, row.start : row.stop] = True
    positions = np.where(segments > 0, np.arange(length, dtype=np.int32)[None], 0)
    return {"tokens": tokens, "segments": segments, "positions": positions, "mask": mask}


def _span(row: Tokens) -> Span:
    """The last step of a row; what stands behind it, such as an end token, says nothing of it and is cut off."""
    start, stop = (int(end) + 1 for end in row.ends[-2:])
    return Span(row.ids[:stop], start, stop)


def _sigmoid(difference: float) -> float:
    """1 / (1 + exp(-difference)), which of the negative difference is exactly 1 less it."""
    return 0.5 + 0.5 * math.tanh(difference / 2)
