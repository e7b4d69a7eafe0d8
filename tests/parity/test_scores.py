"""Scores are the logits of transformers' classifiers of sequences and of tokens, read from and written to folders."""

# pyright: reportMissingImports=false

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models.decoder import Model, Params
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.families.score import Kind
from tests.parity.checkpoints import CASES, draw
from tests.parity.sides import TOLERANCE, Pair, draw_tokens

ROWS, LENGTH = 3, 24
LENGTHS = np.array([24, 15, 1])
AUTO: dict[Kind, Any] = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
FAMILY = {case.args[0]: case.args for case in reversed(CASES.values())}  # the first case of each
EVERY = [
    (family, kind, labels)
    for family in FAMILIES
    for kind, labels in (("sequence", 1), ("token", 2))
    if kind == "sequence" or FAMILIES[family].token
]
EVERY += [("llama", "sequence", 2), ("gpt2", "token", 1)]


def make(family: str, kind: Kind, labels: int) -> PreTrainedModel:
    """A classifier with random weights."""
    _, config = FAMILY[family]
    config = AutoConfig.for_model(family, **config, num_labels=labels)
    model = AUTO[kind].from_config(config, attn_implementation="eager").eval()
    draw(model, seed=1)
    return model


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Tokens with padding on the right, and where they are none."""
    mask = np.arange(LENGTH)[None] < LENGTHS[:, None]
    return np.where(mask, draw_tokens(ROWS, LENGTH), 0), mask


def their_scores(model: PreTrainedModel) -> np.ndarray:
    """The logit, or the difference of both: [B] or [B, T]."""
    tokens, mask = map(torch.from_numpy, rows())
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask.long()).logits.numpy()
    return logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Model, params: Params, rows: dict[str, jax.Array]) -> jax.Array:
    return model.score(params, rows)


def our_scores(pair: Pair, kind: Kind) -> np.ndarray:
    """Of the last token of each row, or of every one."""
    tokens, mask = rows()
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    batch = {"tokens": tokens, "segments": mask.astype(int), "positions": positions}
    model = dataclasses.replace(pair[0], source="")  # one program for all of a family
    scores = np.asarray(_score(model, pair[1], jax.tree.map(jnp.asarray, batch)))
    return scores[np.arange(ROWS), LENGTHS - 1] if kind == "sequence" else scores


def agree(got: np.ndarray, expected: np.ndarray) -> None:
    if got.ndim == 2:  # transformers scores padding too
        mask = rows()[1]
        got, expected = got[mask], expected[mask]
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "kind", "labels"), EVERY)
def test_scores_agree_and_a_written_folder_loads(family: str, kind: Kind, labels: int, tmp_path: pathlib.Path) -> None:
    theirs = make(family, kind, labels)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    ours = hf.read(str(tmp_path / "theirs"))
    assert ours[0].shape.head == "score"
    expected = their_scores(theirs)
    assert expected.std() > 0.2, "the scores must differ"
    agree(our_scores(ours, kind), expected)

    hf.write(str(tmp_path / "ours"), *ours, kind=kind, shard_bytes=40_000)
    back, info = AUTO[kind].from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(back) is type(theirs) and back.config.pad_token_id == theirs.config.pad_token_id
    assert back.config.id2label == ({0: "LABEL_0"} if kind == "sequence" else {0: "wrong", 1: "right"})
    agree(their_scores(back.eval()), expected)


def test_the_bias_of_a_sequences_score_is_ours_alone(tmp_path: pathlib.Path) -> None:
    """Differences of scores are the same in transformers."""
    make("llama", "sequence", 1).save_pretrained(tmp_path / "theirs")
    model, params = hf.read(str(tmp_path / "theirs"))
    params = {**params, "score_bias": jnp.float32(2.5)}
    hf.write(str(tmp_path / "ours"), model, params)
    theirs = their_scores(AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval())
    agree(our_scores(hf.read(str(tmp_path / "ours")), "sequence") - 2.5, theirs)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.token])
def test_what_transformers_has_no_class_for_is_refused(family: str, tmp_path: pathlib.Path) -> None:
    config = AutoConfig.for_model(family, **FAMILY[family][1])
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        AutoModelForTokenClassification.from_config(config)
    make(family, "sequence", 1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"no token classification for {family}"):
        hf.write(str(tmp_path / "ours"), *hf.read(str(tmp_path)), kind="token")
