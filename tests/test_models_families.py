"""Every family: what is read is written, lies where the rules say, decodes as it reads; the rest is refused."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from rlhf_jax import sharding
from rlhf_jax.algorithms.optimizers import decayed
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models.decoder import Model, Numerics, Params
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sharding import MeshShape, make_mesh, param_sharding, path_of, rule
from tests.families import CONFIGS, LONGROPE

QUICK = {"xla_backend_optimization_level": 0}  # the compiler would take most of the time
LENGTH, PROMPT = 14, 6  # longer than the windows of 4 tokens
every = pytest.mark.parametrize("kind", CONFIGS)


def model_of(kind: str, layout: Layout = Layout(), **fields: Any) -> Model:
    config = CONFIGS[kind] | fields
    return Model(FAMILIES[kind].shape(config), layout=layout, source=json.dumps(config))


def params_of(model: Model) -> Params:
    """Every weight, bias and norm random."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape, np.float32)), model.shapes())


def same(got: Params, expected: Params) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@every
def test_what_is_written_is_read(kind: str, tmp_path: pathlib.Path) -> None:
    model = model_of(kind)
    params = params_of(model)
    hf.write(str(tmp_path), model, params)
    again, got = hf.read(str(tmp_path))
    assert again.shape == model.shape
    same(got, params)


@every
def test_every_parameter_has_its_place(kind: str) -> None:
    """And a rule of its own rank; what is a matrix decays, and no norm or bias does."""
    shapes = model_of(kind).shapes()
    on = jax.tree.leaves(decayed(shapes))
    for (keys, leaf), decays in zip(jax.tree_util.tree_leaves_with_path(shapes), on, strict=True):
        path = path_of(keys)
        assert len(rule(path)) == leaf.ndim, path
        assert decays != ("norm" in path or path.endswith("bias")), path


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "gpt_neox"])
def test_a_mesh_reads_its_pieces_of_joined_tensors(kind: str, tmp_path: pathlib.Path) -> None:
    model = model_of(kind)
    params = params_of(model)
    hf.write(str(tmp_path), model, params)
    mesh = make_mesh(MeshShape(2, 2, 2))
    sharding.check_divides(model, mesh)
    got = hf.load(epath.Path(tmp_path), model_of(kind, Layout(mesh)), lambda path, _: param_sharding(mesh, path))
    same(got, params)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def whole(model: Model, params: Params, tokens: jax.Array) -> jax.Array:
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.apply(params, tokens, jnp.ones_like(tokens), places)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def one_by_one(model: Model, params: Params, tokens: jax.Array) -> jax.Array:
    """The first PROMPT tokens in one pass and each later one from a cache."""
    rows, length = tokens.shape
    first = tokens[:, :PROMPT]
    hidden, cache = model.prefill(
        params, first, jnp.ones_like(first), jnp.broadcast_to(jnp.arange(PROMPT), first.shape)
    )
    room = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, length - PROMPT), (0, 0)]), cache)

    def step(cache: Any, place: jax.Array) -> tuple[Any, jax.Array]:
        distance = jnp.broadcast_to(place - jnp.arange(length), (rows, length))
        hidden, new = model.decode(params, tokens[:, place], jnp.full(rows, place), cache, distance)
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, place, axis=3)
        return jax.tree.map(write, cache, new), hidden

    _, later = jax.lax.scan(step, room, jnp.arange(PROMPT, length))
    return jnp.concatenate([hidden, jnp.moveaxis(later, 0, 1)], axis=1)


def draw_tokens(rows: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, 24, (rows, LENGTH)), jnp.int32)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "gpt2", "phi3"])
def test_tokens_from_a_cache_are_those_of_a_whole_row(kind: str) -> None:
    """Past the windows: of one kind of layer and of two, with ropes of their own, and with learned positions."""
    model = model_of(kind)
    params, tokens = params_of(model), draw_tokens(2)
    np.testing.assert_allclose(one_by_one(model, params, tokens), whole(model, params, tokens), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_a_mesh_computes_the_same(kind: str) -> None:
    model, mesh = model_of(kind), make_mesh(MeshShape(2, 2, 2))
    params, tokens = params_of(model), draw_tokens(4)
    placed = jax.tree_util.tree_map_with_path(
        lambda keys, x: jax.device_put(x, param_sharding(mesh, tuple(key.key for key in keys))), params
    )
    spread = whole(model_of(kind, Layout(mesh)), placed, jax.device_put(tokens, sharding.row_sharding(mesh)))
    np.testing.assert_allclose(spread, whole(model, params, tokens), rtol=0, atol=2e-4)


def test_a_window_as_long_as_the_context_is_none() -> None:
    for kind in ("mistral", "qwen2", "gemma2"):
        kinds = model_of(kind, sliding_window=32).shape.kinds
        assert [one.window for one in kinds] == [None] and model_of(kind, sliding_window=31).shape.kinds != kinds
    assert model_of("mistral", sliding_window=None).shape.kinds[0].window is None


def test_of_two_forms_of_the_rope_both_are_heard() -> None:
    """A stretch that was added by hand to a config of transformers 5."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    both: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_scaling": scaling}
    stretched = model_of("llama", **both).shape
    assert stretched == model_of("llama", rope_theta=7.0, rope_scaling=scaling).shape
    (kind,) = stretched.kinds
    assert kind.rope is not None and (kind.rope.kind, kind.rope.theta) == ("yarn", 7.0)


def test_sampling_computes_what_training_does_in_bfloat16() -> None:
    """Gemma's norms multiply in float32, so their weights may not be rounded on the way to the sampler."""
    model = dataclasses.replace(model_of("gemma2"), numerics=Numerics(compute_dtype="bfloat16"))
    params, tokens = params_of(model), draw_tokens(2)
    np.testing.assert_array_equal(
        whole(model, sharding.for_decoding(params, model), tokens), whole(model, params, tokens)
    )


def test_gpt2_is_read_as_it_was_published(tmp_path: pathlib.Path) -> None:
    """Without the prefix of its names, and with the masks that were saved as buffers."""
    model = model_of("gpt2")
    params = params_of(model)
    hf.write(str(tmp_path), model, params)
    file = tmp_path / "model.safetensors"
    held = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    assert "wte.weight" in held
    save_file(held | {"h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32)}, file)
    same(hf.read(str(tmp_path))[1], params)


# What a config may say that we would not compute: a family, what it says, what the sentence must name.
REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
    ("mistral", {"sliding_window": 0}, ("sliding_window 0",)),
    ("qwen2", {"layer_types": ["full_attention"]}, ("layer_types", "1 layers")),
    ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, ("'chunked_attention'", "full_attention")),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ("use_sliding_window",)),
    ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, ("mscale 0.7",)),
    ("gemma2", {"use_bidirectional_attention": True}, ("use_bidirectional_attention True", "False")),
    ("gemma2", {"hidden_activation": "relu6"}, ("hidden_activation 'relu6'", "gelu_pytorch_tanh")),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping 50.0",)),
    ("phi3", {"rope_scaling": LONGROPE | {"short_factor": [1.0]}}, ("short_factor", "2 pairs")),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, ("short_factor",)),
    ("smollm3", {"no_rope_layers": [1]}, ("no_rope_layers", "1 layers")),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx True", "False")),
    ("gpt2", {"reorder_and_upcast_attn": True}, ("reorder_and_upcast_attn True",)),
    ("gpt2", {"add_cross_attention": True}, ("add_cross_attention True",)),
    ("gpt2", {"n_head": 3}, ("n_embd 16", "n_head 3")),
    ("gpt_neox", {"hidden_act": "tanh"}, ("hidden_act 'tanh'", "gelu")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "named"), REFUSED)
def test_what_would_not_be_computed_is_refused(
    kind: str, fields: dict[str, Any], named: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind] | fields))
    with pytest.raises(UserError) as error:
        hf.describe(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)
