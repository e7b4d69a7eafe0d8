"""Whole runs of reward models: ensembles, scores that are 0 on demonstrations, adapters, steps, and what is refused."""

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
from rlhf_jax import fields, run, sweep
from rlhf_jax.algorithms.reward import RewardConfig
from rlhf_jax.config import Config, Loss
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.workdir import load_trained, open_policy, open_rewards
from tests import tiny
from tests.test_run import lines, make_config

NORMAL = RewardConfig(head="normal")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model, pairs, demonstrations, rankings and steps."""
    folder = tmp_path_factory.mktemp("rewards")
    tiny.write_model(folder / "model")
    pairs = [json.loads(line) for line in tiny.write_pairs(folder / "pairs.jsonl").read_text().splitlines()]
    answers = lambda row: [row["chosen"], row["rejected"], row["rejected"] + " sun"]
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("shown.jsonl", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs[:20]])
    write("ranked.jsonl", [{"prompt": p["prompt"], "completions": answers(p), "ranks": [0, 1, 1]} for p in pairs])
    steps = lambda i, p: {"prompt": p["prompt"], "completions": [" red,", " moon."], "labels": [True, i % 3 > 0]}
    write("steps.jsonl", [steps(i, p) for i, p in enumerate(pairs)])
    return folder


def config_of(place: pathlib.Path, loss: str = "bradley_terry", **changes: Any) -> Config:
    """A short run; `changes` by dotted field, with _ for the dots."""
    rows = {"process": "steps", "all_pairs": "ranked", "plackett_luce": "ranked", "outcome": "pairs"}
    config = dataclasses.replace(make_config(place, loss), algorithm="reward")
    data = Data(path=(str(place / f"{rows.get(loss, 'pairs')}.jsonl"),), eval_share=0.2, buckets=(64,))
    config = dataclasses.replace(config, data=data)
    short = {"train.steps": 4, "evaluate.every": 0, "checkpoint.every": 0}
    return fields.replace(config, short | {name.replace("__", "."): value for name, value in changes.items()})


def params_of(workdir: pathlib.Path, step: int | None = None) -> list[np.ndarray]:
    return list(map(np.asarray, jax.tree.leaves(load_trained(epath.Path(workdir), step).params)))


def mean_score(path: pathlib.Path, rows: pathlib.Path) -> float:
    """Of the demonstrations in a file, by the model that a folder holds."""
    (policy,) = open_rewards(str(path))
    data = Data(path=(str(rows),), eval_share=0.0)
    shown = dataset.load(data, Encoder(policy.tokenizer), "demonstration", 64, 0).train
    found = []
    for example in shown:
        ids = example.completions[0].ids[None]
        ones = {"tokens": ids, "segments": np.ones_like(ids), "positions": np.arange(ids.shape[1])[None]}
        padded = {name: np.pad(x, ((0, 0), (0, 64 - ids.shape[1]))) for name, x in ones.items()}
        found.append(float(SCORE(policy.model, policy.params, padded)[0, ids.shape[1] - 1]))
    return float(np.mean(found))


SCORE = jax.jit(lambda model, params, rows: model.score(params, rows), static_argnums=0)


# ---- single models


@pytest.fixture(scope="module")
def trained(place) -> pathlib.Path:
    """A finished run on pairs whose scores are 0 on demonstrations."""
    config = config_of(place, evaluate__every=2, reward__demonstrations=(str(place / "shown.jsonl"),))
    run.train(config, str(place / "trained"))
    return place / "trained"


def test_it_begins_at_log_two_and_learns(trained):
    assert lines(trained / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    first, *_, last = lines(trained / "eval.jsonl")
    assert first["eval/rewards/accuracies"] == 0.5 and first["eval/rewards/margins"] == 0
    assert last["eval/loss"] != first["eval/loss"] and {"margin", "correct"} <= set(
        lines(trained / "held_out.jsonl")[0]
    )


def test_demonstrations_score_zero_on_average_also_when_it_was_exported(trained, place, tmp_path):
    assert mean_score(trained, place / "shown.jsonl") == pytest.approx(0, abs=1e-5)
    held = load_trained(epath.Path(trained))
    assert held.shift != 0 and float(held.params["score_bias"]) == 0  # no gradient of differences moves a constant
    export.main(export.Export(str(trained), str(tmp_path / "exported")))
    written = json.loads((tmp_path / "exported/config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert written["score_bias"] == pytest.approx(held.shift, rel=1e-5)
    assert mean_score(tmp_path / "exported", place / "shown.jsonl") == pytest.approx(0, abs=1e-5)


def test_a_resumed_run_ends_in_the_same_bits(trained, place):
    config = config_of(place, evaluate__every=2, reward__demonstrations=(str(place / "shown.jsonl"),))
    constant = {"optimizer.schedule": "constant"}
    whole, half = (fields.replace(config, constant | {"train.steps": steps}) for steps in (4, 2))
    run.train(whole, str(place / "whole"))
    run.train(half, str(place / "halves"))
    run.train(whole, str(place / "halves"), resume=True)
    for one, other in zip(params_of(place / "whole"), params_of(place / "halves"), strict=True):
        np.testing.assert_array_equal(one, other)
    shifts = [load_trained(epath.Path(place / name)).shift for name in ("whole", "halves")]
    assert shifts[0] == shifts[1]


def test_an_adapter_goes_on_from_the_score_that_its_start_has(trained, place, tmp_path):
    export.main(export.Export(str(trained), str(tmp_path / "start")))
    config = config_of(place, lora__rank=2, model__path=str(tmp_path / "start"), train__steps=1)
    run.train(fields.replace(config, {"optimizer.learning_rate": 0.0}), str(tmp_path / "adapted"))
    held, start = load_trained(epath.Path(tmp_path / "adapted")), open_rewards(str(tmp_path / "start"))[0]
    np.testing.assert_array_equal(held.params["score"], start.params["score"])
    assert mean_score(tmp_path / "adapted", place / "shown.jsonl") == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", ["all_pairs", "outcome", "process"])
def test_each_form_of_labels_trains(place, loss, tmp_path):
    run.train(config_of(place, loss, train__steps=2), str(tmp_path / "run"))
    first, second = lines(tmp_path / "run/metrics.jsonl")
    # Of three answers one pair is a tie, which says nothing.
    assert first["loss"] == pytest.approx(math.log(2) * (2 / 3 if loss == "all_pairs" else 1), rel=1e-6)
    assert second["loss"] != first["loss"]
    if loss == "process":
        assert first["steps/count"] == 2 and 0.5 < first["steps/right"] < 1
        export.main(export.Export(str(tmp_path / "run"), str(tmp_path / "out")))
        assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [
            "LlamaForTokenClassification"
        ]


# ---- ensembles


def test_five_members_in_one_program_are_five_runs(place):
    config = config_of(place, data__bootstrap=True, reward__head="normal", reward__members=5, train__steps=3)
    sweep.train_ensemble(config, str(place / "ensemble"))
    members = open_rewards(str(place / "ensemble"))
    assert len(members) == 5 and len({float(member.params["score"][0]) for member in members}) == 5
    for seed in range(5):
        own = place / f"ensemble/members/seed={seed}"
        alone = fields.from_dict(Config, json.loads((own / "config.json").read_text()))
        assert alone.data.split_seed == 0 and alone.reward.members == 1
        run.train(alone, str(place / f"alone{seed}"))
        for one, other in zip(params_of(own), params_of(place / f"alone{seed}"), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert lines(own / "eval.jsonl")[-1] == pytest.approx(lines(place / f"alone{seed}/eval.jsonl")[-1], rel=1e-4)
    # Each on rows of its own, and all are held to the same ones.
    held = [{row["row"] for row in lines(place / f"ensemble/members/seed={seed}/held_out.jsonl")} for seed in range(5)]
    assert all(one == held[0] for one in held)
    assert len({lines(place / f"ensemble/members/seed={s}/metrics.jsonl")[0]["num_tokens"] for s in range(5)}) > 1
    with pytest.raises(UserError, match="already holds an ensemble; continue it with --resume"):
        sweep.train_ensemble(config, str(place / "ensemble"))
    sweep.train_ensemble(config, str(place / "ensemble"), resume=True)  # there is nothing left to do


# ---- what is refused

REFUSED = [
    ({"algorithm": "sft", "loss__name": "nll", "reward__head": "normal"}, "'sft' would ignore --config.reward.head"),
    ({"loss__name": "dpo"}, "'reward' can't run the loss 'dpo'; .*use --config.algorithm=preference"),
    ({"loss__name": "bradley_terry+nll"}, "'reward' can't run the loss 'nll'"),
    ({"loss__name": "bradley_terry+all_pairs"}, "takes pairs and all_pairs takes rankings"),
    ({"loss__beta": 0.1}, "'bradley_terry' would ignore beta; it takes label_smoothing, margin, centre"),
    ({"loss__centre": -1.0}, "loss.centre=-1.0 is not allowed; it must be at least 0"),
    ({"loss__name": "process", "loss__neutral": 2.0}, "loss.neutral=2.0 is not allowed; it must be from 0 to 1"),
    ({"loss__name": "outcome", "reward__demonstrations": ("x",)}, "the loss 'outcome' are the log-odds of being right"),
    ({"loss__name": "outcome", "data__merge": True}, "data.merge makes soft labels of pairs and rankings"),
    ({"loss__name": "plackett_luce", "data__ties": True}, "'plackett_luce' would ignore --config.data.ties"),
    ({"preference__weighting": "wpo"}, "'reward' would ignore --config.preference.weighting"),
    ({"reward__members": 3}, "reward.members=3 is an ensemble, which python -m experiments.train trains"),
    ({"reward__members": 0}, "reward.members=0 is not allowed; it must be at least 1"),
    ({"reward__demonstrations": ("/nowhere.jsonl",)}, "/nowhere.jsonl"),
    ({"loss__name": "process"}, "this loss needs solutions with a label for each step and .*pairs.jsonl holds pairs"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_means_nothing_is_refused_in_a_sentence(place, tmp_path, changes, says):
    config = config_of(place)
    with pytest.raises(UserError, match=says) as error:
        run.train(
            fields.replace(config, {name.replace("__", "."): value for name, value in changes.items()}),
            str(tmp_path / "run"),
        )
    assert "\n" not in str(error.value)


def test_soft_labels_are_for_losses_that_read_them(place, tmp_path):
    config = fields.replace(config_of(place), {"algorithm": "preference", "loss.name": "ipo", "data.merge": True})
    with pytest.raises(
        UserError, match="'ipo' would ignore --config.data.merge: it takes no label_smoothing row by row"
    ):
        run.train(config, str(tmp_path / "run"))


def test_a_model_that_scores_writes_nothing_and_one_that_writes_scores_nothing(trained, place, tmp_path):
    with pytest.raises(UserError, match="holds a reward model, which scores answers and writes none; give --model"):
        open_policy(str(trained))
    with pytest.raises(UserError, match="holds a model that writes answers and scores none; give --reward"):
        open_rewards(str(place / "model"))
    export.main(export.Export(str(trained), str(tmp_path / "start")))
    config = dataclasses.replace(make_config(place, "dpo"), loss=Loss(name="dpo"))
    with pytest.raises(UserError, match="holds a reward model, not a language model"):
        run.train(fields.replace(config, {"model.path": str(tmp_path / "start")}), str(tmp_path / "run"))
