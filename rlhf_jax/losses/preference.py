"""Losses of pairs: a chosen and a rejected completion of one prompt, [B] each.

Notation: a = log pi(chosen) - log ref(chosen), b the same of rejected, D = a - b; the implicit reward of a
completion is beta times its log-ratio.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array


class Pair(NamedTuple):
    """Log-probabilities of whole completions, nats, and their lengths in tokens, float32 [B] each."""

    chosen: Array
    rejected: Array
    ref_chosen: Array
    ref_rejected: Array
    chosen_len: Array
    rejected_len: Array

    @property
    def margin(self) -> Array:
        """D, the difference of the two log-ratios, nats, [B]."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


def dpo(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """-(1 - e) log sig(beta D) - e log sig(-beta D), [B], e the chance that a label is flipped.

    References: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; Mitchell 2023, "A note on DPO with noisy
    preferences", Eq. 3 (conservative DPO).

    >>> zero, one = jnp.zeros(1), jnp.ones(1)
    >>> print(dpo(Pair(zero, zero, zero, zero, one, one)))
    [0.6931472]
    """
    chex.assert_rank(list(pair), 1)
    logit = beta * pair.margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)


def ipo(pair: Pair, *, beta: float = 0.1, length_normalised: bool = True) -> Array:
    """Squared distance of the margin from its target 1 / (2 beta), [B].

    The log-ratios are means over completion tokens, or sums with length_normalised=False.
    References: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    chex.assert_rank(list(pair), 1)
    per = (pair.chosen_len, pair.rejected_len) if length_normalised else (1.0, 1.0)
    chosen = (pair.chosen - pair.ref_chosen) / per[0]
    rejected = (pair.rejected - pair.ref_rejected) / per[1]
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def hinge(pair: Pair, *, beta: float = 0.1) -> Array:
    """relu(1 - beta D), [B].

    References: Zhao et al. 2023, arXiv:2305.10425 (SLiC); Liu et al. 2023, arXiv:2309.06657, sec. 3 (RSO).
    """
    chex.assert_rank(list(pair), 1)
    return jax.nn.relu(1 - beta * pair.margin)


PREFERENCE = {"dpo": dpo, "ipo": ipo, "hinge": hinge}
