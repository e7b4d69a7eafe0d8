"""Every loss once more in numpy and float64: oracles that share no code with what they are held against."""

from collections.abc import Callable
from typing import Any

import numpy as np


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(log_sigmoid(x))


# Of each loss, by its columns p and its numbers.

Oracle = Callable[..., np.ndarray]


def logistic64(x: np.ndarray, e: float) -> np.ndarray:
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def mapped64(u: np.ndarray, divergence: str = "reverse_kl", divergence_alpha: float = 0.5) -> np.ndarray:
    """f'(t) at t = exp(u), from each divergence's f, less what it is at 1."""
    t = np.exp(u)
    return {
        "reverse_kl": lambda: u,
        "forward_kl": lambda: 1 - 1 / t,
        "js": lambda: np.log(2 * t / (1 + t)),
        "alpha": lambda: (t ** (divergence_alpha - 1) - 1) / (divergence_alpha - 1),
    }[divergence]()


def ratios64(p: list[np.ndarray], **how: Any) -> tuple[np.ndarray, np.ndarray]:
    return mapped64(p[0] - p[2], **how), mapped64(p[1] - p[3], **how)


def margin64(p: list[np.ndarray], **how: Any) -> np.ndarray:
    return np.subtract(*ratios64(p, **how))


def dpo64(p, beta, label_smoothing, margin, **how):
    return logistic64(beta * margin64(p, **how) - margin, label_smoothing)


def robust64(p, beta, label_smoothing, **how):
    x, e = beta * margin64(p, **how), label_smoothing
    return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)


def ipo64(p, beta, length_normalised, **how):
    a, b = ratios64(p, **how)
    lengths = (p[4], p[5]) if length_normalised else (1, 1)
    return (a / lengths[0] - b / lengths[1] - 0.5 / beta) ** 2


def hinge64(p, beta, margin, **how):
    return np.maximum(0, margin - beta * margin64(p, **how))


def exo64(p, beta, label_smoothing, **how):
    """The Kullback-Leibler divergence of two distributions over two answers, as a sum over both."""
    x = beta * margin64(p, **how)
    q = np.stack([np.exp(x), np.ones_like(x)]) / (1 + np.exp(x))
    label = np.stack([np.full_like(x, 1 - label_smoothing), np.full_like(x, label_smoothing)])
    return np.sum(q * np.log(q / label), axis=0)


def nca64(p, beta):
    a, b = ratios64(p)
    return -log_sigmoid(beta * a) - 0.5 * log_sigmoid(-beta * a) - 0.5 * log_sigmoid(-beta * b)


def bco_pair64(p, beta):
    a, b = ratios64(p)
    return -log_sigmoid(beta * a) - log_sigmoid(-beta * b)


def sppo64(p, beta):
    a, b = ratios64(p)
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2


def apo_zero64(p, beta):
    a, b = ratios64(p)
    return 1 - sigmoid(beta * a) + sigmoid(beta * b)


def apo_down64(p, beta):
    a, b = ratios64(p)
    return sigmoid(beta * a) + 1 - sigmoid(beta * (a - b))


def discopop64(p, beta, tau, **how):
    x = beta * margin64(p, **how)
    m = sigmoid(x / tau)
    return (1 - m) * -log_sigmoid(x) + m * np.exp(-x)


def dpo_norm64(p, beta, **how):
    a, b = ratios64(p, **how)
    return -log_sigmoid(beta * (a / p[4] - b / p[5]))


def aot64(p, beta, label_smoothing):
    return logistic64(beta * (p[0] - p[1]), label_smoothing)


def aot_unpaired64(p, beta, label_smoothing):
    above, below = (logistic64(beta * x, label_smoothing) for x in (p[0] - p[2], p[3] - p[1]))
    return (above + below) / 2


def log_odds64(mean: np.ndarray) -> np.ndarray:
    return mean - np.log(-np.expm1(mean))


def orpo64(p, beta):
    return -p[0] - beta * log_sigmoid(log_odds64(p[0]) - log_odds64(p[1]))


def simpo64(p, beta, margin):
    return -log_sigmoid(beta * (p[0] - p[1]) - margin)


def alphapo64(p, beta, margin, alpha):
    chosen, rejected = ((1 - np.exp(mean) ** -alpha) / alpha for mean in p)
    return -log_sigmoid(beta * (chosen - rejected) - margin)


def cpo64(p, beta, alpha, label_smoothing):
    return logistic64(beta * (p[0] - p[1]), label_smoothing) - alpha * p[0] / p[2]


def dpo_pl64(p, beta):
    """Stage by stage, from the best down, over the completions that are there."""
    out = []
    for logprob, ref, rank, present in zip(*p, strict=True):
        reward = {i: beta * (logprob[i] - ref[i]) for i in np.flatnonzero(present)}
        worse = {i: [r for j, r in reward.items() if rank[j] > rank[i]] for i in reward}
        out.append(sum(np.log(np.exp(reward[i]) + np.sum(np.exp(worse[i]))) - reward[i] for i in reward))
    return np.asarray(out)


def kto64(p, beta, desirable_weight, undesirable_weight):
    x = beta * (p[0] - p[1] - (p[3] if len(p) > 3 else 0))
    return np.where(p[2], desirable_weight / (1 + np.exp(x)), undesirable_weight / (1 + np.exp(-x)))


def bco64(p, beta):
    x = beta * (p[0] - p[1]) - p[3]
    return np.where(p[2], np.log1p(np.exp(-x)), np.log1p(np.exp(x)))


def nll64(p, z_loss):
    return -p[0] + z_loss * p[1] ** 2


def dft64(p):
    return -np.exp(p[0]) * p[0]


def smooth_nll64(p, label_smoothing):
    return -(1 - label_smoothing) * p[0] - label_smoothing * p[1]


def bradley_terry64(p, label_smoothing, margin, centre):
    return logistic64(p[0] - p[1] - margin, label_smoothing) + centre * (p[0] + p[1]) ** 2


def all_pairs64(p, centre):
    score, preferred, present = p
    out = np.zeros(len(score))
    for row in range(len(score)):
        there = [i for i in range(score.shape[1]) if present[row, i]]
        pairs = [(i, j) for i in there for j in there if i < j]
        for i, j in pairs:
            d, total = score[row, i] - score[row, j], score[row, i] + score[row, j]
            said = -preferred[row, i, j] * log_sigmoid(d) - preferred[row, j, i] * log_sigmoid(-d)
            out[row] += (said + centre * total**2) / len(pairs)
    return out


def plackett_luce64(p):
    """As the probability of the draws, one after the other."""
    score, rank, present = p
    out = np.zeros(len(score))
    for row in range(len(score)):
        for i in np.flatnonzero(present[row]):
            pool = [j for j in np.flatnonzero(present[row]) if j == i or rank[row, j] > rank[row, i]]
            out[row] -= np.log(np.exp(score[row, i]) / np.exp(score[row, pool]).sum())
    return out


def outcome64(p):
    return -np.log(np.where(p[1], sigmoid(p[0]), 1 - sigmoid(p[0])))


def process64(p, neutral):
    right = np.where(p[1] == 0.5, neutral, p[1])
    return -right * np.log(sigmoid(p[0])) - (1 - right) * np.log(1 - sigmoid(p[0]))
