"""Reward models: a score for every answer, learnt from pairs, rankings, and labels of answers or of their steps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.comparisons import Labels, comparison_means, labels_of, right, row_comparisons
from rlhf_jax.algorithms.completions import completion_sums
from rlhf_jax.algorithms.parts import Part, nothing, rows_as_they_are
from rlhf_jax.algorithms.step import (
    SCORE,
    Batch,
    Judge,
    Mean,
    Objective,
    Reads,
    Term,
    balance_term,
    flat_rows,
    token_weight,
    whole,
)
from rlhf_jax.losses.reward import REWARD, ScoredAnswer, ScoredSteps, ScoreGroup, ScorePair, ScoreRanking
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.logprobs import TokenStats

LOSSES: Mapping[str, Callable[..., Array]] = REWARD
READS = {
    ScorePair: Reads("pair"),
    ScoreGroup: Reads("ranking"),
    ScoreRanking: Reads("ranking"),
    ScoredAnswer: Reads("labelled"),
    ScoredSteps: Reads("stepwise"),
}
BESIDE: tuple[type, ...] = ()  # a model that scores has no likelihood to add
HEAD = "score"


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How a reward model begins, where its scores are 0, and how many are trained at once."""

    head: Annotated[
        Literal["zero", "normal"],
        "a new score head: zeros (the first loss of pairs is log 2), or normal with variance 1 / (width + 1)",
    ] = "zero"
    demonstrations: Annotated[
        tuple[str, ...],
        "good answers whose mean score each checkpoint moves to 0; empty: scores stay as they are",
    ] = ()
    members: Annotated[int, "models that are trained together, each with a seed of its own: an ensemble"] = 1


def new_head(params: Any, key: Array) -> Any:
    """The parameters with a random score head: N(0, 1 / (width + 1)), Stiennon et al. 2020, arXiv:2009.01325."""
    score = params["score"]
    drawn = jax.random.normal(jax.random.fold_in(key, SCORE), score.shape) / (len(score) + 1) ** 0.5
    return params | {"score": drawn.astype(score.dtype)}


def answer_scores(per_token: Array, batch: Batch) -> Array:
    """The score of each answer, read at its last token, [N, K]; 0 where an example has none.

    Args:
      per_token: [B K, T] float32.
      batch: segments [B, K, T]; the last token is found by them, never by what the padding holds.
    """
    segments = batch["segments"]
    ahead = jnp.roll(segments, -1, axis=-1).at[..., -1].set(0)
    last = (segments > 0) & (ahead != segments)
    return completion_sums(jnp.where(last.reshape(per_token.shape), per_token, 0), batch)


def _present(batch: Batch) -> Array:
    """Which answers there are, [N, K] bool."""
    ones = (batch["segments"] > 0).astype(jnp.float32)
    return completion_sums(ones.reshape(-1, ones.shape[-1]), batch) > 0


def _given(batch: Batch) -> Labels:
    """What the labels say; the answers of a pair whose label is a coin flip count as equal."""
    given = labels_of(batch, _present(batch))
    if "probability" not in batch:
        return given
    tied = batch["probability"].reshape(-1, 1) == 0.5
    return given._replace(ranks=jnp.where(tied, 0, given.ranks))


def make_objective(model: Model, parts: Sequence[Part], config: Any = None) -> Objective:
    """The mean over examples of a loss of scores, over steps for losses of steps, or of several losses of one form.

    Args:
      model: with a score head.
      parts: of `losses.reward`.
    A batch has tokens, mask, segments, positions [B, K, T] and weight [B]; of pairs and answers labels [B, K], of
    groups ranks [B, K] and preferred [B, K, K], of steps step_ends and step_labels [B, 1, T]. In a packed batch what
    is [B] here is [B, M].
    """
    judge = make_judge(model, parts, config)
    return lambda params, frozen, hyper, batch, key: judge(params, frozen, hyper, batch, key)[:2]


def make_judge(model: Model, parts: Sequence[Part], config: Any = None) -> Judge:
    """As `make_objective`; also what is said of each example, float32 [N].

    loss: the weighted sum of the losses, of steps their mean over the example's; margin: the mean over its
    comparisons, or its steps, of what should be above 0; correct: the share of them that are. NaN where it has none.
    """
    by_step = parts[0].takes is ScoredSteps
    compares = READS[parts[0].takes].form in ("pair", "ranking")

    def judge(params, frozen, hyper, batch, key):
        params = whole(params, frozen)
        if compares:  # a constant is nothing to a comparison, and centring is to move what transformers reads as well
            params = {**params, "score_bias": jax.lax.stop_gradient(params["score_bias"])}
        scores, stats = _scores(model, params, batch)
        terms, means, rows = (_of_steps if by_step else _of_answers)(parts, scores, hyper, batch)
        if len(parts) > 1:
            means |= {f"loss/{name}": Mean(jax.lax.stop_gradient(t.total), t.count) for name, t in terms.items()}
        return *balance_term(model, stats, batch, hyper, terms, means), rows

    return judge


def _scores(model: Model, params: Any, batch: Batch) -> tuple[Array, TokenStats]:
    """The score at every token, [B K, T], and of a mixture how evenly its experts are used."""
    if model.shape.experts is None:
        return model.score(params, flat_rows(batch)), TokenStats()
    scores, balance = model.score(params, flat_rows(batch), balance=True)
    return scores, TokenStats(balance=balance)


def _of_answers(parts: Sequence[Part], per_token: Array, hyper: Any, batch: Batch) -> tuple[Any, Any, Any]:
    """Terms, means and rows of losses of whole answers."""
    scores, given = answer_scores(per_token, batch), _given(batch)
    count = jnp.sum(given.weight)
    rows = {part.name: _asked(part, scores, given, hyper, batch) for part in parts}
    sums = {name: jnp.sum(jnp.where(given.weight > 0, loss * given.weight, 0)) for name, loss in rows.items()}
    terms = {name: Term(hyper["weights"][name], total, count) for name, total in sums.items()}
    told, threshold = jax.lax.stop_gradient(scores), jnp.zeros_like(given.weight)
    answers = given.weight[:, None] * given.present
    means = comparison_means(given, told, threshold)
    means["rewards/mean"] = Mean(jnp.sum(told * answers), jnp.sum(answers))
    loss = jnp.asarray(sum(hyper["weights"][name] * loss for name, loss in rows.items()))
    return terms, means, {"loss": loss, **row_comparisons(given, told, threshold)}


def _asked(part: Part, scores: Array, given: Any, hyper: Any, batch: Batch) -> Array:
    """A loss of whole answers, [N]; of single ones that of an example's K is their mean."""
    numbers = part.numbers(hyper, batch)
    if part.takes is ScorePair:
        return part.loss(ScorePair(*scores.T), **numbers)
    if part.takes is ScoreGroup:
        count = scores.shape[1]
        preferred = batch["preferred"].reshape(-1, count, count)
        return part.loss(ScoreGroup(scores, preferred, given.present), **numbers)
    if part.takes is ScoreRanking:
        return part.loss(ScoreRanking(scores, given.ranks, given.present), **numbers)
    flat = part.loss(ScoredAnswer(scores.reshape(-1), given.labels.reshape(-1) > 0), **numbers)
    return jnp.mean(flat.reshape(scores.shape), axis=1)


def _of_steps(parts: Sequence[Part], per_token: Array, hyper: Any, batch: Batch) -> tuple[Any, Any, Any]:
    """Terms, means and rows of losses of steps; each step weighs the same, whatever its solution."""
    ends, labels = (batch[name].reshape(per_token.shape) for name in ("step_ends", "step_labels"))
    used = ends * token_weight(batch).reshape(per_token.shape)
    steps = ScoredSteps(jnp.where(ends, per_token, 0), labels)
    losses = {part.name: part.loss(steps, **part.numbers(hyper, batch)) for part in parts}
    terms = {
        name: Term(hyper["weights"][name], jnp.sum(jnp.where(used > 0, loss * used, 0)), jnp.sum(used))
        for name, loss in losses.items()
    }
    told = jax.lax.stop_gradient(steps.score)
    # A neutral step is neither right nor wrong: nothing is held against it.
    clear = used * (labels != 0.5)
    margin = told * (2 * labels - 1)
    mean = lambda x, w: Mean(jnp.sum(x * w), jnp.sum(w))
    means = {
        "rewards/chosen": mean(told, clear * (labels > 0.5)),
        "rewards/rejected": mean(told, clear * (labels < 0.5)),
        "rewards/accuracies": mean(right(margin), clear),
        "steps/right": mean(labels, clear),
        "steps/count": Mean(jnp.sum(used), jnp.sum(batch["weight"])),
    }
    of_example = lambda x: completion_sums(jnp.where(clear > 0, x * clear, 0), batch)[:, 0]
    count = of_example(jnp.ones_like(clear))
    loss = jnp.asarray(sum(hyper["weights"][name] * loss for name, loss in losses.items()))
    rows = {"loss": loss, "margin": margin, "correct": right(margin)}
    return terms, means, {name: of_example(value) / count for name, value in rows.items()}


make_prepare, make_carry, make_advance, make_skip = rows_as_they_are, nothing, nothing, nothing
