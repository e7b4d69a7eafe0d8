"""Of a prompt's completions those that are learnt from: a row of the prepared batch is a prompt.

P prompts have K = `rollout.samples` completions each, the N = P K rows of a rollout, one behind the other. What is
plotted of all of them goes with the prompt's row as `drawn`, [P, K] columns: weight float32, 0 where nothing is to be
told, score and length float32, ended bool, with a reference sequence_kl float32, and of several rewards rewards and
applies by their names.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import sharding
from rlhf_jax.algorithms.rollouts import Around, Scores, mean, reward_means, score_columns, used_tokens
from rlhf_jax.algorithms.step import Batch, Mean

TOKEN_COLUMNS = "tokens", "mask", "segments", "positions"


def scored(around: Around, rollout: Batch) -> Batch:
    """The rollout with `score_columns`, and judged, bool [N]: whether any reward applies to a completion.

    Errors: UserError as those.
    """
    scores: Scores = around.score(rollout)
    real = sharding.fetch(jnp.asarray(rollout["weight"])) > 0
    return rollout | score_columns(scores, rollout) | {"judged": np.any(scores.applies, axis=1) & real}


def extremes(batch: Batch, samples: int) -> tuple[Array, Array]:
    """The best and the worst of each prompt's judged completions, and whether their scores differ.

    Args:
      batch: score float32 [N] and judged bool [N].
    Returns: numbers among all N, int32 [P, 2], of equal ones the first; and bool [P].
    """
    score, judged = (batch[name].reshape(-1, samples) for name in ("score", "judged"))
    high, low = jnp.where(judged, score, -jnp.inf), jnp.where(judged, score, jnp.inf)
    first = jnp.arange(score.shape[0]) * samples
    places = jnp.stack([first + jnp.argmax(high, axis=1), first + jnp.argmin(low, axis=1)], axis=1)
    return places, jnp.max(high, axis=1) > jnp.min(low, axis=1)


def rows_of(batch: Batch, places: Array, samples: int) -> Batch:
    """Completions as the rows of their prompts.

    Args:
      places: int [P, L], which of the N completions.
    Returns: tokens, mask, segments, positions [P, L, T], and index int32 [P], -1 for padding.
    """
    picked: Batch = {name: batch[name][:, 0][places] for name in TOKEN_COLUMNS}
    return picked | {"index": batch["index"].reshape(-1, samples)[:, 0]}


def drawn_of(batch: Batch, samples: int) -> Batch:
    """The columns of `drawn`, see the module; those of padding weigh 0."""
    told = {name: batch[name] for name in ("weight", "score", "ended", "sequence_kl") if name in batch}
    told |= {"length": jnp.sum(used_tokens(batch), axis=1)}
    told |= {name: batch[name] for name in ("rewards", "applies") if name in batch}
    return jax.tree.map(lambda x: x.reshape(-1, samples), told)


def drawn_means(drawn: Batch) -> dict[str, Mean]:
    """What is plotted of all completions that were drawn, a mean over them each; length in tokens, kl in nats."""
    weight = drawn["weight"]
    names = {"objective/score": "score", "completions/length": "length", "completions/ended": "ended"}
    names |= {"objective/kl": "sequence_kl"} if "sequence_kl" in drawn else {}
    return {name: mean(drawn[column], weight) for name, column in names.items()} | reward_means(drawn)
