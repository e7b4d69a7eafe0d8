"""Sweeps: what they expand to, who shares a program, and that a member's run is the one that it would be alone."""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from rlhf_jax import run, sweep
from rlhf_jax.algorithms.preference import PreferenceConfig
from rlhf_jax.build import Memory
from rlhf_jax.config import Config, Evaluate, ModelConfig, Train
from rlhf_jax.errors import UserError
from rlhf_jax.models.linear import Lora
from rlhf_jax.sharding import MeshShape
from rlhf_jax.workdir import load_trained
from tests import tiny
from tests.test_run import lines, make_config


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model and rows."""
    folder = tmp_path_factory.mktemp("sweeps")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl")
    return folder


# ---- what a sweep is


def test_every_combination_comes_once_with_values_of_the_fields_types():
    members = sweep.expand("loss.name=dpo,ipo; loss.beta=0.1,1 ;data.buckets=32,64|64;seed=3", Config())
    values = [tuple(member.values.values()) for member in members]
    assert values == list(itertools.product(["dpo", "ipo"], [0.1, 1.0], [(32, 64), (64,)], [3]))
    assert all(isinstance(member.config.loss.beta, float) for member in members)
    assert members[0].name == "loss.name=dpo,loss.beta=0.1,data.buckets=32,64,seed=3"
    assert len({sweep.folder(epath.Path("/x"), member) for member in members}) == len(members)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; give fields and values"),
        ("loss.bata=1", "'loss.bata', which there isn't; the nearest is loss.beta"),
        ("loss.beta=0.1;loss.beta=1", "names loss.beta twice"),
        ("loss.beta=0.1,0.10", "gives loss.beta a value twice"),
        ("loss.beta=high", "gives loss.beta the value 'high', but it takes"),
        ("seed", "gives seed the value ''"),
    ],
)
def test_what_is_no_sweep_is_refused_in_a_sentence(text, says):
    with pytest.raises(UserError, match=says):
        sweep.expand(text, Config())


@pytest.mark.parametrize("of", [1, 2, 3, 7, 20])
def test_shards_are_a_partition(of):
    members = sweep.expand("loss.beta=0.1,0.2,0.3;seed=0,1,2,3", Config())
    parts = [sweep.shard(members, f"{number}/{of}") for number in range(1, of + 1)]
    assert [member for part in parts for member in part] == members
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_a_shard_that_is_none_is_refused(part):
    with pytest.raises(UserError, match="i/n"):
        sweep.shard(sweep.expand("seed=0,1", Config()), part)


def ready(config: Config, text: str, workdir: Any) -> list[sweep.Ready]:
    return sweep.ready(sweep.expand(text, config), epath.Path(workdir), Memory())


def sizes(config: Config, text: str, workdir: Any, together: int = 16) -> list[int]:
    return [len(group) for group in sweep.groups(ready(config, text, workdir), together)]


def test_members_that_differ_in_numbers_alone_share_a_program(place, tmp_path):
    config = make_config(place, "dpo")
    numbers = "loss.beta=0.1,0.2;loss.margin=0,1;optimizer.learning_rate=1e-3,1e-4;seed=0,1"
    assert sizes(config, numbers, tmp_path) == [16]
    assert sizes(config, numbers, tmp_path, together=6) == [5, 5, 6]
    assert sizes(config, "loss.name=dpo,ipo,hinge;seed=0,1", tmp_path) == [2, 2, 2]
    assert sizes(config, "loss.divergence=js,forward_kl;loss.beta=0.1,0.2", tmp_path) == [2, 2]
    assert sizes(config, "train.steps=2,3", tmp_path) == [1, 1]
    patient = dataclasses.replace(config, evaluate=Evaluate(every=2, patience=1))
    assert sizes(patient, "seed=0,1", tmp_path) == [1, 1]
    random = dataclasses.replace(config, model=dataclasses.replace(config.model, init="random"))
    assert sizes(random, "loss.beta=0.1,0.2;seed=0,1", tmp_path) == [2, 2]


def test_a_member_that_cant_be_run_is_refused_before_any_is(place, tmp_path):
    with pytest.raises(UserError, match=r"member loss.name=simpo,loss.label_smoothing=0.1: loss 'simpo' would ignore"):
        ready(make_config(place, "dpo"), "loss.name=dpo,simpo;loss.label_smoothing=0.1", tmp_path)
    assert not list(tmp_path.rglob("metrics.jsonl"))


# ---- a member's run is the one that it would be alone

PLAIN, LIVE = "loss.beta=0.1,0.5;seed=0,1", "loss.beta=0.1,0.5;seed=0,3"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "kto": ("kto", LIVE, {}),
    "bco packed": ("bco", PLAIN, {"pack": True}),
    "aot, a moving reference": ("aot", PLAIN, {"preference": PreferenceConfig(sync_every=2)}),
    "an adapter": ("dpo", PLAIN, {"lora": Lora(rank=2)}),
    "a mesh": ("rpo", PLAIN, {"mesh": MeshShape(2, 2, 1)}),
}


def config_of(place: pathlib.Path, case: str, steps: int = 4) -> tuple[Config, str]:
    loss, text, changes = CASES[case]
    changes = dict(changes)
    config = make_config(place, loss, train=Train(steps=steps, batch_size=4), evaluate=Evaluate(every=2))
    if changes.pop("pack", False):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, pack=True))
    return dataclasses.replace(config, **changes), text


def timeless(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def assert_same_runs(one: pathlib.Path, other: pathlib.Path, rtol: float = 0.0) -> None:
    """All that two folders say, to the last bit, or to rounding.

    A single row's margin is a difference of some hundred nats, each of which is rounded at 1e-5.
    """
    for name in ("metrics.jsonl", "eval.jsonl", "held_out.jsonl"):
        ours, theirs = lines(one / name), lines(other / name)
        assert len(ours) == len(theirs) > 1 and ours[-1].keys() == theirs[-1].keys()
        for a, b in zip(ours, theirs, strict=True):
            for field, value in timeless(a).items():
                nats = 10 if name == "held_out.jsonl" else 1
                near = pytest.approx(b[field], rel=rtol, abs=nats * rtol) if rtol else b[field]
                assert value == near, (name, field)
    trees = [load_trained(epath.Path(folder)).params for folder in (one, other)]
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(a, b, rtol=10 * rtol, atol=rtol)


@pytest.mark.parametrize(("case", "way"), [*((case, "map") for case in CASES), ("an adapter", "vmap")])
def test_a_member_ends_as_it_would_alone(place, tmp_path, case, way):
    config, text = config_of(place, case)
    (group,) = sweep.groups(ready(config, text, tmp_path), 16)
    assert len(group) == 4
    sweep.train_group(group, way)
    run.train(group[3].member.config, str(tmp_path / "alone"))
    assert_same_runs(pathlib.Path(group[3].built.workdir), tmp_path / "alone", 0.0 if way == "map" else 1e-5)
    first, last = (lines(pathlib.Path(one.built.workdir) / "metrics.jsonl")[-1] for one in (group[0], group[3]))
    assert first["loss"] != last["loss"], "the members must differ"


def test_a_sweep_that_was_stopped_goes_on_to_the_same_bits(place, tmp_path):
    """Stopped at a checkpoint; constant rates, so that the shorter run's steps are the longer's."""
    config, text = config_of(place, "bco packed")
    constant = dataclasses.replace(config.optimizer, schedule="constant")
    config = dataclasses.replace(config, optimizer=constant)
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    for folder, several in (("whole", [config]), ("stopped", [half, config])):
        for each in several:
            (group,) = sweep.groups(ready(each, text, tmp_path / folder), 16)
            sweep.train_group(group)
    for member in sweep.expand(text, config):
        whole, stopped = (pathlib.Path(sweep.folder(epath.Path(tmp_path / n), member)) for n in ("whole", "stopped"))
        assert_same_runs(whole, stopped)


def test_members_share_the_rows_and_one_reference_pass(place, tmp_path, capsys):
    config = make_config(place, "dpo", train=Train(steps=1, batch_size=4), cache=str(tmp_path / "cache"))
    members = ready(config, "loss.beta=0.1,0.2,0.4;seed=0,1", tmp_path / "runs")
    tokens = {id(c) for one in members for e in one.built.data.train for c in e.completions}
    assert len(tokens) <= 2 * 48, "one tokenising for all"
    (group,) = sweep.groups(members, 16)
    sweep.train_group(group)
    assert capsys.readouterr().out.count("reference: computing") == 1 + 1  # training rows, and held-out ones


def test_the_effective_hyper_parameters_are_those_that_a_run_has(place):
    config = make_config(place, "rpo")
    found = dict(sweep.effective(dataclasses.replace(config, preference=PreferenceConfig(length_alpha=0.5))))
    assert found["name"] == "rpo" and found["dpo.beta"] == 0.1 and found["nll.weight"] == 1.0
    assert found["length_alpha"] == 0.5
    assert dict(sweep.effective(make_config(place, "simpo")))["margin"] == 1.0
    assert isinstance(config.model, ModelConfig)
