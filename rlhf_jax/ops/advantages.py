"""From rewards to advantages: by token with a value function, and by group of samples without one.

Whatever stands under a False mask, NaN included, changes nothing, and every result is 0 there. A completion's mask
may have holes, such as the tokens of a tool: the token after a hole follows the one before it, in one step.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

# ---- one number a token


def gae(rewards: Array, values: Array, mask: Array, *, gamma: float, lam: float) -> Array:
    """Generalised advantage estimates, before whitening.

    A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t,
    where t + 1 is the next token of the mask, and V and A are 0 after the last one: no bootstrap past the end.

    Args:
      rewards: [B, T] float32, reward units.
      values: [B, T] float32, same units, from the policy that sampled.
      mask: [B, T] bool, True on completion tokens.
      gamma, lam: discount per token (1.0 in RLHF); bias-variance trade in [0, 1].
    Returns: advantages [B, T], 0 where mask is False; returns are advantages + values.
    References: Schulman et al. 2016, arXiv:1506.02438, Eq. 16.

    >>> one = jnp.ones((1, 3))
    >>> print(gae(one, 0 * one, one > 0, gamma=1.0, lam=1.0))
    [[3. 2. 1.]]
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([rewards, values, mask])
    rewards, values = (jnp.where(mask, x, 0) for x in (rewards, values))

    def before(later: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = later
        reward, value, counts = token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        passed = jnp.where(counts, value, next_value), jnp.where(counts, advantage, next_advantage)
        return passed, jnp.where(counts, advantage, 0)

    end = jnp.zeros_like(rewards[:, 0])
    return jax.lax.scan(before, (end, end), (rewards.T, values.T, mask.T), reverse=True)[1].T


def returns_to_go(rewards: Array, mask: Array, *, gamma: float) -> Array:
    """G_t = r_t + gamma G_{t+1}, the discounted sum of a token's reward and all later ones, [B, T].

    >>> print(returns_to_go(jnp.ones((1, 3)), jnp.array([[True, False, True]]), gamma=0.5))
    [[1.5 0.  1. ]]
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)


def token_rewards(
    score: Array, kl: Array, mask: Array, *, coefficient: float | Array, steps: Array | None = None
) -> Array:
    """-coefficient kl on every token of the mask, and on the last one of a row the row's score too, [B, T].

    Args:
      score: [B], what the whole completion earns; added once, and to no token where a row has none.
      steps: [B, T], what the tokens that end a step earn by themselves: the last token of a row has the rest of the
        score, so that the sum is the same. None: nothing.
      kl: [B, T], an estimate of `ops.kl` a token, nats, held fixed.
      coefficient: reward units a nat.
    References: Ziegler et al. 2019, arXiv:1909.08593, Eq. 2.

    >>> print(token_rewards(jnp.ones(1), jnp.ones((1, 3)), jnp.array([[True, True, False]]), coefficient=0.5))
    [[-0.5  0.5  0. ]]
    """
    chex.assert_rank([score, kl, mask], [1, 2, 2])
    chex.assert_equal_shape([kl, mask])
    to_come = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # tokens from here on, this one included
    last = mask & (to_come == 1)
    earned = jnp.zeros_like(kl) if steps is None else jnp.where(mask, steps, 0)
    rest = score - jnp.sum(earned, axis=1)
    return jnp.where(mask, -coefficient * kl, 0) + earned + jnp.where(last, rest[:, None], 0)


# ---- over a mask


def masked_mean(x: Array, mask: Array, axis: int | None = None) -> Array:
    """The mean over the True entries, of everything or along an axis; 0 where there is none.

    >>> print(masked_mean(jnp.array([[1.0, 3.0], [5.0, 0.0]]), jnp.array([[True, True], [False, False]]), axis=1))
    [2. 0.]
    """
    chex.assert_equal_shape([x, mask])
    return jnp.sum(jnp.where(mask, x, 0), axis=axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def _centred(x: Array, mask: Array, axis: int | None = None) -> Array:
    """x less its mean over the mask, along an axis or over everything; 0 elsewhere, and exactly 0 where all are equal.

    The largest is taken away first: what is left is as small as the spread, or 0, so its mean loses no digit.
    """
    top = jnp.max(x, axis=axis, keepdims=True, where=mask, initial=-jnp.inf)
    below = jnp.where(mask, x - top, 0)
    count = jnp.maximum(jnp.sum(mask, axis=axis, keepdims=True), 1)
    return jnp.where(mask, below - jnp.sum(below, axis=axis, keepdims=True) / count, 0)


def _variance(centred: Array, mask: Array, axis: int | None = None) -> Array:
    """With n - 1, of what `_centred` gave, the axis kept; 0 for fewer than two entries."""
    count = jnp.sum(mask, axis=axis, keepdims=True)
    return jnp.sum(jnp.square(centred), axis=axis, keepdims=True) / jnp.maximum(count - 1, 1)


def whiten(x: Array, mask: Array, *, shift: bool = True) -> Array:
    """(x - mean) / sqrt(var + 1e-8) over all entries of the mask, var with n - 1; 0 outside it.

    Args:
      shift: False adds the mean back, as rewards have it; advantages don't.
    References: Huang et al. 2024, arXiv:2403.17031 (whitening in the details of PPO).

    >>> print(whiten(jnp.array([[1.0, 3.0, jnp.nan]]), jnp.array([[True, True, False]])).round(3))
    [[-0.707  0.707  0.   ]]
    """
    chex.assert_equal_shape([x, mask])
    centred = _centred(x, mask)
    whitened = centred / jnp.sqrt(_variance(centred, mask) + 1e-8)
    return whitened if shift else jnp.where(mask, whitened + masked_mean(x, mask), 0)


# ---- one number a sample, of groups of samples of one prompt

Scale = Literal["group", "batch", "none"]
SMALL = 1e-4  # beside a standard deviation that divides


class Group(NamedTuple):
    """Rewards of G prompts with K samples each by R reward functions.

    Every baseline reads the rewards apart: one that doesn't care sums them, one that scales each by itself can, and
    the caller has one form for all. A sample to which none applies is absent: its advantage is 0, no mean has it.
    """

    rewards: Array  # [G, K, R] float32
    applies: Array  # [G, K, R] bool, False where a reward function has nothing to say of a sample
    weights: Array  # [R]

    @property
    def total(self) -> Array:
        """The weighted sum of the rewards that apply, [G, K]."""
        return jnp.sum(jnp.where(self.applies, self.rewards, 0) * self.weights[None, None], axis=2)

    @property
    def present(self) -> Array:
        """[G, K] bool."""
        return jnp.any(self.applies, axis=2)


def _checked(group: Group) -> Group:
    chex.assert_rank(list(group), [3, 3, 1])
    chex.assert_equal_shape([group.rewards, group.applies])
    return group


def grpo(group: Group, *, scale: Scale = "group") -> Array:
    """(r - mean of the group) / (std + 1e-4), [G, K], std with n - 1.

    Args:
      scale: whose std divides: that of the group, that of all rewards of the batch, or none at all.
    References: Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2; of the batch: Liu et al. 2025, arXiv:2508.08221.

    >>> one = jnp.ones((1, 2, 1))
    >>> print(grpo(Group(one.at[0, 1].set(0), one > 0, jnp.ones(1)), scale="none"))
    [[ 0.5 -0.5]]
    """
    total, present = _checked(group).total, group.present
    centred = _centred(total, present, 1)
    if scale == "none":
        return centred
    whole = _centred(total, present)
    variance = _variance(centred, present, 1) if scale == "group" else _variance(whole, present)
    return centred / (jnp.sqrt(variance) + SMALL)


def rloo(group: Group) -> Array:
    """r less the mean of the group's other samples, [G, K]: K / (K - 1) (r - mean); 0 for a sample that is alone.

    References: Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019 ("Buy 4 REINFORCE samples").
    """
    total, present = _checked(group).total, group.present
    count = jnp.sum(present, axis=1, keepdims=True)
    return _centred(total, present, 1) * (count / jnp.maximum(count - 1, 1))


def reinforce_pp(group: Group, *, baseline: bool = False) -> Array:
    """r whitened over the whole batch, [G, K].

    Args:
      baseline: True takes away the mean of each group first. The batch's mean is 0 then, and isn't taken away again:
        so a group of equal rewards has exactly 0.
    References: Hu et al. 2025, arXiv:2501.03262 (REINFORCE++, and with baseline).
    """
    total, present = _checked(group).total, group.present
    if not baseline:
        return whiten(total, present)
    centred = _centred(total, present, 1)
    return centred / jnp.sqrt(_variance(centred, present) + 1e-8)


def dr_grpo(group: Group) -> Array:
    """r less the mean of the group, [G, K]: easy and hard prompts weigh as their rewards do.

    References: Liu et al. 2025, arXiv:2503.20783.
    """
    return grpo(group, scale="none")


def gdpo(group: Group) -> Array:
    """The weighted sum of each reward's own z-score in its group, over the batch's std + 1e-4, [G, K], std with n - 1.

    So a reward of a small spread isn't drowned by one of a large. The sums have mean 0 in every group already.
    References: Liu et al. 2026, arXiv:2601.05242.
    """
    applies, present = _checked(group).applies, group.present
    centred = _centred(group.rewards, applies, 1)
    scores = centred / (jnp.sqrt(_variance(centred, applies, 1)) + SMALL)
    total = group._replace(rewards=scores).total
    return total / (jnp.sqrt(_variance(total, present)) + SMALL)


BASELINES: dict[str, Callable[..., Array]] = {
    "grpo": grpo, "rloo": rloo, "reinforce_pp": reinforce_pp, "dr_grpo": dr_grpo, "gdpo": gdpo,
}  # fmt: skip
