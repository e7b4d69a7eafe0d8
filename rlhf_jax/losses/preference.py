"""Losses of pairs: a chosen and a rejected completion of one prompt, [B] each.

Notation: a = log pi(chosen) - log ref(chosen), b the same of rejected, D = a - b; the implicit reward of a
completion is beta times its log-ratio. Where a loss takes a divergence, D_g = g(a) - g(b) with the map g of
`ops.divergences`, which is u -> u for the reverse KL.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.choices import logistic
from rlhf_jax.ops.divergences import Divergence, box_cox, log_ratio_map
from rlhf_jax.registry import PerRow


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


def partners(values: Array, others: Array, weight: Array) -> Array:
    """For every row the entry of `others` whose rank among `others` is the row's rank among `values`, [B].

    Rows of weight 0 take no part, whatever they hold, and get 0. Equal values rank by their row.

    >>> print(partners(jnp.array([3.0, 1.0, 2.0]), jnp.array([10.0, 30.0, 20.0]), jnp.ones(3)))
    [30. 10. 20.]
    """
    chex.assert_rank([values, others, weight], 1)
    absent = weight == 0
    rows, entries = (jnp.lexsort((column, absent)) for column in (values, others))  # the last key sorts first
    return jnp.where(absent, 0, jnp.zeros_like(others).at[rows].set(others[entries]))


def _ratios(pair: Pair, divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> tuple[Array, Array]:
    """g(a) and g(b)."""
    a, b = pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected
    return log_ratio_map(a, divergence, alpha), log_ratio_map(b, divergence, alpha)


def _margin(pair: Pair, divergence: Divergence, alpha: float) -> Array:
    """D_g = g(a) - g(b)."""
    a, b = _ratios(pair, divergence, alpha)
    return a - b


def dpo(
    pair: Pair,
    *,
    beta: float = 0.1,
    label_smoothing: PerRow = 0.0,
    margin: PerRow = 0.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Array:
    """-(1 - e) log sig(x) - e log sig(-x) of x = beta D_g - margin, [B], e the chance that a label is flipped.

    A soft label p = P(chosen is better) is label_smoothing = 1 - p, row by row.
    References: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; Mitchell 2023, "A note on DPO with noisy
    preferences", Eq. 3 (conservative DPO); Wang et al. 2023, arXiv:2309.16240 (other divergences).

    >>> zero, one = jnp.zeros(1), jnp.ones(1)
    >>> print(dpo(Pair(zero, zero, zero, zero, one, one)))
    [0.6931472]
    """
    chex.assert_rank(list(pair), 1)
    return logistic(beta * _margin(pair, divergence, divergence_alpha) - margin, label_smoothing)


def robust(
    pair: Pair,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Array:
    """[-(1 - e) log sig(beta D_g) + e log sig(-beta D_g)] / (1 - 2e), [B], e != 1/2 the rate of flipped labels.

    Over labels that are flipped at the rate e its expectation is `dpo` on the true ones.
    References: Chowdhury et al. 2024, arXiv:2403.00409 (rDPO).
    """
    chex.assert_rank(list(pair), 1)
    x = beta * _margin(pair, divergence, divergence_alpha)
    said, flipped = -jax.nn.log_sigmoid(x), -jax.nn.log_sigmoid(-x)
    return ((1 - label_smoothing) * said - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(
    pair: Pair,
    *,
    beta: float = 0.1,
    length_normalised: bool = True,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Array:
    """Squared distance of the margin from its target 1 / (2 beta), [B].

    The margin is that of g(a) and g(b) by token, or with length_normalised=False of the two as they are.
    References: Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    """
    chex.assert_rank(list(pair), 1)
    a, b = _ratios(pair, divergence, divergence_alpha)
    if length_normalised:
        a, b = a / pair.chosen_len, b / pair.rejected_len
    return jnp.square(a - b - 1 / (2 * beta))


def hinge(
    pair: Pair,
    *,
    beta: float = 0.1,
    margin: PerRow = 1.0,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Array:
    """relu(margin - beta D_g), [B].

    References: Zhao et al. 2023, arXiv:2305.10425 (SLiC); Liu et al. 2023, arXiv:2309.06657, sec. 3 (RSO).
    """
    chex.assert_rank(list(pair), 1)
    return jax.nn.relu(margin - beta * _margin(pair, divergence, divergence_alpha))


def exo(
    pair: Pair,
    *,
    beta: float = 0.1,
    label_smoothing: PerRow = 1e-3,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Array:
    """KL(q || p) of the policy's preference q = (sig(x), sig(-x)) from the label p = (1 - e, e), x = beta D_g, [B].

    0 < e < 1: a label without doubt is infinitely far. `dpo` is the other direction, up to the label's entropy.
    References: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    chex.assert_rank(list(pair), 1)
    x = beta * _margin(pair, divergence, divergence_alpha)
    chosen = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - jnp.log1p(-label_smoothing))
    return chosen + jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - jnp.log(label_smoothing))


def nca(pair: Pair, *, beta: float = 0.1) -> Array:
    """-log sig(beta a) - log sig(-beta a) / 2 - log sig(-beta b) / 2, [B]: pulls beta a to log 2, and b down.

    References: Chen et al. 2024, arXiv:2402.05369.
    """
    chex.assert_rank(list(pair), 1)
    a, b = _ratios(pair)
    noise = jax.nn.log_sigmoid(-beta * a) + jax.nn.log_sigmoid(-beta * b)
    return -jax.nn.log_sigmoid(beta * a) - noise / 2


def bco_pair(pair: Pair, *, beta: float = 0.1) -> Array:
    """-log sig(beta a) - log sig(-beta b), [B]: a classifier of single answers, its shift fixed at 0.

    References: Jung et al. 2024, arXiv:2404.04656.
    """
    chex.assert_rank(list(pair), 1)
    a, b = _ratios(pair)
    return -jax.nn.log_sigmoid(beta * a) - jax.nn.log_sigmoid(-beta * b)


def sppo(pair: Pair, *, beta: float = 0.1) -> Array:
    """(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2, [B]: the chosen one wins for certain, the paper's eta is 1 / beta.

    References: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P of 1 and 0.
    """
    chex.assert_rank(list(pair), 1)
    a, b = _ratios(pair)
    return jnp.square(a - 1 / (2 * beta)) + jnp.square(b + 1 / (2 * beta))


def apo_zero(pair: Pair, *, beta: float = 0.1) -> Array:
    """1 - sig(beta a) + sig(beta b), [B]: raises the chosen one, for data that are better than the model.

    References: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    chex.assert_rank(list(pair), 1)
    a, b = _ratios(pair)
    return jax.nn.sigmoid(-beta * a) + jax.nn.sigmoid(beta * b)


def apo_down(pair: Pair, *, beta: float = 0.1) -> Array:
    """sig(beta a) + 1 - sig(beta D), [B]: lowers the rejected one, and the chosen one where |a| < |D|.

    For a model that is better than its data.

    References: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    chex.assert_rank(list(pair), 1)
    a, b = _ratios(pair)
    return jax.nn.sigmoid(beta * a) + jax.nn.sigmoid(-beta * (a - b))


def discopop(
    pair: Pair,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Array:
    """-(1 - m) log sig(x) + m exp(-x) with x = beta D_g and m = sig(x / tau), 0 < tau < 1, [B].

    References: Lu et al. 2024, arXiv:2406.08414, Eq. 5.
    """
    chex.assert_rank(list(pair), 1)
    x = beta * _margin(pair, divergence, divergence_alpha)
    # One exponential, which is at most 1: far below 0 the factors are 0 and infinite.
    exponential = jnp.exp(jax.nn.log_sigmoid(x / tau) - x)
    return exponential - jax.nn.sigmoid(-x / tau) * jax.nn.log_sigmoid(x)


def dpo_norm(
    pair: Pair, *, beta: float = 5.0, divergence: Divergence = "reverse_kl", divergence_alpha: float = 0.5
) -> Array:
    """-log sig(beta (g(a) / |chosen| - g(b) / |rejected|)), [B], lengths in tokens.

    References: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124 (length-normalised DPO).
    """
    chex.assert_rank(list(pair), 1)
    a, b = _ratios(pair, divergence, divergence_alpha)
    return -jax.nn.log_sigmoid(beta * (a / pair.chosen_len - b / pair.rejected_len))


def aot(pair: SortedMargins, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """-(1 - e) log sig(beta x) - e log sig(-beta x) with x = margin - partner, [B].

    The distribution of the policy's margins is to dominate that of the reference's, quantile by quantile.
    References: Melnyk et al. 2024, arXiv:2406.05882 (paired).
    """
    chex.assert_rank(list(pair), 1)
    return logistic(beta * (pair.margin - jax.lax.stop_gradient(pair.partner)), label_smoothing)


def aot_unpaired(pair: SortedRatios, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Array:
    """f(a - chosen_partner) / 2 + f(rejected_partner - b) / 2, [B], with f(x) the loss of `aot` at x.

    Over the batch each half sums f(a_(k) - b_(k)) over the ranks k. The gradient is that of the whole sum: a half
    moves one side alone, for the partners are columns, so it counts twice.
    References: Melnyk et al. 2024, arXiv:2406.05882 (unpaired).
    """
    chex.assert_rank(list(pair), 1)
    b_of_rank, a_of_rank = jax.lax.stop_gradient((pair.chosen_partner, pair.rejected_partner))
    above = logistic(beta * (pair.chosen - b_of_rank), label_smoothing)
    both = above + logistic(beta * (a_of_rank - pair.rejected), label_smoothing)
    return both - jax.lax.stop_gradient(both) / 2


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


def simpo(pair: MeanPair, *, beta: float = 2.0, margin: PerRow = 1.0) -> Array:
    """-log sig(beta (mean log pi(chosen) - mean log pi(rejected)) - margin), [B]; no reference.

    The paper's gamma is the margin here; it advises margin / beta of about 0.5.
    References: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    chex.assert_rank(list(pair), 1)
    return -jax.nn.log_sigmoid(beta * (pair.chosen - pair.rejected) - margin)


def alphapo(pair: MeanPair, *, beta: float = 2.0, margin: PerRow = 1.0, alpha: float = 0.25) -> Array:
    """-log sig(beta (r(chosen) - r(rejected)) - margin), r = (1 - p^-alpha) / alpha, [B]; no reference.

    p = exp of a completion's mean token log-probability. alpha = 0 is `simpo`, whose r is log p.
    References: Gupta et al. 2025, arXiv:2501.03884.
    """
    chex.assert_rank(list(pair), 1)
    chosen, rejected = (box_cox(mean, -alpha) for mean in pair)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - margin)


def cpo(pair: PolicyPair, *, beta: float = 0.1, alpha: float = 1.0, label_smoothing: PerRow = 0.0) -> Array:
    """-(1 - e) log sig(beta m) - e log sig(-beta m) + alpha NLL(chosen), [B]; no reference.

    m = log pi(chosen) - log pi(rejected), of whole completions; the NLL is the mean over the chosen one's tokens.
    References: Xu et al. 2024, arXiv:2401.08417, Eq. 3 to 5.
    """
    chex.assert_rank(list(pair), 1)
    prefers = logistic(beta * (pair.chosen - pair.rejected), label_smoothing)
    return prefers - alpha * pair.chosen / pair.chosen_len


PREFERENCE = {
    "dpo": dpo, "robust": robust, "ipo": ipo, "hinge": hinge, "exo": exo, "nca": nca, "bco_pair": bco_pair,
    "sppo": sppo, "apo_zero": apo_zero, "apo_down": apo_down, "discopop": discopop, "dpo_norm": dpo_norm,
    "aot": aot, "aot_unpaired": aot_unpaired,
    "orpo": orpo, "simpo": simpo, "alphapo": alphapo, "cpo": cpo,
}  # fmt: skip
