"""Losses of scores: what a reward model says of whole answers, or of the steps of one.

The score of an answer is a number without a unit of its own: by Bradley and Terry a difference of scores is the
log-odds that the first answer is preferred, and by the losses of labels a score is the log-odds that the answer, or
the step, is right.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.choices import logistic, plackett_luce_nll
from rlhf_jax.registry import PerRow


class ScorePair(NamedTuple):
    """Scores of a pair, float32 [N] each."""

    chosen: Array
    rejected: Array


class ScoreGroup(NamedTuple):
    """Scores of up to K answers to one prompt."""

    score: Array  # [N, K] float32
    preferred: Array  # [N, K, K], the share of labels that put the first answer above the second
    present: Array  # [N, K] bool, False where a group has fewer than K


class ScoreRanking(NamedTuple):
    """Scores of up to K answers to one prompt, which someone has ranked, [N, K] each."""

    score: Array  # float32
    rank: Array  # the smaller the better; equal ranks are ties
    present: Array  # bool, False where a row has fewer than K


class ScoredAnswer(NamedTuple):
    """Score of a single answer, [N]; label True if it is right."""

    score: Array
    label: Array


class ScoredSteps(NamedTuple):
    """Scores at single tokens, float32 [rows, T]; label 1 right, 0 wrong, 0.5 neutral; used where a step ends."""

    score: Array
    label: Array


def bradley_terry(
    pair: ScorePair, *, label_smoothing: PerRow = 0.0, margin: PerRow = 0.0, centre: float = 0.0
) -> Array:
    """-(1 - e) log sig(x) - e log sig(-x) + c (r_w + r_l)^2 of x = r_w - r_l - margin, [N].

    e is the chance that a label is flipped: a soft label p = P(chosen is better) is label_smoothing = 1 - p, row by
    row, and a tie is p = 1/2. The last term keeps scores near 0, which differences alone leave free.
    References: Bradley and Terry 1952, Biometrika 39; Ouyang et al. 2022, arXiv:2203.02155, Eq. 1; margins: Touvron
    et al. 2023, arXiv:2307.09288, Eq. 2; centring: Eisenstein et al. 2023, arXiv:2312.09244, sec. 4.

    >>> print(bradley_terry(ScorePair(jnp.zeros(1), jnp.zeros(1))))
    [0.6931472]
    """
    chex.assert_rank(list(pair), 1)
    said = logistic(pair.chosen - pair.rejected - margin, label_smoothing)
    return said + centre * jnp.square(pair.chosen + pair.rejected)


def all_pairs(group: ScoreGroup, *, centre: float = 0.0) -> Array:
    """The mean over the C(K, 2) pairs of a prompt's answers of their Bradley-Terry loss, [N].

    For i and j it is -p_ij log sig(r_i - r_j) - p_ji log sig(r_j - r_i) + c (r_i + r_j)^2, where the p are shares of
    labels: a pair that nobody told apart adds nothing but its centring. K is what the group has; a single answer
    gives 0. One row and K forward passes, so the prompt counts once, however many answers were ranked.
    References: Ouyang et al. 2022, arXiv:2203.02155, Eq. 1.

    >>> ranked = jnp.array([[[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    >>> flat = jnp.zeros((1, 3))
    >>> print(all_pairs(ScoreGroup(flat, ranked, flat == 0)))
    [0.6931472]
    """
    chex.assert_rank([group.score, group.preferred], [2, 3])
    score = jnp.where(group.present, group.score, 0)
    both = group.present[:, :, None] & group.present[:, None, :]
    both &= ~jnp.eye(score.shape[1], dtype=bool)[None]
    difference = score[:, :, None] - score[:, None, :]
    of_two = -group.preferred * jax.nn.log_sigmoid(difference)
    of_two += 0.5 * centre * jnp.square(score[:, :, None] + score[:, None, :])  # each two stand there twice
    pairs = jnp.sum(both, axis=(1, 2)) / 2
    return jnp.sum(jnp.where(both, of_two, 0), axis=(1, 2)) / jnp.maximum(pairs, 1)


def plackett_luce(ranking: ScoreRanking) -> Array:
    """-log P(ranking): the best is drawn first with odds exp r, then the best of the rest, and so on, [N].

    The sum over answers i of log(exp r_i + sum over the worse j of exp r_j) - r_i. Ties are not compared. For two
    answers it is `bradley_terry`.
    References: Plackett 1975, JRSS C 24; Luce 1959, Individual Choice Behavior.

    >>> flat = jnp.zeros((1, 3))
    >>> print(plackett_luce(ScoreRanking(flat, jnp.array([[0.0, 1.0, 2.0]]), flat == 0)))  # log 3 + log 2
    [1.7917595]
    """
    return plackett_luce_nll(ranking.score, ranking.rank, ranking.present)


def outcome(answer: ScoredAnswer) -> Array:
    """-log sig(r) of a right answer, -log sig(-r) of a wrong one, [N]: the score is the log-odds of being right.

    References: Cobbe et al. 2021, arXiv:2110.14168, sec. 4 (verifiers).
    """
    chex.assert_rank(list(answer), 1)
    return -jax.nn.log_sigmoid(jnp.where(answer.label, answer.score, -answer.score))


def process(steps: ScoredSteps, *, neutral: float = 1.0) -> Array:
    """-p log sig(r) - (1 - p) log sig(-r) of a step's score and its label p, [rows, T].

    Args:
      neutral: what a label between right and wrong is trained as, from 0 (wrong) to 1 (right).
    References: Lightman et al. 2023, arXiv:2305.20050, sec. 2.4; Uesato et al. 2022, arXiv:2211.14275.
    """
    chex.assert_equal_shape(list(steps))
    return logistic(steps.score, 1 - jnp.where(steps.label == 0.5, neutral, steps.label))


REWARD = {
    "bradley_terry": bradley_terry, "all_pairs": all_pairs, "plackett_luce": plackett_luce, "outcome": outcome,
    "process": process,
}  # fmt: skip
