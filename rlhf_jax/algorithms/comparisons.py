"""What people said of answers, and how far rewards agree with it."""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.step import Batch, Mean


class Given(Protocol):
    """What is given of N examples, each of up to K answers."""

    @property
    def weight(self) -> Array: ...  # [N]
    @property
    def labels(self) -> Array: ...  # [N, K] float32, 1 desirable; of a group those of the best rank are
    @property
    def ranks(self) -> Array: ...  # [N, K] float32, the smaller the better
    @property
    def present(self) -> Array: ...  # [N, K] bool, whether the example has this answer


class Labels(NamedTuple):
    """A `Given` and nothing else."""

    weight: Array
    labels: Array
    ranks: Array
    present: Array


def labels_of(batch: Batch, present: Array) -> Labels:
    """What a batch's columns say of its answers; single answers without a label count as undesirable.

    Args:
      present: [N, K] bool.
    """
    per_answer = lambda name: batch[name].reshape(present.shape) if name in batch else jnp.zeros(present.shape)
    if "ranks" in batch:
        ranks = per_answer("ranks")
        labels = ranks == jnp.min(jnp.where(present, ranks, jnp.inf), axis=1, keepdims=True)
    else:
        labels = per_answer("labels")
        ranks = 1.0 - labels
    return Labels(batch["weight"].reshape(-1), labels.astype(jnp.float32), ranks, present)


def _comparisons(given: Given, rewards: Array, threshold: Array) -> tuple[Array, Array]:
    """Margins that should be above 0, and which of them count: [N, 1], or for groups every two, [N, K, K]."""
    if given.labels.shape[1] == 1:
        return (rewards - threshold[:, None]) * (2 * given.labels - 1), given.present.astype(jnp.float32)
    better = (given.ranks[:, :, None] < given.ranks[:, None, :]) * given.present[:, :, None] * given.present[:, None, :]
    return rewards[:, :, None] - rewards[:, None, :], better.astype(jnp.float32)


def right(margin: Array) -> Array:
    """1 if above 0; a tie counts as half right."""
    return (margin > 0) + 0.5 * (margin == 0)


def comparison_means(given: Given, rewards: Array, threshold: Array) -> dict[str, Mean]:
    """Rewards of good and bad answers, how far they lie apart, and the share of comparisons that they get right.

    Args:
      rewards: [N, K], in reward units.
      threshold: [N], the reward above which a single answer counts as good.
    """
    weight = given.weight[:, None] * given.present
    mean = lambda x, w: Mean(jnp.sum(x * w), jnp.sum(w))
    chosen, rejected = mean(rewards, weight * given.labels), mean(rewards, weight * (1 - given.labels))
    margin, compared = _comparisons(given, rewards, threshold)
    compared *= given.weight.reshape(-1, *(1,) * (compared.ndim - 1))
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": Mean(jnp.stack([chosen.total, -rejected.total]), jnp.stack([chosen.count, rejected.count])),
        "rewards/accuracies": mean(right(margin), compared),
    }


def row_comparisons(given: Given, rewards: Array, threshold: Array) -> dict[str, Array]:
    """Of each example, [N]: margin, the mean over its comparisons of what should be above 0; correct, their share.

    NaN where it has no comparison.
    """
    margin, compared = (x.reshape(len(given.weight), -1) for x in _comparisons(given, rewards, threshold))
    mean = lambda x: jnp.sum(x * compared, axis=1) / jnp.sum(compared, axis=1)
    return {"margin": mean(margin), "correct": mean(right(margin))}
