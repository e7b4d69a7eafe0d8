"""A score in the place of the word head: what it is read from, its files, and how it goes with an adapter."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from rlhf_jax import sharding
from rlhf_jax.algorithms.optimizers import OPTIMIZERS
from rlhf_jax.algorithms.step import Optimizer, make_state
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models import lora, peft, start
from rlhf_jax.models.decoder import Model, Numerics, Params
from rlhf_jax.models.experts import Experts
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.families.score import Kind
from rlhf_jax.models.linear import Lora
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sharding import MeshShape, make_mesh, param_sharding
from tests import problem
from tests.families import CONFIGS

LENGTH = 16
MODEL = problem.make_model().with_head("score")


@functools.partial(jax.jit, static_argnums=0)
def score(model: Model, params: Params, rows: dict[str, Any]) -> jax.Array:
    return model.score(params, rows)


@functools.partial(jax.jit, static_argnums=0)
def hidden(model: Model, params: Params, rows: dict[str, Any]) -> jax.Array:
    return model.apply(params, rows["tokens"], rows["segments"], rows["positions"])


def drawn(shapes: Params, seed: int = 0) -> Params:
    """Every leaf random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype), shapes)


@functools.cache
def params() -> Params:
    return drawn(MODEL.shapes())


def texts(lengths: list[int], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, problem.SHAPE.vocab, length) for length in lengths]


def row(*parts: np.ndarray, at: int = 0, noise: int = 0) -> dict[str, Any]:
    """Texts behind each other from `at` on, with padding of noise around them, [1, T]."""
    rows = {name: np.zeros((1, LENGTH), np.int32) for name in ("tokens", "segments", "positions")}
    rows["tokens"][:] = np.random.default_rng(noise).integers(0, problem.SHAPE.vocab, LENGTH)
    for number, part in enumerate(parts, start=1):
        span = (0, slice(at, at + len(part)))
        rows["tokens"][span], rows["segments"][span], rows["positions"][span] = part, number, np.arange(len(part))
        at += len(part)
    return rows


def read(rows: dict[str, np.ndarray], segment: int = 1) -> np.ndarray:
    return np.asarray(score(MODEL, params(), rows))[rows["segments"] == segment]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 99))
def test_a_score_is_of_its_text_up_to_its_token_alone(lengths: list[int], at: int, seed: int) -> None:
    """Padding, later tokens and neighbours in the row change nothing."""
    parts = texts(lengths, seed)
    packed = row(*parts, at=at, noise=seed)
    for number, part in enumerate(parts, start=1):
        alone = read(row(part, noise=seed + 1))
        np.testing.assert_allclose(read(packed, number), alone, rtol=1e-5, atol=1e-5)
        longer = read(row(np.concatenate([part, parts[0]])))[: len(part)]
        np.testing.assert_allclose(longer, alone, rtol=1e-5, atol=1e-5)
    assert (read(packed, 0) == 0).all()


def test_a_new_score_is_exactly_0_and_the_rest_as_without_it() -> None:
    key = jax.random.key(0)
    with_score, with_words = jax.jit(MODEL.init)(key), jax.jit(MODEL.with_head("words").init)(key)
    assert set(with_score) - set(with_words) == {"score", "score_bias"}
    assert set(with_words) - set(with_score) == {"head"}
    for name in ("embedding", "layers"):
        jax.tree.map(np.testing.assert_array_equal, with_score[name], with_words[name])
    rows = row(*texts([5, 7], 0))
    assert (np.asarray(score(MODEL, with_score, rows)) == 0).all()
    assert MODEL.with_head("words") == problem.make_model() != MODEL
    tied = dataclasses.replace(problem.SHAPE, tied=True, head="score")
    assert set(Model(tied).shapes()) == set(with_score)


def test_the_product_is_in_float32_whatever_the_layers_compute_in() -> None:
    model = dataclasses.replace(MODEL, numerics=Numerics(compute_dtype="bfloat16"))
    rows = row(*texts([5, 7], 0))
    # Not jitted: XLA may leave out the rounding of the states on their way into the product.
    states = model.apply(params(), rows["tokens"], rows["segments"], rows["positions"])
    assert states.dtype == jnp.bfloat16
    wide, weight = np.asarray(states, np.float64), np.asarray(params()["score"], np.float64)
    expected = np.where(rows["segments"], wide @ weight + float(params()["score_bias"]), 0)
    got = model.score(params(), rows)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_balance_of_experts_comes_with_it() -> None:
    shape = dataclasses.replace(problem.SHAPE, experts=Experts(count=4, chosen=2, width=12))
    words = Model(shape)
    model, rows = words.with_head("score"), row(*texts([5, 7], 0))
    held = drawn({**model.shapes(), "head": words.shapes()["head"]})
    inner = {name: leaf for name, leaf in held.items() if name != "head"}
    scores, balance = model.score(inner, rows, balance=True)
    np.testing.assert_allclose(scores, score(model, inner, rows), rtol=1e-6, atol=1e-6)
    outer = {name: leaf for name, leaf in held.items() if name not in lora.SCORE}
    stats = words.token_stats(outer, rows | {"mask": rows["segments"] > 0}, want=("logprobs", "balance"))
    np.testing.assert_array_equal(balance, stats.balance)
    with pytest.raises(ValueError, match="without experts"):
        MODEL.score(params(), rows, balance=True)


def test_neither_head_answers_for_the_other() -> None:
    rows = row(*texts([5], 0))
    for ask in (
        lambda: MODEL.head(params()),
        lambda: MODEL.logits(params(), hidden(MODEL, params(), rows)),
        lambda: MODEL.token_stats(params(), rows | {"mask": rows["segments"] > 0}),
    ):
        with pytest.raises(ValueError, match="says nothing of words"):
            ask()
    with pytest.raises(ValueError, match="no score to give"):
        MODEL.with_head("words").score(params(), rows)


# ---- adapters

BASES = ("full", "int8", "nf4")


@functools.cache
def adapted(base: Any) -> tuple[Model, Params, Params]:
    """A model with an adapter, the adapter's leaves, random, and the base with the score that it was read with."""
    model = lora.attach(Lora(rank=4, base=base), MODEL)
    return model, drawn(lora.split(model.shapes())[0], 1), jax.jit(functools.partial(lora.quantise, model))(params())


@pytest.mark.parametrize("base", BASES)
def test_the_score_is_trained_beside_an_adapter(base: str) -> None:
    model, adapter, held = adapted(base)
    assert set(adapter) == {"layers", "score", "score_bias"}
    assert not set(lora.SCORE) & set(lora.split(model.shapes())[1])
    assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, lora.base_shapes(model))
    joined = lora.join(adapter, held)
    assert joined["score"] is adapter["score"] and joined["score_bias"] is adapter["score_bias"]
    fresh = jax.jit(functools.partial(lora.init_adapter, model))(jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(adapter)
    assert not fresh["score"].any() and not fresh["score_bias"].any()

    rows = row(*texts([5, 7], 0))
    of_base = score(model.without_adapter(), held, rows)
    np.testing.assert_array_equal(score(model, lora.join(lora.with_score(fresh, held), held), rows), of_base)
    plain, merged = lora.merge(model, adapter, held)
    apart = np.asarray(score(model, joined, rows))
    assert np.abs(apart - of_base).max() > 0.1, "the adapter must be seen"
    np.testing.assert_allclose(score(plain, merged, rows), apart, atol=1e-4 * np.abs(apart).max())
    slope = jax.jit(jax.grad(lambda adapter: model.score(lora.join(adapter, held), rows).sum()))(adapter)
    assert float(slope["score_bias"]) == 12 and all(x.any() for x in jax.tree.leaves(slope))


def test_a_base_that_has_a_score_gives_copies() -> None:
    """The state's buffers are donated and the base's are not."""
    model, adapter, held = adapted("full")
    own = lora.with_score(adapter, held)
    np.testing.assert_array_equal(own["score"], held["score"])
    assert own["score"].unsafe_buffer_pointer() != held["score"].unsafe_buffer_pointer()
    words = lora.attach(Lora(rank=4), problem.make_model())
    plain = drawn(lora.split(words.shapes())[0])
    assert lora.with_score(plain, words.without_adapter().shapes()) == plain


def test_a_state_with_a_score_lies_by_the_rules() -> None:
    """Its moments like it; a leaf elsewhere that happens to have its name but not its shape is on every device."""
    mesh = make_mesh(MeshShape(1, 4, 2))
    _, adapter, held = adapted("nf4")
    optimizer = Optimizer(OPTIMIZERS["adamw"], optax.constant_schedule(1.0))
    hyper = {"loss": {}, "optimizer": {"learning_rate": 1e-2, "clip_norm": 1.0}}
    carry = {"score": jnp.zeros((4, 3, 2))}
    state = make_state(adapter, hyper, optimizer, jax.random.PRNGKey(0), frozen=held, carry=carry)
    places = sharding.state_shardings(state, mesh)
    assert (places.params["score"].spec, places.params["score_bias"].spec) == (P(None), P())
    assert places.carry["score"].spec == P()
    moments = [
        leaf.spec
        for keys, leaf in jax.tree_util.tree_leaves_with_path(places.opt_state)
        if sharding.path_of(keys).endswith("/score")
    ]
    assert moments == 2 * [P(None)]
    sharding.check_divides(MODEL, mesh)


def test_a_score_stays_wide_where_weights_are_rounded() -> None:
    model = dataclasses.replace(MODEL, numerics=Numerics(compute_dtype="bfloat16"))
    narrow = sharding.for_decoding(params(), model)
    assert narrow["score"].dtype == narrow["score_bias"].dtype == jnp.float32
    assert narrow["embedding"].dtype == jnp.bfloat16


def test_an_adapter_of_a_reward_model_is_not_written_for_peft(tmp_path: pathlib.Path) -> None:
    model, adapter, _ = adapted("full")
    with pytest.raises(UserError, match="drop --adapter"):
        peft.write_peft(tmp_path / "adapter", model, adapter)
    assert not (tmp_path / "adapter").exists()


# ---- files

every = pytest.mark.parametrize(
    ("family", "kind"),
    [(name, kind) for name in CONFIGS for kind in ("sequence", "token") if kind == "sequence" or FAMILIES[name].token],
)
SMALL = 4000  # bytes of a file, so that a model is several files


def words_folder(folder: pathlib.Path, family: str = "llama", **fields: Any) -> tuple[start.Start, Params]:
    """A language model in a folder, and its weights."""
    folder.mkdir()
    stated = CONFIGS[family] | {"architectures": [f"{FAMILIES[family].stem}ForCausalLM"], "pad_token_id": 3} | fields
    (folder / "config.json").write_text(json.dumps(stated))
    model = hf.describe(str(folder))
    held = drawn(model.shapes())
    hf.write(str(folder), model, held)
    return start.find(str(folder)), held


def score_folder(folder: pathlib.Path, family: str = "llama", **how: Any) -> tuple[Model, Params]:
    """A reward model in a folder, made of a language model."""
    found, _ = words_folder(folder.with_name(f"{folder.name}-words"), family)
    model = start.describe(found, head="score")
    held = drawn(model.shapes(), 1)
    hf.write(str(folder), model, held, **how)
    return model, held


def same(got: Params, expected: Params) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_on_a_language_model_it_begins_at_0(family: str, tmp_path: pathlib.Path) -> None:
    """And its word head, if the files hold one, is not read."""
    found, held = words_folder(tmp_path / "words", family)
    model = start.describe(found, head="score")
    start.check(found, model)
    got = start.load(found, model)
    zeros = {"score": np.zeros(16, np.float32), "score_bias": np.zeros((), np.float32)}
    same(got, {name: leaf for name, leaf in held.items() if name != "head"} | zeros)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, model.shapes())
    assert start.describe(found) == start.describe(found, head="words") == model.with_head("words")


@every
def test_what_is_written_is_read(family: str, kind: Kind, tmp_path: pathlib.Path) -> None:
    model, held = score_folder(tmp_path / "score", family, kind=kind, shard_bytes=SMALL)
    again, got = hf.read(str(tmp_path / "score"))
    same(got, held)
    assert again.shape == model.shape
    written = tensors(tmp_path / "score")
    assert not {"lm_head.weight", "embed_out.weight"} & set(written)
    index = json.loads((tmp_path / "score" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(written)
    stated = json.loads((tmp_path / "score" / "config.json").read_text())
    suffix = "ForSequenceClassification" if kind == "sequence" else "ForTokenClassification"
    assert stated["architectures"] == [FAMILIES[family].stem + suffix] and stated["pad_token_id"] == 3
    assert len(stated["id2label"]) == len(stated["label2id"]) == (1 if kind == "sequence" else 2)
    assert ("score_bias" in stated) == (kind == "sequence")
    hf.write(str(tmp_path / "other"), again, got, kind=kind, shard_bytes=SMALL)
    assert json.loads((tmp_path / "other" / "config.json").read_text()) == stated


def test_one_kind_is_written_as_the_other(tmp_path: pathlib.Path) -> None:
    _, held = score_folder(tmp_path / "one", kind="token")
    hf.write(str(tmp_path / "two"), *hf.read(str(tmp_path / "one")))
    same(hf.read(str(tmp_path / "two"))[1], held)
    hf.write(str(tmp_path / "three"), *hf.read(str(tmp_path / "two")), kind="token")
    same(hf.read(str(tmp_path / "three"))[1], held)
    assert "score_bias" not in json.loads((tmp_path / "three" / "config.json").read_text())


def edit(folder: pathlib.Path, change: dict[str, Any], **fields: Any) -> None:
    """Changes tensors, all in one file, and fields of the config; None takes one away."""
    file = folder / "model.safetensors"
    save_file({name: x for name, x in (load_file(file) | change).items() if x is not None}, file)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: x for name, x in config.items() if x is not None}))


@pytest.mark.parametrize("said", [{"id2label": {"0": "a", "1": "b"}}, {"num_labels": 2}, {}])
def test_of_two_labels_it_is_the_difference(said: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """Also where config.json says nothing of labels, as transformers writes it of two."""
    score_folder(tmp_path / "score", kind="token")
    rows = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    bias = np.asarray([0.5, 2.0], np.float32)
    edit(tmp_path / "score", {"score.weight": rows, "score.bias": bias}, **({"id2label": None} | said))
    got = hf.read(str(tmp_path / "score"))[1]
    np.testing.assert_array_equal(got["score"], rows[1] - rows[0])
    assert float(got["score_bias"]) == 1.5


def test_a_bias_is_0_where_there_is_none(tmp_path: pathlib.Path) -> None:
    score_folder(tmp_path / "one")
    edit(tmp_path / "one", {}, score_bias=None)
    assert float(hf.read(str(tmp_path / "one"))[1]["score_bias"]) == 0
    score_folder(tmp_path / "two", kind="token")
    edit(tmp_path / "two", {"score.bias": None}, token_classification_bias=False)
    assert float(hf.read(str(tmp_path / "two"))[1]["score_bias"]) == 0


@pytest.mark.parametrize("head", ["fresh", "read"])
def test_a_mesh_and_a_quantised_base_hold_the_same(head: str, tmp_path: pathlib.Path) -> None:
    """Fresh scores of a language model and those of a reward model, placed by the rules."""
    score_folder(tmp_path / "score")
    found = start.find(str(tmp_path / ("score" if head == "read" else "score-words")))
    plain = start.load(found, start.describe(found, head="score"))
    mesh = make_mesh(MeshShape(1, 4, 2))
    model = start.describe(found, layout=Layout(mesh), head="score")
    got = start.load(found, model, lambda path, _: param_sharding(mesh, path))
    same(got, plain)
    assert got["score"].sharding == param_sharding(mesh, ("score",))
    held = start.load(found, model, lambda path, _: param_sharding(mesh, path), "nf4")
    shapes = lora.base_shapes(lora.attach(Lora(rank=2, base="nf4"), model))
    assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_array_equal(held["score"], plain["score"])


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "three labels": ({}, {"id2label": {"0": "a", "1": "b", "2": "c"}}, ("3 labels", "1 label", "2", "config.json")),
    "a number of labels": ({}, {"id2label": None, "num_labels": 5}, ("5 labels",)),
    "no number of labels": ({}, {"id2label": None}, ("score.weight", "(1, 16)", "(2, 16)")),
    "no bias to add": ({}, {"score_bias": "high"}, ("score_bias 'high'",)),
    "no score": ({"score.weight": None}, {}, ("lacks", "score.weight")),
    "a wide score": ({"score.weight": np.zeros((1, 8), np.float32)}, {}, ("score.weight", "(1, 8)", "(1, 16)")),
    "a bias of its own": ({"score.bias": np.zeros(1, np.float32)}, {}, ("holds", "score.bias")),
}


@pytest.mark.parametrize(("change", "fields", "named"), REFUSED.values(), ids=REFUSED)
def test_a_classifier_that_does_not_fit_is_refused(
    change: dict[str, Any], fields: dict[str, Any], named: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    score_folder(tmp_path / "score")
    edit(tmp_path / "score", change, **fields)
    with pytest.raises(UserError) as error:
        hf.check(epath.Path(tmp_path / "score"), hf.describe(str(tmp_path / "score")))
    assert "\n" not in str(error.value)
    for part in (*named, str(tmp_path)):
        assert part in str(error.value)


def test_a_reward_model_is_no_language_model(tmp_path: pathlib.Path) -> None:
    model, held = score_folder(tmp_path / "score")
    found = start.find(str(tmp_path / "score"))
    with pytest.raises(UserError, match="score holds a reward model, not a language model"):
        start.describe(found, head="words")
    assert start.describe(found) == start.describe(found, head="score")
    words = model.with_head("words")
    with pytest.raises(ValueError, match="not written as token"):
        hf.write(str(tmp_path / "words"), words, held, kind="token")


def test_an_older_model_stays_if_the_new_one_cannot_be_written(tmp_path: pathlib.Path) -> None:
    model, held = score_folder(tmp_path / "score", "olmo2")
    with pytest.raises(UserError, match="no token classification for olmo2 models"):
        hf.write(str(tmp_path / "score"), model, held, kind="token")
    same(hf.read(str(tmp_path / "score"))[1], held)
