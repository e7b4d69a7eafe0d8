"""Estimators of KL(pi || ref) from sampled tokens, and the coefficient that follows it.

Each takes d = log pi(y) - log ref(y) of tokens y that the policy sampled, nats, and gives nats, elementwise. Put 0
where a token doesn't count, before the call: an estimator of 0 is 0, with slope 0 or, for k1, a constant one.

The value that is right in expectation and the gradient that is right are two things: a gradient that passes
through a sample misses how the policy's change moves the sampling. The docstrings name what it is in expectation
when the policy that is differentiated is the one that sampled.

References: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.divergences import box_cox

Estimator = Literal["k1", "k2", "k3", "k3_plus"]  # the names of ESTIMATORS


def k1(log_ratio: Array) -> Array:
    """d: unbiased, of either sign, the widest spread. Its gradient is 0 in expectation: for rewards, not for losses.

    >>> print(k1(jnp.array([0.5, -0.5])))
    [ 0.5 -0.5]
    """
    return log_ratio


def k2(log_ratio: Array) -> Array:
    """d^2 / 2: biased, but right to second order near the reference. Its gradient is that of KL(pi || ref).

    >>> print(k2(jnp.array([0.5, -0.5])))
    [0.125 0.125]
    """
    return jnp.square(log_ratio) / 2


def k3(log_ratio: Array) -> Array:
    """exp(-d) - 1 + d: unbiased and never negative. Its gradient is that of KL(ref || pi), the other direction.

    The exponential is continued by its tangent where it would leave float32.

    >>> print(k3(jnp.array([0.5, -0.5])).round(4))
    [0.1065 0.1487]
    """
    return box_cox(-log_ratio, 1.0) + log_ratio


def k3_plus(log_ratio: Array) -> Array:
    """The value of `k3` with the gradient of `k2`, that of KL(pi || ref): k2 straight through.

    >>> print(k3_plus(jnp.array([0.5, -0.5])).round(4))
    [0.1065 0.1487]
    """
    moving = k2(log_ratio)
    return jax.lax.stop_gradient(k3(log_ratio)) + (moving - jax.lax.stop_gradient(moving))


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k3_plus": k3_plus}


def adaptive(
    coefficient: Array | float, kl: Array, count: Array | float, *, target: float = 6.0, horizon: float = 10_000.0
) -> Array:
    """The next coefficient of the KL penalty: coefficient (1 + e count / horizon).

    e = clip(kl / target - 1, -0.2, 0.2).

    Args:
      kl: nats, the mean over the batch of each completion's sum.
      count: completions in that batch.
      target: nats per completion.
      horizon: completions; over so many the coefficient changes by a factor of exp 0.2 at most.
    References: Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2; its K_beta is count / horizon here.

    >>> print(adaptive(0.5, jnp.float32(12), 100, horizon=1000.0))
    0.51
    """
    return coefficient * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * count / horizon)
