"""Every two answers to a prompt: which is really better, and what scores say of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from rlhf_jax.data.labellers import Labeller
from rlhf_jax.lab.ground import gold


class Pairs(NamedTuple):
    """Every two different answers to the same prompt, by their places in [prompts, samples]."""

    prompt: np.ndarray  # [P]
    first: np.ndarray  # [P], a sample
    second: np.ndarray
    margin: np.ndarray  # [P] gold of the first less that of the second
    chance: np.ndarray  # [P] with which a person prefers the first

    def differences(self, scores: np.ndarray) -> np.ndarray:
        """[members, P] score of the first less that of the second, from scores [members, prompts, samples]."""
        return scores[:, self.prompt, self.first] - scores[:, self.prompt, self.second]


def pairs_of(prompts: Sequence[str], texts: Sequence[Sequence[str]], person: Labeller) -> Pairs:
    """All of them; pairs of the same text are left out."""
    worth, found = gold(prompts, texts), []
    for at, (prompt, row) in enumerate(zip(prompts, texts, strict=True)):
        for a in range(len(row)):
            for b in range(a + 1, len(row)):
                if row[a].strip() != row[b].strip():
                    chance = person.probability(prompt, row[a], row[b])
                    found.append((at, a, b, worth[at, a] - worth[at, b], chance))
    at, a, b, margin, chance = (np.asarray(column) for column in zip(*found, strict=True))
    return Pairs(at, a, b, margin, chance)


def auroc(score: np.ndarray, error: np.ndarray) -> float:
    """Chance that an error has a higher score than what is none, ties a half; nan where there is but one kind.

    >>> print(auroc(np.array([0.1, 0.9, 0.5]), np.array([False, True, False])))
    1.0
    """
    wrong, right = int(error.sum()), int((~error).sum())
    if not wrong or not right:
        return math.nan
    ranks = stats.rankdata(score)
    return float((ranks[error].sum() - wrong * (wrong + 1) / 2) / (wrong * right))


def kept(doubt: np.ndarray, share: float) -> np.ndarray:
    """[P] bool: all but this share of pairs, those with the largest doubt.

    >>> print(kept(np.array([0.1, 0.9, 0.5, 0.2]), 0.25))
    [ True False  True  True]
    """
    keep = np.ones(len(doubt), bool)
    keep[np.argsort(doubt, kind="stable")[len(doubt) - round(share * len(doubt)) :]] = False
    return keep


def wins(scores: np.ndarray, base: np.ndarray) -> float:
    """The chance that a reward model gives to an answer over one of the start's, by scores [prompts, samples]."""
    return float((1 / (1 + np.exp(-(scores[:, :, None] - base[:, None, :])))).mean())


def won(
    prompts: Sequence[str], texts: Sequence[Sequence[str]], base: Sequence[Sequence[str]], person: Labeller
) -> float:
    """The chance that a person really prefers an answer to one of the start's."""
    rows = zip(prompts, texts, base, strict=True)
    return float(np.mean([[person.probability(p, a, b) for a in ours for b in theirs] for p, ours, theirs in rows]))
