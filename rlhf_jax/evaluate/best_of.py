"""Best of n: what is gained by drawing n answers and keeping the one that something ranks first."""

import math

import numpy as np


def best_of(scores: np.ndarray, n: int, by: np.ndarray | None = None) -> np.ndarray:
    """The expected score of the best of n answers, for each prompt, from N >= n that were drawn, float [P].

    The mean over all subsets of n of the N answers, by the order statistics, so it is unbiased and wastes no draw:
    with the answers in the order of `by`, sum over i of score_(i) C(i - 1, n - 1) / C(N, n).

    Args:
      scores: [P, N], what an answer is worth.
      by: [P, N], what ranks them; None: the scores themselves. Of equals the later answer is kept.
    Raises: ValueError for n below 1 or above N.
    References: Nakano et al. 2021, arXiv:2112.09332.

    >>> print(best_of(np.array([[1.0, 3.0, 2.0]]), 2))
    [2.66666667]
    """
    draws = scores.shape[1]
    if not 1 <= n <= draws:
        raise ValueError(f"best of {n} can't be had from {draws} answers")
    order = np.argsort(scores if by is None else by, axis=1, kind="stable")
    weights = np.asarray([math.comb(i, n - 1) / math.comb(draws, n) for i in range(draws)])
    return np.take_along_axis(scores, order, axis=1) @ weights


def kl(n: int) -> float:
    """log n - (n - 1) / n, nats: the KL of the best of n from the policy that drew, where no two answers tie.

    An upper bound where some do (Beirami et al. 2024, arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n
