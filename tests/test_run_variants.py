"""Whole runs of what a model and its rows may be: adapters, quantised bases, mixtures of experts, packed rows."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from experiments import export
from rlhf_jax import run
from rlhf_jax.config import Config, Loss, OptimizerConfig, Train
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models import lora, start
from rlhf_jax.models.linear import Lora
from rlhf_jax.models.tokenizers import load_tokenizer
from rlhf_jax.sharding import MeshShape
from rlhf_jax.workdir import load_policy, load_trained, open_policy
from tests import tiny
from tests.test_run import lines, make_config

LORA = Lora(rank=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model, a tiny mixture of experts, and rows."""
    folder = tmp_path_factory.mktemp("variants")
    tiny.write_model(folder / "model")
    tiny.write_model(folder / "mixture", tiny.MIXTURE)
    tiny.write_pairs(folder / "pairs.jsonl")
    return folder


def packed(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, pack=True), **changes)


@pytest.fixture(scope="module")
def adapted(place) -> tuple[Config, pathlib.Path]:
    """A finished run of DPO that trained an adapter on packed pairs."""
    constant = OptimizerConfig(learning_rate=1e-3, schedule="constant")  # the same for a part of the steps
    config = packed(make_config(place, "dpo"), lora=LORA, optimizer=constant)
    run.train(config, str(place / "adapted"))
    return config, place / "adapted"


def logits(policy: Any) -> np.ndarray:
    tokens = np.arange(2, 34)[None]
    hidden = policy.model.apply(policy.params, tokens, np.ones_like(tokens), np.arange(32)[None])
    return np.asarray(policy.model.logits(policy.params, hidden))


def test_an_adapter_starts_at_its_reference_and_learns_alone(adapted):
    config, workdir = adapted
    rows = lines(workdir / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    evaluations = lines(workdir / "eval.jsonl")
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] - 1e-4
    held = load_trained(epath.Path(workdir))
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(held.params)} == {"lora_a", "lora_b"}


def test_a_resumed_adapter_ends_in_the_same_bits(adapted, place):
    config, workdir = adapted
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=5))
    other = place / "resumed"
    run.train(half, str(other))
    run.train(config, str(other), resume=True)
    timeless = lambda row: {name: value for name, value in row.items() if "time" not in name and "second" not in name}
    assert list(map(timeless, lines(other / "metrics.jsonl"))) == list(map(timeless, lines(workdir / "metrics.jsonl")))
    same = jax.tree.map(np.array_equal, *(load_trained(epath.Path(folder)).params for folder in (other, workdir)))
    assert all(jax.tree.leaves(same))


def test_what_an_adapter_learnt_leaves_merged_or_as_an_adapter(adapted, place):
    """Merged weights, PEFT's files read again and the run itself say the same."""
    _, workdir = adapted
    own = logits(load_policy(epath.Path(workdir)))
    before = logits(open_policy(str(place / "model")))
    assert np.abs(own - before).max() > 1e-3
    for name, flag in (("merged", False), ("peft", True)):
        export.main(export.Export(workdir=str(workdir), out=str(place / name), adapter=flag))
        np.testing.assert_allclose(logits(open_policy(str(place / name))), own, atol=2e-5, err_msg=name)
    assert (place / "peft" / "adapter_model.safetensors").stat().st_size < 40_000
    assert not (place / "peft" / "model.safetensors").exists()


def test_a_run_may_start_from_an_adapter_and_its_reference_is_with_it(adapted, place, tmp_path):
    _, workdir = adapted
    export.main(export.Export(workdir=str(workdir), out=str(tmp_path / "peft"), adapter=True))
    config = make_config(place, "dpo", train=Train(steps=1, batch_size=4), lora=LORA)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path / "peft")))
    run.train(config, str(tmp_path / "on"))
    assert lines(tmp_path / "on" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    with pytest.raises(UserError, match="already merged into it"):
        export.main(export.Export(workdir=str(tmp_path / "on"), out=str(tmp_path / "no"), adapter=True))


def test_an_adapter_is_refused_on_other_weights_than_its_own(place, tmp_path):
    tiny.write_model(tmp_path / "model")
    config = make_config(place, "dpo", train=Train(steps=1, batch_size=4), lora=LORA)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path / "model")))
    run.train(config, str(tmp_path / "run"))
    model, params = hf.read(str(tmp_path / "model"))
    hf.write(tmp_path / "model", model, jax.tree.map(lambda x: 1.5 * x, params))
    with pytest.raises(UserError, match="not those that .* was started on"):
        load_policy(epath.Path(tmp_path / "run"))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    with pytest.raises(UserError, match="not those that .* was started on"):
        run.train(longer, str(tmp_path / "run"), resume=True)


def test_random_weights_have_nothing_to_adapt(place, tmp_path):
    config = make_config(place, "dpo", lora=LORA)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init="random"))
    with pytest.raises(UserError, match="config.model.init=random has none"):
        run.train(config, str(tmp_path))


def test_kto_on_a_quantised_base_is_measured_against_that_base(place, tmp_path):
    """The reference is the base with the adapter off, quantised as it is: the first loss is exactly 1/2."""
    config = packed(make_config(place, "kto"), lora=dataclasses.replace(LORA, base="nf4"))
    run.train(config, str(tmp_path))
    first, *_, last = lines(tmp_path / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and first["kl"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] != first["loss"]
    merged, held = load_policy(epath.Path(tmp_path)), load_trained(epath.Path(tmp_path))
    base = start.load(held.found, held.model.without_adapter(), base="nf4")
    trained = held._replace(params=lora.join(held.params, base))
    np.testing.assert_allclose(logits(merged), logits(trained), atol=2e-5)


def test_a_mixture_trains_on_a_mesh_of_experts_as_on_one_device(place, tmp_path):
    rows = {}
    for name, mesh in (("one", MeshShape(1, 1, 1)), ("mesh", MeshShape(1, 2, 1, expert=2))):
        config = packed(make_config(place, "nll", train=Train(steps=3, batch_size=4)), mesh=mesh, algorithm="sft")
        model = dataclasses.replace(config.model, path=str(place / "mixture"))
        run.train(dataclasses.replace(config, model=model), str(tmp_path / name))
        rows[name] = lines(tmp_path / name / "metrics.jsonl")
    for one, other in zip(rows["one"], rows["mesh"], strict=True):
        assert one["balance"] > 1.5 and one["loss"] == pytest.approx(one["nll"] + 0.02 * one["balance"], rel=1e-6)
        for name in ("loss", "balance", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-5), name


def test_the_balance_is_of_mixtures_alone_and_its_weight_can_be_set(place, tmp_path):
    config = make_config(place, "dpo", train=Train(steps=1, batch_size=4, balance=0.5))
    with pytest.raises(UserError, match="balance=0.5 is of mixtures of experts"):
        run.train(config, str(tmp_path / "dense"))
    model = dataclasses.replace(config.model, path=str(place / "mixture"))
    run.train(dataclasses.replace(config, model=model), str(tmp_path / "mixture"))
    (first,) = lines(tmp_path / "mixture" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2) + 0.5 * first["balance"], rel=1e-6)


def test_packed_rows_have_one_length_so_buckets_are_refused(place, tmp_path):
    config = packed(make_config(place, "dpo"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=(32, 64)))
    with pytest.raises(UserError, match="data.buckets=.* would be ignored"):
        run.train(config, str(tmp_path))


@pytest.mark.parametrize("loss", ["orpo", "cpo"])
def test_a_loss_without_a_reference_asks_none(place, loss, tmp_path, capsys):
    config = dataclasses.replace(packed(make_config(place, loss)), cache=str(tmp_path / "cache"))
    run.train(dataclasses.replace(config, loss=Loss(name=loss)), str(tmp_path / "run"))
    assert "reference:" not in capsys.readouterr().out
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    evaluations = lines(tmp_path / "run" / "eval.jsonl")
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]


def test_ranked_groups_of_unlike_sizes_train_packed_and_padded(place, tmp_path):
    """At the reference each of k! orders is as likely: the first loss is the mean of log k!."""
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    ranked = [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], " star"][: 2 + i % 2], "ranks": r}
        for i, row in enumerate(rows)
        for r in ([[1, 2], [2, 3, 1]][i % 2],)
    ]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    config = make_config(place, "dpo_pl", train=Train(steps=3, batch_size=4))
    for pack in (False, True):
        data = dataclasses.replace(config.data, path=(str(tmp_path / "ranked.jsonl"),), pack=pack)
        workdir = tmp_path / f"pack-{pack}"
        run.train(dataclasses.replace(config, data=data), str(workdir))
        before, after = (lines(workdir / "eval.jsonl")[i] for i in (0, -1))
        sizes = [2 + (row["index"] % 2) for row in held_out(config, data)]
        assert before["eval/loss"] == pytest.approx(np.mean([math.lgamma(k + 1) for k in sizes]), rel=1e-5)
        assert after["eval/loss"] < before["eval/loss"] and after["eval/rewards/margins"] > 0


def held_out(config: Config, data: Data) -> list[dict[str, Any]]:
    encoder = Encoder(load_tokenizer(epath.Path(str(config.model.path))))
    kept = dataset.load(data, encoder, "ranking", 64, config.seed).evaluation
    return [dataclasses.asdict(example) for example in kept]
