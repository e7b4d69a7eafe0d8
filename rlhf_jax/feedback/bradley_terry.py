"""Bradley and Terry's model of choices, with a skill and a bias for the answer shown first of each labeller.

    P(labeller l chooses a over b) = sigmoid(skill_l (s_a - s_b) + bias_l x),   s ~ N(0, 1)

with x = 1 if a was shown first, -1 if b was, 0 if nobody knows. What an answer is worth, s, is in units of how much
answers differ: that makes the skills (in nats a unit) identifiable, and the people choose its sign, since skills are
N(1, 2^2) beforehand and biases N(0, 1). A tie counts as half a choice each way.

The most probable skills and biases are looked for with the worths integrated out: of answers that a few people
compared the worths have wide posteriors, and the best joint values of both would take luck for skill. The integral is
that of expectation propagation, which is exact for one choice a prompt; standard errors come from the second
derivatives of the same objective.

References: Bradley and Terry 1952, Biometrika 39; Chen et al. 2013, Pairwise ranking aggregation in a crowdsourced
setting, WSDM (a skill each); Davidson and Beaver 1977, Biometrics 33 (the order of presentation); Minka 2001,
Expectation propagation for approximate Bayesian inference, UAI.
"""

import dataclasses

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.choices import Choices
from rlhf_jax.feedback.judges import written

SKILL, SKILL_SPREAD, BIAS_SPREAD = 1.0, 2.0, 1.0  # what is known beforehand
STEPS, CLOSE, SETTLE = 1000, 1e-5, 50  # SETTLE: most updates of the sites after a nudge
NODES, WEIGHTS = (part.astype(np.float64) for part in np.polynomial.hermite_e.hermegauss(31))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
DAMPING = 0.8  # share of an update of a site that is made; all are made at once
NUDGE = 1e-3  # by which a skill or a bias is moved for a second derivative
LARGEST = 2**26  # cells of all covariances of worths: half a GiB


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """What was found.

    Attributes:
      skill, bias, skill_error, bias_error: [people] float64, with their standard errors.
      covariance: [2 people, 2 people] of skills and then biases.
      mean: [pairs], the worth of each pair's first answer less that of the second; spread: its standard deviation.
      worth: [texts], of each answer.
      steps: iterations done; STEPS where it had not settled.
    """

    skill: np.ndarray
    bias: np.ndarray
    skill_error: np.ndarray
    bias_error: np.ndarray
    covariance: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    worth: np.ndarray
    steps: int

    @property
    def probability(self) -> np.ndarray:
        """[pairs], the posterior chance that the first answer is worth more."""
        from scipy import special

        return special.ndtr(self.mean / self.spread)


class _Blocks:
    """Where worths and covariances stand: answer after answer, prompt after prompt, and its cells row by row.

    Prompts of as many answers are inverted together, so that one of many answers makes no other larger.

    Attributes:
      order: [texts], texts by prompt; place: [texts], where each of them stands in that order.
      cells: how many cells there are.
    """

    def __init__(self, prompt: np.ndarray):
        """Args: prompt: [texts] int."""
        self.order = np.argsort(prompt, kind="stable")
        self.place = np.argsort(self.order)
        self._sizes = np.bincount(prompt)
        self._starts, self._firsts = (np.cumsum(of) - of for of in (self._sizes, self._sizes**2))
        self._prompt = prompt[self.order]
        self.cells = int((self._sizes**2).sum())
        self.largest = int(self._sizes.argmax())

    def cell(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Of two places of one prompt the cell of their covariance."""
        at = self._prompt[one]
        start = self._starts[at]
        return self._firsts[at] + (one - start) * self._sizes[at] + other - start

    def eye(self) -> np.ndarray:
        """[cells], 1 on the diagonals."""
        made, all_ = np.zeros(self.cells), np.arange(len(self.order))
        made[self.cell(all_, all_)] = 1
        return made

    def solve(self, precision: np.ndarray, push: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse [cells], and its product with `push` [texts]."""
        covariance, mean = np.empty_like(precision), np.empty_like(push)
        for size in np.unique(self._sizes).tolist():
            here = self._sizes == size
            texts = self._starts[here][:, None] + np.arange(size)
            cells = self._firsts[here][:, None] + np.arange(size**2)
            inverse = np.linalg.inv(precision[cells].reshape(-1, size, size))
            covariance[cells] = inverse.reshape(-1, size**2)
            mean[texts] = np.einsum("uij,uj->ui", inverse, push[texts])
        return covariance, mean


@dataclasses.dataclass(eq=False)
class _Worths:
    """The normal posterior of all worths: mean [texts], and the covariances of those of a prompt, [cells].

    Each choice has a site, a normal factor of the difference of its two worths: precision and shift, [N] each.
    """

    blocks: _Blocks
    first: np.ndarray  # [N], the place of the pair's first answer
    second: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    precision: np.ndarray
    shift: np.ndarray

    def between(self, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of what the worths at the places i are more than those at j."""
        cov, cell = self.covariance, self.blocks.cell
        return self.mean[i] - self.mean[j], cov[cell(i, i)] + cov[cell(j, j)] - 2 * cov[cell(i, j)]

    def tilted(self, skill: np.ndarray, offset: np.ndarray, sign: np.ndarray) -> "_Tilted":
        """Each difference as the other choices and its own have it; skill, offset (bias x) and sign [N]."""
        mean, spread = self.between(self.first, self.second)
        rest = np.maximum(1 / spread - self.precision, 1e-6)
        push = mean / spread - self.shift
        worth = (push / rest)[:, None] + NODES / np.sqrt(rest)[:, None]
        logit = skill[:, None] * worth + offset[:, None]
        weight = WEIGHTS * np.exp(sign[:, None] * logit - np.logaddexp(0, logit))
        return _Tilted(worth, _sigmoid(logit), weight / weight.sum(axis=1, keepdims=True), rest, push)

    def update(self, skill: np.ndarray, offset: np.ndarray, sign: np.ndarray) -> float:
        """One step to the sites whose moments are right. How far a mean has moved."""
        tilted = self.tilted(skill, offset, sign)
        mean = (tilted.weight * tilted.worth).sum(axis=1)
        spread = (tilted.weight * np.square(tilted.worth - mean[:, None])).sum(axis=1)
        self.precision = self.precision + DAMPING * (np.maximum(1 / spread - tilted.rest, 0) - self.precision)
        self.shift = self.shift + DAMPING * (mean / spread - tilted.push - self.shift)
        push, precision, cell = np.zeros_like(self.mean), self.blocks.eye(), self.blocks.cell
        for one, other, way in ((self.first, self.second, 1), (self.second, self.first, -1)):
            np.add.at(push, one, way * self.shift)
            np.add.at(precision, cell(one, one), self.precision)
            np.add.at(precision, cell(one, other), -self.precision)
        before = self.mean
        self.covariance, self.mean = self.blocks.solve(precision, push)
        return float(np.abs(self.mean - before).max())


@dataclasses.dataclass(frozen=True, eq=False)
class _Tilted:
    """A difference of worths at nodes [N, Q], the chance of the first answer there, and the weights that sum to 1.

    `rest` and `push` are precision and precision times mean of what all other choices say of it, [N].
    """

    worth: np.ndarray
    chance: np.ndarray
    weight: np.ndarray
    rest: np.ndarray
    push: np.ndarray


def fit(choices: Choices) -> Fit:
    """Skills, biases and the worth of every answer.

    One labeller's skill is told by how consistent the choices among three or more answers are; of single pairs it stays
    what it was beforehand, and its error says so.

    Errors: UserError as `gather` of no choice, and for prompts of too many answers.
    """
    if not len(choices):
        raise UserError("there is no choice to learn from; give rows of pairs or rankings.")
    worths = _start(choices)
    who, sign, shown = choices.who, choices.sign, choices.shown
    people = len(choices.people)
    theta = np.concatenate([np.full(people, SKILL), np.zeros(people)])
    step, moved = 0, np.inf
    while moved >= CLOSE and step < STEPS:
        skill, bias = theta[:people], theta[people:]
        moved = worths.update(skill[who], bias[who] * shown, sign)
        slope, curve = _slopes(worths, theta, choices)
        change = np.clip(np.linalg.solve(curve, slope[:, :, None])[:, :, 0].T.ravel(), -1, 1)
        theta = theta + change
        step, moved = step + 1, max(moved, float(np.abs(change).max()))
    covariance = _covariance(worths, theta, choices)
    errors = np.sqrt(np.diag(covariance))
    place = worths.blocks.place
    mean, variance = worths.between(*place[choices.pairs].T)
    return Fit(
        theta[:people], theta[people:], errors[:people], errors[people:], covariance, mean, np.sqrt(variance),
        worths.mean[place], step,
    )  # fmt: skip


def _start(choices: Choices) -> _Worths:
    """Worths that nothing is known of. Errors: UserError where their covariances are too many."""
    blocks = _Blocks(choices.prompt)
    if blocks.cells > LARGEST:
        answers = np.flatnonzero(choices.prompt == blocks.largest)
        told = " ".join(written(choices.texts[answers[0]][0]).split())[:60]
        raise UserError(
            f"bradley_terry keeps a number of each two answers to a prompt, and these are too many: {told!r} has the "
            f"most, {len(answers):,} answers; leave some away, or take dawid_skene."
        )
    first, second = blocks.place[choices.pairs[choices.pair]].T
    nothing = np.zeros(len(choices))
    return _Worths(blocks, first, second, np.zeros(len(choices.texts)), blocks.eye(), nothing, nothing)


def _slopes(worths: _Worths, theta: np.ndarray, choices: Choices) -> tuple[np.ndarray, np.ndarray]:
    """First derivatives [people, 2] and less the second [people, 2, 2] of the objective by each one's skill and bias.

    The sites are held as they are: that is the whole first derivative where they have settled.
    """
    people, who = len(choices.people), choices.who
    skill, bias = theta[:people], theta[people:]
    tilted = worths.tilted(skill[who], bias[who] * choices.shown, choices.sign)
    worth, p, weight = tilted.worth, tilted.chance, tilted.weight
    miss, bend = (choices.sign[:, None] - p) * weight, p * (1 - p) * weight
    total = lambda values: np.bincount(who, values, people)
    slope = np.stack([
        total((miss * worth).sum(axis=1)) - (skill - SKILL) / SKILL_SPREAD**2,
        total(miss.sum(axis=1) * choices.shown) - bias / BIAS_SPREAD**2,
    ], axis=1)  # fmt: skip
    mixed = total((bend * worth).sum(axis=1) * choices.shown)
    curve = np.stack([
        total((bend * worth**2).sum(axis=1)) + 1 / SKILL_SPREAD**2, mixed,
        mixed, total(bend.sum(axis=1) * choices.shown**2) + 1 / BIAS_SPREAD**2,
    ], axis=1)  # fmt: skip
    return slope, curve.reshape(people, 2, 2)


def _covariance(worths: _Worths, theta: np.ndarray, choices: Choices) -> np.ndarray:
    """The inverse of less the second derivatives, of which the worths' answer to each nudge is a part."""
    people, columns = len(choices.people), []
    for place in range(len(theta)):
        ends = []
        for way in (NUDGE, -NUDGE):
            moved = theta.copy()
            moved[place] += way
            near, skill, offset = (
                dataclasses.replace(worths),
                moved[:people],
                moved[people:][choices.who] * choices.shown,
            )
            for _ in range(SETTLE):
                if near.update(skill[choices.who], offset, choices.sign) < CLOSE * NUDGE:
                    break
            ends.append(_slopes(near, moved, choices)[0].T.ravel())
        columns.append((ends[1] - ends[0]) / (2 * NUDGE))
    values, vectors = np.linalg.eigh((np.stack(columns) + np.transpose(columns)) / 2)
    # Where it has not settled the curvature may be off, but less than beforehand nobody can know.
    return (vectors / np.maximum(values, 1 / SKILL_SPREAD**2)) @ vectors.T


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy import special

    return special.expit(x)
