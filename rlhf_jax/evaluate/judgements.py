"""A reward model held against labelled comparisons: how often it orders two answers as people did, and where."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.data.dataset import Example
from rlhf_jax.data.items import Item
from rlhf_jax.data.rows import Text
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.resampling import correlation, mean, ranks, ratio, within
from rlhf_jax.evaluate.scorers import Scorer, score

PARTS = 4  # groups of equal size that comparisons are cut into by a margin
LENGTHS = 8  # that answers are cut into by their length


@dataclasses.dataclass(frozen=True, eq=False)
class Comparisons:
    """Two answers of one prompt a comparison, of which labels put one above the other.

    Attributes:
      rows: the N answers as token ids behind their prompts, each once, whoever labelled it.
      texts: N prompts with answers.
      length: [N] tokens of the answer, its end included.
      prompt: [N] of the answer, `Example.prompt`.
      better, worse: [C] places among the answers.
      share: [C] of labels for the better one, above 0.5.
      source, labeller, where: C of them; "" for no labeller or several.
    """

    rows: tuple[np.ndarray, ...]
    texts: tuple[tuple[Text, Text], ...]
    length: np.ndarray
    prompt: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    share: np.ndarray
    source: tuple[str, ...]
    labeller: tuple[str, ...]
    where: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.better)

    @property
    def units(self) -> np.ndarray:
        """[C], the prompt of each comparison."""
        return self.prompt[self.better]

    @property
    def compared(self) -> np.ndarray:
        """Places of the answers that stand in a comparison."""
        return np.unique(np.concatenate([self.better, self.worse]))

    def some(self, kept: np.ndarray) -> "Comparisons":
        """Those comparisons that a mask keeps; the answers stay, so their scores still fit."""
        names = "source", "labeller", "where"
        columns = {name: tuple(itertools.compress(getattr(self, name), kept)) for name in names}
        numbers = {name: getattr(self, name)[kept] for name in ("better", "worse", "share")}
        return dataclasses.replace(self, **columns, **numbers)


def comparisons(kept: Iterable[tuple[Item, Example]], sources: Sequence[str]) -> Comparisons:
    """Every two answers of an example that its labels tell apart.

    Args:
      kept: of `dataset.read` in the form "ranking".
      sources: what the paths are called, in their order.
    """
    rows: dict[bytes, int] = {}
    ids: list[np.ndarray] = []
    texts: list[tuple[Text, Text]] = []
    columns: list[tuple[int, int]] = []
    found: list[tuple[int, int, float, str, str, str]] = []
    for item, example in kept:
        places = []
        for tokens, text in zip(example.completions, item.completions, strict=True):
            place = rows.setdefault(tokens.ids.tobytes(), len(rows))
            if place == len(ids):
                ids.append(tokens.ids)
                texts.append((item.prompt, text))
                columns.append((int(tokens.mask.sum()), example.prompt))
            places.append(place)
        about = sources[example.source], example.labeller, example.where
        for i, j in itertools.combinations(range(len(places)), 2):
            share = _share(example, i, j)
            if share != 0.5 and places[i] != places[j]:
                pair = (places[i], places[j]) if share > 0.5 else (places[j], places[i])
                found.append((*pair, max(share, 1 - share), *about))
    length, prompt = np.asarray(columns, np.int64).reshape(-1, 2).T
    better, worse, share, source, labeller, where = zip(*found, strict=True) if found else ((),) * 6
    return Comparisons(
        tuple(ids), tuple(texts), length, prompt, np.asarray(better, np.int64), np.asarray(worse, np.int64),
        np.asarray(share, np.float64), tuple(source), tuple(labeller), tuple(where),
    )  # fmt: skip


def _share(example: Example, i: int, j: int) -> float:
    """Of the labels of two answers those that put i above j; 0.5 where there are none."""
    if len(example.completions) == 2 and example.probability != 1:  # what a column of votes says of a pair
        return example.probability
    above, below = example.preferred[i][j], example.preferred[j][i]
    return above / (above + below) if above + below else 0.5


def gold_of(found: Comparisons, scorer: Scorer) -> np.ndarray:
    """What a known reward says of each answer, [N]. Errors: UserError as the scorer and `score`."""
    said = [text if isinstance(text, str) else text[-1].content for _, text in found.texts]
    return np.asarray(score(scorer, [p for p, _ in found.texts], [[text] for text in said], {}))[:, 0]


class Group(NamedTuple):
    """Some of the comparisons."""

    count: int
    prompts: int
    accuracy: Estimate
    at: float | None = None  # mean of what they are grouped by, if it is a number


class Judged(NamedTuple):
    """What one score is worth on comparisons; intervals resample prompts.

    Attributes:
      overall: share of comparisons whose better answer scores higher; equal scores count a half.
      by: the same of groups: by source, labeller, margin and gold margin (quartiles), and by which answer is longer.
      ceiling: the same of the gold reward's own order; None where there is no gold.
      length: correlations of score and length over answers, pearson and spearman, and the same within prompts.
      lengths: answers of like length, each group with its mean length and its mean score.
    """

    overall: Group
    by: dict[str, dict[str, Group]]
    ceiling: Estimate | None
    length: dict[str, Estimate | None]
    lengths: tuple[tuple[float, Estimate], ...]


def judge(found: Comparisons, scores: np.ndarray, gold: np.ndarray | None = None, *, seed: int = 0) -> Judged:
    """Holds a score [N] of every answer against the labels; there must be a comparison."""
    difference = scores[found.better] - scores[found.worse]
    right, units = _right(difference), found.units
    longer = found.length[found.better] - found.length[found.worse]
    group = lambda here, at=None: _group(right, units, here, at, seed)
    by = {
        "source": {name: group(here) for name, here in _names(found.source).items()},
        "labeller": {name: group(here) for name, here in _names(found.labeller).items() if name},
        "margin": {name: group(here, abs(difference)) for name, here in quantiles(abs(difference)).items()},
        "longer": {
            name: group(here)
            for name, here in (("better", longer > 0), ("worse", longer < 0), ("neither", longer == 0))
            if here.any()
        },
    }
    ceiling = None
    if gold is not None:
        margin = gold[found.better] - gold[found.worse]
        by["gold margin"] = {name: group(here, abs(margin)) for name, here in quantiles(abs(margin)).items()}
        ceiling = mean(_right(margin), units, seed=seed)
    whole = group(np.ones(len(found), bool))
    return Judged(whole, by, ceiling, correlations(found, scores, seed=seed), _lengths(found, scores, seed))


def _right(difference: np.ndarray) -> np.ndarray:
    return (np.sign(difference) + 1) / 2


def _group(right: np.ndarray, units: np.ndarray, here: np.ndarray, at: np.ndarray | None, seed: int) -> Group:
    estimate = mean(right[here], units[here], seed=seed)
    middle = None if at is None else float(at[here].mean())
    return Group(int(here.sum()), len(np.unique(units[here])), estimate, middle)


def _names(column: Sequence[str]) -> dict[str, np.ndarray]:
    """Where each name stands, in the order in which they first do."""
    names = np.asarray(column, object)
    return {name: names == name for name in dict.fromkeys(column)}


def quantiles(values: np.ndarray, parts: int = PARTS) -> dict[str, np.ndarray]:
    """Groups of like size by value, each a mask under the name of its range; equal values are never parted.

    >>> print({name: int(here.sum()) for name, here in quantiles(np.array([0.0, 0, 0, 0, 1, 2, 3, 4])).items()})
    {'0 to 0.5': 4, '0.5 to 2.25': 2, '2.25 to 4': 2}
    """
    edges = np.unique(np.quantile(values, np.linspace(0, 1, parts + 1)))
    if len(edges) == 1:
        return {f"{edges[0]:.3g}": np.ones(len(values), bool)}
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    names = (f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges))
    return {name: places == place for place, name in enumerate(names) if (places == place).any()}


def correlations(found: Comparisons, scores: np.ndarray, *, seed: int = 0) -> dict[str, Estimate | None]:
    """Of score and length over the answers that are compared, and over what differs within their prompts."""
    used = found.compared
    score, length, units = scores[used], found.length[used].astype(np.float64), found.prompt[used]
    pairs = {
        "pearson": (score, length),
        "spearman": (ranks(score), ranks(length)),
        "pearson within prompts": (within(score, units), within(length, units)),
        "spearman within prompts": (within(score, units, ranked=True), within(length, units, ranked=True)),
    }
    return {name: correlation(x, y, units, seed=seed) for name, (x, y) in pairs.items()}


def _lengths(found: Comparisons, scores: np.ndarray, seed: int) -> tuple[tuple[float, Estimate], ...]:
    used = found.compared
    length, score, units = found.length[used], scores[used], found.prompt[used]
    groups = quantiles(length, LENGTHS).values()
    return tuple((float(length[here].mean()), mean(score[here], units[here], seed=seed)) for here in groups)


class Agreement(NamedTuple):
    """How far the members of an ensemble are from each other; intervals resample prompts."""

    all: Estimate  # share of comparisons that all members order alike
    pairs: Estimate  # the same of two members, mean over all pairs of them
    spread: Estimate  # standard deviation over the members of the score difference (of M, not M - 1), mean
    relative: Estimate  # the spread over the mean size of the members' mean difference


def agreement(found: Comparisons, scores: np.ndarray, *, seed: int = 0) -> Agreement:
    """Args: scores: [M, N] of at least two members."""
    difference = scores[:, found.better] - scores[:, found.worse]
    signs, units = np.sign(difference), found.units
    alike = [signs[i] == signs[j] for i, j in itertools.combinations(range(len(signs)), 2)]
    spread = difference.std(axis=0)
    size = np.maximum(np.abs(difference.mean(axis=0)), np.finfo(np.float64).tiny)
    return Agreement(
        mean(np.all(signs == signs[:1], axis=0), units, seed=seed),
        mean(np.mean(alike, axis=0), units, seed=seed),
        mean(spread, units, seed=seed),
        ratio(spread, size, units, seed=seed),
    )


def records(
    found: Comparisons, scores: Mapping[str, np.ndarray], members: np.ndarray, gold: np.ndarray | None
) -> Iterable[dict[str, object]]:
    """One object a comparison, for a file.

    Args:
      scores: [N] by name, such as the ways in which members are combined.
      members: [M, N].
    """
    differ = lambda values, c: float(values[found.better[c]] - values[found.worse[c]])
    for c in range(len(found)):
        yield {
            "source": found.source[c],
            "where": found.where[c],
            "prompt": f"{int(found.prompt[found.better[c]]) % 2**64:016x}",
            "labeller": found.labeller[c],
            "share": float(found.share[c]),
            "tokens": int(differ(found.length, c)),
            "scores": {name: differ(values, c) for name, values in scores.items()},
            "members": [differ(values, c) for values in members],
            "gold": None if gold is None else differ(gold, c),
        }
