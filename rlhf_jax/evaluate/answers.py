"""A model's answers to prompts, with the log-probabilities that it and another model give them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.data.rows import Text
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.models.decoder import Model
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Completion, Sampler, bucket

ROWS = 64  # answers that are measured at a time


class Subject(NamedTuple):
    """A model that is evaluated."""

    name: str
    model: Model
    params: Any
    tokenizer: Any
    end_ids: tuple[int, ...] = ()  # tokens that end an answer, besides those of the tokenizer


class Answers(NamedTuple):
    """What a model answered: for each prompt, for each of its samples."""

    prompts: list[np.ndarray]  # token ids
    completions: list[list[Completion]]
    texts: list[list[str]]


def answer(
    subject: Subject,
    encoder: Encoder,
    sampler: Sampler,
    prompts: Sequence[Text],
    sampling: Sampling,
    seed: int,
    tools: Sequence[str] | None = None,
) -> Answers:
    """Draws the sampler's number of answers to each prompt.

    Args:
      tools: what each prompt offers, JSON text, "" for none; None: none do.
      sampler: of a model like the subject's; one serves all parameters of it, and compiles once.
    Errors: UserError naming a prompt that can't be encoded, or that leaves no room for an answer.
    """
    ids = []
    for number, encoded in enumerate(encoder.prompts(prompts, tools)):
        if isinstance(encoded, Exception):
            raise UserError(f"prompt number {number + 1} can't be used by {subject.name}: {encoded}.")
        if encoded.max() >= subject.model.shape.vocab:
            raise UserError(
                f"the tokenizer of {subject.name} gives token {encoded.max()}, but the model's vocabulary ends at "
                f"{subject.model.shape.vocab - 1}; give a folder whose tokenizer belongs to its model."
            )
        ids.append(encoded)
    key = jax.random.PRNGKey(seed)
    drawn = sampler.generate(subject.params, ids, sampling, key, stop_ids=encoder.stop_ids(subject.end_ids))
    text = text_of(subject.tokenizer)
    texts = [[text(ids[c.row], c) for c in row] for row in drawn]
    return Answers(ids, drawn, texts)


def text_of(tokenizer: Any) -> Callable[[np.ndarray, Completion], str]:
    """How a completion reads behind its prompt: some tokenizers drop the space before a first word.

    The token that ended it is no text, also where the tokenizer doesn't hold it for a special one.
    """

    def read(prompt: np.ndarray, completion: Completion) -> str:
        tokens = completion.tokens[: len(completion.tokens) - (completion.stop == "end")]
        # Cleaned up, " ." would become "." and the cut would be elsewhere.
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before = tokenizer.decode(prompt.tolist(), **options)
        return tokenizer.decode([*prompt.tolist(), *tokens.tolist()], **options)[len(before) :]

    return read


def logprobs(subject: Subject, answers: Answers, temperature: float) -> list[list[float]]:
    """The log-probability of every answer under a model, in nats, of the whole softmax at the temperature."""
    model, mesh = subject.model, subject.model.layout.mesh
    assert mesh is not None
    flat = [(answers.prompts[c.row], c.tokens) for row in answers.completions for c in row]
    length = bucket(max(len(prompt) + len(tokens) for prompt, tokens in flat), model.shape.length)
    size = -(-ROWS // model.layout.shards) * model.layout.shards
    out: list[float] = []
    for start in range(0, len(flat), size):
        rows = _rows(flat[start : start + size], size, length)
        mine = {name: column[sharding.local_rows(mesh, size)] for name, column in rows.items()}
        out += sharding.fetch(_logprob(model, subject.params, sharding.place_rows(mine, mesh), temperature)).tolist()
    values = iter(out)
    return [[next(values) for _ in row] for row in answers.completions]


@functools.partial(jax.jit, static_argnums=0)
def _logprob(model: Model, params: Any, rows: dict[str, jax.Array], temperature: float) -> jax.Array:
    return model.token_stats(params, rows, temperature=temperature).logprobs.sum(axis=1)


def _rows(flat: Sequence[tuple[np.ndarray, np.ndarray]], size: int, length: int) -> dict[str, np.ndarray]:
    """Prompts with their completions as rows for `token_stats`, filled up with empty ones."""
    tokens, mask = np.zeros((size, length), np.int32), np.zeros((size, length), np.bool_)
    segments = np.zeros((size, length), np.int32)
    for row, (prompt, completion) in enumerate(flat):
        end = len(prompt) + len(completion)
        tokens[row, :end] = np.concatenate([prompt, completion])
        segments[row, :end] = 1
        mask[row, len(prompt) : end] = True
    positions = np.where(segments > 0, np.arange(length, dtype=np.int32)[None], 0)
    return {"tokens": tokens, "segments": segments, "positions": positions, "mask": mask}
