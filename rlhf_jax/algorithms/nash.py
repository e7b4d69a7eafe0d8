"""Nash-MD: the policy learns to be preferred to a mixture of itself and its reference.

Each call of `prepare` is one rollout: the policy and the mixture draw K completions of each prompt, all are scored, and
a completion of the policy earns how often it would be preferred to those of the mixture; then any loss of sampled
tokens learns from it. `params` are the policy's.

References: Munos et al. 2023, arXiv:2312.00886 (Nash-MD-PG).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.asked import Asked, measure
from rlhf_jax.algorithms.parts import Part, nothing
from rlhf_jax.algorithms.picks import scored
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
    policy_means,
    policy_term,
    sampled,
    used_tokens,
)
from rlhf_jax.algorithms.step import (
    Batch,
    Judge,
    Mean,
    Objective,
    Reads,
    TrainState,
    balance_term,
    flat_rows,
    wanted,
    whole,
)
from rlhf_jax.errors import UserError
from rlhf_jax.losses.policy import POLICY as POLICY_LOSSES
from rlhf_jax.losses.policy import PolicyTokens
from rlhf_jax.models.decoder import Model
from rlhf_jax.sampling.mixture import Both

LOSSES: Mapping[str, Callable[..., Array]] = POLICY_LOSSES
READS = {PolicyTokens: Reads("prompt", reference=True)}
BESIDE: tuple[type, ...] = ()
HEAD = "words"
POLICY: str | None = None  # the parameters are the policy's
ROW = "completion"


@dataclasses.dataclass(frozen=True)
class NashConfig(EndConfig):
    """Whom the policy is held against, and what leaving the reference costs."""

    mixture: Annotated[
        float, "share of the reference in what draws the opponent's completions; 0: the policy itself, 1: the reference"
    ] = 0.125
    kl: Annotated[float, "price of a nat of log(policy / reference) of a completion, in chances of being preferred"] = (
        0.008
    )

    @property
    def numbers(self) -> dict[str, float]:
        """Those that programs read from hyper["nash"]."""
        return {"missing_end_score": self.missing_end_score, "mixture": self.mixture, "kl": self.kl}


def refers(config: NashConfig) -> bool:
    """Whether there is a fixed reference: always, it is part of the mixture."""
    return True


def check(config: NashConfig, rollout: RolloutConfig) -> None:
    """Errors: UserError for a number that means nothing."""
    if not 0 <= config.mixture <= 1:
        raise UserError(f"--config.nash.mixture={config.mixture} is not allowed; it must be from 0 to 1.")
    if config.kl < 0:
        raise UserError(f"--config.nash.kl={config.kl} is not allowed; it must be at least 0.")


# ---- what is differentiated


def make_objective(models: Models, parts: Sequence[Part], config: NashConfig = NashConfig()) -> Objective:
    """A loss of `losses.policy`; the reference's price is in the advantages. A batch is one of `make_prepare`."""
    (part,), model = parts, models.policy
    want = wanted(model, "logprobs", "entropy")

    def objective(params, frozen, hyper, batch, key):
        temperature = hyper["rollout"]["temperature"]
        stats = model.token_stats(whole(params, frozen), flat_rows(batch), temperature=temperature, want=want)
        said = sampled(stats.logprobs, batch)
        terms = {"policy": policy_term(part, said, hyper, batch)}
        means = policy_means(part, said, stats, hyper, batch) | _rollout_means(batch)
        return balance_term(model, stats, batch, hyper, terms, means)

    return objective


def _rollout_means(batch: Batch) -> dict[str, Mean]:
    """What the completions of a minibatch earned, a mean over them each.

    nash/win_rate: of those that were compared, how often they would be preferred to the mixture's of their prompts;
    nash/mixture_score: the score of the mixture's completions, of which each row has one of its prompt.
    """
    of = lambda column: mean(batch[column], batch["weight"])
    means = {"objective/score": of("score"), "objective/kl": of("sequence_kl"), "nash/mixture_score": of("opponent")}
    return means | {"nash/win_rate": mean(batch["preferred"], batch["weight"] * batch["compared"])}


def make_judge(models: Models, parts: Sequence[Part], config: NashConfig = NashConfig()) -> Judge:
    """What held-out rollouts of `make_prepare` earned, see `held_out_rows`; the price of the KL is no score's."""

    def judge(params, frozen, hyper, batch, key):
        return held_out_rows(batch["score"], batch)

    return judge


# ---- what is frozen in a batch


def make_prepare(
    models: Models,
    parts: Sequence[Part],
    config: NashConfig,
    reference: tuple[Model, Any] | None,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    around: Around,
) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """One rollout, then its minibatches, epoch by epoch; a row is a completion that the policy drew.

    The mixture draws as many, which are scored and forgotten; none where rollouts are held out.

    Args:
      reference: a fixed model and its parameters; None: the state's frozen base, which an adapter leaves as it was.
      compiled: makes a program of (params, frozen, fixed, carry, hyper, rows) -> columns.
      around: with `mixed`.
    Errors: UserError that names the row of a score that isn't finite; ValueError for rows that don't divide.
    """
    model, samples, mixed = models.policy, around.rollout.samples, around.mixed
    reference_model = model.without_adapter() if reference is None else reference[0]
    assert mixed is not None

    def look(params: Any, frozen: Any, fixed: Any, carry: Any, hyper: Any, rows: Batch) -> Batch:
        policy, other, numbers = Asked(model, whole(params, frozen)), Asked(reference_model, fixed), hyper["nash"]
        temperature = hyper["rollout"]["temperature"]
        said = measure(policy, rows, temperature=temperature, reference=other, pieces=around.pieces)
        counts = lambda batch: end_counts(config, numbers["missing_end_score"], batch)
        made = said | {"score": counts(rows), "sequence_kl": _sequence_kl(said, rows)}
        if around.held_out:
            return made
        opponent = rows["opponent"] | {"score": counts(rows["opponent"])}
        return made | earned(rows | made, opponent, numbers["kl"], samples)

    looked = compiled(look)

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        key, order = keys(state.key, state.step, around.held_out)
        first, policy = int(state.step), whole(state.params, state.frozen)
        fixed = state.frozen if reference is None else reference[1]
        batch, opponent = scored(around, around.draw(policy, rows, key)), {}
        if not around.held_out:  # keys of its own: the two must not answer alike because their randomness is the same
            both = Both(policy, fixed, state.hyper["nash"]["mixture"])
            theirs = scored(around, mixed(both, rows, jax.random.fold_in(key, 1)))
            opponent = {"opponent": {name: theirs[name] for name in ("weight", "score", "judged", "ended")}}
        made = looked(state.params, state.frozen, fixed, state.carry, state.hyper, batch | opponent)
        # From here on the state isn't read: the step donates its buffers.
        yield from learnt(batch | made, around, order, first, model.layout)

    return prepare


def _sequence_kl(said: Batch, batch: Batch) -> Array:
    """The sum over a completion of log pi - log ref, nats, [B]."""
    log_ratio = (said["old_logprobs"] - said["ref_logprobs"])[:, 0]
    return jnp.sum(jnp.where(used_tokens(batch) > 0, log_ratio, 0), axis=1)


def preference(score: Array, other: Array) -> Array:
    """The chance that each of K completions is preferred to each of L others: sig(score - other), [G, K, L].

    Args: score, other: [G, K] and [G, L], of completions of the same G prompts.
    References: Bradley and Terry 1952, Biometrika 39.

    >>> print(preference(jnp.array([[0.0]]), jnp.array([[0.0, jnp.log(3.0)]])))
    [[[0.5  0.25]]]
    """
    return jax.nn.sigmoid(score[:, :, None] - other[:, None, :])


def earned(batch: Batch, opponent: Batch, price: Array, samples: int) -> Batch:
    """Advantages of a rollout: P - 1/2 - price x the sum of log pi - log ref, P the mean over the opponent's.

    The sum is that of the whole completion, and stands with the rest on each of its tokens: what a token costs is also
    what the tokens behind it will (Munos et al. 2023, Eq. 13). 1/2, what a completion has against its like, takes
    spread away and moves no mean.

    Args:
      batch: score, sequence_kl float32, judged bool [B], mask, weight; K completions a prompt, one behind the other.
      opponent: score float32, judged bool [B], of as many completions of the same prompts.
      price: in chances a nat.
    Returns: advantages float32 [B, 1, T], 0 on completions that no reward judges or that have nothing to be compared
      with; [B] each: preferred, P; compared, bool, whether there is one; opponent, float32, a score of the opponent's.
    """
    score, other, judged = (x.reshape(-1, samples) for x in (batch["score"], opponent["score"], opponent["judged"]))
    count = jnp.sum(judged, axis=1, keepdims=True)
    chances = jnp.where(judged[:, None], preference(score, other), 0)
    preferred = (jnp.sum(chances, axis=2) / jnp.maximum(count, 1)).reshape(-1)
    compared = batch["judged"] & jnp.repeat(count[:, 0] > 0, samples)
    advantages = jnp.where(compared, preferred - 0.5 - price * batch["sequence_kl"], 0)
    return {
        "advantages": jnp.where(used_tokens(batch) > 0, advantages[:, None], 0)[:, None],
        "preferred": preferred, "compared": compared, "opponent": opponent["score"],
    }  # fmt: skip


make_carry, make_advance, make_skip = nothing, nothing, nothing
