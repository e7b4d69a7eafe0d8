"""Our logits on Hugging Face checkpoints are torch's, and an exported checkpoint is one that torch reads."""

# pyright: reportMissingImports=false

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlhf_jax.models import checkpoint as hf
from tests.parity.checkpoints import EACH, LENGTH, load
from tests.parity.sides import Pair, agree, draw_tokens, our_logits, torch_logits, whole_rows

each = pytest.mark.parametrize("case", EACH, indirect=True, scope="session")
ROWS = 4  # of LENGTH tokens in every test, so that a case compiles once


def test_logits_agree(ours: Pair, theirs: PreTrainedModel) -> None:
    """The whole context, which is beyond every window and the original length where the rope is stretched."""
    tokens = draw_tokens(ROWS, LENGTH)
    agree(whole_rows(ours, tokens), torch_logits(theirs, tokens))


@each
def test_logits_agree_under_padding(ours: Pair, theirs: PreTrainedModel) -> None:
    """Texts of 1 to 50 tokens, each by itself there and in rows that noise fills here.

    By themselves, since transformers chooses the waves of longrope by the longest row of a batch.
    """
    lengths = np.array([50, 31, 7, 1])
    mask = np.arange(LENGTH)[None] < lengths[:, None]
    tokens = draw_tokens(ROWS, LENGTH)
    expected = np.concatenate([torch_logits(theirs, row[None, :n])[0] for row, n in zip(tokens, lengths, strict=True)])
    got = our_logits(ours, tokens, mask.astype(int), np.broadcast_to(np.arange(LENGTH), tokens.shape))
    agree(got[mask], expected)


@each
def test_logits_agree_in_packed_rows(ours: Pair, theirs: PreTrainedModel) -> None:
    """Three texts and padding in one row against each text by itself."""
    lengths = (33, 1, 40)
    texts = [draw_tokens(1, length, seed=i) for i, length in enumerate(lengths)]
    expected = np.concatenate([torch_logits(theirs, text)[0] for text in texts])
    tokens, segments, positions = np.zeros((3, ROWS, LENGTH), int)
    used = slice(sum(lengths))
    tokens[0, used] = np.concatenate([text[0] for text in texts])
    segments[0, used] = np.repeat([1, 2, 3], lengths)
    positions[0, used] = np.concatenate([*map(np.arange, lengths)])
    agree(our_logits(ours, tokens, segments, positions)[0, used], expected)


@each
def test_an_exported_folder_loads_with_the_same_logits(
    ours: Pair, theirs: PreTrainedModel, tmp_path: pathlib.Path
) -> None:
    hf.write(str(tmp_path), *ours, shard_bytes=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back = load(tmp_path)
    assert back.config.architectures == theirs.config.architectures
    for (name, got), (_, expected) in zip(back.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(got, expected), name
    tokens = draw_tokens(ROWS, LENGTH)
    np.testing.assert_array_equal(torch_logits(back, tokens), torch_logits(theirs, tokens))


@each
def test_a_bfloat16_checkpoint_is_read_exactly(theirs: PreTrainedModel, tmp_path: pathlib.Path) -> None:
    """Most published weights are bfloat16, which numpy does not know."""
    half: Any = type(theirs)(theirs.config)
    half.load_state_dict(theirs.state_dict())
    half.to(dtype=torch.bfloat16).save_pretrained(tmp_path)
    tokens = draw_tokens(ROWS, LENGTH)
    agree(whole_rows(hf.read(str(tmp_path)), tokens), torch_logits(load(tmp_path), tokens))


def test_the_decoder_alone_is_read_too(ours: Pair, theirs: PreTrainedModel, tmp_path: pathlib.Path) -> None:
    """A checkpoint of the model without its head, whose names lack the family's prefix."""
    if not ours[0].shape.tied:
        return  # it has no head to give
    theirs.base_model.save_pretrained(tmp_path)
    hf.check(hf.folder(str(tmp_path)), ours[0])
