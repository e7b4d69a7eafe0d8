"""Adapters: a new one changes nothing, its gradient is the chain rule's, merging says the same, the base stays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import sharding
from rlhf_jax.algorithms.optimizers import OPTIMIZERS, decayed
from rlhf_jax.algorithms.step import Optimizer, Term, make_state, make_step
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.models.decoder import Model, Numerics, Params
from rlhf_jax.models.experts import Experts
from rlhf_jax.models.linear import Lora
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sharding import MeshShape, make_mesh
from tests import problem

BASES = ("full", "int8", "nf4")
PARTS = ("tokens", "segments", "positions")
ROWS = {name: jnp.asarray(x[:, 0]) for name, x in problem.make_rows(rows=8).items() if name in PARTS}
Trees = tuple[Model, Params, Params]


@functools.cache
def made(base: Any = "full", fresh: bool = False) -> Trees:
    """A model with an adapter, the adapter's leaves and the base; B is 0 if it is fresh."""
    model = lora.attach(Lora(rank=4, base=base), problem.make_model())
    adapter = jax.jit(functools.partial(lora.init_adapter, model))(jax.random.key(2))
    rng = np.random.default_rng(3)
    if not fresh:
        adapter = jax.tree.map(lambda x: x + rng.normal(scale=0.05, size=x.shape).astype(np.float32), adapter)
    return model, adapter, jax.jit(functools.partial(lora.quantise, model))(problem.initial())


@functools.partial(jax.jit, static_argnums=0)
def logits(model: Model, params: Params) -> jax.Array:
    return model.logits(params, model.apply(params, *(ROWS[name] for name in PARTS)))


def loss(model: Model, params: Params, rows: dict[str, Any] = ROWS) -> jax.Array:
    """The mean negative log-likelihood of each row's next tokens; a small program, of all logits."""
    logits = model.logits(params, model.apply(params, *(rows[name] for name in PARTS)))[:, :-1]
    chosen = jnp.take_along_axis(logits, rows["tokens"][:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


@functools.partial(jax.jit, static_argnums=0)
def merge(model: Model, adapter: Params, base: Params) -> Params:
    return lora.merge(model, adapter, base)[1]


def leaves(tree: Params) -> dict[str, Any]:
    return {sharding.path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("base", BASES)
def test_a_new_adapter_changes_no_bit_and_off_is_the_base(base: str) -> None:
    model, fresh, held = made(base, fresh=True)
    assert any(x.any() for path, x in leaves(fresh).items() if path.endswith("lora_a"))
    off = logits(model.without_adapter(), held)
    np.testing.assert_array_equal(logits(model, lora.join(fresh, held)), off)
    if base == "full":
        np.testing.assert_array_equal(off, logits(problem.make_model(), problem.initial()))
    assert model.without_adapter() == problem.make_model()


@pytest.mark.parametrize("base", BASES)
def test_the_merged_model_says_the_same(base: str) -> None:
    model, adapter, held = made(base)
    plain, merged = merge(model, adapter, held), model.without_adapter()
    apart = logits(model, lora.join(adapter, held))
    assert np.abs(apart - logits(merged, held)).max() > 0.1, "the adapter must be seen"
    np.testing.assert_allclose(logits(merged, plain), apart, atol=1e-5 * np.abs(apart).max())
    same = jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, plain, merged.shapes())
    assert jax.tree.all(same)


def test_merging_is_in_the_parameters_dtype_and_makes_other_maps_wide() -> None:
    _, _, held = made("nf4")
    model = problem.make_model(param_dtype="bfloat16")
    model = lora.attach(Lora(rank=4, base="nf4", targets=("query",)), model)
    adapter = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), lora.split(model.shapes())[0])
    assert set(leaves(adapter)) == {"layers/query/lora_a", "layers/query/lora_b"}
    merged = jax.eval_shape(functools.partial(merge, model), adapter, held)
    assert {merged["layers"][name]["kernel"].dtype for name in lora.MAPS} == {jnp.dtype("bfloat16")}


@functools.partial(jax.jit, static_argnums=0)
def slope(model: Model, adapter: Params, held: Params) -> tuple[jax.Array, Params]:
    """The loss and the adapter's gradient."""
    return jax.value_and_grad(lambda adapter: loss(model, lora.join(adapter, held)))(adapter)


def test_the_gradient_is_the_chain_rules() -> None:
    """With W' = W + s A B: dA = s dW' B^T and dB = s A^T dW', summed over what the product sums over."""
    model, adapter, base = made()
    assert model.adapter is not None
    _, of_factors = slope(model, adapter, base)
    of_merged = jax.jit(jax.grad(functools.partial(loss, model.without_adapter())))(merge(model, adapter, base))
    assert jax.tree.structure(of_factors) == jax.tree.structure(adapter)
    for name, factors in adapter["layers"].items():
        a, b = (np.asarray(factors[leaf], np.float64) for leaf in lora.LEAVES)
        layers, rank = len(a), a.shape[-1]
        a, b = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
        whole = np.asarray(of_merged["layers"][name]["kernel"], np.float64)
        whole = model.adapter.scale * whole.reshape(layers, a.shape[1], -1)
        expected = {"lora_a": whole @ b.swapaxes(1, 2), "lora_b": a.swapaxes(1, 2) @ whole}
        for leaf, x in expected.items():
            got = of_factors["layers"][name][leaf]
            np.testing.assert_allclose(got, x.reshape(got.shape), atol=1e-5 * np.abs(x).max(), err_msg=name)


@pytest.mark.parametrize("base", ["full", "nf4"])
def test_the_gradient_is_the_slope(base: str) -> None:
    """Along a direction in which it rises, by central differences of the fourth order."""
    model, adapter, held = made(base)
    gradient, rng = slope(model, adapter, held)[1], np.random.default_rng(0)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    along = jax.tree.map(lambda x: x / norm * rng.uniform(size=x.shape).astype(np.float32), gradient)
    expected = sum(np.sum(x * d) for x, d in zip(*map(jax.tree.leaves, (gradient, along)), strict=True))
    at = lambda t: float(slope(model, jax.tree.map(lambda x, d: np.asarray(x + t * d), adapter, along), held)[0])
    step = 1e-2
    difference = (at(-2 * step) - 8 * at(-step) + 8 * at(step) - at(2 * step)) / (12 * step)
    np.testing.assert_allclose(difference, expected, rtol=2e-3)


# ---- training


def objective(model: Model) -> Any:
    """`loss` as an algorithm's objective."""

    def run(params: Params, frozen: Params, hyper: Any, batch: dict[str, Any], key: Any) -> Any:
        count = jnp.float32(len(batch["tokens"]))
        return {"loss": Term(1.0, count * loss(model, lora.join(params, frozen), batch), count)}, {}

    return run


@pytest.mark.parametrize(("base", "sizes"), [("full", (1, 1, 1)), ("int8", (2, 2, 2)), ("nf4", (1, 1, 1))])
def test_training_moves_the_adapter_alone(base: str, sizes: tuple[int, int, int]) -> None:
    """20 steps on a mesh as a run does them: pinned shardings, donated state, one compile."""
    mesh = make_mesh(MeshShape(*sizes))
    model, adapter, held = made(base, fresh=True)
    model = dataclasses.replace(model, layout=Layout(mesh))
    optimizer = Optimizer(OPTIMIZERS["sgd"], optax.constant_schedule(1.0))
    hyper = {"loss": {}, "optimizer": {"learning_rate": 0.1, "momentum": 0.9, "clip_norm": 1.0}}
    state = make_state(adapter, hyper, optimizer, jax.random.PRNGKey(0), frozen=held)
    places = sharding.state_shardings(state, mesh)
    before = jax.tree.map(np.array, held)
    state = jax.device_put(jax.tree.map(np.array, state), places)
    step = jax.jit(
        make_step(objective(model), optimizer, layout=Layout(mesh)),
        in_shardings=(places, sharding.row_sharding(mesh)), out_shardings=(places, None), donate_argnums=0,
    )  # fmt: skip
    rows = sharding.place_rows(ROWS, mesh)
    losses = []
    for _ in range(20):
        state, metrics = step(state, rows)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0] and np.all(np.isfinite(losses))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
    assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, adapter)
    assert all(path.endswith(lora.LEAVES) for path in leaves(state.params))
    for path, leaf in leaves(state.params).items():
        assert (np.asarray(leaf) != np.asarray(leaves(adapter)[path])).any(), path
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_not_trained_takes_no_moments_and_matrices_decay() -> None:
    _, adapter, _ = made()
    assert jax.tree.all(decayed(adapter))
    for name, make in OPTIMIZERS.items():
        moments = jax.eval_shape(make(1e-3).init, adapter)
        count = sum(x.size for x in jax.tree.leaves(moments))
        assert count <= 2.1 * sum(x.size for x in jax.tree.leaves(adapter)) + 64, name


# ---- the mesh


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_every_mesh_has_the_same_loss_and_gradient(sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshShape(*sizes))
    model, adapter, held = made("nf4")
    expected, gradient = slope(model, adapter, held)
    model = dataclasses.replace(model, layout=Layout(mesh))
    placed = jax.device_put((adapter, held), tuple(sharding.param_shardings(tree, mesh) for tree in (adapter, held)))
    got, of_factors = slope(model, *placed)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for path, x in leaves(gradient).items():
        np.testing.assert_allclose(leaves(of_factors)[path], x, atol=1e-5 * np.abs(x).max(), err_msg=path)
    assert leaves(placed[1])["layers/up/kernel/values"].sharding.spec == P(None, "fsdp", "tensor")


def test_the_state_lies_by_the_rules_and_an_unknown_frozen_leaf_is_named() -> None:
    mesh = make_mesh(MeshShape(1, 4, 2))
    model, adapter, held = made("nf4")
    optimizer = Optimizer(OPTIMIZERS["adamw"], optax.constant_schedule(1.0))
    hyper = {"loss": {}, "optimizer": {"learning_rate": 1e-2, "clip_norm": 1.0}}
    state = make_state(adapter, hyper, optimizer, jax.random.PRNGKey(0), frozen=held)
    places = sharding.state_shardings(state, mesh)
    assert places.params["layers"]["down"]["lora_a"].spec == P(None, "tensor", None)
    assert places.frozen["embedding"].spec == P("tensor", "fsdp")
    assert places.frozen["layers"]["query"]["kernel"]["values"].spec == P(None, "fsdp", "tensor", None)
    # One tile of 32 inputs can't be cut in four: its scales are whole along them.
    assert places.frozen["layers"]["query"]["kernel"]["scales"].spec == P(None, None, "tensor", None)
    moments = [leaf for path, leaf in leaves(places.opt_state).items() if path.endswith("layers/out/lora_b")]
    assert moments == 2 * [NamedSharding(mesh, P(None, None, "fsdp"))]
    with pytest.raises(KeyError, match="layers/router"):
        sharding.state_shardings(dataclasses.replace(state, frozen={"layers/router": jnp.ones(2)}), mesh)


def test_sampling_keeps_a_quantised_base_and_norms_as_they_are() -> None:
    model, adapter, held = made("nf4")
    model = dataclasses.replace(model, numerics=Numerics(compute_dtype="bfloat16"))
    for path, leaf in leaves(sharding.for_decoding(lora.join(adapter, held), model)).items():
        kept = path.endswith(("values", "scales", "_norm"))
        assert leaf.dtype == (leaves(held)[path].dtype if kept else jnp.bfloat16), path


# ---- what it takes


def test_bytes_of_a_base() -> None:
    """Of the maps of an 8B Llama: 8 bits and a scale a channel; 4 bits and a scale for 64 weights."""
    shape = dataclasses.replace(
        problem.SHAPE, vocab=128_256, width=4096, layers=32, heads=32, groups=8, head_dim=128, mlp_width=14_336
    )

    def size(base: Any) -> float:
        base = lora.base_shapes(lora.attach(Lora(rank=16, base=base), Model(shape)))
        return sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves([base["layers"][name]["kernel"] for name in lora.MAPS])
        )

    weights = size("full") / 4
    assert weights == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    assert 1 < size("int8") / weights < 1.002
    assert size("nf4") / weights == 0.5625


@pytest.mark.parametrize("base", BASES)
def test_the_backward_pass_keeps_no_wide_kernels(base: Any) -> None:
    """What it reads of a full base are the kernels themselves; of a quantised one only the quantised ones."""
    model = lora.attach(Lora(rank=2, base=base), problem.make_model())
    pullback = lambda adapter, held: jax.vjp(lambda adapter: loss(model, lora.join(adapter, held)), adapter)[1]
    kept = jax.tree.leaves(jax.eval_shape(pullback, lora.split(model.shapes())[0], lora.base_shapes(model)))
    kernels = lora.maps(model)
    wide = [name for name, shape in kernels.items() if any(x.shape == shape and x.dtype == "float32" for x in kept)]
    assert wide == (list(kernels) if base == "full" else [])


# ---- refusals


REFUSED = {
    "unknown map": (Lora(4, targets=("querry",)), ("'querry'", "did you mean query", "query, key, value, out")),
    "their name": (Lora(4, targets=("q_proj",)), ("'q_proj'", "gate, up, down", "--config.lora.targets")),
    "negative": (Lora(-1), ("--config.lora.rank is -1",)),
    "too large": (Lora(33), ("33", "more than 32", "query", "--config.lora.targets")),
    "alpha": (Lora(4, alpha=-1.0), ("--config.lora.alpha is -1.0",)),
    "targets without a rank": (Lora(targets=("query",)), ("--config.lora.targets", "--config.lora.rank")),
    "base without a rank": (Lora(base="int8"), ("--config.lora.base", "--config.lora.rank")),
}


@pytest.mark.parametrize(("config", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(config: Lora, named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        lora.attach(config, problem.make_model())
    assert "\n" not in str(error.value)
    for part in named:
        assert part in str(error.value)


def test_only_the_attention_of_a_mixture_is_adapted() -> None:
    shape = dataclasses.replace(problem.SHAPE, experts=Experts(count=4, chosen=2, width=12))
    model = lora.attach(Lora(4), Model(shape))
    assert model.adapter is not None and model.adapter.targets == ("query", "key", "value", "out")
    with pytest.raises(UserError, match="gate.*mixture of experts.*query, key, value, out"):
        lora.attach(Lora(4, targets=("gate",)), Model(shape))


def test_a_model_without_a_gate_has_no_adapter_there() -> None:
    model = Model(dataclasses.replace(problem.SHAPE, gated=False))
    attached = lora.attach(Lora(4), model)
    assert attached.adapter is not None and "gate" not in attached.adapter.targets
    with pytest.raises(UserError, match="names gate, but the model has none"):
        lora.attach(Lora(4, targets=("gate",)), model)


def test_an_odd_width_cannot_be_two_weights_a_byte() -> None:
    model = Model(dataclasses.replace(problem.SHAPE, mlp_width=49))
    with pytest.raises(UserError, match="nf4.*gate.*49.*int8"):
        lora.attach(Lora(4, base="nf4"), model)


def test_no_rank_is_the_model_itself() -> None:
    model = problem.make_model()
    assert lora.attach(Lora(), model) is model
