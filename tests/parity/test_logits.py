"""Our logits on Hugging Face checkpoints are torch's, and an exported checkpoint is one that torch reads."""

# pyright: reportMissingImports=false

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models.decoder import Model, Params
from tests.parity.checkpoints import CASES, LENGTH, VOCAB, load

TOLERANCE = 1e-4
SHOWS = 100 * TOLERANCE

Pair = tuple[Model, Params]


@pytest.fixture(scope="module")
def ours(folder: pathlib.Path) -> Pair:
    return hf.read(str(folder))


def _tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, shape)


def _torch_logits(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    ids = torch.from_numpy(tokens)
    mask = np.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.from_numpy(mask.astype(np.int64))).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _run(model: Model, params: Params, *row: jax.Array) -> jax.Array:
    return model.logits(params, model.apply(params, *row))


def _logits(pair: Pair, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(_run(*pair, *map(jnp.asarray, (tokens, segments, positions))))


def _whole_rows(pair: Pair, tokens: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return _logits(pair, tokens, np.ones_like(tokens), positions)


def _agree(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_logits_agree(ours: Pair, theirs: PreTrainedModel) -> None:
    """The whole context, which is beyond the original length where the rope is stretched."""
    tokens = _tokens(2, LENGTH)
    _agree(_whole_rows(ours, tokens), _torch_logits(theirs, tokens))


def test_logits_agree_under_padding(ours: Pair, theirs: PreTrainedModel) -> None:
    """Rows of 1 to 50 tokens, padded on the right with token 0 there and with noise here."""
    lengths = np.array([50, 31, 7, 1])
    mask = np.arange(50)[None] < lengths[:, None]
    tokens = _tokens(4, 50)
    expected = _torch_logits(theirs, np.where(mask, tokens, 0), mask)
    got = _logits(ours, tokens, mask.astype(int), np.broadcast_to(np.arange(50), tokens.shape))
    _agree(got[mask], expected[mask])


def test_logits_agree_in_packed_rows(ours: Pair, theirs: PreTrainedModel) -> None:
    """Three texts and padding in one row against each text by itself."""
    lengths = (33, 1, 40)
    texts = [_tokens(1, length, seed=i) for i, length in enumerate(lengths)]
    expected = np.concatenate([_torch_logits(theirs, text)[0] for text in texts])
    pad = np.zeros(6, int)
    tokens = np.concatenate([*(text[0] for text in texts), pad])[None]
    segments = np.concatenate([np.repeat([1, 2, 3], lengths), pad])[None]
    positions = np.concatenate([*map(np.arange, lengths), pad])[None]
    got = _logits(ours, tokens, segments, positions)[0, : sum(lengths)]
    _agree(got, expected)


def test_an_exported_folder_loads_with_the_same_logits(
    ours: Pair, theirs: PreTrainedModel, tmp_path: pathlib.Path
) -> None:
    hf.write(str(tmp_path), *ours, shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back = load(tmp_path)
    assert back.config.architectures == theirs.config.architectures
    for (name, got), (_, expected) in zip(back.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(got, expected), name
    tokens = _tokens(2, LENGTH)
    np.testing.assert_array_equal(_torch_logits(back, tokens), _torch_logits(theirs, tokens))


def test_a_bfloat16_checkpoint_is_read_exactly(theirs: PreTrainedModel, tmp_path: pathlib.Path) -> None:
    """Most published weights are bfloat16, which numpy does not know."""
    half: Any = type(theirs)(theirs.config)
    half.load_state_dict(theirs.state_dict())
    half.to(dtype=torch.bfloat16).save_pretrained(tmp_path)
    tokens = _tokens(1, 40)
    _agree(_whole_rows(hf.read(str(tmp_path)), tokens), _torch_logits(load(tmp_path), tokens))


# A mistake is made on purpose in a model that agrees: each takes one feature away.


def _with(pair: Pair, **fields: Any) -> Pair:
    model, params = pair
    return dataclasses.replace(model, shape=dataclasses.replace(model.shape, **fields)), params


def _leaf(pair: Pair, change: Callable[[jax.Array], jax.Array], *path: str) -> Pair:
    model, params = pair

    def at(tree: Params, keys: tuple[str, ...]) -> Params:
        return change(tree) if not keys else {**tree, keys[0]: at(tree[keys[0]], keys[1:])}

    return model, at(params, path)


def _no_rope_scaling(pair: Pair) -> Pair:
    return _with(pair, rope=dataclasses.replace(pair[0].shape.rope, kind="default"))


def _other_rope_base(pair: Pair) -> Pair:
    rope = pair[0].shape.rope
    return _with(pair, rope=dataclasses.replace(rope, theta=2 * rope.theta))


def _rope_on_neighbours(pair: Pair) -> Pair:
    """Pairs (x_0, x_1), (x_2, x_3) as GPT-J has them, in the place of halves."""
    size = pair[0].shape.head_dim
    order = np.arange(size).reshape(2, -1).T.reshape(-1)
    for name in ("query", "key"):
        pair = _leaf(pair, lambda x: x[..., order], "layers", name, "kernel")
        if pair[0].shape.qkv_bias:
            pair = _leaf(pair, lambda x: x[..., order], "layers", name, "bias")
    return pair


def _heads_in_another_group(pair: Pair) -> Pair:
    """Query head h reads group h mod G in the place of h // (H / G)."""
    shape = pair[0].shape
    order = np.arange(shape.heads).reshape(-1, shape.groups).T.reshape(-1)
    pair = _leaf(pair, lambda x: x[:, :, order], "layers", "query", "kernel")
    if shape.qkv_bias:
        pair = _leaf(pair, lambda x: x[:, order], "layers", "query", "bias")
    return _leaf(pair, lambda x: x[:, order], "layers", "out", "kernel")


def _no_bias(name: str) -> Callable[[Pair], Pair]:
    return lambda pair: _leaf(pair, jnp.zeros_like, "layers", name, "bias")


def _no_norm(*path: str) -> Callable[[Pair], Pair]:
    return lambda pair: _leaf(pair, jnp.ones_like, *path)


ALWAYS: dict[str, Callable[[Pair], Pair]] = {
    "rope base": _other_rope_base,
    "rope halves": _rope_on_neighbours,
    "grouped heads": _heads_in_another_group,
    "attention norm": _no_norm("layers", "attention_norm"),
    "mlp norm": _no_norm("layers", "mlp_norm"),
    "final norm": _no_norm("final_norm"),
    "norm epsilon": lambda pair: _with(pair, norm_eps=1e-6),
    "activation": lambda pair: _with(pair, activation="gelu"),
}
SOMETIMES: dict[str, Callable[[Pair], Pair]] = {
    "rope scaling": _no_rope_scaling,
    "untied head": lambda pair: _with(pair, tied=True),
    **{f"bias of {name}": _no_bias(name) for name in ("query", "key", "value", "out", "gate", "up", "down")},
}


def test_every_feature_shows_in_the_logits(case: str, ours: Pair) -> None:
    """So that the agreement above is not one of models that ignore a feature alike."""
    tokens = _tokens(2, LENGTH)
    right = _whole_rows(ours, tokens)
    features = ALWAYS | {name: SOMETIMES[name] for name in CASES[case].features}
    wrong = {name: _whole_rows(change(ours), tokens) for name, change in features.items()}
    moves = {name: float(np.abs(logits - right).max()) for name, logits in wrong.items()}
    hidden = {name: move for name, move in moves.items() if not move > SHOWS}
    assert not hidden, f"these are not seen in the logits: {hidden}"


def test_the_cases_have_every_feature() -> None:
    assert set(SOMETIMES) == {feature for case in CASES.values() for feature in case.features}


def test_every_bias_of_a_case_is_named(case: str, folder: pathlib.Path) -> None:
    """The list of features that are switched off is as long as the checkpoint's own list of biases."""
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    biases = {name.split(".")[-2] for name in names if name.endswith(".bias")}
    assert len(biases) == sum(feature.startswith("bias of") for feature in CASES[case].features)
