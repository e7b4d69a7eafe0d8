"""Proximal policy optimisation with a value model: learn from the policy's own completions and their scores.

Each call of `prepare` is one rollout: draw, measure, score, then rewards, advantages and returns, which are columns of
minibatches that the same step as everywhere takes one by one. `params` are {"policy": a model of words, "value": one
with a score head}.

References: Schulman et al. 2017, arXiv:1707.06347; for language Ziegler et al. 2019, arXiv:1909.08593; its details
Huang et al. 2024, arXiv:2403.17031.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.asked import Asked, measure, token_values
from rlhf_jax.algorithms.parts import Part
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
    score_columns,
    step_columns,
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
    wanted,
    whole,
)
from rlhf_jax.errors import UserError
from rlhf_jax.losses.policy import PER_TOKEN, PolicyTokens, value_loss
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.advantages import gae, masked_mean, token_rewards, whiten
from rlhf_jax.ops.kl import ESTIMATORS, Estimator, adaptive
from rlhf_jax.ops.logprobs import Stat

LOSSES: Mapping[str, Callable[..., Array]] = PER_TOKEN
READS = {PolicyTokens: Reads("prompt", reference=True)}
BESIDE: tuple[type, ...] = ()  # text of its own comes with `pretrain`
HEAD = "words"
POLICY: str | None = "policy"
ROW = "completion"


@dataclasses.dataclass(frozen=True)
class PpoConfig(EndConfig):
    """How scores become rewards and advantages, and what is learnt beside the policy."""

    value: Annotated[
        Literal["separate", "head"], "the value: a model of its own, or a second head of the policy, which begins at 0"
    ] = "separate"
    value_path: Annotated[
        str | None,
        "reward model that the value begins as; none: rewards.model, but one of steps; else the policy with a new head",
    ] = None
    gamma: Annotated[float, "discount a token"] = 1.0
    lam: Annotated[float, "of the advantages: 1 sums rewards to the end, 0 trusts the value of the next token"] = 0.95
    kl: Annotated[float, "price of leaving the reference, reward units a nat; the first one if it adapts"] = 0.05
    kl_in: Annotated[Literal["reward", "loss"], "whether that price is part of the rewards or a term of the loss"] = (
        "reward"
    )
    kl_estimator: Annotated[Estimator | None, "of the KL; none: k1 in the reward, k3_plus in the loss"] = None
    kl_target: Annotated[float | None, "nats a completion that the price adapts to; none: it stays"] = None
    kl_horizon: Annotated[float, "completions over which an adaptive price changes by 20%"] = 10_000.0
    credit: Annotated[
        Literal["step", "end"],
        "where the score of a reward model of steps is paid: at the end of each step, or of the completion",
    ] = "step"
    whiten_rewards: Annotated[bool, "divide token rewards by their standard deviation, their mean kept"] = False
    whiten_advantages: Annotated[bool, "give the advantages of a rollout mean 0 and standard deviation 1"] = True
    value_weight: Annotated[float, "of the value's loss beside the policy's"] = 0.1
    value_clip: Annotated[float | None, "reward units that a value may move in a rollout; none: any"] = 0.2
    entropy: Annotated[
        float | None, "weight of the policy's entropy, nats a token, as a bonus; none: there is none"
    ] = None
    stop_kl: Annotated[
        float | None, "policy/approxkl, nats a token, past which the rest of a rollout isn't learnt from; none: all is"
    ] = None
    pretrain: Annotated[tuple[str, ...], "text that each update also learns from, to forget less; empty: none"] = ()
    pretrain_weight: Annotated[float, "of that text's negative log-likelihood, nats a token (PPO-ptx)"] = 1.0

    @property
    def numbers(self) -> dict[str, float]:
        """Those that programs read from hyper["ppo"]; what is None isn't there, and the programs don't ask for it."""
        values = vars(self) | {"value_clip": math.inf if self.value_clip is None else self.value_clip}
        return {n: x for n, x in values.items() if isinstance(x, int | float) and not isinstance(x, bool)}

    @property
    def estimator(self) -> Estimator:
        """Of the KL. Errors: UserError for one that would teach nothing."""
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError(
                "kl_estimator k1 has no gradient on average, so that with kl_in=loss it would hold nothing back; "
                "choose --config.ppo.kl_estimator=k3_plus, k2 or k3."
            )
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3_plus")


def refers(config: PpoConfig) -> bool:
    """Whether there is a fixed reference: always, since its KL is told where it costs nothing."""
    return True


def check(config: PpoConfig, rollout: RolloutConfig) -> None:
    """Errors: UserError for settings that mean nothing together."""
    if config.value == "head" and config.value_path is not None:
        raise UserError("ppo.value=head is a new head of the policy and would ignore --config.ppo.value_path; drop it.")
    if config.kl_target is not None and config.kl == 0:
        raise UserError("a price that adapts is multiplied, and --config.ppo.kl=0 stays 0; give a first one above 0.")
    if config.stop_kl is not None and rollout.updates == 1:
        raise UserError(
            "--config.ppo.stop_kl ends a rollout before its last update, and it has one; raise --config.rollout.epochs "
            "or --config.rollout.minibatches, or drop it."
        )
    if config.kl_target is None and config.kl_horizon != PpoConfig.kl_horizon:
        raise UserError("--config.ppo.kl_horizon would be ignored: the price stays; give --config.ppo.kl_target too.")
    if not config.pretrain and config.pretrain_weight != PpoConfig.pretrain_weight:
        raise UserError("--config.ppo.pretrain_weight weighs text, and --config.ppo.pretrain names none; give both.")
    _ = config.estimator  # refuses one that teaches nothing


# ---- what is differentiated


def make_objective(models: Models, parts: Sequence[Part], config: PpoConfig = PpoConfig()) -> Objective:
    """A loss of `losses.policy`, the value's, and if asked for the entropy's, the KL's and that of text of its own.

    Each has its denominator: the policy's that of its loss, the others completion tokens, or the tokens of the text.
    A batch is a minibatch of `make_prepare`.
    """
    (part,), model = parts, models.policy
    estimate, shared = ESTIMATORS[config.estimator], models.value is None
    both: tuple[Stat, ...] = ("logprobs", "entropy")
    want = wanted(model, *both, "score") if shared else wanted(model, *both)

    def objective(params, frozen, hyper, batch, key):
        numbers, rows = hyper["ppo"], flat_rows(batch)
        policy = whole(params["policy"], frozen)
        asked = policy | params["value"] if shared else policy
        stats = model.token_stats(asked, rows, temperature=hyper["rollout"]["temperature"], want=want)
        said = sampled(stats.logprobs, batch)
        count = jnp.sum(said.used)
        terms = {"policy": policy_term(part, said, hyper, batch)}
        values = stats.score if models.value is None else token_values(Asked(models.value, params["value"]), rows)
        terms["value"], means = _value(values, said.used, numbers, batch)
        if config.entropy is not None:
            terms["entropy"] = Term(-numbers["entropy"], total(stats.entropy, said.used), count)
        if config.kl_in == "loss":
            price = batch["coefficient"][:, None]
            terms["kl"] = Term(1.0, total(price * estimate(said.ref_ratio), said.used), count)
        if config.pretrain:
            terms["pretrain"] = _likelihood(Asked(model, policy), numbers["pretrain_weight"], batch["pretrain"])
        means |= policy_means(part, said, stats, hyper, batch) | _rollout_means(batch)
        means |= {f"loss/{name}": Mean(jax.lax.stop_gradient(t.total), t.count) for name, t in terms.items()}
        return balance_term(model, stats, batch, hyper, terms, means)

    return objective


def _likelihood(policy: Asked, weight: Array, batch: Batch) -> Term:
    """The mean negative log-likelihood of text, nats a token, at temperature 1 (Ouyang et al. 2022, Eq. 2)."""
    rows = flat_rows(batch)
    used = rows["mask"] * batch["weight"][:, None]
    return Term(weight, -total(policy.model.token_stats(policy.params, rows).logprobs, used), jnp.sum(used))


def make_judge(models: Models, parts: Sequence[Part], config: PpoConfig = PpoConfig()) -> Judge:
    """What held-out rollouts of `make_prepare` earned, see `held_out_rows`; it reads no parameters."""

    def judge(params, frozen, hyper, batch, key):
        in_loss = batch["coefficient"] * batch["sequence_kl"] if config.kl_in == "loss" else 0.0
        return held_out_rows(batch["score"] + batch["penalty"] - in_loss, batch)

    return judge


def _value(values: Array, used: Array, numbers: Any, batch: Batch) -> tuple[Term, dict[str, Mean]]:
    """The value's term, and what is plotted of it; values [B, T]."""
    column = lambda name: jnp.where(used > 0, batch[name][:, 0], 0)
    old, returns, clip = column("values"), column("returns"), numbers["value_clip"]
    loss = value_loss(values, old, returns, used > 0, clip=clip)
    error = jnp.square(jnp.where(used > 0, values, 0) - returns)
    means = {
        "val/loss": mean(loss, used),
        "val/error": mean(error, used),
        # Where the clipped one is the larger; by itself that is also rounding, where nothing is clipped.
        "val/clip": mean((2 * loss > error) & (jnp.abs(values - old) > clip), used),
        "val/explained": mean(batch["explained"], batch["weight"]),
    }
    return Term(numbers["value_weight"], total(loss, used), jnp.sum(used)), means


def _rollout_means(batch: Batch) -> dict[str, Mean]:
    """What the completions of a minibatch earned, each a mean over completions: of scores as they count."""
    names = {"score": "score", "kl": "sequence_kl", "non_score_reward": "penalty", "coefficient": "coefficient"}
    means = {f"objective/{name}": mean(batch[column], batch["weight"]) for name, column in names.items()}
    means["objective/rlhf_reward"] = mean(batch["score"] + batch["penalty"], batch["weight"])
    return means


# ---- what is frozen in a batch


def make_prepare(
    models: Models,
    parts: Sequence[Part],
    config: PpoConfig,
    reference: tuple[Model, Any] | None,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    around: Around,
) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """One rollout, then its minibatches, epoch by epoch.

    Args:
      reference: a fixed model and its parameters; None: the state's frozen base, which an adapter leaves as it was.
      compiled: makes a program of (params, frozen, fixed, carry, hyper, rows) -> columns.
    Errors: UserError that names the row of a score that isn't finite.
    """
    model, shared = models.policy, models.value is None
    reference_model = model.without_adapter() if reference is None else reference[0]

    def look(params: Any, frozen: Any, fixed: Any, carry: Any, hyper: Any, rows: Batch) -> Batch:
        policy = whole(params["policy"], frozen)
        value = None if models.value is None else Asked(models.value, params["value"])
        asked = Asked(model, policy | params["value"] if shared else policy)
        return measure(
            asked, rows, temperature=hyper["rollout"]["temperature"], reference=Asked(reference_model, fixed),
            value=value, second_head=shared, pieces=around.pieces,
        )  # fmt: skip

    def earn(params: Any, frozen: Any, fixed: Any, carry: Any, hyper: Any, rows: Batch) -> Batch:
        return _earned(config, carry, hyper["ppo"], rows)

    measured, earned = compiled(look), compiled(earn)

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        samples, order = keys(state.key, state.step, around.held_out)
        first = int(state.step)
        drawn = around.draw(whole(state.params["policy"], state.frozen), rows, samples)
        fixed = state.frozen if reference is None else reference[1]
        batch = drawn | measured(state.params, state.frozen, fixed, state.carry, state.hyper, drawn)
        scores = around.score(drawn)
        batch |= score_columns(scores, drawn)
        paid = step_columns(scores) if config.credit == "step" else {}
        batch |= earned(None, None, None, state.carry, state.hyper, batch | paid)
        # From here on the state isn't read: the step donates its buffers.
        yield from learnt(batch, around, order, first, model.layout)

    return prepare


def _earned(config: PpoConfig, carry: Any, numbers: Any, batch: Batch) -> Batch:
    """Rewards, advantages and returns of a rollout, and what is plotted of it; whitening is over all of it.

    Returns: advantages and returns [B, 1, T]; [B] each: score, as it counts; sequence_kl, the sum of log pi - log ref;
      penalty, what the rewards lost for it; coefficient, its price; explained, the share of the returns' variance
      that the values foresaw; and with an adaptive price next_coefficient, what it is after this rollout.
    """
    used = used_tokens(batch) > 0
    column = lambda name: jnp.where(used, batch[name][:, 0], 0)
    log_ratio, values = column("old_logprobs") - column("ref_logprobs"), column("values")
    weight = batch["weight"]
    score = end_counts(config, numbers["missing_end_score"], batch)
    coefficient = numbers["kl"] if config.kl_target is None else carry["kl"]
    price = coefficient if config.kl_in == "reward" else 0.0
    kl = ESTIMATORS[config.estimator](log_ratio)
    steps = column("step_rewards") if "step_rewards" in batch else None
    rewards = token_rewards(score, kl, used, coefficient=price, steps=steps)
    rewards = whiten(rewards, used, shift=False) if config.whiten_rewards else rewards
    advantages = gae(rewards, values, used, gamma=numbers["gamma"], lam=numbers["lam"])
    returns = advantages + values
    missed, whole_spread = _spread(advantages, used), _spread(returns, used)
    foreseen = jnp.where(whole_spread > 0, 1 - missed / jnp.where(whole_spread > 0, whole_spread, 1), 0)
    made = {"score": score, "sequence_kl": jnp.sum(log_ratio, axis=1), "penalty": -price * jnp.sum(kl, axis=1)}
    made |= {"coefficient": jnp.broadcast_to(coefficient, score.shape)}
    made |= {"explained": jnp.broadcast_to(foreseen, score.shape)}
    if config.kl_target is not None:
        count = jnp.sum(weight)
        kl_of_all = total(made["sequence_kl"], weight) / jnp.maximum(count, 1)
        after = adaptive(coefficient, kl_of_all, count, target=numbers["kl_target"], horizon=numbers["kl_horizon"])
        made["next_coefficient"] = jnp.broadcast_to(after, score.shape)
    advantages = whiten(advantages, used) if config.whiten_advantages else advantages
    return made | {"advantages": advantages[:, None], "returns": returns[:, None]}


def _spread(x: Array, mask: Array) -> Array:
    """The variance over a mask."""
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


# ---- the carry


def make_carry(parts: Sequence[Part], config: PpoConfig, params: Any, hyper: Any) -> dict[str, Array] | None:
    """The algorithm's own state at the start: kl, an adaptive price; stop, whether the rollout is done with."""
    carry = {}
    if config.kl_target is not None:
        carry["kl"] = jnp.array(hyper["ppo"]["kl"], jnp.float32)  # a copy: the step donates both
    if config.stop_kl is not None:
        carry["stop"] = jnp.zeros((), bool)
    return carry or None


def make_advance(
    parts: Sequence[Part], config: PpoConfig
) -> Callable[[TrainState, Batch, dict[str, Array]], Any] | None:
    """The carry after an update, None if there is none.

    The price moves after a rollout's last minibatch, by the KL of the whole rollout (Ziegler et al. 2019, sec. 2.2). A
    minibatch on which the policy has gone too far is the last that the rollout's policy learns from.
    """
    if config.kl_target is None and config.stop_kl is None:
        return None

    def advance(state: TrainState, batch: Batch, metrics: dict[str, Array]) -> Any:
        carry, last = dict(state.carry), jnp.any(batch["last"])
        if config.kl_target is not None:
            carry["kl"] = jnp.where(last, jnp.max(batch["next_coefficient"]), carry["kl"])
        if config.stop_kl is not None:
            far = metrics["policy/approxkl"] > state.hyper["ppo"]["stop_kl"]
            carry["stop"] = (carry["stop"] | far) & ~last
        return carry

    return advance


def make_skip(parts: Sequence[Part], config: PpoConfig) -> Callable[[TrainState, Batch], Array] | None:
    """Whether the step leaves the parameters as they are, see `make_step`; None if it never does."""
    return None if config.stop_kl is None else lambda state, batch: state.carry["stop"]
