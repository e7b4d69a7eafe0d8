"""What a judge of pairs is worth before it is used: position, agreement with people, length, its own kind."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.resampling import mean
from rlhf_jax.feedback.judges import Verdict, counted, written
from rlhf_jax.feedback.pairs import Compared

ALL = "all rows"


class Agreed(NamedTuple):
    """How often a judge and people say the same of some pairs."""

    count: int
    prompts: int
    accuracy: Estimate


class Position(NamedTuple):
    """What the order of two answers does to a judge that was asked in both, over pairs."""

    count: int
    flips: Estimate  # share whose better answer is another one, or none, when the order is turned round
    first: Estimate  # mean chance of the answer that is shown first; 0.5 without a preference


class Leaning(NamedTuple):
    """How often a judge prefers the answers of one kind to others, beside how often people do.

    Attributes:
      count: pairs of one answer of the kind and one that isn't.
      judge: share of them in which the judge prefers it; equal chances count a half.
      people: the same share by the labels, of labelled pairs; and `gap`, the judge's share of these less that. None
        where no pair is labelled.
    """

    count: int
    judge: Estimate
    people: Estimate | None
    gap: Estimate | None


class Figures(NamedTuple):
    """A judge on some pairs; intervals resample prompts.

    Attributes:
      count, judged: pairs, and those of them with a verdict.
      failed: why the others have none, with their number.
      position: None for a judge that wasn't asked in both orders.
      agreement: of all rows, and of each file where there are several; without pairs that people hold for equal.
      longer: the answer with more characters; None where no two differ.
      models: by who wrote the answers, as far as the rows say it.
      own: the judge's leaning to its own answers, where it is one of the models.
    """

    count: int
    judged: int
    failed: Mapping[str, int]
    position: Position | None
    agreement: dict[str, Agreed]
    longer: Leaning | None
    models: dict[str, Leaning]
    own: Leaning | None


class Table(NamedTuple):
    """Judged pairs as columns of equal length."""

    chance: np.ndarray  # float64, the judge's, that the first answer is better
    label: np.ndarray  # float64, the share of people's labels for it; nan: none
    units: np.ndarray  # int64, whose prompt it is
    rows: list[Compared]

    def some(self, kept: np.ndarray) -> "Table":
        """Those that a mask keeps."""
        return Table(
            self.chance[kept], self.label[kept], self.units[kept], [self.rows[i] for i in np.flatnonzero(kept)]
        )


def figures(found: Sequence[Compared], verdicts: Sequence[Verdict], name: str = "", *, seed: int = 0) -> Figures:
    """Everything that can be said of a judge's verdicts on pairs.

    Args:
      verdicts: one a pair.
      name: the judge's, to find its own answers by.
      seed: of the resampling.
    References: Zheng et al. 2023, arXiv:2306.05685, sec. 3.3.
    """
    table = judged(found, verdicts)
    models = {model: _of_model(table, model, seed) for model in _models(table.rows)}
    leaning = {model: one for model, one in models.items() if one is not None}
    return Figures(
        len(found), len(table.rows), counted(verdicts), _position(verdicts, units_of(found), seed),
        _agreement(table, seed), _longer(table, seed), leaning, leaning.get(name),
    )  # fmt: skip


def units_of(found: Sequence[Compared]) -> np.ndarray:
    """Of each pair the number of its prompt, int64."""
    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(written(one.pair.prompt), len(numbers)) for one in found], np.int64)


def judged(found: Sequence[Compared], verdicts: Sequence[Verdict]) -> Table:
    """The pairs that have a verdict."""
    kept = np.asarray([verdict.probability is not None for verdict in verdicts], bool)
    chance = np.asarray([np.nan if v.probability is None else v.probability for v in verdicts], np.float64)
    label = np.asarray([np.nan if one.label is None else one.label for one in found], np.float64)
    return Table(chance, label, units_of(found), list(found)).some(kept)


def agreed(chance: np.ndarray, label: np.ndarray) -> np.ndarray:
    """1 where both hold the same answer for the better one, 0 where they don't; equal chances count a half.

    >>> print(agreed(np.array([0.9, 0.5, 0.2]), np.array([0.6, 1.0, 1.0])))
    [1.  0.5 0. ]
    """
    return (1 + np.sign(chance - 0.5) * np.sign(label - 0.5)) / 2


def _position(verdicts: Sequence[Verdict], units: np.ndarray, seed: int) -> Position | None:
    asked = [(v.ahead, v.behind, unit) for v, unit in zip(verdicts, units.tolist(), strict=True)]
    known = [(ahead, behind, unit) for ahead, behind, unit in asked if ahead is not None and behind is not None]
    if not known:
        return None
    ahead, behind, whose = np.asarray(known, np.float64).T
    flips = np.sign(ahead - 0.5) != np.sign(behind - 0.5)
    first = (ahead + 1 - behind) / 2
    return Position(len(known), mean(flips, whose, seed=seed), mean(first, whose, seed=seed))


def _agreement(table: Table, seed: int) -> dict[str, Agreed]:
    told = table.some(np.nan_to_num(table.label, nan=0.5) != 0.5)
    source = np.asarray([row.source for row in told.rows], object)
    parts = {ALL: np.ones(len(source), bool)} if len(source) else {}
    if len(names := dict.fromkeys(source.tolist())) > 1:
        parts |= {name: source == name for name in names}
    made = {}
    for name, here in parts.items():
        some = told.some(here)
        accuracy = mean(agreed(some.chance, some.label), some.units, seed=seed)
        made[name] = Agreed(len(some.rows), len(np.unique(some.units)), accuracy)
    return made


def _longer(table: Table, seed: int) -> Leaning | None:
    lengths = [(len(written(row.pair.first)), len(written(row.pair.second))) for row in table.rows]
    return _leaning(table, np.asarray([np.sign(a - b) for a, b in lengths]), seed)


def _of_model(table: Table, model: str, seed: int) -> Leaning | None:
    by = [(False, False) if row.models is None else tuple(name == model for name in row.models) for row in table.rows]
    return _leaning(table, np.asarray([first - second for first, second in by]), seed)


def _models(rows: Sequence[Compared]) -> list[str]:
    return sorted({name for row in rows if row.models is not None for name in row.models})


def _leaning(table: Table, side: np.ndarray, seed: int) -> Leaning | None:
    """Args: side: of each pair 1 where the first answer is of the kind, -1 where the second is, 0: neither or both."""
    some, side = table.some(side != 0), side[side != 0]
    if not len(side):
        return None
    share = (1 + np.sign(some.chance - 0.5) * side) / 2
    told = ~np.isnan(some.label)
    overall, people, gap = mean(share, some.units, seed=seed), None, None
    if told.any():
        label = ((1 + np.sign(some.label - 0.5) * side) / 2)[told]
        people = mean(label, some.units[told], seed=seed)
        gap = mean(share[told] - label, some.units[told], seed=seed)
    return Leaning(len(side), overall, people, gap)


class Together(NamedTuple):
    """How far judges say the same, over the pairs that all of them judged.

    Attributes:
      alike: share of pairs of which all say the same; equal chances are the same only as equal chances.
      differ: pairs of which they don't.
      pairs: the same share of every two judges.
    """

    count: int
    alike: Estimate
    differ: int
    pairs: dict[tuple[str, str], Estimate]


def together(found: Sequence[Compared], verdicts: Mapping[str, Sequence[Verdict]], *, seed: int = 0) -> Together | None:
    """Args: verdicts: of at least two judges, one a pair. Returns: None if there is no pair that all judged."""
    chances = np.asarray(
        [[np.nan if v.probability is None else v.probability for v in each] for each in verdicts.values()], np.float64
    )
    known = ~np.isnan(chances).any(axis=0)
    if not known.any():
        return None
    units, signs, names = units_of(found)[known], np.sign(chances[:, known] - 0.5), list(verdicts)
    same = np.all(signs == signs[:1], axis=0)
    pairs = {
        (names[i], names[j]): mean(signs[i] == signs[j], units, seed=seed)
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }
    return Together(int(known.sum()), mean(same, units, seed=seed), int((~same).sum()), pairs)
