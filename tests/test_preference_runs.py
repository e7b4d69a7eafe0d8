"""Preference runs end to end: sums in pieces, cached LD columns, sorted losses on a mesh, and states that resume."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from rlhf_jax import build, initial, run
from rlhf_jax.algorithms import preference
from rlhf_jax.algorithms.optimizers import sgd
from rlhf_jax.algorithms.preference import PreferenceConfig
from rlhf_jax.algorithms.step import Batch, Optimizer, make_state, make_step
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, OptimizerConfig, Train
from rlhf_jax.data.dataset import Example
from rlhf_jax.data.loader import Loader, once
from rlhf_jax.models.decoder import Model
from rlhf_jax.models.linear import Lora
from rlhf_jax.sharding import MeshShape
from tests import tiny
from tests.problem import part
from tests.test_run import arrays, lines, make_config
from tests.test_step import norm_of

BETA = 0.3


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model and rows."""
    folder = tmp_path_factory.mktemp("preference_runs")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl")
    return folder


def packed(config: Config) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, pack=True))


def without_held_out(config: Config) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, eval_share=0.0))


# ---- an oracle: dense logits of single completions


def dense(examples: Sequence[Example], width: int = 64) -> dict[str, np.ndarray]:
    """Each completion in a row of its own, [N, 2, T]; trained tokens are True in `mask`."""
    tokens, mask, real = (np.zeros((len(examples), 2, width), kind) for kind in (np.int32, np.bool_, np.int32))
    for n, example in enumerate(examples):
        for k, completion in enumerate(example.completions):
            here = n, k, slice(len(completion))
            tokens[here], mask[here], real[here] = completion.ids, completion.mask, 1
    return {"tokens": tokens, "mask": mask, "real": real}


def token_logprobs(model: Model, params: Any, rows: dict[str, np.ndarray]) -> Any:
    """log p of each trained token from the whole softmax, [N, 2, T]; 0 elsewhere."""
    flat = {name: jnp.asarray(x.reshape(-1, x.shape[-1])) for name, x in rows.items()}
    positions = jnp.broadcast_to(jnp.arange(flat["tokens"].shape[1]), flat["tokens"].shape)
    logits = model.logits(params, model.apply(params, flat["tokens"], flat["real"], positions * flat["real"]))
    logp = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    said = jnp.take_along_axis(logp, flat["tokens"][:, 1:, None], axis=2)[..., 0]
    said = jnp.concatenate([jnp.zeros_like(said[:, :1]), said], axis=1)
    return jnp.where(flat["mask"], said, 0).reshape(rows["tokens"].shape)


# ---- a sum, packed and in microbatches


@functools.cache
def sum_problem(place: pathlib.Path) -> tuple[build.Built, Any, Any, dict[str, np.ndarray], np.ndarray]:
    """An experiment, policy, reference log-probabilities by example, and the rows of 32 examples."""
    built = build.build(make_config(place, "dpo"), epath.Path(place / "sum"))
    start = jax.jit(built.model.init)(jax.random.key(1))
    examples = built.data.train[:32]
    rows = dense(examples)
    reference = jax.jit(lambda params: token_logprobs(built.model, params, rows).sum(-1))(start)
    policy = jax.tree.map(lambda x: np.asarray(1.2 * x), start)
    return built, examples, policy, rows, np.asarray(reference)


@functools.cache
def expected_sum(place: pathlib.Path) -> tuple[float, float, Any]:
    """dpo, nll and the gradient of 0.7 dpo + 0.3 nll, from dense logits."""
    built, _, policy, rows, reference = sum_problem(place)

    def loss(params: Any) -> Any:
        logprobs = token_logprobs(built.model, params, rows)
        margin = (logprobs.sum(-1) - reference) @ jnp.array([1.0, -1.0])
        dpo = jnp.mean(jnp.logaddexp(0, -BETA * margin))
        nll = -jnp.sum(logprobs[:, 0]) / rows["mask"][:, 0].sum()  # one mean over the tokens of all chosen ones
        return 0.7 * dpo + 0.3 * nll, (dpo, nll)

    (_, (dpo, nll)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(policy)
    return float(dpo), float(nll), jax.tree.map(np.asarray, gradient)


def whole_batch(place: pathlib.Path, pack: bool) -> Batch:
    """The 32 examples as one batch with the reference's column, two rows of padding and more behind them."""
    built, examples, _, _, reference = sum_problem(place)
    length = built.loader.length
    count = len(Loader(examples, batch_size=1, length=length, pack=pack).rows)
    (batch,) = once(examples, batch_size=count + 2 + count % 2, length=length, pack=pack)
    table = np.full((max(e.index for e in examples) + 2, 2), 1e3, np.float32)  # what padding holds must not matter
    table[[e.index for e in examples]] = reference
    return batch | {"ref_logprob": table[batch["index"]]}


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_a_sum_in_two_microbatches_has_one_mean_over_pairs_and_one_over_tokens(place, pack):
    built, examples, policy, _, _ = sum_problem(place)
    dpo, nll, gradient = expected_sum(place)
    batch = whole_batch(place, pack)
    assert (len(batch["weight"]) < len(examples)) is pack and batch["weight"].sum() == 32
    hyper = {
        "loss": {"dpo": {"beta": BETA}, "nll": {}}, "weights": {"dpo": 0.7, "nll": 0.3},
        "optimizer": {"learning_rate": 0.5, "momentum": 0.0, "clip_norm": np.inf},
    }  # fmt: skip
    optimizer = Optimizer(sgd, optax.constant_schedule(1.0))
    objective = preference.make_objective(built.model, [part("dpo"), part("nll")])
    step = jax.jit(make_step(objective, optimizer, microbatches=2))
    state = make_state(jax.tree.map(jnp.asarray, policy), hyper, optimizer, jax.random.PRNGKey(0))
    after, metrics = step(state, {name: x for name, x in batch.items() if name != "index"})
    for name, value in (("loss/dpo", dpo), ("loss/nll", nll), ("loss", 0.7 * dpo + 0.3 * nll)):
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    found = jax.tree.map(lambda old, new: (np.float64(old) - np.float64(new)) / 0.5, policy, after.params)
    off = norm_of(jax.tree.map(np.subtract, found, gradient))
    assert norm_of(gradient) > 0.1 and off < 1e-4 * norm_of(gradient)


def test_the_weights_of_a_sum_are_those_of_the_config(place, tmp_path):
    config = without_held_out(make_config(place, "dpo", train=Train(steps=2, batch_size=4)))
    run.train(dataclasses.replace(config, loss=Loss(name="rpo", weights=(2.0, 0.5))), str(tmp_path))
    for row in lines(tmp_path / "metrics.jsonl"):
        assert row["loss"] == pytest.approx(2 * row["loss/dpo"] + 0.5 * row["loss/nll"], rel=1e-6)
    assert row["loss/dpo"] != pytest.approx(math.log(2), rel=1e-6) and row["loss/nll"] > 1


# ---- LD-DPO's columns in the cache


def test_a_completion_of_two_pairs_is_cached_for_each_shared_length(place, tmp_path):
    """The chosen answers are one text; what the reference says of it ends where its pair's shorter answer does."""
    rejected = (" a", " a cat", " a cat and a bird in the sun")
    rows = [{"prompt": "one:", "chosen": " a red star", "rejected": text} for text in rejected]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    config = make_config(place, "dpo", cache=str(tmp_path / "cache"), train=Train(steps=1, batch_size=3))
    config = without_held_out(dataclasses.replace(config, data=dataclasses.replace(config.data, path=(str(file),))))
    shortened = dataclasses.replace(config, preference=PreferenceConfig(length_alpha=0.5))
    built = build.build(shortened, epath.Path(tmp_path / "run"))
    params = initial.base_params(built)
    logprobs = np.asarray(token_logprobs(built.model, params, dense(built.data.train)), np.float64)
    whole, shared = {}, {}
    for example, said in zip(built.data.train, logprobs, strict=True):
        trained = [np.flatnonzero(tokens.mask) for tokens in example.completions]
        least = min(map(len, trained))
        whole[example.index] = [sum(said[k, t] for t in places) for k, places in enumerate(trained)]
        shared[example.index] = [sum(said[k, t] for t in places[:least]) for k, places in enumerate(trained)]
    assert len({round(chosen, 3) for chosen, _ in shared.values()}) == 3 > len({c for c, _ in whole.values()})

    def no_need() -> Any:
        raise AssertionError("all of it is in the cache")

    plain = build.build(config, epath.Path(tmp_path / "run"))
    initial.reference_tables([plain], lambda: params, 0)  # leaves whole completions alone in the cache
    for source in (lambda: params, no_need):
        (tables,) = initial.reference_tables([built], source, 0)
        for name, expected in (("ref_logprob", whole), ("ref_shared", shared)):
            found, _ = tables[name]
            np.testing.assert_allclose(found[list(expected)], list(expected.values()), rtol=1e-5, err_msg=name)


# ---- losses that sort, on a mesh


def test_a_sorted_batch_is_the_same_on_every_mesh_and_in_pieces(place, tmp_path):
    """Ranks are those of the global batch, of packed rows that hold unlike numbers of pairs."""
    seen, names = [], ("aot", "aot_unpaired")
    for mesh, pieces in (((1, 1, 1), 1), ((2, 2, 2), 2)):
        train = Train(steps=3, batch_size=8, microbatches=pieces)
        config = packed(without_held_out(make_config(place, "dpo", train=train, mesh=MeshShape(*mesh))))
        config = dataclasses.replace(config, loss=Loss(name="+".join(names), beta=BETA))
        run.train(config, str(tmp_path / str(pieces)))
        rows = lines(tmp_path / str(pieces) / "metrics.jsonl")
        seen.append([[row[name] for name in ("loss/aot", "loss/aot_unpaired", "grad_norm")] for row in rows])
    weight = build.build(config, epath.Path(tmp_path)).loader.batch(0)["weight"]
    assert weight.ndim == 2 and 0 < weight.sum() < weight.size, "some places of packed rows must be empty"
    assert np.abs(np.array(seen[0])[-1, :2] - math.log(2)).min() > 1e-2
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-5)


# ---- single answers of pairs


def test_answers_of_pairs_need_no_mismatched_rows(place, tmp_path):
    """Trained one by one, held out as pairs, so that accuracy is of pairs."""
    config = make_config(place, "kto_zero", train=Train(steps=2, batch_size=4), evaluate=Evaluate(every=0))
    built = build.build(config, epath.Path(tmp_path / "run"))
    assert "mismatched" not in built.loader.batch(0) and built.loader.batch(0)["tokens"].shape[1] == 1
    run.train(config, str(tmp_path / "run"))
    first, last = lines(tmp_path / "run" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and "kl" not in first and last["loss"] != first["loss"]
    held_out = lines(tmp_path / "run" / "held_out.jsonl")
    assert len(held_out) == len(built.held_out) and {len(e.completions) for e in built.held_out} == {2}
    correct = [row["margin"] > 0 for row in held_out]
    assert lines(tmp_path / "run" / "eval.jsonl")[-1]["eval/rewards/accuracies"] == pytest.approx(np.mean(correct))


# ---- states that resume

MIX = 0.25
MOVING = PreferenceConfig(sync_every=3, sync_mix=MIX)
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "bco": ("bco", {"preference": MOVING}),  # a running mean and a moving reference
    "adapter": ("dpo", {"preference": MOVING, "lora": Lora(rank=4)}),
}


def resumable(place: pathlib.Path, name: str, steps: int = 10) -> Config:
    loss, changes = RESUMED[name]
    config = make_config(
        place, loss, train=Train(steps=steps, batch_size=4), checkpoint=CheckpointConfig(every=3, keep_last=5),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"), **changes,
    )  # fmt: skip
    return packed(without_held_out(config))


@functools.cache
def finished(place: pathlib.Path, name: str) -> pathlib.Path:
    run.train(resumable(place, name), str(place / name))
    return place / name


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_in_the_same_bits_with_its_carry(place, name):
    """It stops at step 5, between two moves of the reference."""
    whole, broken = finished(place, name), place / f"{name} resumed"
    run.train(resumable(place, name, steps=5), str(broken))
    run.train(resumable(place, name), str(broken), resume=True)
    assert (whole / "metrics.jsonl").read_text() == (broken / "metrics.jsonl").read_text()
    expected, found = arrays(whole, 10), arrays(broken, 10)
    carry = [value for path, value in expected.items() if "carry" in path]
    assert expected.keys() == found.keys() and carry and any(np.any(value != 0) for value in carry)
    for path, value in expected.items():
        assert value.tobytes() == found[path].tobytes(), path


def test_the_shift_is_the_mean_of_the_rewards_before(place):
    """From metrics.jsonl alone; packed batches of one size hold unlike numbers of answers."""
    rows = lines(finished(place, "bco") / "metrics.jsonl")
    built = build.build(resumable(place, "bco"), epath.Path(place / "bco again"))
    count = np.array([built.loader.batch(i)["weight"].sum() for i in range(len(rows))])
    reward, shift = (np.array([row[name] for row in rows]) for name in ("rewards/mean", "shift"))
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and shift[0] == 0 and np.abs(shift[2:]).max() > 1e-3
    np.testing.assert_allclose(shift[1:], (np.cumsum(reward * count) / np.cumsum(count))[:-1], rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
@pytest.mark.parametrize("name", RESUMED)
def test_the_reference_of_a_run_moves_every_third_step(place, name):
    """mix * policy + (1 - mix) * reference, of what is trained: the adapter alone if there is one."""
    workdir = finished(place, name)
    third, sixth, ninth, last = (arrays(workdir, step) for step in (3, 6, 9, 10))
    paths = [path for path in last if path.startswith("['carry']['reference']")]
    policy_of = {path: path.replace("['carry']['reference']", "['params']") for path in paths}
    assert sorted(policy_of.values()) == sorted(path for path in last if path.startswith("['params']"))
    moved = 0.0
    for path, policy in policy_of.items():
        for before, now in ((third, sixth), (sixth, ninth)):
            mixed = MIX * np.float64(now[policy]) + (1 - MIX) * np.float64(before[path])
            np.testing.assert_allclose(now[path], mixed, rtol=1e-5, atol=1e-7, err_msg=path)
            moved = max(moved, float(np.abs(now[path] - before[path]).max()))
        assert last[path].tobytes() == ninth[path].tobytes(), path
    assert moved > 1e-4


def test_an_adapters_reference_that_has_not_moved_yet_is_its_base(place, tmp_path):
    """Until the first move the losses are those of a fixed reference, and after it they are not."""
    run.train(dataclasses.replace(resumable(place, "adapter"), preference=PreferenceConfig()), str(tmp_path))
    folders = tmp_path, finished(place, "adapter")
    fixed, moving = ([row["loss"] for row in lines(folder / "metrics.jsonl")] for folder in folders)
    np.testing.assert_allclose(moving[:3], fixed[:3], rtol=1e-6)
    assert np.ptp(fixed) > 1e-3 and np.abs(np.subtract(moving, fixed)[3:]).max() > 1e-4
