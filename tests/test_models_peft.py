"""PEFT's files, without PEFT: what is written is read, the product is theirs, and the rest is refused.

tests/parity/test_peft.py holds the same files against PEFT itself.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models import lora
from rlhf_jax.models.decoder import Model, Numerics, Params
from rlhf_jax.models.linear import Lora
from rlhf_jax.models.peft import CONFIG, WEIGHTS, modules, read_peft, write_peft

COMMON: dict[str, Any] = dict(
    vocab_size=24, hidden_size=8, num_hidden_layers=3, num_attention_heads=4, intermediate_size=12,
    max_position_embeddings=32,
)  # fmt: skip
LLAMA = dict(model_type="llama", num_key_value_heads=2) | COMMON
FUSED = dict(model_type="phi3", num_key_value_heads=2) | COMMON
CONFIGS = {
    "llama": LLAMA,
    "phi3": FUSED,
    "gpt2": dict(model_type="gpt2", n_embd=8, n_layer=3, n_head=4, n_positions=32, vocab_size=24),
    "gpt_neox": dict(model_type="gpt_neox") | COMMON,
}
ADAPTERS = {
    "all": Lora(rank=2),
    "by the root": Lora(rank=3, alpha=0.1, rslora=True),
    "some": Lora(rank=2, alpha=5.0, targets=("query", "value", "down")),
}


def describe(folder: pathlib.Path, config: dict[str, Any] = LLAMA, **numerics: Any) -> Model:
    (folder / "config.json").write_text(json.dumps(config))
    return hf.describe(str(folder), Numerics(**numerics))


def random(model: Model) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), lora.split(model.shapes())[0])


def same(got: Params, expected: Params) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("family", "adapter"),
    [(name, "by the root") for name in CONFIGS] + [("llama", "all"), ("phi3", "some"), ("gpt2", "some")],
)
def test_what_is_written_is_read(tmp_path: pathlib.Path, family: str, adapter: str) -> None:
    model = describe(tmp_path, CONFIGS[family])
    attached = lora.attach(ADAPTERS[adapter], model)
    params = random(attached)
    write_peft(tmp_path, attached, params, base="some/model")
    read, got = read_peft(tmp_path, model)
    assert read == attached.adapter
    same(got, params)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "some/model"


def test_a_new_adapter_is_read_as_it_was(tmp_path: pathlib.Path) -> None:
    """Though its B, which tells the parts of a joined module apart, is 0."""
    model = lora.attach(Lora(rank=2), describe(tmp_path, FUSED))
    adapter = jax.tree_util.tree_map_with_path(lambda keys, x: x * (keys[-1].key == "lora_a"), random(model))
    write_peft(tmp_path, model, adapter)
    same(read_peft(tmp_path, model)[1], adapter)


def test_bfloat16_stays_bfloat16(tmp_path: pathlib.Path) -> None:
    model = lora.attach(Lora(rank=2), describe(tmp_path, param_dtype="bfloat16"))
    adapter = random(model)
    write_peft(tmp_path, model, adapter)
    assert {x.dtype for x in load_file(tmp_path / WEIGHTS).values()} == {np.dtype(ml_dtypes.bfloat16)}
    same(read_peft(tmp_path, model)[1], adapter)


def test_the_names_and_shapes_are_theirs(tmp_path: pathlib.Path) -> None:
    model = lora.attach(Lora(rank=2, targets=("query", "down")), describe(tmp_path))
    write_peft(tmp_path, model, random(model))
    name = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    expected = {}
    for layer in range(3):
        for module, inputs, outputs in (("self_attn.q_proj", 8, 8), ("mlp.down_proj", 12, 8)):
            expected |= {name.format(layer, module, "A"): (2, inputs), name.format(layer, module, "B"): (outputs, 2)}
    assert {name: x.shape for name, x in load_file(tmp_path / WEIGHTS).items()} == expected
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (2, 4.0, False)
    assert config["target_modules"] == ["self_attn.q_proj", "mlp.down_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_a_joined_module_has_the_summed_rank(tmp_path: pathlib.Path) -> None:
    model = lora.attach(Lora(rank=2), describe(tmp_path, FUSED))
    write_peft(tmp_path, model, random(model))
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == 6 and config["lora_alpha"] == 12
    assert config["rank_pattern"] == {"self_attn.o_proj": 2, "mlp.gate_up_proj": 4, "mlp.down_proj": 2}
    assert config["alpha_pattern"] == {"self_attn.o_proj": 4, "mlp.gate_up_proj": 8, "mlp.down_proj": 4}


def deltas(model: Model, adapter: Params) -> dict[str, np.ndarray]:
    """What the adapter adds to each kernel."""
    assert model.adapter is not None
    scale = model.adapter.scale
    return {name: scale * np.asarray(lora.product(part)) for name, part in adapter["layers"].items()}


def test_one_pair_for_joined_maps_and_patterns_are_the_same_product(tmp_path: pathlib.Path) -> None:
    """Random pairs of theirs for phi3's joined modules, of other ranks and alphas, in two of three layers."""
    model = describe(tmp_path, FUSED)
    rng = np.random.default_rng(0)
    tensors, expected = {}, {name: np.zeros(shape) for name, shape in lora.maps(model).items()}
    table = {"self_attn.qkv_proj": (3, 7.0), "self_attn.o_proj": (2, 4.0)}
    for module in modules(model):
        if module.suffix not in table:
            continue
        rank, alpha = table[module.suffix]
        for layer in (0, 2):
            a, b = (
                rng.normal(size=size).astype(np.float32) for size in ((rank, module.size[0]), (module.size[1], rank))
            )
            path = f"base_model.model.{module.path(layer)}"
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            theirs = alpha / rank * b.astype(np.float64) @ a
            for (_, name, _), kernel in zip(
                module.weight.ours, module.weight.map.load(theirs, model.shape), strict=True
            ):
                expected[name][layer] = kernel
    save_file(tensors, tmp_path / WEIGHTS)
    config = dict(
        peft_type="LORA", r=2, lora_alpha=4, target_modules="all-linear", rank_pattern={"qkv_proj": 3},
        alpha_pattern={r".*\.qkv_proj": 7},
    )  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    read, adapter = read_peft(tmp_path, model)
    assert read.rank == 3 and read.targets == ("query", "key", "value", "out")
    for name, delta in deltas(dataclasses.replace(model, adapter=read), adapter).items():
        np.testing.assert_allclose(delta, expected[name], atol=1e-5)
    assert not adapter["layers"]["query"]["lora_a"][1].any()


# ---- refusals


def configured(**fields: Any) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        file = folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return apply


def edited(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return apply


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
HEAD = "base_model.model.lm_head.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[pathlib.Path], object], tuple[str, ...]]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), (CONFIG,)),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), (WEIGHTS, "safetensors")),
    "half a config": (lambda folder: (folder / CONFIG).write_text('{"r": 2,'), (CONFIG,)),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), (CONFIG,)),
    "half a file": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:99]), (WEIGHTS,)),
    "nothing in it": (edited(dict.clear), ("no adapter", WEIGHTS)),
    "another method": (configured(peft_type="IA3"), ("'IA3'", "LORA")),
    "a rank that is none": (configured(r="two"), ("r='two'",)),
    "dora": (configured(use_dora=True), ("use_dora",)),
    "biases": (configured(bias="all"), ("bias='all'",)),
    "whole modules": (configured(modules_to_save=["lm_head"]), ("modules_to_save",)),
    "changed base": (configured(init_lora_weights="pissa"), ("'pissa'", "base")),
    "an adapted head": (edited(lambda held: held.update({HEAD: np.ones((2, 8), np.float32)})), ("lm_head.lora_A",)),
    "half a pair": (edited(lambda held: held.pop(Q)), ("lacks", "layers.1.self_attn.q_proj.lora_B")),
    "another model's": (edited(lambda held: held.update({Q: np.ones((9, 2), np.float32)})), ("(9, 2)", "(8, 2)")),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused(
    tmp_path: pathlib.Path, spoil: Callable[[pathlib.Path], object], named: tuple[str, ...]
) -> None:
    model = lora.attach(Lora(rank=2), describe(tmp_path))
    write_peft(tmp_path, model, random(model))
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        read_peft(tmp_path, model)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)
