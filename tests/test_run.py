"""Whole runs: what the first step must be, what is written, and that a stop loses and repeats nothing."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from experiments import export
from rlhf_jax import checkpoint, flags, run
from rlhf_jax.algorithms import ALGORITHMS, preference
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data
from rlhf_jax.metrics import Log, LogConfig
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.sharding import MeshShape
from rlhf_jax.workdir import best_step, load_policy
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model and rows."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl")
    return folder


def make_config(place: pathlib.Path, loss: str, **changes: Any) -> Config:
    config = Config(
        cache=str(place / "cache"),
        model=ModelConfig(path=str(place / "model")),
        data=Data(path=(str(place / "pairs.jsonl"),), eval_share=0.2),
        loss=Loss(name=loss),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=Train(steps=10, batch_size=4),
        evaluate=Evaluate(every=4),
        checkpoint=CheckpointConfig(every=5),
        mesh=MeshShape(1, 1, 1),
        log=LogConfig(tensorboard=False, progress=False),
    )
    return dataclasses.replace(config, **changes)


def lines(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- resume


def rollouts() -> types.SimpleNamespace:
    """Preference learning whose prepare makes three batches of each batch of rows, like a rollout's minibatches."""

    def make_prepare(*args: Any):
        inner = preference.make_prepare(*args)

        def prepare(state, rows):
            for batch in inner(state, rows):
                for scale in (1.0, 0.5, 0.25):
                    yield batch | {"ref_logprob": scale * batch["ref_logprob"]}

        return prepare

    return types.SimpleNamespace(**{**vars(preference), "make_prepare": make_prepare})


class Killed(Exception):
    """Stands for the machine being taken away."""


def job(place: str, workdir: str, loss: str, several: bool, stop_at: int | None) -> None:
    """Trains, resuming what the folder holds; killed before the line of `stop_at` is written."""
    if several:
        ALGORITHMS["preference"] = rollouts()  # type: ignore[assignment]
    write = Log.step

    def step(self: Log, row: dict[str, float], tokens: int) -> None:
        if row["step"] == stop_at:
            raise Killed
        write(self, row, tokens)

    Log.step = step
    try:
        run.train(make_config(pathlib.Path(place), loss), workdir, resume=True)
    finally:
        Log.step = write
        ALGORITHMS["preference"] = preference


def in_new_process(*arguments: Any) -> None:
    code = f"from tests.test_run import job; job(*{arguments!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint's state."""
    import orbax.checkpoint as ocp

    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    flat = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in flat}


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
@pytest.mark.parametrize(("loss", "several"), [("kto", False), ("dpo", True)], ids=["kto", "pending"])
def test_a_killed_run_resumed_in_a_new_process_is_the_run_itself(place, loss, several):
    whole, broken = place / f"{loss}_whole", place / f"{loss}_broken"
    job(str(place), str(whole), loss, several, None)
    with pytest.raises(Killed):
        job(str(place), str(broken), loss, several, 7)
    assert lines(broken / "metrics.jsonl")[-1]["step"] == 6
    assert checkpoint.latest(epath.Path(broken / "checkpoints")) == 5
    pending = json.loads((broken / "checkpoints" / "5" / "host" / "metadata").read_text())["pending"]
    assert len(pending) == (1 if several else 0)  # step 5 stands within the second rollout of three batches
    in_new_process(str(place), str(broken), loss, several, None)
    for name in ("metrics.jsonl", "eval.jsonl", "rows.jsonl", "config.json"):
        assert (whole / name).read_text() == (broken / name).read_text(), name
    assert [row["step"] for row in lines(whole / "metrics.jsonl")] == list(range(10))
    expected, found = arrays(whole, 10), arrays(broken, 10)
    assert expected.keys() == found.keys() and any("opt_state" in name for name in expected)
    for name, value in expected.items():
        assert value.tobytes() == found[name].tobytes(), name


def test_a_finished_run_returns_at_once(place, capsys):
    config = make_config(place, "dpo", train=Train(steps=2, batch_size=4))
    first = run.train(config, str(place / "done"))
    again = run.train(config, str(place / "done"), resume=True)
    assert "finished" in capsys.readouterr().out
    assert again.state is None and again.metrics == first.metrics and again.evaluation == first.evaluation


def test_other_rows_are_not_resumed(place, tmp_path):
    config = make_config(place, "dpo", data=Data(path=(str(tmp_path / "rows.jsonl"),), eval_share=0.2))
    tiny.write_pairs(tmp_path / "rows.jsonl", 40)
    run.train(dataclasses.replace(config, train=Train(steps=2, batch_size=4)), str(tmp_path / "run"))
    tiny.write_pairs(tmp_path / "rows.jsonl", 41)
    with pytest.raises(run.UserError, match="rows of .* are not those"):
        run.train(dataclasses.replace(config, train=Train(steps=3, batch_size=4)), str(tmp_path / "run"), resume=True)


# ---- patience

HELD_OUT = {0: 1.0, 2: 0.8, 4: 0.6, 6: 0.7, 8: 0.6, 10: 0.9, 12: 0.65}  # step -> its eval/loss


@pytest.fixture
def patient(place, monkeypatch) -> Config:
    """A config with a patience of 3, whose evaluations have the losses of HELD_OUT."""
    evaluate, now = run.Run._evaluate, []

    def noted(self: run.Run, step: int) -> None:
        now.append(step)
        evaluate(self, step)

    monkeypatch.setattr(run.Run, "_evaluate", noted)
    monkeypatch.setattr(run, "summarise", lambda terms, means: {"eval/loss": HELD_OUT[now[-1]]})
    return make_config(
        place, "nll", algorithm="sft", train=Train(steps=20, batch_size=4), evaluate=Evaluate(every=2, patience=3),
        checkpoint=CheckpointConfig(every=5, keep_last=1),
    )  # fmt: skip


def steps_kept(workdir: pathlib.Path) -> list[int]:
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


def test_a_run_whose_held_out_loss_has_stopped_falling_ends(place, patient, capsys, monkeypatch):
    """An equal loss is not lower; the best checkpoint outlives a newer one that the same evaluation came before."""
    workdir = place / "patient"
    first = run.train(patient, str(workdir))
    assert "stopped: " in capsys.readouterr().out
    assert [row["step"] for row in lines(workdir / "eval.jsonl")] == [0, 2, 4, 6, 8, 10]
    assert lines(workdir / "metrics.jsonl")[-1] == first.metrics and first.metrics["step"] == 9
    assert first.evaluation["step"] == 10 and steps_kept(workdir) == [4, 10]
    assert best_step(epath.Path(workdir)) == 4 == load_policy(epath.Path(workdir), 4).step

    with monkeypatch.context() as within:
        within.delattr(run, "build")  # nothing is built
        again = run.train(patient, str(workdir), resume=True)
    assert "finished" in capsys.readouterr().out
    assert again.state is None and again.metrics == first.metrics and again.evaluation == first.evaluation

    more = dataclasses.replace(patient, evaluate=Evaluate(every=2, patience=4))
    assert run.train(more, str(workdir), resume=True).evaluation["step"] == 12
    assert steps_kept(workdir) == [4, 12]


def test_a_killed_run_ends_where_it_would_have_ended(place, patient, monkeypatch):
    workdir, write = place / "impatient", Log.step

    def step(self: Log, row: dict[str, float], tokens: int) -> None:
        if row["step"] == 7:
            raise Killed
        write(self, row, tokens)

    with monkeypatch.context() as within, pytest.raises(Killed):
        within.setattr(Log, "step", step)
        run.train(patient, str(workdir))
    assert lines(workdir / "eval.jsonl")[-1]["step"] == 6 and steps_kept(workdir) == [4, 5]
    with (workdir / "eval.jsonl").open("a") as file:
        file.write('{"step": 8, "eval/lo')  # the line that a kill cut short
    assert run.train(patient, str(workdir), resume=True).evaluation["step"] == 10
    assert [row["step"] for row in lines(workdir / "eval.jsonl")] == [0, 2, 4, 6, 8, 10]
    assert steps_kept(workdir) == [4, 10]


def test_without_an_evaluated_checkpoint_none_is_best(tmp_path):
    with pytest.raises(run.UserError, match="holds no checkpoint"):
        best_step(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluate": Evaluate(patience=-1)}, "patience=-1 is not allowed; it must be at least 0"),
        ({"evaluate": Evaluate(every=0, patience=1)}, "--config.evaluate.every"),
        ({"evaluate": Evaluate(rows=0, patience=1)}, "held-out rows"),
        ({"data": 0.0}, "held-out rows"),
        ({"checkpoint": CheckpointConfig(keep_best=0)}, "--config.checkpoint.keep_best"),
    ],
)
def test_patience_needs_evaluations_and_the_best(place, patient, tmp_path, changes, says):
    if "data" in changes:
        changes = {"data": dataclasses.replace(patient.data, eval_share=changes["data"])}
    with pytest.raises(run.UserError, match=says):
        run.build(dataclasses.replace(patient, **changes), epath.Path(tmp_path))


# ---- what a run writes


def test_microbatches_and_meshes_give_one_run(place):
    """End to end, not only the step: the loader, the reference columns and the baseline on other meshes."""
    rows = []
    for number, (mesh, parts) in enumerate((((1, 1, 1), 1), ((2, 2, 2), 2))):
        train = Train(steps=3, batch_size=8, microbatches=parts)
        changes = {"train": train, "mesh": MeshShape(*mesh), "cache": str(place / f"cache{number}")}
        run.train(make_config(place, "kto", **changes), str(place / f"mesh{number}"))
        rows.append([(row["loss"], row["grad_norm"]) for row in lines(place / f"mesh{number}" / "metrics.jsonl")])
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-5)


FIRST = {"dpo": math.log(2), "kto": 0.5}


@pytest.mark.parametrize("loss", ["dpo", "kto"])  # the others' first values: tests/test_losses.py
def test_the_first_step_on_real_rows_and_a_real_model(shared, stories, tmp_path_factory, loss):
    """At the reference: DPO log 2, KTO 1/2; a line a step; held-out accuracy with its interval; rows counted."""
    config = make_config(
        tmp_path_factory.getbasetemp(), loss,
        model=ModelConfig(path=str(stories)),
        data=Data(
            path=(str(shared / "data/hh-harmless-base/valid.jsonl"),), length=128, buckets=(128,), eval_share=0.2
        ),
        train=Train(steps=3, batch_size=8), evaluate=Evaluate(every=0, rows=8),
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp(loss)
    result = run.train(config, str(workdir))
    rows = lines(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    np.testing.assert_allclose(rows[0]["loss"], FIRST[loss], rtol=1e-5)
    assert abs(rows[0]["rewards/margins"]) < 1e-4 < abs(rows[1]["rewards/margins"])
    assert rows[-1] == result.metrics and rows[0]["num_tokens"] < rows[1]["num_tokens"]
    held_out = lines(workdir / "eval.jsonl")
    assert [row["step"] for row in held_out] == [0, 3] and held_out[1]["eval/rows"] == 8
    low, share, high = (held_out[1][f"eval/rewards/accuracies{end}"] for end in ("_low", "", "_high"))
    assert 0 <= low < share < high <= 1 or share in (0, 1)
    assert {row["what"] for row in lines(workdir / "rows.jsonl")} >= {"refused", "cut"}


def test_sft_learns_and_exports_a_folder_that_loads(place, capsys):
    config = make_config(place, "nll", algorithm="sft", train=Train(steps=8, batch_size=8))
    workdir = place / "sft"
    run.train(config, str(workdir))
    held_out = lines(workdir / "eval.jsonl")
    assert held_out[-1]["eval/loss"] < 0.95 * held_out[0]["eval/loss"]
    flags.run(export.main, export.Export, ["export", f"--workdir={workdir}", f"--out={place / 'exported'}"])
    model, params = hf.read(str(place / "exported"))
    policy = load_policy(epath.Path(workdir))
    assert model.shape == policy.model.shape and policy.step == 8
    jax.tree.map(np.testing.assert_array_equal, params, policy.params)
    with pytest.raises(SystemExit, match="2"):
        flags.run(export.main, export.Export, ["export", f"--workdir={workdir}", f"--out={place / 'exported'}"])
    assert "already holds something" in capsys.readouterr().err


def test_random_weights_need_a_config_alone(place, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((place / "model" / name).read_bytes())
    model = ModelConfig(path=str(folder), init="random")
    train = Train(steps=1, batch_size=4)
    first = run.train(make_config(place, "nll", algorithm="sft", model=model, train=train), str(tmp_path / "a"))
    again = run.train(make_config(place, "nll", algorithm="sft", model=model, train=train), str(tmp_path / "b"))
    other = make_config(place, "nll", algorithm="sft", model=model, train=train, seed=1)
    assert first.metrics == again.metrics != run.train(other, str(tmp_path / "c")).metrics


def test_a_step_compiles_once_for_each_bucket(place, tmp_path):
    data = Data(path=(str(place / "pairs.jsonl"),), buckets=(24, 40))
    config = make_config(place, "nll", algorithm="sft", data=data, train=Train(steps=12, batch_size=2))
    job = run.Run([run.build(config, epath.Path(tmp_path))], None)
    job.train()
    buckets = job.built.loader.buckets(0, 12)
    assert len(buckets) >= 2 and sum(buckets.values()) == 12
    assert job.step._cache_size() == len(buckets)  # pyright: ignore[reportAttributeAccessIssue]
