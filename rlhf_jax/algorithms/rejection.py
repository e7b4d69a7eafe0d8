"""Rejection sampling fine-tuning: of the policy's own answers to a prompt the best one is learnt as a demonstration.

Each call of `prepare` is one rollout: draw K completions of a prompt, score them and keep the best; then a supervised
loss makes its tokens likely. `params` are the policy's; there is no reference.

References: Dong et al. 2023, arXiv:2304.06767 (RAFT); Gulcehre et al. 2023, arXiv:2308.08998 (ReST: the threshold).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.parts import TOKENS, Part, nothing, token_term
from rlhf_jax.algorithms.picks import drawn_means, drawn_of, extremes, rows_of, scored
from rlhf_jax.algorithms.rollouts import (
    Around,
    EndConfig,
    Models,
    RolloutConfig,
    end_counts,
    held_out_rows,
    keys,
    learnt,
    mean,
    used_tokens,
)
from rlhf_jax.algorithms.step import (
    Batch,
    Judge,
    Objective,
    Reads,
    TrainState,
    balance_term,
    flat_rows,
    wanted,
    whole,
)
from rlhf_jax.errors import UserError
from rlhf_jax.losses.supervised import SUPERVISED
from rlhf_jax.models.decoder import Model

LOSSES: Mapping[str, Callable[..., Array]] = SUPERVISED
READS = {takes: Reads("prompt") for takes in TOKENS}
BESIDE: tuple[type, ...] = ()
HEAD = "words"
POLICY: str | None = None  # the parameters are the policy's
ROW = "prompt"


@dataclasses.dataclass(frozen=True)
class RejectionConfig(EndConfig):
    """Which of a prompt's completions is learnt from."""

    least: Annotated[
        float | None, "score below which the best completion of a prompt isn't learnt from either; none: any"
    ] = None

    @property
    def numbers(self) -> dict[str, float]:
        """Those that programs read from hyper["rejection"]; what is None isn't there."""
        least = {} if self.least is None else {"least": self.least}
        return {"missing_end_score": self.missing_end_score, **least}


def refers(config: RejectionConfig) -> bool:
    """Whether there is a fixed reference: there is none."""
    return False


def check(config: RejectionConfig, rollout: RolloutConfig) -> None:
    """Errors: UserError for settings by which every completion would be learnt from."""
    if rollout.samples < 2 and config.least is None:
        raise UserError(
            f"--config.rollout.samples={rollout.samples} leaves nothing to choose a completion from; give 2 or more, "
            "or --config.rejection.least."
        )


# ---- what is differentiated


def make_objective(models: Models, parts: Sequence[Part], config: RejectionConfig = RejectionConfig()) -> Objective:
    """The mean over completion tokens of a loss of `losses.supervised`, at the sampler's temperature.

    A batch is a minibatch of `make_prepare`. Plotted beside what `picks.drawn_means` says of all completions: nll, of
    the tokens that are learnt, nats; rejection/best, the mean score of each prompt's best; rejection/kept, the share of
    prompts whose best is learnt from.
    """
    (part,), model = parts, models.policy
    want = wanted(model, *dict.fromkeys(("logprobs", *part.takes._fields)))

    def objective(params, frozen, hyper, batch, key):
        temperature = hyper["rollout"]["temperature"]
        stats = model.token_stats(whole(params, frozen), flat_rows(batch), temperature=temperature, want=want)
        used, asked = used_tokens(batch), batch["asked"]
        means = {"nll": mean(-stats.logprobs, used), "rejection/best": mean(batch["score"], asked)}
        means |= {"rejection/kept": mean(batch["weight"], asked)} | drawn_means(batch["drawn"])
        terms = {part.name: token_term(part, stats, used, hyper, batch)}
        return balance_term(model, stats, batch, hyper, terms, means)

    return objective


def make_judge(models: Models, parts: Sequence[Part], config: RejectionConfig = RejectionConfig()) -> Judge:
    """What held-out rollouts of `make_prepare` earned, see `held_out_rows`; no KL is told, as none is measured."""

    def judge(params, frozen, hyper, batch, key):
        terms, means, rows = held_out_rows(batch["score"], batch)
        return terms, {n: x for n, x in means.items() if n != "kl"}, {n: x for n, x in rows.items() if n != "kl"}

    return judge


# ---- what is frozen in a batch


def make_prepare(
    models: Models,
    parts: Sequence[Part],
    config: RejectionConfig,
    reference: tuple[Model, Any] | None,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    around: Around,
) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """One rollout, then its minibatches, epoch by epoch; a row is a prompt. Held-out rollouts stay completions.

    Args:
      reference: None, see `refers`.
      compiled: makes a program of (params, frozen, fixed, carry, hyper, rows) -> columns.
    Errors: UserError that names the row of a score that isn't finite; ValueError for prompts that don't divide.
    """
    model, samples = models.policy, around.rollout.samples

    def choose(params: Any, frozen: Any, fixed: Any, carry: Any, hyper: Any, rows: Batch) -> Batch:
        numbers = hyper["rejection"]
        made = {"score": end_counts(config, numbers["missing_end_score"], rows)}
        if around.held_out:
            return made | {"sequence_kl": jnp.zeros_like(made["score"])}
        return best_of(rows | made, samples, None if config.least is None else numbers["least"])

    chosen = compiled(choose)

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        key, order = keys(state.key, state.step, around.held_out)
        first = int(state.step)
        batch = scored(around, around.draw(whole(state.params, state.frozen), rows, key))
        made = chosen(None, None, None, state.carry, state.hyper, batch)
        # From here on the state isn't read: the step donates its buffers.
        yield from learnt(batch | made if around.held_out else made, around, order, first, model.layout)

    return prepare


def best_of(batch: Batch, samples: int, least: Array | None) -> Batch:
    """The best completion of each prompt as a demonstration, [P, 1, T].

    Args:
      batch: N completions with judged bool and score float32 [N].
      least: the score below which it weighs 0.
    Returns: tokens, mask, segments, positions; index; weight float32 [P], 0 for padding and for what isn't learnt
      from, a prompt none of whose completions is judged among it; score float32 [P], of the best; asked float32 [P], 0
      for padding; drawn, see `picks`.
    """
    places = extremes(batch, samples)[0][:, 0]
    score, asked = batch["score"][places], batch["weight"].reshape(-1, samples)[:, 0]
    kept = batch["judged"][places] if least is None else batch["judged"][places] & (score >= least)
    made = rows_of(batch, places[:, None], samples)
    return made | {"weight": asked * kept, "score": score, "asked": asked, "drawn": drawn_of(batch, samples)}


make_carry, make_advance, make_skip = nothing, nothing, nothing
