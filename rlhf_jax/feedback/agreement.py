"""How far labellers agree on items that not all of them labelled: shares, kappas, Krippendorff's alpha.

Each coefficient is a function of sums over items. `joint`, `marks` and `coincidences` give what an item adds, so that
whoever resamples items (`evaluate.labelling`) sums anew and asks the same function; trailing axes of the sums are kept.

A coefficient is nan where it is undefined: nobody labelled what another did, or one class is all that was ever said.
"""

from typing import Literal

import numpy as np

MISSING = -1
Weights = Literal["none", "linear", "quadratic"]
Level = Literal["nominal", "ordinal", "interval"]


def table(item: np.ndarray, who: np.ndarray, label: np.ndarray, items: int, people: int) -> np.ndarray:
    """Labels [N] as a table [items, people] int64, MISSING where there is none; of several of one labeller the last.

    >>> print(table(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([2, 0, 1]), 2, 2))
    [[ 2 -1]
     [ 0  1]]
    """
    made = np.full((items, people), MISSING, np.int64)
    made[item, who] = label
    return made


def counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """How often each class was said of each item, [items, classes] float64."""
    return (labels[:, :, None] == np.arange(classes)).sum(axis=1).astype(np.float64)


# Two labellers


def joint(labels: np.ndarray, classes: int) -> np.ndarray:
    """What each item adds to the table of two labellers' labels, [classes, classes, items]; 0 where one is missing.

    Args:
      labels: [items, 2].
    """
    first, second = labels.T
    said = (first != MISSING) & (second != MISSING)
    grid = np.arange(classes)
    return ((first == grid[:, None])[:, None] & (second == grid[:, None])[None] & said).astype(np.float64)


def cohen(together: np.ndarray, weights: Weights = "none", values: np.ndarray | None = None) -> np.ndarray:
    """Cohen's kappa of two labellers: 1 always the same, 0 as by chance with each one's own shares of the classes.

    kappa = 1 - sum w o / sum w e, with o the observed shares, e the products of their margins, and w_jk = 1 where
    j != k, |v_j - v_k|, or (v_j - v_k)^2.

    Args:
      together: sums of `joint`, [K, K, ...].
      values: [K], v, what the classes stand for in weights; None: 0 to K - 1.
    References: Cohen 1960, Educational and Psychological Measurement 20; Cohen 1968, Psychological Bulletin 70.

    >>> print(round(float(cohen(np.array([[20.0, 5.0], [10.0, 15.0]]))), 6))
    0.4
    """
    places = np.arange(len(together), dtype=np.float64) if values is None else np.asarray(values, np.float64)
    apart = np.abs(places[:, None] - places)
    weight = {"none": np.sign(apart), "linear": apart, "quadratic": apart**2}[weights]
    total = together.sum(axis=(0, 1))
    expected = together.sum(axis=1)[:, None] * together.sum(axis=0)[None]
    return 1 - _ratio(np.tensordot(weight, together) * total, np.tensordot(weight, expected))


# Any number of labellers


def marks(labels: np.ndarray, classes: int) -> np.ndarray:
    """What each item adds to `same` and `fleiss`, [4 + classes, items].

    Items of fewer than two labels add nothing. The rows: equal ordered pairs of labels, all of them, the share of
    equal ones, 1, and the share of each class.
    """
    said = counts(labels, classes)
    n = said.sum(axis=1)
    several = n > 1
    equal, pairs = (said * (said - 1)).sum(axis=1), n * (n - 1)
    part = np.divide(equal, pairs, out=np.zeros(len(n)), where=several)
    shares = np.divide(said.T, n, out=np.zeros_like(said.T), where=several)
    return np.concatenate([np.stack([equal, pairs * several, part, several.astype(np.float64)]), shares])


def same(sums: np.ndarray) -> np.ndarray:
    """The share of all two labels of an item that are the same. Args: sums: of `marks`, [4 + K, ...]."""
    return _ratio(sums[0], sums[1])


def fleiss(sums: np.ndarray) -> np.ndarray:
    """Fleiss' kappa, (P - P_e) / (1 - P_e).

    P is the mean over items of the share of their pairs of labels that are the same, and P_e = sum_k p_k^2 with p_k
    the mean over items of the share of class k. With as many labels of each item it is Fleiss' own; of other items
    those with at least two labels count, each the same.

    Args:
      sums: of `marks`, [4 + K, ...].
    References: Fleiss 1971, Psychological Bulletin 76; for missing labels Gwet 2014, Handbook of Inter-Rater
      Reliability, ch. 2.
    """
    observed = _ratio(sums[2], sums[3])
    chance = np.square(_ratio(sums[4:], sums[3])).sum(axis=0)
    return 1 - _ratio(1 - observed, 1 - chance)


def coincidences(labels: np.ndarray, classes: int) -> np.ndarray:
    """What each item adds to the matrix of coincidences, [classes, classes, items].

    An item of n labels adds to (c, k) the number of its ordered pairs of labels c and k, over n - 1; of one, nothing.
    """
    said = counts(labels, classes).T
    n = said.sum(axis=0)
    pairs = said[:, None] * said[None] - np.eye(classes)[:, :, None] * said
    return np.divide(pairs, n - 1, out=np.zeros_like(pairs), where=n > 1)


def krippendorff(matched: np.ndarray, level: Level = "nominal", values: np.ndarray | None = None) -> np.ndarray:
    """Krippendorff's alpha: 1 - D_o / D_e, 1 if all agree, 0 as by chance, below 0 if they disagree on purpose.

    alpha = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck. The difference d of two classes is 1 (nominal), the
    square of how many labels lie between them, half of their own included (ordinal), or of values (interval).

    Args:
      matched: sums of `coincidences`, [K, K, ...]; unless nominal the classes are in order.
      values: [K], what the classes stand for in intervals; None: 0 to K - 1.
    References: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, University of Pennsylvania.
    """
    marginal = matched.sum(axis=0)
    places = np.arange(len(matched), dtype=np.float64) if values is None else np.asarray(values, np.float64)
    if level == "ordinal":
        # Labels up to the middle of a class; the difference of two is that of their middles.
        places = np.cumsum(marginal, axis=0) - marginal / 2
    apart = np.square(places[:, None] - places[None])
    if level == "nominal":
        apart = np.sign(apart)
    apart = apart.reshape(apart.shape + (1,) * (matched.ndim - apart.ndim))
    observed = (matched * apart).sum(axis=(0, 1))
    expected = (marginal[:, None] * marginal[None] * apart).sum(axis=(0, 1))
    return 1 - _ratio((marginal.sum(axis=0) - 1) * observed, expected)


# One labeller


def triples(prompt: np.ndarray, pairs: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Three answers of which one labeller put one of each two above the other, and those without a circle.

    Args:
      prompt: [N] int, of each choice; pairs: [N, 2] int, its answers; sign: [N], 1 for the first, 0 for the second,
        0.5 for neither.
    Returns: [2, prompts] float64, of each prompt in order the triples without a circle, and all of them.

    >>> print(triples(np.zeros(3, int), np.array([[0, 1], [1, 2], [0, 2]]), np.array([1.0, 1.0, 0.0])).tolist())
    [[0.0], [1.0]]
    """
    found = []
    for one in np.unique(prompt):
        here = (prompt == one) & (sign != 0.5)
        names, places = np.unique(pairs[here], return_inverse=True)
        above = np.zeros((len(names), len(names)))
        first, second = places.reshape(-1, 2).T
        above[first, second], above[second, first] = sign[here], 1 - sign[here]
        both = above + above.T
        around, whole = np.trace(above @ above @ above) / 3, np.trace(both @ both @ both) / 6
        found.append((whole - around, whole))
    return np.asarray(found).reshape(-1, 2).T


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, nan where bottom is 0, but for what rounding leaves of it."""
    top, bottom = np.broadcast_arrays(np.asarray(top, np.float64), np.asarray(bottom, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 1e-12)
