"""Whole runs of on-policy distillation: killed and resumed, on a mesh, as an adapter, and what is refused."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from rlhf_jax import checks, fields, run
from rlhf_jax.algorithms.distill import DistillConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.build import build
from rlhf_jax.config import Config, Loss
from rlhf_jax.data.config import Data
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import Log
from rlhf_jax.workdir import open_policy
from tests import tiny
from tests.test_ppo_runs import figures, policy_of, same
from tests.test_run import Killed, arrays, lines, make_config


def write_model(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    return tiny.write_model(folder, tiny.CONFIG | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model, a wider one with the same tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("distill")
    write_model(folder / "model")
    write_model(folder / "teacher", hidden_size=36, num_attention_heads=2)
    pairs = [json.loads(line) for line in tiny.write_pairs(folder / "pairs.jsonl").read_text().splitlines()]
    prompts = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in pairs[:20]]
    (folder / "prompts.jsonl").write_text("".join(prompts))
    return folder


def config_of(place: pathlib.Path, **changes: Any) -> Config:
    """Rollouts of eight, two updates each, without a reward."""
    config = dataclasses.replace(
        make_config(place, "jsd"), algorithm="distill", distill=DistillConfig(str(place / "teacher")),
        data=Data(path=(str(place / "prompts.jsonl"),), eval_share=0.2),
        rollout=RolloutConfig(max_new_tokens=10, minibatches=2, slots=8),
    )  # fmt: skip
    short = {
        "train.steps": 8, "evaluate.every": 4, "checkpoint.every": 2, "optimizer.schedule": "constant",
        "optimizer.learning_rate": 1e-2,
    }  # fmt: skip
    return fields.replace(config, short | {name.replace("__", "."): x for name, x in changes.items()})


def train(place: pathlib.Path, name: str, **changes: Any) -> pathlib.Path:
    run.train(config_of(place, **changes), str(place / name), resume=True)
    return place / name


@pytest.fixture(scope="module")
def whole(place) -> pathlib.Path:
    return train(place, "whole")


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
def test_a_run_without_a_reward_comes_nearer_to_its_teacher(whole):
    rows, evaluations = lines(whole / "metrics.jsonl"), lines(whole / "eval.jsonl")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"] and {"kl", "objective/kl", "entropy"} <= set(rows[0])
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    assert evaluations[2]["eval/loss"] < 0.9 * evaluations[0]["eval/loss"] and "eval/score" not in evaluations[0]
    shown, held_out = lines(whole / "samples.jsonl"), lines(whole / "held_out.jsonl")
    assert set(shown[0]) == {"step", "row", "prompt", "completion"}
    assert set(held_out[0]) == {"row", "index", "loss", "kl", "length"}
    kept = arrays(whole, 8)  # the teacher's kernels are as wide as none of the student's
    assert not any(36 in array.shape for array in kept.values()) and not any("frozen" in name for name in kept)
    assert open_policy(str(whole)).model.shape.width == 32  # as any program opens it


def test_a_run_that_was_killed_goes_on_to_the_same_bits(whole, place, monkeypatch):
    write = Log.step

    def killed(self: Log, row: dict[str, float], tokens: int) -> None:
        if row["step"] == 4:
            raise Killed
        write(self, row, tokens)

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(Log, "step", killed)
        train(place, "killed", checkpoint__every=3)  # between the two updates of a rollout
    train(place, "killed", checkpoint__every=3)
    assert same(whole, place / "killed") and figures(place / "killed")[-1] == figures(whole)[-1]
    assert figures(place / "killed", "eval.jsonl") == figures(whole, "eval.jsonl")


def test_a_run_goes_on_with_its_own_teacher_alone(place):
    teacher = {"distill__teacher": str(place / "replaced")}
    shutil.copytree(place / "teacher", place / "replaced")
    train(place, "short", **teacher, train__steps=2)
    run.begin(build(config_of(place, **teacher), epath.Path(place / "short")), 2)
    moved = {"distill__teacher": str(shutil.copytree(place / "teacher", place / "elsewhere"))}
    train(place, "short", **moved, train__steps=4)  # the same weights by another name
    weights = bytearray((place / "replaced" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (place / "replaced" / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="replaced is not the one that .*short' was started with; put its weights"):
        train(place, "short", **teacher)
    run.begin(build(config_of(place, **teacher), epath.Path(place / "short")))  # what starts anew is held to nothing


def test_a_run_teaches_too_and_each_of_its_checkpoints_is_another_teacher(whole, place):
    opened = lambda at: build(config_of(place, distill__teacher=f"{whole}{at}"), epath.Path(place / "unused")).online
    made: list[Any] = [opened(at) for at in ("", "@8", "@6")]
    newest, last, before = (one.teacher for one in made)
    assert newest.identity == last.identity != before.identity
    for held, trained in zip(jax.tree.leaves(newest.params), policy_of(whole), strict=True):
        np.testing.assert_array_equal(held, trained)
    assert f"taught by {whole};" in made[0].describe(8) and "scored" not in made[0].describe(8)


def test_a_mesh_draws_and_learns_alike(place):
    """With a seed of which no draw is as near to the next token as rounding reaches (tests/test_ppo_runs.py)."""
    few = {"evaluate__rows": 0, "train__steps": 4, "seed": 2}
    mesh = {"mesh__fsdp": 2, "mesh__tensor": 2, "train__microbatches": 2}
    alone, several = (
        lines(train(place, name, **few, **more) / "metrics.jsonl") for name, more in (("alone", {}), ("mesh", mesh))
    )
    for one, other in zip(alone, several, strict=True):
        for name in ("loss", "kl", "objective/kl", "completions/length", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_an_adapter_learns_and_a_reward_is_looked_at(place):
    scored = {"rewards__functions": ("tests.rewards:letters",), "lora__rank": 2}
    workdir = train(place, "adapter", **scored, train__steps=4)
    rows, shown = lines(workdir / "metrics.jsonl"), lines(workdir / "samples.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] and 0 <= rows[0]["objective/score"] <= 1
    last = lines(workdir / "eval.jsonl")[-1]
    assert last["eval/score"] == pytest.approx(np.mean([row["score"] for row in shown if row["step"] == 4]), abs=1e-5)
    merged, base = open_policy(str(workdir)), open_policy(str(place / "model"))
    moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (merged.params, base.params)), strict=True)]
    assert any(moved) and not all(moved)


# ---- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": ({"distill__teacher": None}, "there is no teacher to learn from; give --config.distill.teacher="),
    "a share above 1": ({"loss__beta": 1.5}, "--config.loss.beta=1.5 is not allowed; it must be from 0 to 1"),
    "a loss of pairs": ({"loss__name": "dpo"}, "can't run the loss 'dpo'; .* use --config.algorithm=preference"),
    "weights of nothing": ({"rewards__weights": (1.0,)}, "--config.rewards.weights would be ignored without"),
    "a teacher of others": ({"algorithm": "rejection", "loss__name": "nll"}, "ignore --config.distill.teacher; drop"),
    "a run of others": ({"algorithm": "sft"}, "can't run the loss 'jsd'; .* use --config.algorithm=distill"),
    "a share of 0 elsewhere": (
        {"algorithm": "preference", "loss__name": "dpo", "loss__beta": 0.0}, "beta=0.0 is not .*; it must be above 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_means_nothing_is_one_sentence(place, case):
    changes, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        checks.check(config_of(place, **changes))


def test_the_ends_are_allowed_and_are_numbers(place):
    for beta in (0.0, 1.0):
        hyper = checks.check(config_of(place, loss__beta=beta)).chosen.hyper
        assert hyper["loss"] == {"jsd": {"beta": beta}} and hyper["distill"] == {}
    assert Loss(name="jsd").beta is None and checks.check(config_of(place)).chosen.hyper["loss"]["jsd"]["beta"] == 0.5


def swapped(folder: pathlib.Path) -> None:
    """Another meaning of two tokens."""
    file = folder / "tokenizer.json"
    written = json.loads(file.read_text())
    ids = written["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(written))


def templated(folder: pathlib.Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def ended(folder: pathlib.Path) -> None:
    """Another token ends its texts, as in an instruct model beside its base."""
    file = folder / "tokenizer_config.json"
    written = json.loads(file.read_text())
    assert written["eos_token"] != "a"
    file.write_text(json.dumps(written | {"eos_token": "a"}))


def shortened(folder: pathlib.Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))


OTHERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "tokens": (swapped, {}, "has another tokenizer than the student, and a token must mean the same to both"),
    "context": (shortened, {}, "64 tokens and the context of the teacher .* is 32; lower"),
    "mesh": (lambda folder: None, {"mesh__fsdp": 8, "train__batch_size": 8}, "fsdp=8 does not divide the 36"),
    "another template": (templated, {}, ""),
    "another end": (ended, {}, ""),
    "shorter rows": (shortened, {"data__length": 32}, ""),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_teacher_must_read_what_the_student_writes(tmp_path, place, case):
    change, changes, says = OTHERS[case]
    folder = tmp_path / "other"
    shutil.copytree(place / "teacher", folder)
    change(folder)
    made = lambda: build(config_of(place, distill__teacher=str(folder), **changes), epath.Path(tmp_path / "run"))
    if not says:
        assert made().online is not None
        return
    with pytest.raises(UserError, match=says) as error:
        made()
    assert "\n" not in str(error.value)


def test_another_vocabulary_a_reward_model_and_no_folder_teach_nothing(tmp_path, place):
    write_model(tmp_path / "larger", vocab_size=272)
    folder = pathlib.Path(shutil.copytree(place / "teacher", tmp_path / "scores"))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 1}))
    refused = {
        str(tmp_path / "larger"): "student has a vocabulary of 260 tokens and the teacher .* one of 272",
        str(folder): "score", "/nowhere": "'/nowhere' doesn't exist; give --config.distill.teacher",
    }  # fmt: skip
    for name, says in refused.items():
        with pytest.raises(UserError, match=says):
            build(config_of(place, distill__teacher=name), epath.Path(tmp_path / "run"))
