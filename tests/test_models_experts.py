"""A mixture of experts is the sum that its formula says, on every mesh, and loses no token.

The oracle is dense and by hand, in float64: every expert for every token, weighted by 0 where it isn't chosen.
"""

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
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from rlhf_jax import sharding
from rlhf_jax.algorithms.optimizers import OPTIMIZERS
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models.decoder import Model, Numerics
from rlhf_jax.models.experts import Experts, Kernels, balance, mixture
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.sharding import MeshShape, make_mesh
from tests import problem

EXPERTS = Experts(count=8, chosen=2, width=12)
ROWS, LENGTH, WIDTH = 8, 6, 16
MESHES = [(8, 1, 1, 1), (1, 1, 1, 8), (1, 1, 2, 4), (2, 2, 1, 2), (1, 1, 4, 2)]  # data fsdp tensor expert


def draw(seed: int = 0, experts: Experts = EXPERTS) -> tuple[np.ndarray, Kernels]:
    """Tokens of which the router is sure enough, and weights."""
    rng = np.random.default_rng(seed)
    make: Any = lambda *shape: rng.normal(size=shape, scale=shape[-2] ** -0.5).astype(np.float32)
    count, inner = experts.count, experts.width
    kernels = Kernels(
        2 * make(WIDTH, count), make(count, WIDTH, inner), make(count, WIDTH, inner), make(count, inner, WIDTH)
    )
    return rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32), kernels


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(x: np.ndarray, kernels: Kernels, experts: Experts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The output, the router's probabilities and how many of each token's choices went where, float64."""
    x, (router, gate, up, down) = x.astype(np.float64), (np.asarray(k, np.float64) for k in kernels)
    probs = softmax(x @ router)
    cut = np.sort(probs, axis=-1)[..., -experts.chosen, None]
    hits = (probs >= cut).astype(float)
    weights = probs * hits
    if experts.normalise:
        weights /= weights.sum(-1, keepdims=True)
    a = np.einsum("btd,edf->btef", x, gate)
    inner = a / (1 + np.exp(-a)) * np.einsum("btd,edf->btef", x, up)
    return np.einsum("btef,efd,bte->btd", inner, down, weights), probs, hits


def load_of(segments: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """The share of each token's own segment that chose each expert, by a loop."""
    out = np.zeros(hits.shape)
    for row, numbers in enumerate(segments):
        for number in set(numbers.tolist()) - {0}:
            out[row, numbers == number] = hits[row, numbers == number].mean(0)
    return out


def run(x: Any, kernels: Kernels, experts: Experts = EXPERTS, segments: Any = None, layout: Layout = Layout()) -> Any:
    return mixture(x, kernels, experts, jax.nn.silu, segments, layout)


@pytest.mark.parametrize("chosen", [1, 2, 8])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_sum_is_the_oracles(chosen: int, normalise: bool) -> None:
    experts = Experts(8, chosen, 12, normalise)
    x, kernels = draw(experts=experts)
    got, _ = jax.jit(functools.partial(run, experts=experts))(x, kernels)
    np.testing.assert_allclose(got, oracle(x, kernels, experts)[0], atol=1e-5)


SEGMENTS = np.tile(np.array([1, 1, 1, 2, 2, 0]), (ROWS, 1))
SEGMENTS[3:5] = [[0, 4, 4, 4, 4, 4], [1, 2, 3, 3, 0, 0]]
MARK = np.random.default_rng(9).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


def marked(outputs: tuple[Any, Any]) -> Any:
    """One number that the output and the balance of every token are in."""
    y, weigh = outputs
    return jnp.sum(MARK * y) + jnp.sum(MARK[..., 0] * weigh)


@functools.cache
def plainest() -> Any:
    """Output and balance, and the gradient of their mark at the tokens and all weights, without a mesh."""
    return jax.tree.map(np.asarray, outputs_and_gradient(Layout()))


def outputs_and_gradient(layout: Layout) -> Any:
    def loss(x: Any, kernels: Kernels) -> Any:
        outputs = run(x, kernels, segments=jnp.asarray(SEGMENTS), layout=layout)
        return marked(outputs), outputs

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*draw())


def test_the_gradient_is_that_of_the_dense_form() -> None:
    """Which jax differentiates by itself; the loads are constants."""
    x, kernels = draw()
    hits = oracle(x, kernels, EXPERTS)[2]
    load, hits = load_of(SEGMENTS, hits).astype(np.float32), hits.astype(np.float32)

    def loss(x: Any, kernels: Kernels) -> Any:
        probs = jax.nn.softmax(x @ kernels.router, axis=-1)
        weights = probs * hits / jnp.sum(probs * hits, axis=-1, keepdims=True)
        gate, up = (jnp.einsum("btd,edf->btef", x, kernel) for kernel in (kernels.gate, kernels.up))
        y = jnp.einsum("btef,efd,bte->btd", jax.nn.silu(gate) * up, kernels.down, weights)
        return marked((y, EXPERTS.count * jnp.sum(load * probs, axis=-1)))

    expected = jax.jit(jax.grad(loss, (0, 1)))(x, kernels)
    got, _ = plainest()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_same_sums_and_gradients(sizes: tuple[int, int, int, int]) -> None:
    got = outputs_and_gradient(Layout(make_mesh(MeshShape(*sizes))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, plainest())


def test_what_a_product_leaves_behind_its_groups_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some devices' kernels leave rubbish there, forward and backward: NaN in the place of a CPU's zeros."""
    product = jax.lax.ragged_dot

    def rubbish(x: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(len(x))[:, None] < jnp.sum(sizes), x, jnp.nan)

    @jax.custom_vjp
    def spoilt(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
        return rubbish(product(x, kernel, sizes), sizes)

    def backward(residuals: Any, gradient: jax.Array) -> Any:
        x, kernel, sizes = residuals
        dx, dk = jax.vjp(lambda x, kernel: product(x, kernel, sizes), x, kernel)[1](gradient)
        return rubbish(dx, sizes), dk, None

    spoilt.defvjp(lambda *args: (spoilt(*args), args), backward)
    monkeypatch.setattr(jax.lax, "ragged_dot", spoilt)
    got = outputs_and_gradient(Layout(make_mesh(MeshShape(1, 1, 1, 4))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, plainest())


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 2, 4)], ids=str)
def test_no_load_is_too_uneven(sizes: tuple[int, int, int, int]) -> None:
    """All tokens choose experts 5 and 2, which two of four devices hold: nothing is lost."""
    x, kernels = draw(3)
    router = np.zeros((WIDTH, EXPERTS.count), np.float32)
    router[0, [2, 5]] = 1, 2
    x[..., 0] = 3 + np.abs(x[..., 0])
    kernels = kernels._replace(router=router)
    layout = Layout(make_mesh(MeshShape(*sizes)))
    got, _ = jax.jit(functools.partial(run, layout=layout))(x, kernels)
    expected, _, hits = oracle(x, kernels, EXPERTS)
    assert hits[..., [2, 5]].all() and hits.sum() == 2 * ROWS * LENGTH
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_token_does_not_depend_on_its_batch() -> None:
    x, kernels = draw()
    whole, _ = jax.jit(run)(x, kernels)
    one, _ = jax.jit(run)(x[2:3, 4:5], kernels)
    np.testing.assert_allclose(one[0, 0], whole[2, 4], rtol=0, atol=1e-6)


def test_products_in_bfloat16_add_up_in_float32() -> None:
    experts = Experts(8, 8, 12)
    x, kernels = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw(experts=experts))
    got, _ = jax.jit(functools.partial(run, experts=experts))(x, kernels)
    assert got.dtype == jnp.bfloat16
    whole, wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (x, kernels))
    expected, _, _ = oracle(whole, wide, experts)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=0.02 * np.abs(expected).max())


# Balance.


def weigh(probs: np.ndarray, segments: np.ndarray, chosen: int = 2) -> np.ndarray:
    best = np.argsort(-probs, axis=-1)[..., :chosen]
    return np.asarray(jax.jit(balance)(probs.astype(np.float32), best, segments))


def test_the_balance_is_the_oracles() -> None:
    """Token by token, and its mean over a segment is E sum_e (share of tokens that chose e) (mean p_e)."""
    x, kernels = draw()
    _, probs, hits = oracle(x, kernels, EXPERTS)
    got = plainest()[1][1]
    expected = EXPERTS.count * np.sum(load_of(SEGMENTS, hits) * probs, axis=-1)
    np.testing.assert_allclose(got, np.where(SEGMENTS > 0, expected, 0), rtol=1e-5)
    inside = np.s_[3, 1:]
    mean = EXPERTS.count * np.sum(hits[inside].mean(0) * probs[inside].mean(0))
    np.testing.assert_allclose(got[inside].mean(), mean, rtol=1e-5)


def test_the_balance_of_an_even_load_is_k_and_of_one_expert_for_all_their_number() -> None:
    """16 tokens, each expert chosen by 4 of them; and uniform probabilities give k whatever the load."""
    np.testing.assert_allclose(weigh(np.eye(8)[[[3] * 5]], np.ones((1, 5), int), chosen=1), 8)
    rng = np.random.default_rng(0)
    probs = softmax(rng.normal(size=(1, 16, 8)))
    for token in range(16):
        best = np.array([token, token + 1 + token // 8]) % 8
        probs[0, token, best] += 1
    probs /= probs.sum(-1, keepdims=True)
    np.testing.assert_allclose(weigh(probs, np.ones((1, 16), int)).mean(), 2, rtol=1e-6)
    np.testing.assert_allclose(weigh(np.full((1, 16, 8), 1 / 8), np.ones((1, 16), int)), 2, rtol=1e-6)


def test_the_gradient_of_the_balance_takes_from_the_loaded() -> None:
    """Descent makes the experts that are chosen more than others less likely: of 8 tokens 6 chose expert 0."""
    logits = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32) * 0.1
    chosen = np.array([0, 0, 0, 0, 0, 0, 1, 2])[None, :, None]
    logits = logits + 2 * np.eye(4, dtype=np.float32)[chosen[..., 0]]
    loss = lambda z: jnp.sum(balance(jax.nn.softmax(z), jnp.asarray(chosen), jnp.ones((1, 8), jnp.int32)))
    gradient = np.asarray(jax.jit(jax.grad(loss))(logits))
    assert np.all(gradient[..., 0] > 0) and np.all(gradient[..., 1:] < 0)


def test_the_balance_does_not_depend_on_packing_and_padding() -> None:
    """Three texts in one row, between padding, or each in a row of its own."""
    rng = np.random.default_rng(1)
    texts = [softmax(rng.normal(size=(length, 8))) for length in (5, 1, 9)]
    alone = [weigh(text[None], np.ones((1, len(text)), int))[0] for text in texts]
    pad = softmax(rng.normal(size=(3, 8)))
    packed = np.concatenate([texts[0], pad, texts[1], texts[2], pad])[None]
    segments = np.repeat([1, 0, 2, 3, 0], [5, 3, 1, 9, 3])[None]
    got = weigh(packed, segments)[0]
    np.testing.assert_allclose(got[segments[0] > 0], np.concatenate(alone), rtol=1e-6)
    assert not got[segments[0] == 0].any()


# In a decoder.

# Weights of a smaller spread than the problem's: sharp attention multiplies what rounding does to a gradient.
SHAPE = dataclasses.replace(problem.SHAPE, spread=0.2, experts=Experts(count=4, chosen=2, width=24, normalise=False))
TEXTS: Any = {name: value[:, 0] for name, value in problem.make_rows(rows=8).items() if value.ndim == 3}


@functools.cache
def initial() -> Any:
    """Random parameters with routers that are sure of themselves, on the host."""
    params = jax.tree.map(np.array, jax.jit(Model(SHAPE).init)(jax.random.key(0)))
    params["layers"]["experts"]["router"]["kernel"] *= 3
    return params


def placed(mesh: jax.sharding.Mesh) -> Any:
    place = lambda keys, leaf: jax.device_put(leaf, NamedSharding(mesh, sharding.rule(sharding.path_of(keys))))
    return jax.tree_util.tree_map_with_path(place, initial())


def stats_and_gradient(mesh: jax.sharding.Mesh | None, **numerics: Any) -> Any:
    """Log-probabilities and balance of every token, and the gradient of both."""
    model = Model(SHAPE, Numerics(chunk=64, **numerics), Layout(mesh))

    def loss(params: Any, rows: Any) -> Any:
        stats = model.token_stats(params, rows, want=("logprobs", "balance"))
        return jnp.sum(stats.logprobs) / 10 + jnp.sum(stats.balance), (stats.logprobs, stats.balance)

    params, rows = (initial(), TEXTS) if mesh is None else (placed(mesh), sharding.place_rows(TEXTS, mesh))
    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss, has_aux=True))(params, rows))


@functools.cache
def plainest_stats() -> Any:
    return stats_and_gradient(None)


def test_balance_is_of_every_token_but_padding_and_reaches_the_routers() -> None:
    gradient, (logprobs, weigh) = plainest_stats()
    assert np.array_equal(weigh > 0, TEXTS["segments"] > 0)
    assert np.array_equal(logprobs != 0, TEXTS["mask"])
    assert np.abs(gradient["layers"]["experts"]["router"]["kernel"]).min() > 0


@pytest.mark.parametrize(("sizes", "remat"), [((1, 2, 2, 2), "full"), ((2, 1, 1, 4), "dots")], ids=str)
def test_every_mesh_trains_alike(sizes: tuple[int, int, int, int], remat: str) -> None:
    got = stats_and_gradient(make_mesh(MeshShape(*sizes)), remat=remat)
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(plainest_stats()), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_balance_is_given_by_itself_and_by_a_model_with_experts_alone() -> None:
    def asked(model: Model) -> Any:
        return jax.eval_shape(lambda params: model.token_stats(params, TEXTS, want=("balance",)), model.shapes())

    stats = asked(Model(SHAPE))
    assert stats.logprobs is None and stats.balance.shape == TEXTS["tokens"].shape
    with pytest.raises(ValueError, match="without experts"):
        asked(problem.make_model())


def test_decoding_on_a_mesh_is_reading_on() -> None:
    """What the sampler says of the tokens that it drew is what the whole rows say of them, without a mesh."""
    mesh, length = make_mesh(MeshShape(1, 2, 1, 4)), 6
    prompts = [np.arange(1, 1 + size, dtype=np.int32) for size in (3, 7, 5)]
    sampler = Sampler(Model(SHAPE, layout=Layout(mesh)), slots=8)
    key = jax.random.key_data(jax.random.key(0))
    done = sampler.generate(placed(mesh), prompts, Sampling(max_new_tokens=length), key)
    rows: Any = {name: np.zeros((3, 13), np.int32) for name in ("tokens", "segments", "positions")}
    for row, (prompt, (one,)) in enumerate(zip(prompts, done, strict=True)):
        tokens = np.concatenate([prompt, one.tokens])
        for name, column in (("tokens", tokens), ("segments", 1), ("positions", np.arange(len(tokens)))):
            rows[name][row, : len(tokens)] = column
    rows["mask"] = rows["segments"] > 0
    expected = jax.jit(Model(SHAPE).token_stats)(initial(), rows).logprobs
    for row, (prompt, (one,)) in enumerate(zip(prompts, done, strict=True)):
        assert len(one.tokens) == length
        np.testing.assert_allclose(one.old_logprobs, expected[row, len(prompt) :][:length], rtol=0, atol=1e-4)


def test_the_rules_know_the_experts_and_a_mesh_that_does_not_divide_them_is_refused() -> None:
    for keys, leaf in jax.tree_util.tree_leaves_with_path(initial()):
        assert len(sharding.rule(sharding.path_of(keys))) == leaf.ndim
    with pytest.raises(UserError, match="expert=8 does not divide the 4 of layers/experts/down/kernel"):
        sharding.check_divides(Model(SHAPE), make_mesh(MeshShape(1, 1, 1, 8)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_takes_the_experts(name: str) -> None:
    """Muon must know which axes of a stack of experts are a matrix."""
    optimizer = OPTIMIZERS[name](1e-3)
    updates, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), initial())
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, initial())


# As a folder.

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": COMMON | {"model_type": "mixtral", "num_local_experts": 4, "router_aux_loss_coef": 0.02},
    "qwen3_moe": COMMON | {
        "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 20, "intermediate_size": 48,
        "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
}  # fmt: skip
PUBLISHED = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.down_proj.weight",
}


def describe(folder: pathlib.Path, config: dict[str, Any], layout: Layout = Layout()) -> Model:
    (folder / "config.json").write_text(json.dumps(config))
    return hf.describe(epath.Path(folder), layout=layout)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_is_read_as_it_was_written(kind: str, tmp_path: pathlib.Path) -> None:
    """Under the published names, an expert a tensor; and each device of a mesh gets its own experts."""
    model = describe(tmp_path, CONFIGS[kind])
    experts = {"mixtral": Experts(4, 2, 24, True, 0.02), "qwen3_moe": Experts(4, 2, 20, True, 0.001)}
    assert model.shape.experts == experts[kind]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), model.shapes())
    hf.write(str(tmp_path), model, params)
    saved = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(saved[PUBLISHED[kind]], params["layers"]["experts"]["down"]["kernel"][1, 3].T)
    mesh = make_mesh(MeshShape(1, 2, 2, 2))
    back = hf.load(epath.Path(tmp_path), model, lambda path, _: sharding.param_sharding(mesh, path))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert back["layers"]["experts"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "expert", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ],
)
def test_what_is_not_computed_is_refused(kind: str, change: dict[str, Any], says: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=says):
        describe(tmp_path, CONFIGS[kind] | change)
