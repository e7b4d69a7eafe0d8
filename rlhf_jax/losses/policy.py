"""Losses of sampled tokens with advantages: what the policy of PPO and of its group relatives minimises.

Notation: d = logprob - old_logprob of a token, its ratio r = exp(d), A its advantage, |y| the tokens of a row's mask.

What a loss returns says what it is a mean over: [B] is averaged over rows, so the caller divides by the global number
of rows, and [B, T] over tokens, so the caller divides by the global number of tokens of the mask. Where the mask is
False there is no value and no gradient, whatever stands there, and a row without a token has 0. On-policy, at r = 1,
the gradient of every one is that of -A logprob over its own denominator, with the row's mean for A where the ratio is
the row's.
"""

import math
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.errors import UserError
from rlhf_jax.ops.advantages import masked_mean
from rlhf_jax.ops.divergences import STEEPEST


class PolicyTokens(NamedTuple):
    """Sampled tokens, [B, T] each; the advantage of a whole row stands on each of its tokens."""

    logprobs: Array  # nats, float32
    old_logprobs: Array  # nats, of the policy that sampled; no gradient
    advantages: Array  # float32; no gradient
    mask: Array  # bool, True on tokens that count


class _Clean(NamedTuple):
    """The same with 0 under the mask."""

    logprobs: Array
    log_ratio: Array
    advantages: Array
    mask: Array


def _clean(tokens: PolicyTokens) -> _Clean:
    chex.assert_rank(tokens.mask, 2)
    chex.assert_equal_shape(list(tokens))
    logprobs, old, advantages = (jnp.where(tokens.mask, x, 0) for x in tokens[:3])
    old, advantages = jax.lax.stop_gradient((old, advantages))
    return _Clean(logprobs, logprobs - old, advantages, tokens.mask)


def _ratio(log_ratio: Array) -> Array:
    """exp, continued by its tangent where it would leave float32: a token out there has a slope and no infinity."""
    low = jnp.minimum(log_ratio, STEEPEST)
    return jnp.exp(low) * (1 + log_ratio - low)


def _row_ratio(clean: _Clean) -> Array:
    """log of the geometric mean of a row's ratios, [B, 1]."""
    return masked_mean(clean.log_ratio, clean.mask, axis=1)[:, None]


def _check_cap(cap: float) -> None:
    if isinstance(cap, int | float) and cap < 1:
        raise UserError(
            f"cap={cap} is below 1, so it would hold on-policy tokens too, whose ratio is 1; it is the largest ratio "
            "itself, not its distance from 1. Take 1 or more."
        )


def _surrogate(log_ratio: Array, advantages: Array, clip_low: float, clip_high: float, cap: float = math.inf) -> Array:
    """max(-A min(r, cap), -A clip(r, 1 - clip_low, 1 + clip_high))."""
    _check_cap(cap)
    ratio = _ratio(log_ratio)
    free = -advantages * jnp.minimum(ratio, cap)
    return jnp.maximum(free, -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high))


def ppo(tokens: PolicyTokens, *, clip_low: float = 0.2, clip_high: float = 0.2, cap: float = math.inf) -> Array:
    """max(-A min(r, cap), -A clip(r, 1 - clip_low, 1 + clip_high)), [B, T].

    Args:
      cap: bounds what a token with A < 0 can weigh, which the clip leaves open. Above 1 + clip_high it changes no
        other token, and is the constant c of the dual clip and the delta of two-sided clipping; inf is neither.
    References: Schulman et al. 2017, arXiv:1707.06347, Eq. 7; dual clip: Ye et al. 2020, arXiv:1912.09729; two-sided:
    Prime Intellect 2025 (INTELLECT-2), arXiv:2505.07291.

    >>> one = jnp.ones((1, 2))
    >>> print(ppo(PolicyTokens(jnp.array([[0.5, -0.5]]), 0 * one, one, one > 0)))
    [[-1.2        -0.60653067]]
    """
    clean = _clean(tokens)
    return _surrogate(clean.log_ratio, clean.advantages, clip_low, clip_high, cap)


def grpo(tokens: PolicyTokens, *, clip_low: float = 0.2, clip_high: float = 0.2, cap: float = math.inf) -> Array:
    """The mean of `ppo` over a row's tokens, [B]: each row weighs the same, so a token of a long one weighs less.

    References: Shao et al. 2024, arXiv:2402.03300, Eq. 3, without its KL term.
    """
    each = ppo(tokens, clip_low=clip_low, clip_high=clip_high, cap=cap)
    return masked_mean(each, tokens.mask, axis=1)


def bnpo(tokens: PolicyTokens, *, clip_low: float = 0.2, clip_high: float = 0.2, cap: float = math.inf) -> Array:
    """`ppo` on the advantages of a group, [B, T]: each token of the batch weighs the same.

    The name is that of TRL, where the batch was a device's own; over the global batch it is `dapo` with an even clip.
    """
    return ppo(tokens, clip_low=clip_low, clip_high=clip_high, cap=cap)


def dr_grpo(
    tokens: PolicyTokens, *, length: float, clip_low: float = 0.2, clip_high: float = 0.2, cap: float = math.inf
) -> Array:
    """The sum of `ppo` over a row's tokens, over one length for all rows, [B]: no row's own length divides it.

    Args:
      length: tokens, such as the most that a completion may have.
    References: Liu et al. 2025, arXiv:2503.20783.
    """
    return jnp.sum(ppo(tokens, clip_low=clip_low, clip_high=clip_high, cap=cap), axis=1) / length


def dapo(tokens: PolicyTokens, *, clip_low: float = 0.2, clip_high: float = 0.28, cap: float = math.inf) -> Array:
    """`ppo` with a higher upper clip, [B, T]: unlikely tokens that did well can rise further.

    References: Yu et al. 2025, arXiv:2503.14476, sec. 3.1 and 3.3.
    """
    return ppo(tokens, clip_low=clip_low, clip_high=clip_high, cap=cap)


def gspo(tokens: PolicyTokens, *, clip_low: float = 3e-4, clip_high: float = 4e-4, cap: float = math.inf) -> Array:
    """The mean over a row's tokens of `ppo` at the row's ratio s = exp(mean of d), [B].

    The whole row is clipped or isn't. s moves less than r, hence the small defaults, which are the paper's.
    References: Zheng et al. 2025, arXiv:2507.18071, Eq. 5 and 7, sec. 5.1.
    """
    clean = _clean(tokens)
    each = _surrogate(_row_ratio(clean), clean.advantages, clip_low, clip_high, cap)
    return masked_mean(each, clean.mask, axis=1)


def luspo(tokens: PolicyTokens, *, clip_low: float = 2e-3, clip_high: float = 2.5e-3, cap: float = math.inf) -> Array:
    """The sum, not the mean, over a row's tokens of what `gspo` has there, [B]: |y| times its loss.

    References: Liu et al. 2026, arXiv:2602.05261, sec. 5.1 for the defaults.
    """
    clean = _clean(tokens)
    return jnp.sum(_surrogate(_row_ratio(clean), clean.advantages, clip_low, clip_high, cap), axis=1)


def gmpo(tokens: PolicyTokens, *, clip_low: float = 0.4, clip_high: float = 0.4) -> Array:
    """-(mean of A) exp(mean of c), [B]: the geometric mean of a row's ratios, each of them clipped first.

    c = min(d, clip_high) where A >= 0 and max(d, -clip_low) where A < 0: the bounds are nats, of the log-ratio.
    References: Zhao et al. 2025, arXiv:2507.20673.
    """
    clean = _clean(tokens)
    up, down = jnp.minimum(clean.log_ratio, clip_high), jnp.maximum(clean.log_ratio, -clip_low)
    exponent = masked_mean(jnp.where(clean.advantages < 0, down, up), clean.mask, axis=1)
    return -masked_mean(clean.advantages, clean.mask, axis=1) * _ratio(exponent)


def cispo(tokens: PolicyTokens, *, cap: float = 5.0) -> Array:
    """-w A logprob, [B, T], with the weight w = min(r, cap) held fixed: a token past the cap still has a gradient.

    The cap is the largest weight itself, not its distance from 1.
    References: MiniMax 2025 (MiniMax-M1), arXiv:2506.13585, without a lower bound.
    """
    _check_cap(cap)
    clean = _clean(tokens)
    weight = jax.lax.stop_gradient(jnp.minimum(_ratio(clean.log_ratio), cap))
    return -weight * clean.advantages * clean.logprobs


def sapo(tokens: PolicyTokens, *, temperature: float = 1.0, temperature_negative: float = 1.05) -> Array:
    """The mean over a row's tokens of -A (4 / tau) sig(tau (r - 1)), [B]: a gate that closes softly, not a clip.

    Args:
      temperature, temperature_negative: tau where A > 0, and elsewhere; the larger, the sooner the gate closes.
    References: Gao et al. 2025, arXiv:2511.20347.
    """
    clean = _clean(tokens)
    tau = jnp.where(clean.advantages > 0, temperature, temperature_negative)
    gate = 4 / tau * jax.nn.sigmoid(tau * (_ratio(clean.log_ratio) - 1))
    return masked_mean(-clean.advantages * gate, clean.mask, axis=1)


def vespo(
    tokens: PolicyTokens,
    *,
    power: float = 2.0,
    decay: float = 3.0,
    power_negative: float = 3.0,
    decay_negative: float = 2.0,
) -> Array:
    """-u A logprob, [B, T], with the weight u = w^k exp(-lam (w - 1)) held fixed, w = exp(sum of the row's d).

    u is 1 on-policy and falls to 0 on both sides of w = k / lam.

    Args:
      power, decay: k and lam where A >= 0; power_negative, decay_negative: where A < 0.
    References: Shen et al. 2026, arXiv:2602.10693.
    """
    clean = _clean(tokens)
    log_weight = jnp.sum(clean.log_ratio, axis=1, keepdims=True)
    down = clean.advantages < 0
    k, lam = jnp.where(down, power_negative, power), jnp.where(down, decay_negative, decay)
    weight = jnp.exp(k * log_weight - lam * jnp.expm1(log_weight))  # far off-policy exp(-inf), which is 0
    return -jax.lax.stop_gradient(weight) * clean.advantages * clean.logprobs


def reinforce(tokens: PolicyTokens) -> Array:
    """The sum over a row's tokens of -A logprob, [B]: the policy gradient itself, for tokens of the current policy.

    References: Williams 1992, Machine Learning 8; Ahmadian et al. 2024, arXiv:2402.14740.
    """
    clean = _clean(tokens)
    return jnp.sum(-clean.advantages * clean.logprobs, axis=1)


POLICY = {
    "ppo": ppo, "grpo": grpo, "bnpo": bnpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "cispo": cispo,
    "sapo": sapo, "gmpo": gmpo, "vespo": vespo, "luspo": luspo, "reinforce": reinforce,
}  # fmt: skip
# Those whose tokens each have an advantage of their own, as a value model gives them; the others read a row's.
PER_TOKEN = {name: POLICY[name] for name in ("ppo", "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "vespo")}


def clip_fractions(
    tokens: PolicyTokens, *, clip_low: float, clip_high: float, level: Literal["token", "row"] = "token"
) -> tuple[Array, Array]:
    """1 where the clip takes a token's gradient, below where A < 0 and above where A > 0, else 0; [B, T] each.

    Args:
      level: "row" for the ratio of the whole row, which `gspo` and `luspo` clip.
    """
    clean = _clean(tokens)
    ratio = _ratio(clean.log_ratio if level == "token" else _row_ratio(clean))
    low = (ratio < 1 - clip_low) & (clean.advantages < 0)
    high = (ratio > 1 + clip_high) & (clean.advantages > 0)
    return low.astype(jnp.float32), high.astype(jnp.float32)


def value_loss(values: Array, old_values: Array, returns: Array, mask: Array, *, clip: float = 0.2) -> Array:
    """max((v - R)^2, (c - R)^2) / 2 with c = old + clip(v - old, -clip, clip), [B, T], 0 outside the mask.

    Args:
      values: of the parameters that move, reward units, float32 [B, T]; old_values and returns have no gradient.
      mask: bool [B, T]; what stands elsewhere is not used.
      clip: reward units; inf is off.
    References: Huang et al. 2024, arXiv:2403.17031 (value clipping in the details of PPO).

    >>> one = jnp.ones((1, 1))
    >>> print(value_loss(2 * one, one, 3 * one, one > 0, clip=0.5))  # as if v were 1.5
    [[1.125]]
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    values, old, returns = (jnp.where(mask, x, 0) for x in (values, old_values, returns))
    old, returns = jax.lax.stop_gradient((old, returns))
    clipped = old + jnp.clip(values - old, -clip, clip)
    return jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns)) / 2
