"""On-policy distillation: a student answers, and at each token of its answer it learns what a teacher would say next.

Each call of `prepare` is one rollout of the student's own completions. The teacher reads them in the objective, whose
`frozen` holds its parameters: a column of the batch would need its whole distribution at every token. `params` are the
student's. No reward is needed; one that is given is told and not learnt from.

References: Agarwal et al. 2024, arXiv:2306.13649 (GKD, all of whose data are the student's samples here: lambda = 1).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.asked import Asked
from rlhf_jax.algorithms.parts import Part, nothing
from rlhf_jax.algorithms.rollouts import (
    Around,
    Models,
    RolloutConfig,
    keys,
    learnt,
    mean,
    reward_means,
    score_columns,
    total,
    used_tokens,
)
from rlhf_jax.algorithms.step import (
    Batch,
    Judge,
    Mean,
    Objective,
    Reads,
    Term,
    TrainState,
    balance_term,
    flat_rows,
    whole,
)
from rlhf_jax.errors import UserError
from rlhf_jax.losses.distillation import DISTILLATION, Reading, TwoHeads
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.kl import k3
from rlhf_jax.ops.logprobs import HeadStat, TokenStats, ahead, token_logprobs

LOSSES: Mapping[str, Callable[..., Array]] = DISTILLATION
READS = {TwoHeads: Reads("prompt")}
BESIDE: tuple[type, ...] = ()
HEAD = "words"
POLICY: str | None = None  # the parameters are the student's
ROW = "completion"
SCORED = False  # rewards are only told


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Who teaches."""

    teacher: Annotated[
        str | None, "the model that is learnt from: a run's folder, a Hugging Face folder or a Hub name"
    ] = None

    @property
    def numbers(self) -> dict[str, float]:
        """Those that programs read from hyper["distill"]: there are none."""
        return {}


def refers(config: DistillConfig) -> bool:
    """Whether there is a fixed reference: there is none, the teacher is no former self."""
    return False


def check(config: DistillConfig, rollout: RolloutConfig) -> None:
    """Errors: UserError where there is nobody to learn from."""
    if config.teacher is None:
        raise UserError(
            "there is no teacher to learn from; give --config.distill.teacher=FOLDER_OR_HUB_NAME, a model with the "
            "student's tokenizer."
        )


# ---- what is differentiated


class Said(NamedTuple):
    """What student and teacher say of each token of the completions, float32 [B, T]; 0 elsewhere."""

    loss: Array
    log_ratio: Array  # log S - log T of the token that was drawn, nats, without a gradient
    stats: TokenStats  # the student's entropy, without a gradient, and the balance of its experts if it has some


def _say(models: Models, part: Part, params: Any, frozen: Any, hyper: Any, batch: Batch) -> Said:
    rows, temperature = flat_rows(batch), hyper["rollout"]["temperature"]
    assert models.teacher is not None
    student, teacher = Asked(models.policy, whole(params, frozen)), Asked(models.teacher, frozen.teacher)
    targets, asked = ahead(rows)
    numerics, layout = student.model.numerics, student.model.layout

    def picked(one: Asked, hidden: Array, *want: HeadStat) -> TokenStats:
        fixed = jax.lax.stop_gradient((hidden, one.model.head(one.params)))
        return token_logprobs(
            *fixed, targets, asked, temperature=temperature, soft_cap=one.model.shape.soft_cap, want=want,
            chunk=numerics.chunk, layout=layout,
        )  # fmt: skip

    hidden, balance = student.model.states(student.params, rows, student.model.shape.experts is not None)
    taught, _ = jax.lax.stop_gradient(teacher.model.states(teacher.params, rows))
    heads = TwoHeads(
        hidden, student.model.head(student.params), taught, teacher.model.head(teacher.params), asked,
        Reading(temperature, student.model.shape.soft_cap, teacher.model.shape.soft_cap, numerics.chunk, layout),
    )  # fmt: skip
    loss = part.loss(heads, **part.numbers(hyper, batch))
    own = picked(student, hidden, "logprobs", "entropy")
    log_ratio = own.logprobs - picked(teacher, taught, "logprobs").logprobs
    behind = lambda x: jnp.roll(x, 1, axis=1)  # from the state before a token to the token
    stats = TokenStats(entropy=behind(own.entropy))
    return Said(behind(loss), behind(log_ratio), stats if balance is None else stats._replace(balance=balance))


def make_objective(models: Models, parts: Sequence[Part], config: DistillConfig = DistillConfig()) -> Objective:
    """The mean over completion tokens of a loss of `losses.distillation`, both models at the sampler's temperature.

    `frozen` is a `step.Taught`. A batch is a minibatch of `make_prepare`. Plotted beside it, see docs/metrics.md: kl,
    nats a token, objective/kl, nats a completion, entropy, and what the completions earned if they are scored.
    """
    (part,), model = parts, models.policy

    def objective(params, frozen, hyper, batch, key):
        said = _say(models, part, params, frozen, hyper, batch)
        used, weight = used_tokens(batch), batch["weight"]
        terms = {part.name: Term(hyper["weights"][part.name], total(said.loss, used), jnp.sum(used))}
        means = {
            "kl": mean(k3(said.log_ratio), used),
            "objective/kl": mean(jnp.sum(said.log_ratio, axis=1), weight),
            "entropy": mean(said.stats.entropy, used),
            "completions/length": Mean(jnp.sum(used), jnp.sum(weight)),
            "completions/ended": mean(batch["ended"], weight),
        }
        if "score" in batch:
            means |= {"objective/score": mean(batch["score"], weight)} | reward_means(batch)
        return balance_term(model, said.stats, batch, hyper, terms, means)

    return objective


def make_judge(models: Models, parts: Sequence[Part], config: DistillConfig = DistillConfig()) -> Judge:
    """The loss a token of held-out rollouts of `make_prepare`; kl is a sum over a completion, nats."""
    (part,) = parts

    def judge(params, frozen, hyper, batch, key):
        said = _say(models, part, params, frozen, hyper, batch)
        used, weight = used_tokens(batch), batch["weight"]
        length, own = jnp.sum(used, axis=1), jnp.sum(jnp.where(used > 0, said.loss * used, 0), axis=1)
        rows = {"loss": own / jnp.maximum(length, 1), "kl": jnp.sum(said.log_ratio, axis=1), "length": length}
        rows |= {"score": batch["score"]} if "score" in batch else {}
        means = {name: mean(rows[name], weight) for name in ("score", "kl") if name in rows}
        means |= {"completions/length": mean(length, weight), "completions/ended": mean(batch["ended"], weight)}
        terms = {part.name: Term(hyper["weights"][part.name], jnp.sum(own), jnp.sum(used))}
        return terms, means | reward_means(batch), rows

    return judge


# ---- rollouts


def make_prepare(
    models: Models,
    parts: Sequence[Part],
    config: DistillConfig,
    reference: tuple[Model, Any] | None,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    around: Around,
) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """One rollout, then its minibatches, epoch by epoch; nothing is measured beforehand.

    Args:
      reference: None, see `refers`.
      compiled: not used.
    Errors: UserError that names the row of a score that isn't finite; ValueError for completions that don't divide.
    """
    layout = models.policy.layout

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        key, order = keys(state.key, state.step, around.held_out)
        first = int(state.step)
        batch = around.draw(whole(state.params, state.frozen), rows, key)
        scores = around.score(batch)
        # From here on the state isn't read: the step donates its buffers.
        yield from learnt(
            batch | (score_columns(scores, batch) if scores.names else {}), around, order, first, layout
        )  # fmt: skip

    return prepare


make_carry, make_advance, make_skip = nothing, nothing, nothing
