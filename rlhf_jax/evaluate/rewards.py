"""Scores of a reward model, or of the members of an ensemble: of texts, of token rows, of the steps of solutions."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.data.conversions import joined
from rlhf_jax.data.cutting import fit
from rlhf_jax.data.rows import Message, Text
from rlhf_jax.data.steps import Pieces
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.models.decoder import Model
from rlhf_jax.sampling.sampler import bucket

ROWS = 64  # answers that are scored at a time
SHORTEST = 64  # the smallest length that rows are filled up to
LAM = 0.5

How = Literal["mean", "minimum", "mean_less_variance"]
COMBINED: Mapping[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "mean": lambda scores, lam: scores.mean(axis=0),
    "minimum": lambda scores, lam: scores.min(axis=0),
    "mean_less_variance": lambda scores, lam: scores.mean(axis=0) - lam * scores.var(axis=0),
}


def combine(scores: np.ndarray, how: str, lam: float = LAM) -> np.ndarray:
    """One score an answer from those of the members [members, N]; of one member its own, whatever the way.

    mean; minimum; mean_less_variance: mean - lam * variance over the members (the sum of squares over M, not M - 1).

    Args: lam: 1 / unit of the scores.
    References: Coste et al. 2024, arXiv:2310.02743, sec. 3.

    >>> print(combine(np.array([[1.0, 0.0], [3.0, 0.0]]), "mean_less_variance", 0.5))
    [1.5 0. ]
    """
    return COMBINED[how](np.asarray(scores, np.float64), lam)


def lowest(scores: np.ndarray) -> int | None:
    """The member [members, N] that alone is the minimum of 95% of the answers or more, so that it says nothing else.

    Comparisons leave each member's zero free. None if there is no such member, or but one.

    >>> print(lowest(np.array([[1.0, 3.0], [0.5, 2.0]])))
    1
    """
    if len(scores) < 2 or not scores.shape[1]:
        return None
    times = np.bincount(np.argmin(scores, axis=0), minlength=len(scores))
    return int(times.argmax()) if times.max() >= 0.95 * scores.shape[1] else None


class Rewards:
    """One or several models of scores that read the same tokens.

    Called as a scorer it gives one number an answer, the members' scores combined.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[Subject],
        *,
        how: How = "mean",
        lam: float = LAM,
        chat_template: str | None = None,
    ):
        """Args:
          name: what messages call it.
          members: with score heads; those of one shape compile once.
          how, lam: as of `combine`, for the scorer.
          chat_template: Jinja file in the place of the tokenizers' own.
        Errors: UserError for members whose tokenizers differ.
        """
        encoders = [Encoder(member.tokenizer, chat_template, trailing=False) for member in members]
        if len({encoder.fingerprint for encoder in encoders}) > 1:
            raise UserError(f"the members of {name} have different tokenizers, so their scores can't be combined.")
        self.name, self.members, self.encoder = name, tuple(members), encoders[0]
        self.length = min(member.model.shape.length for member in members)
        self._how, self._lam = how, lam

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """In the form of a scorer; of the columns `tools` is read, what each prompt offers."""
        offered = columns.get("tools") or [None] * len(prompts)
        tools = [text if isinstance(text, str) else json.dumps(text) if text else "" for text in offered]
        rows = self.encode([_text(p) for p in prompts], [_text(c) for c in completions], tools)
        return combine(self.scores([row.ids for row in rows]), self._how, self._lam).tolist()

    def encode(
        self, prompts: Sequence[Text], completions: Sequence[Text], tools: Sequence[str] | None = None
    ) -> list[Tokens]:
        """Each answer behind its prompt as training has it, the oldest prompt tokens cut where it is too long.

        Errors: UserError naming the first answer that can't be encoded, or doesn't fit without any prompt.
        """
        offered = tools or [""] * len(prompts)
        return self._fitted(self.encoder.encode_many(list(zip(prompts, completions, offered, strict=True))), "answer")

    def encode_steps(self, prompts: Sequence[Text], solutions: Sequence[Sequence[Text]]) -> list[Tokens]:
        """Each solution, the texts of its steps, as `encode`; `ends` says where its steps end."""
        whole = [joined(steps) for steps in solutions]
        items = [(prompt, text, "", ends) for prompt, (text, ends) in zip(prompts, whole, strict=True)]
        return self._fitted(self.encoder.encode_many(items), "solution")

    def encode_cut(
        self, prompts: Sequence[Text], answers: Sequence[str], ends: Sequence[Sequence[int]]
    ) -> tuple[list[Tokens], list[np.ndarray]]:
        """Whole answers, as `encode`, and where in their tokens steps end that are given by characters.

        A step that ends inside a token ends behind it, and several may end in one: nothing is refused for that.

        Args:
          ends: for each answer the characters of its text up to the end of each of its steps.
        """
        replies = [
            text if isinstance(prompt, str) else (Message("assistant", text),)
            for prompt, text in zip(prompts, answers, strict=True)
        ]
        rows, pieces, places = self.encode(prompts, replies), Pieces(self.members[0].tokenizer), []
        for row, text, own in zip(rows, answers, ends, strict=True):
            said, upto = pieces(row.ids[row.start :])
            # What a template writes before an answer, or strips off it, is no part of a step.
            begins = max(said.rfind(text.strip()), 0) - (len(text) - len(text.lstrip()))
            found = np.searchsorted(upto, begins + np.asarray(own, np.int64))
            places.append(row.start + np.minimum(found, len(upto) - 1))
        return rows, places

    def _fitted(self, encoded: Sequence[Tokens | Exception], what: str) -> list[Tokens]:
        rows = []
        for number, found in enumerate(encoded, start=1):
            if isinstance(found, Exception):
                raise UserError(f"{what} number {number} can't be scored by {self.name}: {found}.")
            fitted = fit((found,), self.length)
            if fitted is None:
                raise UserError(
                    f"{what} number {number} has {len(found) - found.start} tokens without its prompt and doesn't fit "
                    f"the context of {self.name}, {self.length}; leave it out or give another reward model."
                )
            rows += fitted
        return rows

    def scores(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """The score of each row of token ids, read at its last token, float64 [members, N]."""
        found = self.scores_at(rows, [np.asarray([len(row) - 1]) for row in rows])
        return np.stack([one[:, 0] for one in found], axis=1) if found else np.zeros((len(self.members), 0))

    def step_scores(self, rows: Sequence[Tokens]) -> list[np.ndarray]:
        """Of each row the scores at the last token of each step, [members, steps]."""
        return self.scores_at([row.ids for row in rows], [row.ends for row in rows])

    def scores_at(self, rows: Sequence[np.ndarray], places: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each row the scores at these places, [members, places], in the order of the rows.

        Rows of like length are scored together; a length compiles once, for all members of one shape.
        """
        shards = max(member.model.layout.shards for member in self.members)
        size = -(-ROWS // shards) * shards
        self._check(rows)
        by_length: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            by_length.setdefault(bucket(max(len(row), SHORTEST), self.length), []).append(number)
        out: list[Any] = [None] * len(rows)
        for length, numbers in sorted(by_length.items()):
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                batch = _batch([rows[number] for number in part], size, length)
                told = np.stack([_scores(member, batch) for member in self.members])
                for place, number in enumerate(part):
                    out[number] = told[:, place, places[number]].astype(np.float64)
        return out

    def _check(self, rows: Sequence[np.ndarray]) -> None:
        largest = max((int(row.max()) for row in rows), default=0)
        vocab = min(member.model.shape.vocab for member in self.members)
        if largest >= vocab:
            raise UserError(
                f"the tokenizer of {self.name} gives token {largest}, but the model's vocabulary ends at {vocab - 1}; "
                "give a folder whose tokenizer belongs to its model."
            )


def _text(given: Any) -> Text:
    """A prompt or an answer as scorers get it, as rows have it."""
    if isinstance(given, str):
        return given
    others = ({k: v for k, v in turn.items() if k not in ("role", "content")} for turn in given)
    mores = [json.dumps(other) if other else "" for other in others]
    return tuple(Message(t["role"], t["content"] or "", more) for t, more in zip(given, mores, strict=True))


def _batch(rows: Sequence[np.ndarray], size: int, length: int) -> dict[str, np.ndarray]:
    """Rows of token ids for `Model.score`, filled up with empty ones."""
    tokens, segments = np.zeros((size, length), np.int32), np.zeros((size, length), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)], segments[place, : len(row)] = row, 1
    positions = np.where(segments > 0, np.arange(length, dtype=np.int32)[None], 0)
    return {"tokens": tokens, "segments": segments, "positions": positions}


def _scores(member: Subject, batch: dict[str, np.ndarray]) -> np.ndarray:
    """[B, T] on the host."""
    mesh = member.model.layout.mesh
    assert mesh is not None
    mine = sharding.local_rows(mesh, len(batch["tokens"]))
    placed = sharding.place_rows({name: column[mine] for name, column in batch.items()}, mesh)
    return sharding.fetch(_score(member.model, member.params, placed))


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Model, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    return model.score(params, rows)
