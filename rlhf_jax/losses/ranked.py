"""Losses of ranked groups: several completions of one prompt, the smaller the rank the better, [B, K] each."""

from typing import NamedTuple

import chex
from jax import Array

from rlhf_jax.ops.choices import plackett_luce_nll


class Ranked(NamedTuple):
    """Up to K completions a row: log-probabilities of whole completions in nats, float32 [B, K] each."""

    logprob: Array
    ref_logprob: Array
    rank: Array  # [B, K]; equal ranks are ties
    present: Array  # [B, K] bool, False where a row has fewer than K


def dpo_pl(group: Ranked, *, beta: float = 0.1) -> Array:
    """DPO under the Plackett-Luce model: the best is drawn first, then the best of the rest, and so on, [B].

    With r = beta (logprob - ref_logprob): the sum over completions i of log(exp r_i + sum over the worse j of exp r_j)
    - r_i. Ties are not compared. For two completions it is `preference.dpo`.
    References: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3, Eq. 20.

    >>> import jax.numpy as jnp
    >>> row = jnp.zeros((1, 3))
    >>> print(dpo_pl(Ranked(row, row, jnp.array([[0.0, 1.0, 2.0]]), row == 0)))  # log 3 + log 2
    [1.7917595]
    """
    chex.assert_rank(list(group), 2)
    return plackett_luce_nll(beta * (group.logprob - group.ref_logprob), group.rank, group.present)


RANKED = {"dpo_pl": dpo_pl}
