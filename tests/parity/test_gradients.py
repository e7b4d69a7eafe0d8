"""The gradient of the mean negative log-likelihood is torch's, parameter by parameter."""

# pyright: reportMissingImports=false

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models.decoder import Model, Params
from tests.parity.checkpoints import EACH, load
from tests.parity.sides import Pair, draw_tokens

LENGTH = 40  # beyond every window, and the original length where the rope is stretched
TOLERANCE = 1e-3  # of the largest number of a parameter's gradient
ROUNDING = 1e-7  # is all there is of a gradient of 0: a key's bias without a rope adds the same to all scores


@functools.partial(jax.jit, static_argnums=0)
def _gradient(model: Model, params: Params, tokens: jax.Array) -> Params:
    def loss(params: Params) -> jax.Array:
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        rows = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": places, "mask": places > 0}
        return -jnp.sum(model.token_stats(params, rows).logprobs) / jnp.sum(rows["mask"])

    return jax.grad(loss)(params)


@pytest.mark.parametrize("case", EACH, indirect=True, scope="session")
def test_gradients_agree(ours: Pair, theirs: PreTrainedModel, tmp_path: pathlib.Path) -> None:
    """Ours are written as if they were weights, so that torch reads each under its own name."""
    tokens = draw_tokens(3, LENGTH)
    model, params = ours
    hf.write(str(tmp_path), model, _gradient(model, params, jnp.asarray(tokens)))
    got = dict(load(tmp_path).named_parameters())
    ids = torch.from_numpy(tokens)
    logits = theirs(input_ids=ids).logits[:, :-1]
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).backward()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None, name
        expected = parameter.grad.numpy()
        atol = TOLERANCE * np.abs(expected).max() + ROUNDING
        np.testing.assert_allclose(got[name].detach().numpy(), expected, rtol=0, atol=atol, err_msg=name)
    theirs.zero_grad()
