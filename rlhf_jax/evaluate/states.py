"""What a model knows of answers: the last layer's hidden states, a row of numbers an answer."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.data.rows import Text
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.rewards import ROWS, SHORTEST, Rewards
from rlhf_jax.models.decoder import Model
from rlhf_jax.sampling.sampler import bucket

Read = Literal["mean", "last"]


def states(
    subject: Subject,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    tools: Sequence[str] | None = None,
    *,
    read: Read = "mean",
    chat_template: str | None = None,
) -> np.ndarray:
    """The hidden states after the final norm, float64 [N, width], of each answer behind its prompt.

    Args:
      subject: a model of words or of scores.
      tools: what each prompt offers, JSON text, "" for none; None: none do.
      read: mean over the answer's tokens, or at its last one, where a reward model reads its score.
    Errors: UserError naming the first answer that can't be encoded, or doesn't fit without any prompt.
    """
    rows = Rewards(subject.name, [subject], chat_template=chat_template).encode(prompts, completions, tools)
    model, mesh = subject.model, subject.model.layout.mesh
    assert mesh is not None
    size = -(-ROWS // model.layout.shards) * model.layout.shards
    out = np.zeros((len(rows), model.shape.width))
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(bucket(max(len(row.ids), SHORTEST), model.shape.length), []).append(number)
    for length, numbers in sorted(by_length.items()):
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            batch = {name: np.zeros((size, length), np.int32) for name in ("tokens", "segments", "positions")}
            weight = np.zeros((size, length), np.float32)
            for place, number in enumerate(part):
                ids, first = rows[number].ids, rows[number].start if read == "mean" else len(rows[number].ids) - 1
                batch["tokens"][place, : len(ids)], batch["segments"][place, : len(ids)] = ids, 1
                batch["positions"][place, : len(ids)] = np.arange(len(ids))
                weight[place, first : len(ids)] = 1 / (len(ids) - first)
            mine = sharding.local_rows(mesh, size)
            placed = sharding.place_rows({name: x[mine] for name, x in (batch | {"weight": weight}).items()}, mesh)
            out[part] = sharding.fetch(_weighed(model, subject.params, placed))[: len(part)]
    return out


@functools.partial(jax.jit, static_argnums=0)
def _weighed(model: Model, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    hidden, _ = model.states(params, rows)
    return jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), rows["weight"], precision=jax.lax.Precision.HIGHEST)
