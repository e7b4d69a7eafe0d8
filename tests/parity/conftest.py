"""One checkpoint a case, made once, as both sides read it."""

import pathlib

import pytest
from transformers import PreTrainedModel

from rlhf_jax.models import checkpoint as hf
from tests.parity.checkpoints import CASES, draw, load
from tests.parity.sides import Pair


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """The name of one of the checkpoints."""
    return request.param


@pytest.fixture(scope="session")
def folder(case: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The checkpoint as transformers saves it, in several safetensors files."""
    model = CASES[case]()
    draw(model)
    path = tmp_path_factory.mktemp(case)
    model.save_pretrained(path, max_shard_size="40KB")
    assert (path / "model.safetensors.index.json").exists(), "the checkpoint must be in several files"
    return path


@pytest.fixture(scope="session")
def theirs(folder: pathlib.Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it."""
    return load(folder)


@pytest.fixture(scope="session")
def ours(folder: pathlib.Path) -> Pair:
    """The checkpoint as we load it."""
    return hf.read(str(folder))
