"""Which pairs of answers people should compare next, and how many of them a budget pays.

Each strategy is a function of a `Pool` that gives the places of the chosen pairs, in the order in which they were
chosen. None of them looks at a label of a pair that it may choose.

`information` and `prediction` look at a head, w, on what is known of each answer, phi: P(i is preferred to j) =
sigmoid(w . x), x = phi_i - phi_j, with w ~ N(0, I / prior) beforehand and Laplace's normal posterior N(m, S) behind
what is labelled. Whichever way a pair turns out, what it adds to the precision is p (1 - p) x x': so a batch is chosen
greedily, and each pick counts what the earlier ones of the batch will have told.

References: Chaloner and Verdinelli 1995, Bayesian Experimental Design: A Review, Statistical Science 10; Shen et al.
2025, arXiv:2502.04354 (D-optimal pairs for the last layer of a reward model).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from rlhf_jax.errors import UserError

STEPS, CLOSE = 100, 1e-8  # of Newton's method; nats that a step gains at which it is the last
SPREAD = 0.25  # nats: what w . x is like beforehand, if nobody says
Reads = Literal["nothing", "features", "scores"]


# The head


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A normal posterior of w: mean [d], and precision [d, d], the inverse of its covariance."""

    mean: np.ndarray
    precision: np.ndarray


def fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, prior: float = 1.0) -> Head:
    """Bayesian logistic regression without an intercept, by Laplace's approximation.

    The mean maximises  sum_n weight_n (y_n log p_n + (1 - y_n) log (1 - p_n)) - prior / 2 |w|^2,  p = sigmoid(x w), and
    the precision is  sum_n weight_n p_n (1 - p_n) x_n x_n' + prior I,  there.

    Args:
      x: [N, d] differences of features; N may be 0.
      y: [N] from 0 to 1: 1 if the pair's first answer is preferred, 0.5 for neither.
      weight: [N], at least 0, of each label; None: 1 each.
      prior: above 0; precision of each of w beforehand.
    Errors: ValueError for a y that is not from 0 to 1, and a weight or a prior that isn't allowed.
    References: MacKay 1992, The Evidence Framework Applied to Classification Networks, Neural Computation 4.

    >>> head = fit(np.array([[1.0]]), np.array([0.5]), prior=2.0)
    >>> print(head.mean, head.precision)
    [0.] [[2.25]]
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    weight = np.ones(len(y)) if weight is None else np.asarray(weight, np.float64)
    if not (prior > 0 and math.isfinite(prior)) or not (weight >= 0).all() or not ((y >= 0) & (y <= 1)).all():
        raise ValueError("y must be from 0 to 1, weights at least 0, and the prior above 0")
    eye = prior * np.eye(x.shape[1])
    # y log p + (1 - y) log (1 - p) = y m - log(1 + exp m)
    value = lambda w: weight @ (y * (x @ w) - np.logaddexp(0, x @ w)) - prior / 2 * w @ w
    w = np.zeros(x.shape[1])
    for _ in range(STEPS):
        p = _sigmoid(x @ w)
        slope = x.T @ (weight * (y - p)) - prior * w
        precision = (x.T * (weight * p * (1 - p))) @ x + eye
        way = np.linalg.solve(precision, slope)
        gain = slope @ way  # twice what a quadratic function would gain
        length = 1.0
        while gain > CLOSE and value(w + length * way) < value(w) + length * gain / 10 and length > 1e-6:
            length /= 2
        w = w + length * way
        if gain <= CLOSE:  # so near a step squares the distance, and the value is too coarse to tell
            break
    p = _sigmoid(x @ w)
    return Head(w, (x.T * (weight * p * (1 - p))) @ x + eye)


def standardised(features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Features [answers, d] in units of how much the answers of a pair differ in each: that has a mean square of 1.

    One in which no two answers of a pair [P, 2] differ becomes 0.

    >>> print(standardised(np.array([[0.0, 1.0], [3.0, 1.0]]), np.array([[0, 1]])))
    [[0. 0.]
     [1. 0.]]
    """
    features = np.asarray(features, np.float64)
    size = np.sqrt(np.square(features[pairs[:, 0]] - features[pairs[:, 1]]).mean(axis=0))
    return np.where(size > 0, features / np.where(size > 0, size, 1), 0)


# What there is to choose from


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Pairs to choose from, and what is known of their answers.

    Attributes:
      pairs: [P, 2] int, places among the answers; which of the two stands first is no matter.
      features: [answers, d] float64, better `standardised`; None: not known.
      scores: [members, answers], of several reward models; None: not known. Each one's zero is free.
      labelled: [N, 2] int, pairs that people compared; they are chosen no more, in either order.
      label: [N], from 0 to 1: 1 if they preferred the first.
      group: [P] int, such as the prompt; at most `most` pairs of a group are chosen. None: any number.
      closed: [P] bool, pairs that can't be chosen, and are yet of what predictions are to be good for. None: none.
      prior: precision of each of w beforehand; None: d / SPREAD^2, with which w . x of standardised features is about
        SPREAD beforehand.
    """

    pairs: np.ndarray
    features: np.ndarray | None = None
    scores: np.ndarray | None = None
    labelled: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int64))
    label: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    group: np.ndarray | None = None
    most: int | None = None
    closed: np.ndarray | None = None
    prior: float | None = None

    def differences(self, pairs: np.ndarray) -> np.ndarray:
        """[len(pairs), d], features of the first answers less those of the second."""
        assert self.features is not None
        return self.features[pairs[:, 0]] - self.features[pairs[:, 1]]

    def head(self) -> Head:
        """The posterior behind what is labelled."""
        assert self.features is not None
        prior = self.features.shape[1] / SPREAD**2 if self.prior is None else self.prior
        return fit(self.differences(self.labelled), self.label, prior=prior)


class _Open:
    """Which pairs may still be chosen: each once, none that is labelled, and not too many of a group."""

    def __init__(self, pool: Pool):
        size = max((int(pairs.max()) + 1 for pairs in (pool.pairs, pool.labelled) if len(pairs)), default=1)
        one, known = (np.sort(pairs, axis=1) @ np.array([size, 1]) for pairs in (pool.pairs, pool.labelled))
        _, first = np.unique(one, return_index=True)
        self.mask = np.zeros(len(one), bool)
        self.mask[first] = True
        self.mask &= ~np.isin(one, known) & (pool.pairs[:, 0] != pool.pairs[:, 1])
        if pool.closed is not None:
            self.mask &= ~pool.closed
        self.chosen: list[int] = []
        self._group, self._most = pool.group, pool.most

    def best(self, worth: np.ndarray) -> int | None:
        """Takes the open pair [P] that is worth most, the first of equal ones; None if there is none left."""
        if not self.mask.any():
            return None
        place = int(np.where(self.mask, worth, -np.inf).argmax())
        self.chosen.append(place)
        self.mask[place] = False
        if self._group is not None and self._most is not None:
            mine = self._group == self._group[place]
            if mine[self.chosen].sum() >= self._most:
                self.mask &= ~mine
        return place

    def all_of(self, worth: np.ndarray, count: int) -> np.ndarray:
        """Up to `count`, of a worth that picks don't change."""
        while len(self.chosen) < count and self.best(worth) is not None:
            pass
        return np.asarray(self.chosen, np.int64)


# Strategies: (pool, how many, seed) -> [at most that many] int64, places among the pool's pairs


def random(pool: Pool, count: int, seed: int = 0) -> np.ndarray:
    """Any pairs, which the seed decides: what the others must beat.

    >>> print(random(Pool(np.array([[0, 1], [0, 2], [1, 2]])), 3, seed=1).tolist())
    [1, 0, 2]
    """
    return _Open(pool).all_of(np.random.default_rng(seed).random(len(pool.pairs)), count)


def disagreement(pool: Pool, count: int, seed: int = 0) -> np.ndarray:
    """Pairs of which the members of an ensemble are each sure, and not of one mind: a label tells who of them is right.

    worth = H(mean_m p_m) - mean_m H(p_m),  p_m = sigmoid(score_m,i - score_m,j),  H(p) the entropy of a coin, in nats:
    0 if all say the same, also if that is 0.5; log 2 at most. Picks of a batch don't count what earlier ones tell.

    References: Houlsby et al. 2011, arXiv:1112.5745 (BALD); Christiano et al. 2017, arXiv:1706.03741, sec. 2.2.4
    (the disagreement of an ensemble, there the variance).

    >>> scores = np.array([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    >>> print(disagreement(Pool(np.array([[0, 2], [0, 1]]), scores=scores), 1))
    [1]
    """
    assert pool.scores is not None
    p = _sigmoid(pool.scores[:, pool.pairs[:, 0]] - pool.scores[:, pool.pairs[:, 1]])
    return _Open(pool).all_of(_entropy(p.mean(axis=0)) - _entropy(p).mean(axis=0), count)


def information(pool: Pool, count: int, seed: int = 0) -> np.ndarray:
    """Pairs that tell most of the head: the greedy D-optimal batch.

    worth = log(1 + p (1 - p) x' S x),  twice what the label takes off the entropy of the normal posterior, in nats; S
    becomes that behind each pick, with p as it is. What a batch takes off in all, log det of the precision, is
    submodular: so the greedy one takes off at least 1 - 1/e of what the best one does.

    References: Chaloner and Verdinelli 1995, sec. 4; MacKay 1992, Information-based Objective Functions for Active Data
    Selection, Neural Computation 4; Shen et al. 2025, arXiv:2502.04354; Nemhauser et al. 1978, Mathematical
    Programming 14 (the bound).

    >>> features = np.array([[0.0, 0.0], [3.0, 0.0], [2.9, 0.0], [0.0, 2.0]])
    >>> print(information(Pool(np.array([[0, 1], [0, 2], [0, 3]]), features, prior=1.0), 2).tolist())
    [0, 2]
    """
    open_, head = _Open(pool), pool.head()
    x, covariance = pool.differences(pool.pairs), np.linalg.inv(head.precision)
    bend = _bend(x @ head.mean)
    spread = ((x @ covariance) * x).sum(axis=1)  # x' S x
    while len(open_.chosen) < count and (place := open_.best(np.log1p(bend * spread))) is not None:
        way = covariance @ x[place]
        share = bend[place] / (1 + bend[place] * spread[place])
        covariance = covariance - share * np.outer(way, way)
        spread = np.maximum(spread - share * np.square(x @ way), 0)
    return np.asarray(open_.chosen, np.int64)


def prediction(pool: Pool, count: int, seed: int = 0) -> np.ndarray:
    """Pairs that tell most of what the head says of all pairs of the pool, not of directions that few of them lie in.

    worth = p (1 - p) x' S M S x / (1 + p (1 - p) x' S x),  M the mean of x x' over the pool: by how much the mean
    variance of w . x over the pool falls, in nats^2; S becomes that behind each pick.

    References: Cohn et al. 1996, arXiv:cs/9603104 (the mean variance of predictions); Smith et al. 2023,
    arXiv:2304.08151 (why to aim at predictions); Chaloner and Verdinelli 1995, sec. 2 (A-optimality).

    >>> features = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 2.1]])
    >>> print(prediction(Pool(np.array([[0, 1], [0, 2], [1, 2], [0, 3]]), features, prior=1.0), 1))
    [1]
    """
    open_, head = _Open(pool), pool.head()
    x, covariance = pool.differences(pool.pairs), np.linalg.inv(head.precision)
    bend = _bend(x @ head.mean)
    spread = ((x @ covariance) * x).sum(axis=1)
    both = covariance @ (x.T @ x / max(len(x), 1)) @ covariance  # S M S
    reach = ((x @ both) * x).sum(axis=1)
    while len(open_.chosen) < count and (place := open_.best(bend * reach / (1 + bend * spread))) is not None:
        share = bend[place] / (1 + bend[place] * spread[place])
        way, far = covariance @ x[place], both @ x[place]
        along, across, size = x @ way, x @ far, x[place] @ far
        reach = np.maximum(reach - 2 * share * along * across + share**2 * size * np.square(along), 0)
        spread = np.maximum(spread - share * np.square(along), 0)
        crossed = np.outer(way, far)
        both = both - share * (crossed + crossed.T) + share**2 * size * np.outer(way, way)
        covariance = covariance - share * np.outer(way, way)
    return np.asarray(open_.chosen, np.int64)


def diversity(pool: Pool, count: int, seed: int = 0) -> np.ndarray:
    """Farthest first: each pick is the pair whose difference of features is farthest from all labelled and picked ones.

    worth = min over those x' of  min(|x - x'|, |x + x'|),  as it is no matter which answer stands first; with nothing
    labelled the first pick is the longest x. The longest distance that is left is at most twice the least possible.

    References: Sener and Savarese 2018, arXiv:1708.00489, algorithm 1; Gonzalez 1985, Theoretical Computer Science 38
    (the bound).

    >>> features = np.array([[0.0], [1.0], [1.1], [3.0]])
    >>> print(diversity(Pool(np.array([[0, 1], [2, 0], [3, 0]]), features), 2).tolist())
    [2, 0]
    """
    open_, x, known = _Open(pool), pool.differences(pool.pairs), pool.differences(pool.labelled)
    square = np.square(x).sum(axis=1)
    apart = lambda centre: np.maximum(square + centre @ centre - 2 * np.abs(x @ centre), 0)
    near = square
    for number, centre in enumerate(known):
        near = np.minimum(near, apart(centre)) if number else apart(centre)
    while len(open_.chosen) < count and (place := open_.best(near)) is not None:
        first = len(known) + len(open_.chosen) == 1
        near = apart(x[place]) if first else np.minimum(near, apart(x[place]))
    return np.asarray(open_.chosen, np.int64)


Strategy = Callable[[Pool, int, int], np.ndarray]
STRATEGIES: Mapping[str, Strategy] = {
    "random": random,
    "disagreement": disagreement,
    "information": information,
    "prediction": prediction,
    "diversity": diversity,
}
READS: Mapping[str, Reads] = {
    "random": "nothing", "disagreement": "scores", "information": "features", "prediction": "features",
    "diversity": "features",
}  # fmt: skip


def clearest(pool: Pool, share: float) -> Pool:
    """The pool with all pairs closed but a share of them, those of which the head says most: the largest |w . x|.

    Of two answers of nearly the same worth a label is nearly a coin, whoever gives it, and no strategy above knows:
    each takes its own model of labels for the true one. Nothing is closed as long as nothing is labelled.

    Args: share: above 0, at most 1; at least one pair is left.
    """
    if not 0 < share <= 1:
        raise UserError(f"a share of {share} of the pairs can't be kept; it must be above 0 and at most 1.")
    if share == 1 or not len(pool.pairs):
        return pool
    margin = np.where(_Open(pool).mask, np.abs(pool.differences(pool.pairs) @ pool.head().mean), -1)
    left = margin[margin >= 0]
    least = np.sort(left)[-max(round(share * len(left)), 1)] if len(left) else 0
    return dataclasses.replace(pool, closed=margin < least)


# Budget


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may be spent: money in any currency, hours of people's time; None: as much as it takes."""

    money: float | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("money", self.money), ("hours", self.hours)):
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"a budget of {name}={value} is not allowed; it must be finite and at least 0.")

    def labels_for(self, price: float, seconds: float) -> int | None:
        """How many labels it pays, the smaller of what money and hours pay; None: no end.

        Args:
          price: of a label, in the budget's currency. seconds: that a label takes. What is free has no end.

        >>> print(Budget(money=10.0, hours=1.0).labels_for(price=0.1, seconds=30.0))
        100
        """
        paid = []
        for what, have, each in (("price", self.money, price), ("seconds", self.hours, seconds)):
            if not (each >= 0 and math.isfinite(each)):
                raise UserError(f"a label of {what}={each} is not allowed; it must be finite and at least 0.")
            if have is not None and each:
                have *= 3600 if what == "seconds" else 1
                paid.append(math.floor(have / each * (1 + 1e-12)))  # 0.3 pays three labels of 0.1
        return min(paid, default=None)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / 2)


def _bend(margin: np.ndarray) -> np.ndarray:
    """p (1 - p)."""
    p = _sigmoid(margin)
    return p * (1 - p)


def _entropy(p: np.ndarray) -> np.ndarray:
    """Of a coin, nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(p > 0, p * np.log(p), 0) - np.where(p < 1, (1 - p) * np.log1p(-p), 0)
