"""Losses of pairs: a chosen and a rejected completion of one prompt, [B] each.

Notation: a = log pi(chosen) - log ref(chosen), b the same of rejected, D = a - b; the implicit reward of a
completion is beta times its log-ratio.
"""

from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array


PER_ROW = "or a number a row, from a column of the data"  # float32 [B] in the place of the number
PerRow = Annotated[float, PER_ROW]


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


class PolicyPair(NamedTuple):
    """A pair without a reference: log-probabilities of whole completions, nats, and lengths, float32 [B] each."""

    chosen: Array
    rejected: Array
    chosen_len: Array
    rejected_len: Array


class MeanPair(NamedTuple):
    """A pair without a reference: mean log-probabilities of completion tokens, nats, float32 [B] each."""

    chosen: Array
    rejected: Array


class SortedMargins(NamedTuple):
    """Margins log pi(chosen) - log pi(rejected), nats, and the reference's margin of the same rank, float32 [B] each.

    The ranks are those of the global batch: row i holds the r-th smallest margin, and `partner` the r-th smallest
    margin of the reference, whichever row that came from; no gradient flows to it.
    """

    margin: Array
    partner: Array


class SortedRatios(NamedTuple):
    """Log-ratios a and b, nats, each with the other side's of the same rank in the global batch, float32 [B] each.

    `chosen_partner` is the b whose rank among all b is that of this row's a among all a; `rejected_partner` is the a
    whose rank is that of this row's b. Both come from `prepare`, at the parameters that are about to be updated; no
    gradient flows to them.
    """

    chosen: Array
    rejected: Array
    chosen_partner: Array
    rejected_partner: Array


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


def orpo(pair: MeanPair, *, beta: float = 0.1) -> Array:
    """NLL(chosen) - beta log sig(log odds(chosen) - log odds(rejected)), [B]; no reference.

    With p = exp of a completion's mean token log-probability: odds = p / (1 - p), and the NLL is -log p of the
    chosen one, so each row has a denominator of its own, its tokens. The paper's lambda is beta here.
    References: Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7.
    """
    chex.assert_rank(list(pair), 1)
    # A mean log-probability that rounds to 0 has infinite odds; the largest number below 0 stands for it.
    chosen, rejected = (jnp.minimum(mean, -jnp.finfo(mean.dtype).tiny) for mean in pair)
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -pair.chosen - beta * jax.nn.log_sigmoid(odds)


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, without cancellation near 0 nor far from it (Mächler 2012)."""
    near = x > -0.6931472
    # The branch that isn't taken gets a number for which it is finite: its gradient would be NaN otherwise.
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -0.5))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def simpo(pair: MeanPair, *, beta: float = 2.0, margin: float = 1.0) -> Array:
    """-log sig(beta (mean log pi(chosen) - mean log pi(rejected)) - margin), [B]; no reference.

    The paper's gamma is the margin here; it advises margin / beta of about 0.5.
    References: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    chex.assert_rank(list(pair), 1)
    return -jax.nn.log_sigmoid(beta * (pair.chosen - pair.rejected) - margin)


def cpo(pair: PolicyPair, *, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> Array:
    """-(1 - e) log sig(beta m) - e log sig(-beta m) + alpha NLL(chosen), [B]; no reference.

    m = log pi(chosen) - log pi(rejected), of whole completions; the NLL is the mean over the chosen one's tokens.
    References: Xu et al. 2024, arXiv:2401.08417, Eq. 3 to 5.
    """
    chex.assert_rank(list(pair), 1)
    logit = beta * (pair.chosen - pair.rejected)
    prefers = -(1 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)
    return prefers - alpha * pair.chosen / pair.chosen_len


PREFERENCE = {"dpo": dpo, "ipo": ipo, "hinge": hinge, "orpo": orpo, "simpo": simpo, "cpo": cpo}
