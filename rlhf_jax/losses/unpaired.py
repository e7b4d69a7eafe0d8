"""Losses of single answers that carry a label: good or bad, [N] each."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array


class Answer(NamedTuple):
    """One completion a row, [N] each: log-probabilities in nats, float32; label True if desirable."""

    logprob: Array
    ref_logprob: Array
    label: Array
    baseline: Array  # k >= 0, nats: how far the policy has moved from the reference; no gradient


class BareAnswer(NamedTuple):
    """One completion a row, [N] each: log-probabilities in nats, float32; label True if desirable."""

    logprob: Array
    ref_logprob: Array
    label: Array


class ShiftedAnswer(NamedTuple):
    """One completion a row, [N] each: log-probabilities in nats, float32; label True if desirable."""

    logprob: Array
    ref_logprob: Array
    label: Array
    shift: Array  # running mean of beta (logprob - ref_logprob) over past batches; no gradient


def kto(answer: Answer, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Array:
    """1 - sig(beta (r - k)) for a desirable answer, 1 - sig(beta (k - r)) for another, weighted, [N].

    r = logprob - ref_logprob, and k is the baseline.
    References: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8.
    """
    chex.assert_rank(list(answer), 1)
    gain = beta * (answer.logprob - answer.ref_logprob - jax.lax.stop_gradient(answer.baseline))
    desirable = desirable_weight * (1 - jax.nn.sigmoid(gain))
    undesirable = undesirable_weight * (1 - jax.nn.sigmoid(-gain))
    return jnp.where(answer.label, desirable, undesirable)


def kto_zero(
    answer: BareAnswer, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Array:
    """1 - sig(beta r) for a desirable answer, sig(beta r) for another, weighted, [N]: `kto` with its baseline at 0.

    r = logprob - ref_logprob. Also known as the unpaired form of APO-zero.
    References: Ethayarajh et al. 2024, arXiv:2402.01306; D'Oosterlinck et al. 2024, arXiv:2408.06266.
    """
    chex.assert_rank(list(answer), 1)
    gain = beta * (answer.logprob - answer.ref_logprob)
    desirable, undesirable = desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain)
    return jnp.where(answer.label, desirable, undesirable)


def bco(answer: ShiftedAnswer, *, beta: float = 0.1) -> Array:
    """-log sig(r - d) for a desirable answer, -log sig(d - r) for another, [N]: a classifier whose logit is r - d.

    r = beta (logprob - ref_logprob), and d is the shift, in the units of r.
    References: Jung et al. 2024, arXiv:2404.04656.
    """
    chex.assert_rank(list(answer), 1)
    logit = beta * (answer.logprob - answer.ref_logprob) - jax.lax.stop_gradient(answer.shift)
    return -jax.nn.log_sigmoid(jnp.where(answer.label, logit, -logit))


UNPAIRED = {"kto": kto, "kto_zero": kto_zero, "bco": bco}
