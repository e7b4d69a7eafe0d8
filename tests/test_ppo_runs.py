"""Whole runs of PPO: from prompts to a policy, killed and resumed anywhere, with every kind of value and reward."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from rlhf_jax import fields, run
from rlhf_jax.algorithms.ppo import PpoConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.build import build
from rlhf_jax.config import Config
from rlhf_jax.data.config import Data
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.feedback.rewards import RewardsConfig
from rlhf_jax.metrics import Log
from rlhf_jax.workdir import load_trained, open_policy, open_rewards
from tests import rewards, tiny
from tests.test_reward_runs import config_of as reward_config
from tests.test_run import Killed, lines, make_config


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model, a reward model of the same tokenizer, pairs and prompts."""
    folder = tmp_path_factory.mktemp("ppo")
    tiny.write_model(folder / "model")
    pairs = [json.loads(line) for line in tiny.write_pairs(folder / "pairs.jsonl").read_text().splitlines()]
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("prompts.jsonl", [{"prompt": p["prompt"], "loud": i % 2 > 0} for i, p in enumerate(pairs[:20])])
    write("text.jsonl", [{"text": p["chosen"]} for p in pairs])
    config = reward_config(folder, reward__demonstrations=(str(folder / "pairs.jsonl"),), train__steps=6)
    run.train(config, str(folder / "reward"))
    write("steps.jsonl", [{"prompt": p["prompt"], "completions": [" red,", " sun"], "labels": [1, 0]} for p in pairs])
    data = {"data.path": (str(folder / "steps.jsonl"),), "loss.name": "process", "reward.demonstrations": ()}
    run.train(fields.replace(config, data | {"reward.head": "normal"}), str(folder / "steps"))
    return folder


def config_of(place: pathlib.Path, **changes: Any) -> Config:
    """Two rollouts of eight, each four updates; `changes` by dotted field, with __ for the dots."""
    config = dataclasses.replace(
        make_config(place, "ppo"), algorithm="ppo",
        data=Data(path=(str(place / "prompts.jsonl"),), eval_share=0.2),
        rollout=RolloutConfig(max_new_tokens=12, epochs=2, minibatches=2, slots=8),
        rewards=RewardsConfig(functions=("tests.rewards:letters",)),
        ppo=PpoConfig(missing_end="subtract", missing_end_score=0.0),  # nearly nothing ends by itself
    )  # fmt: skip
    short = {"train.steps": 8, "evaluate.every": 4, "checkpoint.every": 2, "optimizer.schedule": "constant"}
    changed = fields.replace(config, short | {n.replace("__", "."): x for n, x in changes.items() if n != "ppo"})
    return dataclasses.replace(changed, ppo=changes["ppo"]) if "ppo" in changes else changed


def train(place: pathlib.Path, name: str, **changes: Any) -> pathlib.Path:
    run.train(config_of(place, **changes), str(place / name), resume=True)
    return place / name


@pytest.fixture(scope="module")
def whole(place) -> pathlib.Path:
    return train(place, "whole")


def policy_of(workdir: pathlib.Path) -> list[np.ndarray]:
    return list(map(np.asarray, jax.tree.leaves(load_trained(epath.Path(workdir)).params)))


def same(one: pathlib.Path, other: pathlib.Path) -> bool:
    return all(map(np.array_equal, policy_of(one), policy_of(other)))


def figures(workdir: pathlib.Path, file: str = "metrics.jsonl") -> list[dict[str, float]]:
    """What the lines of a log say, without clocks."""
    clocks = ("seconds", "tokens_per_second", "time")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in lines(workdir / file)]


# ---- what a run leaves


def test_a_run_tells_what_it_earned_and_shows_some_of_it(whole, place):
    rows, evaluations = lines(whole / "metrics.jsonl"), lines(whole / "eval.jsonl")
    first, moved = rows[0], rows[3]
    assert len(rows) == 8 and first["policy/ratio"] == pytest.approx(1, abs=1e-6) and abs(first["kl"]) < 1e-6
    assert first["objective/rlhf_reward"] == pytest.approx(first["objective/score"], abs=1e-6)
    assert moved["policy/approxkl"] > 0 and abs(rows[4]["objective/kl"]) > 1e-6
    named = {"objective/score", "objective/kl", "objective/non_score_reward", "policy/approxkl", "clip_ratio/low"}
    assert named | {"val/loss", "val/explained", "entropy", "completions/length", "completions/ended"} <= set(first)
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    assert evaluations[0]["eval/kl"] == pytest.approx(0, abs=1e-5) and evaluations[2]["eval/kl"] != 0
    price = 0.05 * evaluations[2]["eval/kl"]
    assert evaluations[2]["eval/loss"] == pytest.approx(price - evaluations[2]["eval/score"], rel=1e-4)
    shown = lines(whole / "samples.jsonl")
    held_out = {json.loads(line)["row"] for line in (whole / "held_out.jsonl").read_text().splitlines()}
    assert {row["row"] for row in shown} == held_out and len(shown) == 3 * len(held_out)
    assert all(row["score"] <= 1 and row["prompt"] for row in shown)
    policy = open_policy(str(whole))  # as any program opens it, without the value
    assert "score" not in policy.params and policy.model.shape.head == "words"


def test_without_a_learning_rate_nothing_moves_for_ever(place):
    workdir = train(place, "still", optimizer__learning_rate=0.0, train__steps=12)
    for row in lines(workdir / "metrics.jsonl"):
        assert row["objective/kl"] == 0 and row["clip_ratio/low"] == row["clip_ratio/high"] == 0
        # Minibatches are other programs than the one that measured the whole rollout: what is left is rounding.
        assert row["policy/ratio"] == pytest.approx(1, abs=1e-6)
        assert row["policy/approxkl"] < 1e-11 and abs(row["kl"]) < 1e-6
    told = figures(workdir, "eval.jsonl")
    assert all(row == told[0] | {"step": row["step"]} for row in told)  # and evaluations draw the same
    start = open_policy(str(place / "model"))
    assert all(map(np.array_equal, policy_of(workdir), map(np.asarray, jax.tree.leaves(start.params))))


# ---- killed and resumed


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(whole, place, monkeypatch, step):
    """After the first minibatch, the second, between two rollouts, and in the second one."""
    write = Log.step

    def killed(self: Log, row: dict[str, float], tokens: int) -> None:
        if row["step"] == step:
            raise Killed
        write(self, row, tokens)

    name = f"killed{step}"
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(Log, "step", killed)
        train(place, name, checkpoint__every=1)
    train(place, name, checkpoint__every=1)
    assert same(whole, place / name) and figures(place / name)[-1] == figures(whole)[-1]
    assert figures(place / name, "eval.jsonl")[-1] == figures(whole, "eval.jsonl")[-1]


def test_a_run_that_was_killed_during_a_rollout_makes_that_one_anew(whole, place):
    """Its scoring fails: of the second rollout, which comes after an evaluation and the first one."""
    rewards.calls.clear()
    rewards.broken.append(3)
    with pytest.raises(rewards.Broken):
        train(place, "scoring")
    train(place, "scoring")
    assert same(whole, place / "scoring")
    assert len(rewards.calls) == 3 + 2, "the second rollout and the last evaluation"


# ---- what the value begins as, and adapters


def state_of(place: pathlib.Path, **changes: Any) -> Any:
    built = build(config_of(place, **changes), epath.Path(place / "unused"))
    return run.Run([built], None)


def test_the_value_begins_as_the_reward_model_in_reward_units(place):
    config = {"rewards__functions": (), "rewards__model": str(place / "reward")}
    (reward,) = open_rewards(str(place / "reward"))
    assert float(reward.params["score_bias"]) != 0, "the shift of the checkpoint is in it"
    started = state_of(place, **config)
    for one, other in zip(*map(jax.tree.leaves, (started.state.params["value"], reward.params)), strict=True):
        np.testing.assert_array_equal(one, other)
    feed = started._feed()
    batch = next(started.prepare(started.whole_state, next(feed)[1]))
    subject = Subject("reward", reward.model, reward.params, reward.tokenizer)
    tokens, segments = (np.asarray(batch[name])[:, 0] for name in ("tokens", "segments"))
    ids = [row[real > 0] for row, real in zip(tokens, segments, strict=True)]
    np.testing.assert_allclose(batch["score"], Rewards("reward", [subject]).scores(ids)[0], atol=1e-5)
    started.state, _ = started.step(started.state, started.frozen, batch)
    workdir = train(place, "from_reward", **config)
    assert 0 < lines(workdir / "metrics.jsonl")[0]["val/loss"] < math.inf


@pytest.mark.parametrize("credit", ["step", "end"])
def test_steps_are_paid_where_they_end_or_all_of_them_at_the_end(place, credit):
    """Without a value, a price and whitening the return of a token is what is still to come."""
    config = {
        "rewards__functions": (), "rewards__model": str(place / "steps"), "rewards__step_end": "[a-f ]",
        "ppo__credit": credit, "ppo__value": "head", "ppo__kl": 0.0, "ppo__lam": 1.0, "ppo__whiten_advantages": False,
    }  # fmt: skip
    started = state_of(place, **config)
    batch = next(started.examine(started.whole_state, next(started._feed())[1]))
    scores, mask = started.built.online.score(batch), np.asarray(batch["mask"])[:, 0]
    assert scores.steps is not None and (np.count_nonzero(scores.steps, axis=1) > 1).any()
    paid = scores.steps if credit == "step" else np.zeros_like(scores.steps)
    upto = np.cumsum(paid, axis=1) - paid
    expected = np.where(mask, np.asarray(batch["score"])[:, None] - upto, 0)
    np.testing.assert_allclose(np.asarray(batch["returns"])[:, 0], expected, atol=2e-5)
    np.testing.assert_allclose(batch["score"], scores.total, atol=1e-6)
    assert "step_rewards" not in batch


def test_a_model_of_steps_is_no_beginning_for_a_value(place):
    steps = {"rewards__functions": (), "rewards__model": str(place / "steps"), "rewards__step_end": "[a-f ]"}
    value = state_of(place, **steps).state.params["value"]
    assert not np.asarray(value["score"]).any(), "it begins as the policy with a new head"


def test_a_run_goes_on_with_its_own_reward_model_alone(place):
    config = {"rewards__functions": (), "rewards__model": str(shutil.copytree(place / "reward", place / "judge"))}
    built = build(config_of(place, **config), epath.Path(place / "judged"))
    built.workdir.mkdir()
    run.begin(built)
    run.begin(built, 2)
    (place / "judge" / "checkpoints" / "6" / "state" / "more").write_text("")
    with pytest.raises(UserError, match="judge is not the one that .*judged' was started with; put its weights back"):
        run.begin(built, 2)
    run.begin(built)


def test_a_value_of_its_own_begins_as_the_policy_with_a_new_head_or_is_a_head_of_the_policy(place):
    alone, head = (state_of(place, ppo__value=value).state.params for value in ("separate", "head"))
    assert not np.asarray(alone["value"]["score"]).any() and set(head["value"]) == {"score", "score_bias"}
    layers = lambda tree: jax.tree.leaves(tree["layers"])
    assert all(map(np.array_equal, layers(alone["value"]), layers(alone["policy"])))
    rows = lines(train(place, "head", ppo__value="head") / "metrics.jsonl")
    assert rows[0]["val/explained"] == 0 and rows[4]["val/explained"] != 0


def test_an_adapter_is_held_against_its_base_and_leaves_it(place):
    workdir = train(place, "adapter", lora__rank=2, ppo__value="head", optimizer__learning_rate=1e-2)
    rows = lines(workdir / "metrics.jsonl")
    assert rows[0]["objective/kl"] == 0 and rows[4]["objective/kl"] != 0
    assert set(load_trained(epath.Path(workdir)).params["layers"]["query"]) == {"lora_a", "lora_b"}
    merged, base = open_policy(str(workdir)), open_policy(str(place / "model"))
    moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (merged.params, base.params)), strict=True)]
    assert any(moved) and not all(moved)


# ---- rewards, text beside


def test_rewards_are_weighed_where_they_apply_and_each_is_told(place):
    names = ("tests.rewards:letters", "tests.rewards:shouting")
    started = state_of(place, rewards__functions=names, rewards__weights=(2.0, -3.0), rollout__samples=2)
    batch = next(started.examine(started.whole_state, next(started._feed())[1]))
    loud, small = (batch["rewards"][name] for name in (names[1], names[0]))
    applies = np.asarray(batch["applies"][names[1]])
    np.testing.assert_allclose(batch["score"], np.asarray(2 * small - 3 * loud), atol=1e-6)
    index = np.asarray(batch["index"])
    np.testing.assert_array_equal(applies, index % 2 > 0)
    assert not np.asarray(loud)[~applies].any() and (index[::2] == index[1::2]).all()


def test_a_row_that_stands_twice_in_a_rollout_is_answered_twice(place):
    """Six prompts are trained on and a rollout has eight rows."""
    started = state_of(place, data__eval_share=0.7)
    batch = next(started.examine(started.whole_state, next(started._feed())[1]))
    index, tokens = np.asarray(batch["index"]), np.asarray(batch["tokens"])[:, 0]
    again = [(i, j) for i in range(8) for j in range(i) if index[i] == index[j]]
    assert again and all((tokens[i] != tokens[j]).any() for i, j in again)


def test_each_update_learns_from_text_of_its_own(whole, place):
    text = {"ppo__pretrain": (str(place / "text.jsonl"),), "ppo__pretrain_weight": 0.5}
    started = state_of(place, **text)
    first, second, *_ = started.prepare(started.whole_state, next(started._feed())[1])
    assert first["pretrain"]["tokens"].shape[0] == 4 and not np.array_equal(
        first["pretrain"]["tokens"], second["pretrain"]["tokens"]
    )
    rows = lines(train(place, "beside", **text) / "metrics.jsonl")
    without = lines(whole / "metrics.jsonl")
    assert rows[0]["loss/pretrain"] > 1 and rows[-1]["loss/pretrain"] < rows[0]["loss/pretrain"]
    parts = ("policy", "value", "pretrain")
    weights = (1, 0.1, 0.5)
    expected = sum(w * rows[0][f"loss/{p}"] for p, w in zip(parts, weights, strict=True))
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["loss/policy"] == pytest.approx(without[0]["loss/policy"], abs=1e-6)


def test_a_price_that_adapts_and_an_early_stop_are_part_of_the_checkpoint(place):
    changes = {"ppo__kl_target": 0.01, "ppo__kl_horizon": 50.0, "ppo__stop_kl": 1e-6}
    rows = lines(train(place, "adaptive", **changes) / "metrics.jsonl")
    assert rows[0]["objective/coefficient"] == pytest.approx(0.05) != rows[4]["objective/coefficient"]
    assert [row["learning_rate"] > 0 for row in rows] == [True, True, False, False] * 2
    train(place, "adaptive_halves", **changes, train__steps=3)
    assert same(train(place, "adaptive_halves", **changes), place / "adaptive")


def test_a_mesh_draws_and_learns_alike(place):
    """Sampled tokens are the same, and so every figure but for rounding.

    A draw that lies within rounding of where one token ends and the next begins falls to either; one of the seed 0
    does without fused multiply-adds.
    """
    alone = lines(train(place, "alone", train__steps=4, seed=2) / "metrics.jsonl")
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    several = lines(train(place, "mesh", train__steps=4, seed=2, **mesh) / "metrics.jsonl")
    for one, other in zip(alone, several, strict=True):
        for name in ("loss", "objective/score", "completions/length", "val/loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


# ---- what is refused

REFUSED = {
    "nothing says what is good": ({"rewards__functions": ()}, "give --config.rewards.model=FOLDER"),
    "a reward that there isn't": ({"rewards__functions": ("gould",)}, "nearest is 'gold'"),
    "weights without functions": (
        {"rewards__functions": (), "rewards__model": "x", "rewards__weights": (1.0,)},
        "--config.rewards.weights would be ignored",
    ),
    "a model that writes": ({"rewards__model": "model"}, "scores none; give --config.rewards.model"),
    "samples that don't divide": ({"rollout__samples": 3}, "8 completions, which --config.rollout.samples=3"),
    "no room for a prompt": ({"rollout__max_new_tokens": 64}, "leaves no room for a prompt in rows of 64 tokens"),
    "packing": ({"data__pack": True}, "rollouts have prompts; drop it"),
    "a loss of rows": ({"loss__name": "gspo"}, "algorithm 'ppo' can't run the loss 'gspo'"),
    "two losses": ({"loss__name": "ppo+dapo"}, "has one loss of its policy"),
    "a preference loss": ({"loss__name": "dpo"}, "use --config.algorithm=preference"),
    "k1 in the loss": ({"ppo__kl_in": "loss", "ppo__kl_estimator": "k1"}, "no gradient on average"),
    "a horizon without a target": ({"ppo__kl_horizon": 5.0}, "give --config.ppo.kl_target too"),
    "a weight without text": ({"ppo__pretrain_weight": 2.0}, "--config.ppo.pretrain names none"),
    "a head from a model": ({"ppo__value": "head", "ppo__value_path": "x"}, "would ignore --config.ppo.value_path"),
    "a section of rollouts": (
        {"algorithm": "preference", "loss__name": "dpo", "ppo": PpoConfig()},
        "'preference' would ignore --config.rollout.max_new_tokens",
    ),
    "a deadline of nothing": ({"rewards__functions": (), "rewards__model": "x", "rewards__deadline": 5.0},
                              "deadline would be ignored without --config.rewards.functions"),
    "steps without a model": ({"rewards__step_end": "x"}, "step_end would be ignored without --config.rewards.model"),
    "a score of no steps": (
        {"rewards__model": "x", "rewards__step_score": "last"}, "step_score would be ignored without",
    ),
    "a verifier of no steps": ({"rewards__verifier": "world"}, "verifier would be ignored without"),
    "a score of verified steps": (
        {"rewards__verifier": "world", "rewards__step_end": "x", "rewards__step_score": "last"},
        "--config.rewards.step_score would be ignored without --config.rewards.model",
    ),
    "a verifier beside a model": (
        {"rewards__model": "x", "rewards__verifier": "world", "rewards__step_end": "x"}, "drop one of them",
    ),
    "no such verifier": ({"rewards__verifier": "wurld", "rewards__step_end": "x"}, "the nearest is 'world'"),
    "credit without steps": ({"ppo__credit": "end"}, "--config.ppo.credit would be ignored"),
    "no pattern": ({"rewards__model": "x", "rewards__step_end": "["}, "step_end='[' is no regular expression"),
    "a pattern of nothing": ({"rewards__model": "x", "rewards__step_end": "a*"}, "matches where there is no text"),
    "steps of a model of wholes": (
        {"rewards__model": "reward", "rewards__step_end": "x"}, "reward scores whole ones; drop it",
    ),
    "wholes of a model of steps": ({"rewards__model": "steps"}, "steps scores steps; give --config.rewards.step_end"),
    "a negative price": ({"ppo__kl": -1.0}, "--config.ppo.kl=-1.0 is not allowed; it must be at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_means_nothing_is_one_sentence(place, case):
    changes, says = REFUSED[case]
    if (name := changes.get("rewards__model")) in ("model", "reward", "steps"):
        changes = changes | {"rewards__model": str(place / name)}
    with pytest.raises(UserError, match=re.escape(says)) as error:
        run.train(config_of(place, **changes), str(place / "refused"))
    assert not (place / "refused" / "metrics.jsonl").exists() and "\n" not in str(error.value)


def test_a_reward_that_is_no_number_shows_the_sample(place, monkeypatch):
    monkeypatch.setattr("tests.rewards.letters", lambda prompts, completions, **_: [math.nan] * len(completions))
    with pytest.raises(UserError, match="gave nan for the answer '"):
        train(place, "nan")
