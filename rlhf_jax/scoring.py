"""What each completion of a rollout earns: by a reward model, by functions, or both."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import registry, sharding
from rlhf_jax.algorithms.reward import answer_scores
from rlhf_jax.algorithms.rollouts import Scores
from rlhf_jax.algorithms.step import Batch, by_pieces, flat_rows
from rlhf_jax.data import dataset
from rlhf_jax.data.rows import Message, Text
from rlhf_jax.data.steps import TokenEnds, step_pattern
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import text_of
from rlhf_jax.evaluate.process import step_gains
from rlhf_jax.evaluate.rewards import Rewards, combine
from rlhf_jax.evaluate.step_labels import VERIFIERS, check_verifier, verified
from rlhf_jax.feedback.rewards import RewardFunctions, RewardsConfig
from rlhf_jax.models.decoder import Model
from rlhf_jax.sampling.sampler import Completion

SHOWN = 32  # rollouts of an evaluation that samples.jsonl gets
VERIFIED = "steps"  # the same of what a verifier says
STEP_FLAG = "--config.rewards.step_end"
MODEL = "model"  # the name of the reward model's score beside those of functions


class Score:
    """A batch of rollouts -> what each completion earns, on the host."""

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Any,
        examples: Sequence[dataset.Example],
        config: RewardsConfig,
        model: Rewards | None,
        *,
        length: int,
        pieces: int = 1,
    ):
        """Args:
          encoder, tokenizer: the policy's.
          examples: the prompts, those that are trained and those that are held out.
          model: what config.model names.
          length: most tokens of a prompt with its completion.
          pieces: that a reward model reads a rollout in.
        Errors: UserError for what the model can't read, and for functions that can't be called.
        """
        self._asked = {example.index: example for example in examples}
        self._text, self._model, self._config = text_of(tokenizer), model, config
        self._pieces = pieces
        self._same = model is not None and model.encoder.fingerprint == encoder.fingerprint
        if model is not None and self._same and model.length < length:
            raise UserError(
                f"rows may have {length} tokens and the context of {model.name} is {model.length}; "
                "lower --config.data.length or give another reward model."
            )
        self._ends = None
        if config.step_end is not None:
            self._ends = TokenEnds(tokenizer, step_pattern(config.step_end, STEP_FLAG))
        self._functions = functions_of(config) if config.functions else None
        self._columns = tuple(dict.fromkeys(name for example in examples for name in example.columns))
        if self._functions is not None:  # whether they can be called at all is told before anything is drawn
            self._functions([], [], {name: [] for name in self._columns})
        self._verifier = None if config.verifier is None else registry.resolve(VERIFIERS, config.verifier, "verifier")
        first = [MODEL] if model is not None else [VERIFIED] if self._verifier is not None else []
        if self._verifier is not None:
            check_verifier(self._verifier, self._columns)
        self.names = (*first, *config.functions)

    def __call__(self, batch: Batch) -> Scores:
        real = sharding.fetch(batch["weight"]) > 0
        if not self.names:
            return Scores(np.zeros((len(real), 0), np.float32), np.zeros((len(real), 0), bool), np.zeros(0), ())
        said = self.texts(batch) if self._functions is not None or not self._same else []
        rewards, applies, weights, steps = [], [], [], None
        if self._model is not None or self._verifier is not None:
            scores, steps = self._by_steps(batch, said) if self._ends else (self._by_answers(batch, said), None)
            rewards.append(scores[:, None])
            applies.append(np.ones((int(real.sum()), 1), bool))
            weights.append([self._config.model_weight])
        if self._functions is not None:
            told = self._functions(*self._apart(said))
            rewards, applies, weights = [*rewards, told.rewards], [*applies, told.applies], [*weights, told.weights]
        shape = len(real), len(self.names)
        spread = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for whole, parts in zip(spread, (rewards, applies), strict=True):
            whole[real] = np.concatenate(parts, axis=1)
        told, apply = _agreed(spread)
        return Scores(told, apply, np.concatenate(weights).astype(np.float32), self.names, steps)

    def texts(self, batch: Batch) -> list[tuple[dataset.Example, str]]:
        """Each completion that is not padding: the example that it answers, and how it reads."""
        names = ("tokens", "mask", "segments", "index", "ended", "weight")
        tokens, mask, segments, index, ended, weight = (sharding.fetch(batch[name]) for name in names)
        said = []
        for row in np.flatnonzero(weight > 0):
            ids, answer = tokens[row, 0], mask[row, 0]
            stop = "end" if ended[row] else "length"
            nothing = np.zeros(0, np.float32)
            completion = Completion(0, 0, ids[answer], nothing, nothing, stop)
            prompt = ids[(segments[row, 0] > 0) & ~answer]
            said.append((self._asked[int(index[row])], self._text(prompt, completion)))
        return said

    def _apart(self, said: Sequence[tuple[dataset.Example, str]]) -> tuple[list[Text], list[str], dict[str, list[Any]]]:
        """Prompts, completions, and the columns that any row has; None where a prompt's hasn't one."""
        columns = {name: [example.columns.get(name) for example, _ in said] for name in self._columns}
        return [example.text for example, _ in said], [text for _, text in said], columns

    def shown(self, batch: Batch) -> list[dict[str, Any]]:
        """The first rollouts of a prepared batch as they read, with what they earned."""
        told = {"score": "score"} if "score" in batch else {}
        told |= {"kl": "sequence_kl"} if "ref_logprobs" in batch else {}
        columns = {name: sharding.fetch(jnp.asarray(batch[column])) for name, column in told.items()}
        real = np.flatnonzero(sharding.fetch(batch["weight"]) > 0)
        rows = []
        for (example, text), row in list(zip(self.texts(batch), real, strict=True))[:SHOWN]:
            prompt = example.text if isinstance(example.text, str) else example.text[-1].content
            numbers = {name: float(column[row]) for name, column in columns.items()}
            rows.append({"row": example.where, "prompt": prompt, "completion": text, **numbers})
        return rows

    def _by_answers(self, batch: Batch, said: Sequence[tuple[dataset.Example, str]]) -> np.ndarray:
        """The reward model's score of each completion, [N]."""
        if self._same:
            scores = self._by_tokens(batch, _answer_scores)[:, sharding.fetch(batch["weight"]) > 0]
        else:
            assert self._model is not None
            prompts = [example.text for example, _ in said]
            rows = self._model.encode(prompts, [_reply(p, text) for p, (_, text) in zip(prompts, said, strict=True)])
            scores = self._model.scores([row.ids for row in rows])
        return combine(scores, self._config.how, self._config.lam)

    def _by_steps(self, batch: Batch, said: Sequence[tuple[dataset.Example, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Of a model or a verifier of steps the score of each completion, [N], and what its tokens add, float32 [B, T].

        That is 0 but at the last token of each step, and weighted as the score is.
        """
        tokens, mask, ended, weight = (sharding.fetch(batch[name]) for name in ("tokens", "mask", "ended", "weight"))
        real, each, places = np.flatnonzero(weight > 0), np.zeros(mask[:, 0].shape, np.float32), []
        for row in real:
            at = np.flatnonzero(mask[row, 0])
            words = tokens[row, 0, at[: len(at) - int(ended[row])]]
            assert self._ends is not None
            # Of what ends at once the one step is the end itself.
            places.append(at[np.maximum(self._ends(words), 1) - 1])
        if self._verifier is not None:
            prompts, steps = [example.text for example, _ in said], self._cut(batch, real, places, said)
            gains = [_lost(labels) for labels in verified(self._verifier, prompts, steps, self._apart(said)[2])]
        else:
            told = self._of_tokens(batch, real, places) if self._same else self._of_texts(batch, real, places, said)
            scores = [combine(one, self._config.how, self._config.lam) for one in told]
            gains = [step_gains(one, self._config.step_score) for one in scores]
        for row, at, gain in zip(real, places, gains, strict=True):
            each[row, at] = self._config.model_weight * gain
        return np.asarray([gain.sum() for gain in gains]), _agreed(each)

    def _of_tokens(self, batch: Batch, real: np.ndarray, places: Sequence[np.ndarray]) -> list[np.ndarray]:
        """[members, steps] of each completion, read where its steps end in the tokens as they were drawn."""
        scores = self._by_tokens(batch, _token_scores)
        return [scores[:, row, at] for row, at in zip(real, places, strict=True)]

    def _of_texts(
        self,
        batch: Batch,
        real: np.ndarray,
        places: Sequence[np.ndarray],
        said: Sequence[tuple[dataset.Example, str]],
    ) -> list[np.ndarray]:
        """The same of a reward model with another tokenizer, which reads the texts."""
        assert self._model is not None
        prompts, cuts = [example.text for example, _ in said], self._cut(batch, real, places, said)
        ends = [list(itertools.accumulate(map(len, steps))) for steps in cuts]
        rows, at = self._model.encode_cut(prompts, [text for _, text in said], ends)
        return self._model.scores_at([row.ids for row in rows], at)

    def _cut(
        self,
        batch: Batch,
        real: np.ndarray,
        places: Sequence[np.ndarray],
        said: Sequence[tuple[dataset.Example, str]],
    ) -> list[list[str]]:
        """The texts of the steps of each completion, whose last tokens stand at these places."""
        tokens, mask, segments = (sharding.fetch(batch[name])[:, 0] for name in ("tokens", "mask", "segments"))
        nothing, solutions = np.zeros(0, np.float32), []
        for row, at, (_, whole) in zip(real, places, said, strict=True):
            asked, first = tokens[row][(segments[row] > 0) & ~mask[row]], int(np.flatnonzero(mask[row])[0])
            begun = [tokens[row, first : end + 1] for end in at[:-1]]
            ends = [len(self._text(asked, Completion(0, 0, ids, nothing, nothing, "length"))) for ids in begun]
            solutions.append([whole[a:b] for a, b in zip([0, *ends], [*ends, len(whole)], strict=True)])
        return solutions

    def _by_tokens(self, batch: Batch, read: Any) -> np.ndarray:
        """[members, ...], of models that read the tokens as they were drawn."""
        assert self._model is not None
        rows = {name: batch[name] for name in ("tokens", "mask", "segments", "positions", "weight")}
        told = [read(member.model, self._pieces, member.params, rows) for member in self._model.members]
        return np.stack([sharding.fetch(one) for one in told]).astype(np.float64)


def _lost(labels: Sequence[bool]) -> np.ndarray:
    """-1 at the first wrong step, else 0, [steps]: the whole is 0 if all steps are right, else -1.

    >>> print(_lost([True, False, False]))
    [ 0. -1.  0.]
    """
    return np.where(np.arange(len(labels)) == (labels.index(False) if False in labels else -1), -1.0, 0.0)


def functions_of(rewards: RewardsConfig) -> RewardFunctions:
    """The functions that a config names. Errors: UserError as `RewardFunctions`."""
    weights = rewards.weights or None
    return RewardFunctions.named(rewards.functions, weights, deadline=rewards.deadline)


def _reply(prompt: Text, text: str) -> Text:
    """An answer in the form of its prompt."""
    return text if isinstance(prompt, str) else (Message("assistant", text),)


def _agreed(arrays: Any) -> Any:
    """Those of the first process: a function may not say the same twice."""
    if jax.process_count() == 1:
        return arrays
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(arrays))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer_scores(model: Model, pieces: int, params: Any, batch: Batch) -> jax.Array:
    """[B], read a piece of the rows at a time."""
    told = lambda rows: answer_scores(model.score(params, flat_rows(rows)), rows)[:, 0]
    return by_pieces(told, batch, pieces, model.layout)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _token_scores(model: Model, pieces: int, params: Any, batch: Batch) -> jax.Array:
    """[B, T], the score at every token, read as `_answer_scores`."""
    told = lambda rows: model.score(params, flat_rows(rows))
    return by_pieces(told, batch, pieces, model.layout)
