"""What the seeds of a study come to: figures with intervals, and whether its claims held."""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.lab.estimates import over_seeds
from rlhf_jax.lab.study import Claim, Remedy, Seen, Sign, Study

SHOWN, NOT_SHOWN, OPPOSITE = "shown", "not shown", "the opposite"
# What a remedy did, and the answer to a question, by the same rule.
HELPS = {SHOWN: "helps", NOT_SHOWN: "no help was shown", OPPOSITE: "makes it worse"}


class Found(NamedTuple):
    """A claim with the difference that was measured; None where no seed has both figures."""

    claim: Claim
    difference: Estimate | None
    each: list[float]  # of every seed that has both
    verdict: str


class Mended(NamedTuple):
    """A remedy with what it changed in the measure that fails, and in what it may cost."""

    remedy: Remedy
    difference: Estimate | None
    verdict: str
    prices: dict[str, Estimate | None]


def value(seeds: Sequence[Seen], condition: str, measure: str) -> Estimate | None:
    """A figure over the seeds that have it."""
    return over_seeds([seed.value(condition, measure) for seed in seeds])


def differences(seeds: Sequence[Seen], measure: str, condition: str, than: str | None) -> list[float]:
    """Of every seed that has both: the figure of a condition less that of another, or as it is."""
    told = []
    for seed in seeds:
        ours, theirs = seed.value(condition, measure), 0.0 if than is None else seed.value(than, measure)
        if ours is not None and theirs is not None:
            told.append(ours - theirs)
    return told


def verdict(difference: Estimate | None, sign: Sign) -> str:
    """Whether the 95% interval of a difference lies on the side that was claimed.

    >>> print(verdict(Estimate(0.2, 0.1, 0.3), 1), verdict(Estimate(0.2, -0.1, 0.5), 1), verdict(None, 1), sep="; ")
    shown; not shown; not shown
    >>> print(verdict(Estimate(0.2, 0.1, 0.3), -1), verdict(Estimate(0.2, 0.1, 0.3), 0), sep="; ")
    the opposite; more
    """
    if difference is None or difference.low <= 0 <= difference.high:
        return NOT_SHOWN if sign else "not told apart"
    if not sign:
        return "more" if difference.mean > 0 else "less"
    return SHOWN if difference.mean * sign > 0 else OPPOSITE


def found(study: Study, seeds: Sequence[Seen]) -> list[Found]:
    """The study's claims, in its order."""
    told = []
    for claim in study.phenomena:
        each = differences(seeds, claim.measure, claim.condition, claim.than)
        difference = over_seeds(each)
        told.append(Found(claim, difference, each, verdict(difference, claim.sign)))
    return told


def mended(study: Study, seeds: Sequence[Seen]) -> list[Mended]:
    """The study's remedies, in its order."""
    told = []
    for remedy in study.remedies:
        changed = lambda measure, one=remedy: over_seeds(differences(seeds, measure, one.condition, one.than))
        difference = changed(remedy.measure)
        prices = {measure: changed(measure) for measure in remedy.prices}
        told.append(Mended(remedy, difference, HELPS[verdict(difference, remedy.sign)], prices))
    return told
