"""PEFT's adapters give the same logits here, ours the same there, and merged they are the same model."""

# pyright: reportMissingImports=false

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models import lora, peft
from rlhf_jax.models.decoder import Model, Params
from rlhf_jax.models.linear import Lora
from tests.parity.checkpoints import CASES, load
from tests.parity.sides import TOLERANCE, Pair, agree, draw_tokens, torch_logits, whole_rows

RANK = 4
TOKENS = draw_tokens(2, 24)
# The first checkpoint of each family: the others differ in what an adapter doesn't see.
FIRST = list({case.args[0]: name for name, case in reversed(CASES.items())}.values())
each_family = pytest.mark.parametrize("case", FIRST, indirect=True, scope="session")
# PEFT's, of transformers' attribute.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def _adapted(model: PreTrainedModel, ours: Model, **config: Any) -> Any:
    """PEFT's model of theirs, every A and B random, on every module that can carry an adapter."""
    modules = peft.modules(ours)
    config = {
        "r": RANK, "lora_alpha": 6, "target_modules": [module.suffix for module in modules],
        "fan_in_fan_out": any(module.turned for module in modules), **config,
    }  # fmt: skip
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * parameter.shape[1] ** -0.5 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def _merged(folder: pathlib.Path, model: Model, adapter: Params, base: Params) -> np.ndarray:
    """The logits in transformers of the model that the adapter is merged into here."""
    hf.write(str(folder), model.without_adapter(), jax.jit(functools.partial(_merge, model))(adapter, base))
    return torch_logits(load(folder), TOKENS)


def _merge(model: Model, adapter: Params, base: Params) -> Params:
    return lora.merge(model, adapter, base)[1]


@each_family
def test_their_adapter_here_and_ours_there(ours: Pair, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Theirs: as it is, and merged here against merged there. Ours: scaled by the root, and read again."""
    model, base = ours
    adapted = _adapted(load(folder), model)
    expected = torch_logits(adapted, TOKENS)
    assert np.abs(expected - torch_logits(load(folder), TOKENS)).max() > 1000 * TOLERANCE, "it must be seen"
    adapted.save_pretrained(tmp_path / "theirs")
    config, adapter = peft.read_peft(tmp_path / "theirs", model)
    assert config.targets == tuple(lora.maps(model)) and config.alpha == 6
    attached = dataclasses.replace(model, adapter=config)
    agree(whole_rows((attached, lora.join(adapter, base)), TOKENS), expected)
    agree(_merged(tmp_path / "merged", attached, adapter, base), torch_logits(adapted.merge_and_unload(), TOKENS))

    attached = lora.attach(Lora(rank=RANK, alpha=6.0, rslora=True), model)
    rng = np.random.default_rng(1)
    draw = lambda x: rng.normal(scale=0.5 * x.shape[1] ** -0.5, size=x.shape).astype(np.float32)
    adapter = jax.tree.map(draw, lora.split(attached.shapes())[0])
    peft.write_peft(tmp_path / "ours", attached, adapter, base=str(folder))
    there = PeftModel.from_pretrained(load(folder), str(tmp_path / "ours"))
    agree(_merged(tmp_path / "merged", attached, adapter, base), torch_logits(there, TOKENS))  # type: ignore[arg-type]
    config, again = peft.read_peft(tmp_path / "ours", model)
    assert config == attached.adapter
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize("case", ["llama", "phi3"], indirect=True, scope="session")
def test_patterns_and_chosen_layers(ours: Pair, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A rank and an alpha of its own for the first module, scaled by the root, and in two of three layers."""
    model, base = ours
    first = peft.modules(model)[0].suffix
    patterns = dict(rank_pattern={first: 7}, alpha_pattern={first: 11}, layers_to_transform=[0, 2])
    adapted = _adapted(load(folder), model, use_rslora=True, **patterns)
    adapted.save_pretrained(tmp_path)
    config, adapter = peft.read_peft(tmp_path, model)
    model = dataclasses.replace(model, adapter=config)
    agree(whole_rows((model, lora.join(adapter, base)), TOKENS), torch_logits(adapted, TOKENS))
