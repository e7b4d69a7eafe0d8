"""The parts of the quickstart that go without training; the whole is the README's first command."""

import pathlib

import jax
import pytest
from etils import epath

from experiments import quickstart
from rlhf_jax import worlds
from rlhf_jax.build import load_tokenizer
from rlhf_jax.data import world_rows
from rlhf_jax.data.rows import Refusal
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf

ROWS = {
    "held_out": world_rows.prompts(200, 0, "held_out"),
    "shifted": world_rows.prompts(200, 0, "held_out", shifted=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    folder = epath.Path(tmp_path_factory.mktemp("base"))
    worlds.write_model(folder, [row["completion"] for row in world_rows.documents(3000, 0)])
    return folder


def test_every_row_fits_and_reads_back(base):
    tokenizer = load_tokenizer(base)
    encoder = Encoder(tokenizer)
    rows = [*world_rows.documents(2000, 1), *world_rows.demonstrations(500, 1)]
    for row, tokens in zip(rows, encoder.encode_many([(r["prompt"], r["completion"]) for r in rows]), strict=True):
        assert not isinstance(tokens, Refusal)
        assert len(tokens) <= worlds.LENGTH["length"]
        assert tokenizer.decode(tokens.ids, skip_special_tokens=True) == row["prompt"] + row["completion"]


@pytest.mark.parametrize("split", ROWS)
def test_every_prompt_leaves_room_for_an_answer(base, split):
    context = worlds.SHAPE["max_position_embeddings"]
    ids = Encoder(load_tokenizer(base)).prompts([row["prompt"] for row in ROWS[split]])
    assert max(len(prompt) for prompt in ids if not isinstance(prompt, Refusal)) + 24 <= context


def test_an_empty_prompt_is_the_start_token(base):
    encoder = Encoder(load_tokenizer(base))
    (ids,) = encoder.prompts([""])
    assert not isinstance(ids, Refusal)
    assert ids.tolist() == [encoder.bos_id]
    assert encoder.stop_ids() == (encoder.eos_id,)


def test_the_model_is_tiny(base):
    size = sum(leaf.size for leaf in jax.tree.leaves(hf.describe(base).shapes()))
    assert size < 500_000


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_that_mean_nothing_are_one_sentence(tmp_path: pathlib.Path, seeds: tuple[int, ...]):
    with pytest.raises(UserError, match="give different numbers of at least 0"):
        quickstart.main(quickstart.Quickstart(workdir=str(tmp_path), seeds=seeds))
    assert not list(tmp_path.iterdir())
