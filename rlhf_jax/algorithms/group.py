"""Group methods (GRPO, RLOO, REINFORCE++, Dr. GRPO, DAPO, GDPO): several completions of a prompt, one against another.

Each call of `prepare` is one rollout: draw, score, and if asked draw again in the place of groups that teach nothing;
measure; then one advantage a completion from the rewards of its group, where PPO has a value model. `params` are the
policy's. Which method it is says the baseline together with the loss of `losses.policy`.

References: Shao et al. 2024, arXiv:2402.03300 (GRPO); Yu et al. 2025, arXiv:2503.14476 (DAPO); those of each baseline
and loss stand in `ops.advantages` and `losses.policy`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.asked import Asked, measure
from rlhf_jax.algorithms.parts import Part, nothing
from rlhf_jax.algorithms.rollouts import (
    Around,
    Models,
    RolloutConfig,
    Sampled,
    held_out_rows,
    keys,
    learnt,
    mean,
    policy_means,
    policy_term,
    sampled,
    total,
    used_tokens,
)
from rlhf_jax.algorithms.rounds import drawn_in_rounds
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
from rlhf_jax.losses.policy import POLICY as POLICY_LOSSES
from rlhf_jax.losses.policy import PolicyTokens
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.advantages import BASELINES, Group, grpo
from rlhf_jax.ops.kl import ESTIMATORS, Estimator
from rlhf_jax.registry import arguments, generated, resolve

LOSSES: Mapping[str, Callable[..., Array]] = POLICY_LOSSES
READS = {PolicyTokens: Reads("prompt", reference=True)}
BESIDE: tuple[type, ...] = ()
HEAD = "words"
POLICY: str | None = None  # the parameters are the policy's
ROW = "completion"
NUMBERS = ("kl", "overlong_weight", "top_entropy", "entropy")  # fields that programs read


@generated(BASELINES)
class Baseline:
    """How the rewards of a group become advantages; an option left at none has the baseline's own default."""

    name: str = "grpo"


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """How the rewards of a prompt's completions become advantages, and what is learnt from."""

    baseline: Baseline = Baseline()  # pyright: ignore[reportInvalidTypeForm]
    kl: Annotated[
        float | None, "price of leaving the reference, in rewards or weight in the loss; none: no reference is kept"
    ] = None
    kl_in: Annotated[Literal["loss", "reward"], "whether that price is a term of the loss or one of the rewards"] = (
        "loss"
    )
    kl_estimator: Annotated[Estimator | None, "of the KL; none: k1 in the reward, k3 in the loss"] = None
    truncated: Annotated[
        Literal["keep", "mask"],
        "what the length cut off: learnt from, or left out of the loss and its means; its rewards count in its group",
    ] = "keep"
    overlong: Annotated[
        int | None, "tokens before rollout.max_new_tokens over which a reward falls from 0 to -1; none: there is none"
    ] = None
    overlong_weight: Annotated[float, "of that reward"] = 1.0
    top_entropy: Annotated[
        float | None, "share of a rollout's tokens, of the highest entropy, that the policy's loss has; none: all"
    ] = None
    entropy: Annotated[
        float | None, "weight of the policy's entropy, nats a token, as a bonus; none: there is none"
    ] = None
    rounds: Annotated[
        int, "most draws for a rollout, if groups of equal rewards are replaced (dynamic sampling); 1: they stay"
    ] = 1

    @property
    def numbers(self) -> dict[str, float]:
        """Those that programs read from hyper["group"]; what is None isn't there."""
        return {name: getattr(self, name) for name in NUMBERS if getattr(self, name) is not None}

    @property
    def estimator(self) -> Estimator:
        """Of the KL. Errors: UserError for one that would teach nothing."""
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError(
                "kl_estimator k1 has no gradient on average, so that with kl_in=loss it would hold nothing back; "
                "choose --config.group.kl_estimator=k3, k3_plus or k2."
            )
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")


def refers(config: GroupConfig) -> bool:
    """Whether there is a fixed reference. An adapter's base is none by itself: without a price nobody asks it."""
    return config.kl is not None


def check(config: GroupConfig, rollout: RolloutConfig) -> None:
    """Errors: UserError for settings that mean nothing, alone or together."""
    limits: dict[str, tuple[Callable[[float], bool], str]] = {
        "rounds": (lambda x: x >= 1, "at least 1"),
        "kl": (lambda x: x >= 0, "at least 0"),
        "overlong_weight": (lambda x: x >= 0, "at least 0"),
        "top_entropy": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
        "overlong": (
            lambda x: 1 <= x <= rollout.max_new_tokens, f"from 1 to rollout.max_new_tokens={rollout.max_new_tokens}",
        ),
    }  # fmt: skip
    for name, (test, says) in limits.items():
        value = getattr(config, name)
        if value is not None and not test(value):
            raise UserError(f"--config.group.{name}={value} is not allowed; it must be {says}.")
    for name, reader in (("kl_in", "kl"), ("kl_estimator", "kl"), ("overlong_weight", "overlong")):
        if getattr(config, reader) is None and getattr(config, name) != getattr(GroupConfig(), name):
            raise UserError(f"--config.group.{name} would be ignored without --config.group.{reader}; give both.")
    _ = config.estimator, _baseline(config)  # refuse what would teach nothing, and options that nothing reads
    _check_samples(config, rollout)


def _check_samples(config: GroupConfig, rollout: RolloutConfig) -> None:
    baseline = config.baseline
    alone = baseline.name == "reinforce_pp" and not baseline.baseline  # it looks at the whole batch
    if rollout.samples < 2 and baseline.name in BASELINES and not alone:
        raise UserError(
            f"--config.rollout.samples={rollout.samples} leaves baseline {baseline.name!r} nothing to hold a "
            "completion against; give 2 or more, or --config.group.baseline.name=reinforce_pp."
        )
    if rollout.samples < 2 and config.rounds > 1:
        raise UserError(
            f"--config.group.rounds={config.rounds} replaces groups of equal rewards, which all are with "
            f"--config.rollout.samples={rollout.samples}; give 2 or more."
        )


def _baseline(config: GroupConfig) -> Callable[[Group], Array]:
    """Rewards [G, K, R] to advantages [G, K]. Errors: UserError for a name or an option that there isn't."""
    function = resolve(BASELINES, config.baseline.name, "baseline")
    return functools.partial(function, **arguments("group.baseline", function, config.baseline))


# ---- what is differentiated


def _trained(config: GroupConfig, batch: Batch) -> Batch:
    """The batch as the loss sees it: what is left out weighs 0, so that no normaliser counts it."""
    return batch if config.truncated == "keep" else batch | {"weight": batch["weight"] * batch["ended"]}


def _counted(said: Sampled, batch: Batch) -> Sampled:
    """What the policy's loss sees of it: the counted tokens, if they are told apart."""
    if "counted" not in batch:
        return said
    counted = batch["counted"][:, 0]
    tokens = said.tokens._replace(mask=said.tokens.mask & counted)
    return said._replace(tokens=tokens, used=said.used * counted)


def make_objective(models: Models, parts: Sequence[Part], config: GroupConfig = GroupConfig()) -> Objective:
    """A loss of `losses.policy`, and if asked for the KL's and the entropy's.

    The policy's denominator is that of its loss: completions, or counted tokens; that of the others is completion
    tokens, counted or not. A batch is a minibatch of `make_prepare`.
    """
    (part,), model = parts, models.policy
    estimate, want = ESTIMATORS[config.estimator], wanted(model, "logprobs", "entropy")

    def objective(params, frozen, hyper, batch, key):
        numbers, trained = hyper["group"], _trained(config, batch)
        stats = model.token_stats(
            whole(params, frozen), flat_rows(batch), temperature=hyper["rollout"]["temperature"], want=want
        )
        said = sampled(stats.logprobs, trained)
        counted, count = _counted(said, trained), jnp.sum(said.used)
        terms = {"policy": policy_term(part, counted, hyper, trained)}
        if config.entropy is not None:
            terms["entropy"] = Term(-numbers["entropy"], total(stats.entropy, said.used), count)
        if refers(config) and config.kl_in == "loss":
            terms["kl"] = Term(numbers["kl"], total(estimate(said.ref_ratio), said.used), count)
        means = policy_means(part, said._replace(tokens=counted.tokens), stats, hyper, batch)
        means = {name: x for name, x in means.items() if name != "kl" or refers(config)}
        means |= _rollout_means(config, batch)
        means |= {f"loss/{name}": Mean(jax.lax.stop_gradient(t.total), t.count) for name, t in terms.items()}
        return balance_term(model, stats, trained, hyper, terms, means)

    return objective


def make_judge(models: Models, parts: Sequence[Part], config: GroupConfig = GroupConfig()) -> Judge:
    """What held-out rollouts of `make_prepare` earned, see `held_out_rows`; no KL is told if none is measured."""

    def judge(params, frozen, hyper, batch, key):
        earned = batch["score"]
        if refers(config):
            in_loss = lambda: -hyper["group"]["kl"] * batch["sequence_kl"]
            earned = earned + (batch["penalty"] if config.kl_in == "reward" else in_loss())
        terms, means, rows = held_out_rows(earned, batch)
        told = lambda values: {name: x for name, x in values.items() if name != "kl" or refers(config)}
        return terms, told(means), told(rows)

    return judge


def _rollout_means(config: GroupConfig, batch: Batch) -> dict[str, Mean]:
    """What the completions of a minibatch earned, each a mean over them, those included that the loss leaves out.

    groups/spread: standard deviation of a group's rewards; groups/equal: share of those in groups without any, from
    which nothing is learnt; groups/kept: share of all groups drawn for the rollout that dynamic sampling kept.
    """
    weight = batch["weight"]
    of = lambda column: mean(batch[column], weight)
    means = {"completions/length": mean(jnp.sum(used_tokens(batch), axis=1), weight), "objective/score": of("score")}
    means |= {"groups/spread": of("spread"), "groups/equal": of("equal")}
    if refers(config):
        means["objective/kl"] = of("sequence_kl")
    if "penalty" in batch:
        means["objective/non_score_reward"] = of("penalty")
        means["objective/rlhf_reward"] = mean(batch["score"] + batch["penalty"], weight)
    return means | ({"groups/kept": of("kept")} if "kept" in batch else {})


# ---- what is frozen in a batch


def make_prepare(
    models: Models,
    parts: Sequence[Part],
    config: GroupConfig,
    reference: tuple[Model, Any] | None,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    around: Around,
) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """One rollout, then its minibatches, epoch by epoch; its rows are `config.rounds` times as many prompts.

    Args:
      reference: a fixed model and its parameters; None: the state's frozen base, which an adapter leaves as it was,
        or nothing if the config asks for none, see `refers`.
      compiled: makes a program of (params, frozen, fixed, carry, hyper, rows) -> columns.
    Errors: UserError that names the row of a score that isn't finite; ValueError for rows that don't divide.
    """
    model, baseline = models.policy, _baseline(config)
    held_against = (model.without_adapter() if reference is None else reference[0]) if refers(config) else None
    rounds = 1 if around.held_out else config.rounds

    def look(params: Any, frozen: Any, fixed: Any, carry: Any, hyper: Any, rows: Batch) -> Batch:
        policy = Asked(model, whole(params, frozen))
        other = None if held_against is None else Asked(held_against, fixed)
        return measure(
            policy, rows, temperature=hyper["rollout"]["temperature"], reference=other,
            entropy=config.top_entropy is not None, pieces=around.pieces,
        )  # fmt: skip

    def earn(params: Any, frozen: Any, fixed: Any, carry: Any, hyper: Any, rows: Batch) -> Batch:
        return _earned(config, baseline, around.rollout, hyper["group"], rows)

    measured, earned = compiled(look), compiled(earn)

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        samples, order = keys(state.key, state.step, around.held_out)
        first, policy = int(state.step), whole(state.params, state.frozen)
        draw = lambda some, number: around.draw(policy, some, jax.random.fold_in(samples, number))
        batch = drawn_in_rounds(around, draw, rows, rounds, model.layout)
        table = batch.pop("table")  # no step reads it, nor the entropy: so no checkpoint has them
        fixed = None if held_against is None else state.frozen if reference is None else reference[1]
        said = measured(state.params, state.frozen, fixed, state.carry, state.hyper, batch)
        batch |= earned(None, None, None, state.carry, state.hyper, batch | said | {"table": table})
        batch |= {name: column for name, column in said.items() if name != "entropy"}
        # From here on the state isn't read: the step donates its buffers.
        yield from learnt(batch, around, order, first, model.layout)

    return prepare


# ---- from rewards to advantages


def overlong_reward(length: Array, most: int, last: int) -> Array:
    """0 up to most - last tokens, then down in a line to -1 at most, [B].

    Args:
      length: tokens of each completion, [B].
      most, last: tokens that a completion may have, and at the end of those how many cost.
    References: Yu et al. 2025, arXiv:2503.14476, Eq. 13 (DAPO); its L_max and L_cache are most and last.

    >>> print(overlong_reward(jnp.array([1, 6, 8, 10]), most=10, last=4))
    [ 0.   0.  -0.5 -1. ]
    """
    return jnp.clip((most - last - length) / last, -1, 0)


def _groups(config: GroupConfig, rollout: RolloutConfig, numbers: Any, batch: Batch) -> tuple[Group, Batch]:
    """The rewards in groups, the overlong one and the KL's being two of them; and columns [B], see `_earned`.

    Both apply where any other does: a completion that no reward function judges has no advantage.
    """
    table, used = batch["table"], used_tokens(batch) > 0
    applied, present = table["applied"], jnp.any(table["applied"], axis=1)
    rewards, weights, made = [table["given"]], [table["weights"][0]], {"score": batch["score"]}
    if config.overlong is not None:
        late = overlong_reward(jnp.sum(used, axis=1), rollout.max_new_tokens, config.overlong)
        made["score"] += numbers["overlong_weight"] * jnp.where(present, late, 0)
        rewards.append(late[:, None])
        weights.append(numbers["overlong_weight"][None])
    made["sequence_kl"] = jnp.zeros_like(batch["score"])
    if refers(config):
        log_ratio = jnp.where(used, (batch["old_logprobs"] - batch["ref_logprobs"])[:, 0], 0)
        made["sequence_kl"] = jnp.sum(log_ratio, axis=1)
        if config.kl_in == "reward":
            cost = jnp.sum(ESTIMATORS[config.estimator](log_ratio), axis=1)
            made["penalty"] = -numbers["kl"] * cost
            rewards.append(-cost[:, None])
            weights.append(numbers["kl"][None])
    applied = jnp.concatenate([applied, *[present[:, None]] * (len(rewards) - 1)], axis=1)
    shaped = lambda x: x.reshape(-1, rollout.samples, x.shape[1])
    return Group(shaped(jnp.concatenate(rewards, axis=1)), shaped(applied), jnp.concatenate(weights)), made


def _earned(
    config: GroupConfig, baseline: Callable[[Group], Array], rollout: RolloutConfig, numbers: Any, batch: Batch
) -> Batch:
    """Advantages of a rollout, and what is plotted of it; what a baseline takes of the batch is of all of it.

    Returns: advantages [B, 1, T], a row's on each of its completion tokens; counted, bool [B, 1, T], if a share of
      tokens is asked for; [B] each: score, the weighted rewards with the overlong one; penalty, what is added to them
      for the KL if it is a reward; sequence_kl, the sum of log pi - log ref, 0 without a reference; of a row's group
      spread, the standard deviation of all that counts, with n - 1, and equal, 1 if there is none.
    """
    used = used_tokens(batch) > 0
    group, made = _groups(config, rollout, numbers, batch)
    centred, present = grpo(group, scale="none"), group.present  # exactly 0 where a group is equal
    variance = jnp.sum(jnp.square(centred), axis=1) / jnp.maximum(jnp.sum(present, axis=1) - 1, 1)
    by_row = lambda x: jnp.broadcast_to(x[:, None], present.shape).reshape(-1)
    made["spread"] = by_row(jnp.sqrt(variance))
    made["equal"] = by_row(jnp.all(centred == 0, axis=1)).astype(jnp.float32)
    advantages = jnp.where(present, baseline(group), 0).reshape(-1, 1)
    made["advantages"] = jnp.where(used, advantages, 0)[:, None]
    if config.top_entropy is not None:
        learnt_from = used_tokens(_trained(config, batch)) > 0
        made["counted"] = _highest(batch["entropy"][:, 0], learnt_from, numbers["top_entropy"])[:, None]
    return made


def _highest(x: Array, mask: Array, share: Array) -> Array:
    """The share of the mask's entries with the highest x, to the nearest whole number and one at least; with ties.

    References: Wang et al. 2025, arXiv:2506.01939, Eq. 5 and 6, where x is the entropy.
    """
    entries = jnp.where(mask, x, -jnp.inf)
    keep = jnp.maximum(jnp.round(share * jnp.sum(mask)), 1).astype(jnp.int32)
    return mask & (entries >= jnp.sort(entries.reshape(-1))[x.size - keep])


make_carry, make_advance, make_skip = nothing, nothing, nothing
