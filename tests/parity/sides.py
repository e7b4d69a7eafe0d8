"""The same rows through torch and through the model under test."""

# pyright: reportMissingImports=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_jax.models.decoder import Model, Params
from tests.parity.checkpoints import VOCAB

TOLERANCE = 1e-4

Pair = tuple[Model, Params]


def draw_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Random tokens, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCAB, shape)


def torch_logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of whole rows."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _run(model: Model, params: Params, *row: jax.Array) -> jax.Array:
    return model.logits(params, model.apply(params, *row))


def our_logits(pair: Pair, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of rows in segments."""
    return np.asarray(_run(*pair, *map(jnp.asarray, (tokens, segments, positions))))


def whole_rows(pair: Pair, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of rows of one text each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return our_logits(pair, tokens, np.ones_like(tokens), positions)


def agree(got: np.ndarray, expected: np.ndarray) -> None:
    """To the tolerance of the project."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
