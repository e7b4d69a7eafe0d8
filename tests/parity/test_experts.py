"""The balance of a text in a model of one layer is transformers' load-balancing loss of that text."""

# pyright: reportMissingImports=false

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlhf_jax.models import checkpoint as hf
from tests.parity.checkpoints import DEFAULT, EXPERTS, LLAMA, VOCAB, draw, make

MIXTRAL = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(("kind", "config"), [("mixtral", MIXTRAL), ("qwen3_moe", EXPERTS)])
def test_balance_is_the_load_balancing_loss(kind: str, config: dict, tmp_path: pathlib.Path) -> None:
    """Two texts in one row, each against their loss of that text alone; the loads are far from even."""
    theirs = make(kind, config | {"num_hidden_layers": 1} | DEFAULT).eval()
    draw(theirs)
    theirs.save_pretrained(tmp_path)
    model, params = hf.read(str(tmp_path))
    lengths = 60, 37
    tokens = np.random.default_rng(0).integers(3, VOCAB, (1, sum(lengths)))
    rows = {
        "tokens": jnp.asarray(tokens),
        "segments": jnp.repeat(jnp.array([1, 2]), jnp.array(lengths))[None],
        "positions": jnp.concatenate([jnp.arange(length) for length in lengths])[None],
        "mask": jnp.ones(tokens.shape, bool),
    }
    got = np.asarray(jax.jit(lambda rows: model.token_stats(params, rows, want=("balance",)).balance)(rows))[0]
    for text, value in zip(np.split(tokens, [lengths[0]], axis=1), np.split(got, [lengths[0]]), strict=True):
        with torch.no_grad():
            expected = theirs(torch.from_numpy(text), output_router_logits=True).aux_loss.item()
        assert expected > 1.02 * config["num_experts_per_tok"]
        np.testing.assert_allclose(value.mean(dtype=np.float64), expected, rtol=1e-6)
