"""What several labellers' labels say together: the chance of each class of an item, and how each labeller errs.

`majority` counts; `dawid_skene` weighs by confusion matrices; `glad` and `mace` are crowd-kit's. Choices between two
answers become labels by `of_choices`; Bradley and Terry's model of them is in `feedback.bradley_terry`.
"""

import dataclasses
import warnings
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.choices import Choices

CLASSES = ("first", "second"), ("first", "tie", "second")  # of two answers, without ties and with them
STEPS, CLOSE = 500, 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """N labels of items, each one of K classes.

    Attributes:
      item, who, label: [N] int, places among items, people and classes.
      items, people: how many there are.
      classes: K names.
      turned: [N] float64, 1 where the labeller saw the classes in reverse order (two answers, the second shown
        first), 0 where not, 0.5 where nobody knows: a confusion matrix is of what labellers saw.
    """

    item: np.ndarray
    who: np.ndarray
    label: np.ndarray
    items: int
    people: int
    classes: tuple[str, ...]
    turned: np.ndarray

    def __post_init__(self) -> None:
        for name, most in (("item", self.items), ("who", self.people), ("label", len(self.classes))):
            found = getattr(self, name)
            if not len(found) or found.min() < 0 or found.max() >= most:
                raise UserError(f"{name} of the labels must be places from 0 to {most - 1}, at least one; give such.")

    @property
    def overlap(self) -> int:
        """How many items were labelled by two people or more."""
        both = np.unique(np.stack([self.item, self.who]), axis=1)
        return int((np.bincount(both[0], minlength=self.items) > 1).sum())


def of_choices(choices: Choices) -> Labels:
    """Choices as labels of pairs: first, second, and tie if there is any."""
    ties = bool((choices.sign == 0.5).any())
    label = np.rint((1 - choices.sign) * (1 + ties)).astype(np.int64)
    people, classes = len(choices.people), CLASSES[ties]
    return Labels(
        choices.pair, choices.who, label, len(choices.pairs), people, classes, (1 - choices.shown) / 2
    )  # fmt: skip


def chance_of_first(posterior: np.ndarray) -> np.ndarray:
    """[P], that the first of two answers is the better one, from the classes of `of_choices`; a tie is half a chance.

    >>> print(chance_of_first(np.array([[0.5, 0.25, 0.25]])))
    [0.625]
    """
    return posterior @ np.linspace(1, 0, posterior.shape[1])


# Counting


def majority(labels: Labels) -> np.ndarray:
    """The share of labels of each class, [items, K]; of an item without labels each class has the same."""
    votes = np.zeros((labels.items, len(labels.classes)))
    np.add.at(votes, (labels.item, labels.label), 1.0)
    total = votes.sum(axis=1, keepdims=True)
    return np.divide(votes, total, out=np.full_like(votes, 1 / votes.shape[1]), where=total > 0)


# Dawid and Skene


class Confusions(NamedTuple):
    """Dawid and Skene's fit.

    Attributes:
      posterior: [items, K], the chance that each class is the true one.
      confusion: [people, K, K], of each labeller the chance of what they say (last axis) of what is true.
      prior: [K], shares of the classes.
      steps: iterations done; as many as were allowed where it had not settled.
    """

    posterior: np.ndarray
    confusion: np.ndarray
    prior: np.ndarray
    steps: int


def dawid_skene(
    labels: Labels,
    smoothing: float = 1.0,
    *,
    weight: np.ndarray | None = None,
    start: np.ndarray | None = None,
    steps: int = STEPS,
) -> Confusions:
    """The most probable confusion matrices and class shares, and what they say of each item.

    P(labels of i, true class k) = p_k prod of pi_l[k, label]; labellers err independently given the true class.
    Expectation-maximisation from the shares of votes, with `smoothing` labels added to every cell and one more to the
    diagonal: so a few labels don't make anyone infallible, and better than chance is where the search begins.

    Args:
      smoothing: labels of each class that each labeller is taken to have given of each true class, at least 0.
      weight: [items], how often each counts, as for a bootstrap; None: once.
      start: [items, K], the posterior that the search begins with; None: the shares of votes.
      steps: most iterations.
    Errors: UserError if no item has two labellers: nothing tells who errs then.
    References: Dawid and Skene 1979, Applied Statistics 28, 20-28.
    """
    check_overlap(labels, "dawid_skene")
    if not smoothing >= 0:
        raise UserError(f"smoothing={smoothing} is not allowed; it must be at least 0.")
    size, table = len(labels.classes), _table(labels)
    posterior = majority(labels) if start is None else start
    often = np.ones(labels.items) if weight is None else np.asarray(weight, np.float64)
    added = smoothing * (1 + np.eye(size))
    done, moved, confusion, prior = 0, np.inf, added, posterior.mean(axis=0)
    while moved >= CLOSE and done < steps:
        mass = often[:, None] * posterior
        prior = (mass.sum(axis=0) + smoothing) / (mass.sum() + smoothing * size)
        # [people, K true, K said] each; what was seen in reverse order counts in reverse order.
        straight, turned = (table.T @ mass).reshape(2, labels.people, size, size).transpose(0, 1, 3, 2)
        cells = straight + turned[:, ::-1, ::-1] + added
        total = cells.sum(axis=2, keepdims=True)
        confusion = np.divide(cells, total, out=np.full_like(cells, 1 / size), where=total > 0)
        before, posterior = posterior, _posterior(table, confusion, prior)
        done, moved = done + 1, np.abs(posterior - before).max()
    return Confusions(posterior, confusion, prior, done)


def check_overlap(labels: Labels, method: str) -> None:
    """Errors: UserError if no two labellers labelled the same item."""
    if not labels.overlap:
        raise UserError(
            f"no two of {labels.people} labellers labelled the same item, so {method} can't tell who errs; have items "
            "labelled by several people, or take majority, or bradley_terry for rankings."
        )


def _table(labels: Labels) -> Any:
    """How often each labeller said each class of each item, [items, 2 * people * K], seen straight and then turned.

    Sparse, since of many labellers most cells are 0.
    """
    from scipy import sparse

    size = len(labels.classes)
    column = labels.who * size + labels.label
    rows, columns = np.tile(labels.item, 2), np.concatenate([column, column + labels.people * size])
    share = np.concatenate([1 - labels.turned, labels.turned])
    shape = labels.items, 2 * labels.people * size
    made = sparse.csr_array((share, (rows, columns)), shape=shape)
    return made.toarray() if np.prod(shape) < 2**20 else made


def _posterior(table: Any, confusion: np.ndarray, prior: np.ndarray) -> np.ndarray:
    logs = np.log(np.maximum(confusion, 1e-300))  # without smoothing a cell may be 0
    both = np.stack([logs, logs[:, ::-1, ::-1]]).transpose(0, 1, 3, 2).reshape(-1, len(prior))
    said = table @ both + np.log(np.maximum(prior, 1e-300))
    odds = np.exp(said - said.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


# crowd-kit's


class Rated(NamedTuple):
    """What crowd-kit's methods give: posterior [items, K], and one number a labeller, [people]."""

    posterior: np.ndarray
    people: np.ndarray


def glad(labels: Labels, steps: int = 50) -> Rated:
    """Labellers of different ability on items of different difficulty; a labeller's number is the ability.

    P(label right) = sigmoid(ability_l * easiness_i), easiness above 0; wrong labels fall on all other classes alike.

    References: Whitehill et al. 2009, Whose vote should count more, NeurIPS 22. Code: crowd-kit.
    """
    check_overlap(labels, "glad")
    model, posterior = _crowdkit(labels, "GLAD", n_iter=steps)
    return Rated(posterior, model.alphas_.reindex(range(labels.people)).to_numpy(np.float64))


def mace(labels: Labels, seed: int = 0, restarts: int = 10) -> Rated:
    """Labellers who know, or else say what they always say; a labeller's number is how often they know.

    References: Hovy et al. 2013, Learning Whom to Trust with MACE, NAACL. Code: crowd-kit.
    """
    check_overlap(labels, "mace")
    model, posterior = _crowdkit(labels, "MACE", random_state=seed, n_restarts=restarts)
    # The first of its two columns counts labels that were guessed, the second those that were known.
    known = model.spamming_ / model.spamming_.sum(axis=1, keepdims=True)
    return Rated(posterior, known[:, 1])


def _crowdkit(labels: Labels, name: str, **settings: Any) -> tuple[Any, np.ndarray]:
    try:
        import pandas as pd
        from crowdkit import aggregation
    except ImportError as error:
        raise UserError(
            f"{name.lower()} needs crowd-kit ({error}); pip install 'rlhf_jax[aggregate]', or take dawid_skene."
        ) from error
    frame = pd.DataFrame({"task": labels.item, "worker": labels.who, "label": labels.label})
    model = getattr(aggregation, name)(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas 3, about how crowd-kit calls it
        made = model.fit_predict_proba(frame)
    # Its columns stand in the order in which classes were met, and items without labels are not there.
    made = made.reindex(index=range(labels.items), columns=range(len(labels.classes)))
    return model, made.fillna(0.0).where(made.notna().any(axis=1), 1 / len(labels.classes)).to_numpy(np.float64)
