"""Online preferences and XPO: the right pairs with the right columns, the loss of written pairs, and whole runs.

The arithmetic is that of a model that says what its parameters are, see tests/test_group.py.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rlhf_jax import checks, fields, run
from rlhf_jax.algorithms import preference
from rlhf_jax.algorithms.online import LOSSES, OnlineConfig, _unadapted, check, make_judge, make_objective, make_prepare
from rlhf_jax.algorithms.rollouts import Around, RolloutConfig, Scores
from rlhf_jax.algorithms.step import TrainState
from rlhf_jax.build import build
from rlhf_jax.config import Config
from rlhf_jax.data.config import Data
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.rewards import RewardsConfig
from rlhf_jax.metrics import Log
from rlhf_jax.models import lora
from rlhf_jax.workdir import open_policy
from tests import problem, tiny
from tests import test_group as told
from tests.problem import part
from tests.test_group import ENDED, GROUPS, LENGTH, LENGTHS, LOGPROBS, MASK, REF, REWARDS, ROWS, SAMPLES, TOLD
from tests.test_ppo_runs import figures, same
from tests.test_run import Killed, lines, make_config

AS_SCORED = OnlineConfig(missing_end="subtract", missing_end_score=0.0)
WHOLE, WHOLE_REF = (np.where(MASK, x, 0).sum(axis=1) for x in (LOGPROBS, REF))  # [ROWS], nats
PAIRS = np.stack([3 * np.arange(GROUPS), 3 * np.arange(GROUPS) + 2], axis=1)  # which the scores below make
RISING = np.tile([2.0, 1.0, 0.5], GROUPS).astype(np.float32)


def hyper_of(name: str, config: OnlineConfig = AS_SCORED, temperature: float = 1.0, beta: float = 0.1) -> Any:
    numbers = {"beta": beta, "divergence_alpha": 0.5} if name == "dpo" else {"beta": beta}
    own = {"online": config.numbers, "rollout": {"temperature": temperature}}
    return jax.tree.map(jnp.float32, problem.numbers_of(name, **numbers) | own)


def scores_of(values: Any) -> Any:
    """Of one reward, which applies where it is a number."""

    def score(batch: Any) -> Scores:
        given = np.asarray(values, np.float32)[np.asarray(batch["tokens"])[:, 0, 0] // LENGTH][:, None]
        return Scores(np.nan_to_num(given), np.isfinite(given), np.ones(1, np.float32), ("told",))

    return score


def prepared(
    values: Any = RISING,
    config: OnlineConfig = AS_SCORED,
    *,
    more: int = 0,
    samples: int = SAMPLES,
    draw: Any = told.draw,
    score: Any = None,
    held_out: bool = False,
    temperature: float = 1.0,
) -> Any:
    """The one batch of the four prompts in their order; `more` prompts of padding behind them."""
    table = lambda x: {"logprobs": jnp.asarray(x), "entropy": jnp.asarray(told.ENTROPY)}
    hyper = hyper_of("dpo", config, temperature)
    state = TrainState(table(LOGPROBS), None, None, jnp.int32(0), told.key(), None, hyper)
    rollout = RolloutConfig(max_new_tokens=told.MOST, samples=samples)
    around = Around(draw, score or scores_of(values), rollout, held_out=held_out)
    reference = TOLD.policy, table(REF)
    prepare = make_prepare(TOLD, (part("dpo"),), config, reference, jax.jit, around)
    (made,) = prepare(state, {"index": np.arange(GROUPS + more)})
    made = jax.tree.map(np.asarray, made)
    order = np.argsort(np.where(made["index"] < 0, GROUPS, made["index"]), kind="stable")
    return made if held_out else jax.tree.map(lambda x: x[order], made)


def params_of(table: np.ndarray) -> Any:
    return {"logprobs": jnp.asarray(table), "entropy": jnp.asarray(told.ENTROPY)}


def objective_of(
    batch: Any, name: str = "dpo", config: OnlineConfig = AS_SCORED, table: np.ndarray = LOGPROBS, **more: Any
) -> Any:
    objective = make_objective(TOLD, (part(name),), config)
    return objective(params_of(table), None, hyper_of(name, config, **more), batch, told.key())


def mean_of(mean: Any) -> float:
    return float(mean.total / mean.count)


class Plain(told.Told):
    """As what learns from written pairs asks: without a temperature."""

    def token_stats(self, params: Any, rows: Any, *, want: Any = (), temperature: Any = 1.0) -> Any:
        return super().token_stats(params, rows, temperature=1.0, want=want)


# ---- which pairs


@pytest.mark.parametrize("more", [0, 2])
def test_a_prompts_best_and_worst_judged_completions_are_its_pair(more):
    values = np.asarray([0.5, 2, -1, math.nan, 3, 1, -2, math.nan, -1, 7, 7, 6], np.float32)
    batch = prepared(values, more=more)
    expected = np.asarray([[1, 2], [4, 5], [8, 6], [9, 11]])
    np.testing.assert_array_equal(batch["tokens"][:GROUPS, :, 0], expected * LENGTH)
    np.testing.assert_array_equal(batch["mask"][:GROUPS], MASK[expected])
    np.testing.assert_allclose(batch["ref_logprob"][:GROUPS], WHOLE_REF[expected], rtol=1e-6)
    np.testing.assert_array_equal(batch["labels"], [[True, False]] * (GROUPS + more))
    np.testing.assert_array_equal(batch["index"], [0, 1, 2, 3] + [-1] * more)
    np.testing.assert_array_equal(batch["weight"], [1] * GROUPS + [0] * more)
    np.testing.assert_array_equal(batch["weight"], batch["asked"])
    drawn, real = batch["drawn"], np.s_[:GROUPS]
    np.testing.assert_array_equal(drawn["score"][real].reshape(-1), np.nan_to_num(values))
    np.testing.assert_array_equal(drawn["length"][real].reshape(-1), LENGTHS)
    np.testing.assert_allclose(drawn["sequence_kl"][real].reshape(-1), WHOLE - WHOLE_REF, rtol=1e-5)
    assert not drawn["weight"][GROUPS:].any()
    means = objective_of(batch)[1]
    assert mean_of(means["objective/score"]) == pytest.approx(np.nan_to_num(values).mean())
    assert mean_of(means["objective/kl"]) == pytest.approx((WHOLE - WHOLE_REF).mean(), rel=1e-5)
    assert mean_of(means["completions/length"]) == pytest.approx(LENGTHS.mean())
    assert mean_of(means["completions/ended"]) == pytest.approx(ENDED.mean())
    assert mean_of(means["pairs/equal"]) == 0
    ratios = 0.1 * (WHOLE - WHOLE_REF)[expected].mean(axis=0)
    assert mean_of(means["rewards/chosen"]) == pytest.approx(ratios[0], rel=1e-5)
    assert mean_of(means["logps/rejected"]) == pytest.approx(WHOLE[expected[:, 1]].mean(), rel=1e-5)


def test_prompts_of_equal_scores_or_texts_or_with_one_judged_answer_teach_nothing():
    """Of the first prompt all scores are equal, of the second best and worst are one text, of the third one counts."""

    def draw(params: Any, rows: Any, key: Any) -> Any:
        made = told.draw(params, rows, key)
        made["tokens"][5], made["segments"][5] = made["tokens"][3], made["segments"][3]
        return made

    def score(batch: Any) -> Scores:
        given = np.asarray([1, 1, 1, 2, 1, 0, 0, 0, 0, 5, 4, 3], np.float32)[:, None]
        applies = np.asarray([1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1], bool)[:, None]
        return Scores(given, applies, np.ones(1, np.float32), ("told",))

    batch = prepared(draw=draw, score=score)
    np.testing.assert_array_equal(batch["weight"], [0, 0, 0, 1])
    terms, means = objective_of(batch)
    assert terms["dpo"].count == 1 and mean_of(means["pairs/equal"]) == 0.75
    x = 0.1 * ((WHOLE - WHOLE_REF)[9] - (WHOLE - WHOLE_REF)[11])
    np.testing.assert_allclose(terms["dpo"].total, np.log1p(np.exp(-x)), rtol=1e-5)
    grad = jax.grad(lambda p: make_objective(TOLD, (part("dpo"),), AS_SCORED)(
        p, None, hyper_of("dpo"), batch, told.key())[0]["dpo"].total)(params_of(np.nan_to_num(LOGPROBS)))  # fmt: skip
    slope = np.asarray(grad["logprobs"])
    assert not slope[:9].any() and (slope[9][MASK[9]] < 0).all() and (slope[11][MASK[11]] > 0).all()


def test_a_completion_without_an_end_is_paired_by_the_score_that_it_gets():
    for rule, lost in (("replace", lambda x: -9.0 + 0 * x), ("subtract", lambda x: x - 9)):
        batch = prepared(config=OnlineConfig(missing_end=cast(Any, rule), missing_end_score=-9.0))
        counted = np.where(ENDED, RISING, lost(RISING)).reshape(GROUPS, SAMPLES)
        np.testing.assert_allclose(batch["drawn"]["score"], counted)
        expected = np.stack([counted.argmax(axis=1), counted.argmin(axis=1)], axis=1) + 3 * np.arange(GROUPS)[:, None]
        np.testing.assert_array_equal(batch["tokens"][:, :, 0], expected * LENGTH)
        assert (expected != PAIRS).any()


def test_several_rewards_are_told_of_all_completions():
    batch = prepared(score=told.scores(REWARDS, told.APPLIES), more=1)
    total = np.where(told.APPLIES, REWARDS * told.WEIGHTS, 0).sum(axis=1)
    means = objective_of(batch)[1]
    assert mean_of(means["objective/score"]) == pytest.approx(total.mean(), rel=1e-5)
    second = told.APPLIES[:, 1]
    assert mean_of(means["rewards/second"]) == pytest.approx(REWARDS[second, 1].mean(), rel=1e-5)


# ---- the loss


@pytest.mark.parametrize("name", LOSSES)
def test_the_objective_is_that_of_the_same_pairs_written_beforehand(name):
    batch = prepared(more=2)
    pairs = {column: x for column, x in batch.items() if column != "drawn"}
    written = preference.make_objective(cast(Any, Plain()), (part(name),))
    expected, means = written(params_of(LOGPROBS), None, hyper_of(name), pairs, told.key())
    terms, found = objective_of(batch, name)
    jax.tree.map(np.testing.assert_array_equal, terms, expected)
    jax.tree.map(np.testing.assert_array_equal, {n: found[n] for n in means}, means)
    assert terms[name].count == GROUPS and name not in ("aot", "aot_unpaired")


@pytest.mark.parametrize(("name", "expected"), [("dpo", math.log(2)), ("ipo", 25.0), ("hinge", 1.0)])
def test_the_first_step_is_at_the_reference(name, expected):
    terms, means = objective_of(prepared(), name, table=REF)
    assert mean_of(terms[name]) == pytest.approx(expected, rel=1e-6)
    assert means["rewards/margins"].total.sum() == pytest.approx(0, abs=1e-6)


def test_policy_and_reference_are_those_of_the_samplers_temperature():
    batch = prepared(temperature=0.5)
    np.testing.assert_allclose(batch["ref_logprob"], 2 * WHOLE_REF[PAIRS], rtol=1e-6)
    ratio = 2 * (WHOLE - WHOLE_REF)[PAIRS]
    terms, _ = objective_of(batch, temperature=0.5)
    expected = np.log1p(np.exp(-0.1 * (ratio[:, 0] - ratio[:, 1])))
    np.testing.assert_allclose(terms["dpo"].total, expected.sum(), rtol=1e-5)


def test_held_out_rollouts_stay_completions_in_their_order():
    batch = prepared(more=2, held_out=True, config=OnlineConfig(explore=1.0, missing_end_score=-3.0))
    np.testing.assert_array_equal(batch["tokens"][:ROWS, 0, 0], np.arange(ROWS) * LENGTH)
    assert "explored" not in batch and "drawn" not in batch
    terms, means, rows = make_judge(TOLD, ())({}, None, {}, batch, told.key())
    counted = np.where(ENDED, RISING, -3)
    np.testing.assert_allclose(rows["loss"][:ROWS], -counted)
    np.testing.assert_allclose(rows["kl"][:ROWS], WHOLE - WHOLE_REF, rtol=1e-5)
    assert terms["loss"].count == ROWS and mean_of(terms["loss"]) == pytest.approx(-counted.mean())
    assert mean_of(means["kl"]) == pytest.approx((WHOLE - WHOLE_REF).mean(), rel=1e-5)


# ---- XPO


def test_xpo_pairs_the_policys_answer_with_the_references_and_prices_the_latters_likelihood():
    """Two answers each: rows 0 to 5 are the policy's, 6 to 11 the reference's, of three prompts."""
    seen: list[Any] = []

    def draw(params: Any, rows: Any, key: Any) -> Any:
        policy = np.array_equal(params["logprobs"], LOGPROBS, equal_nan=True)
        seen.append((policy, tuple(np.asarray(key).tolist())))
        made = told.draw(params, {"index": np.arange(4)}, key)
        half = jax.tree.map(lambda x: x[:6] if policy else x[6:], made)
        return half | {"index": np.repeat(np.arange(3, dtype=np.int32), 2)}

    config = dataclasses.replace(AS_SCORED, explore=0.25)
    values = np.arange(ROWS, dtype=np.float32) * np.where(np.arange(ROWS) == 9, -1, 1)  # 7, 9 and 11 are explored
    batch = prepared(values, config, samples=2, draw=draw)
    assert [policy for policy, _ in seen] == [True, False] and seen[0][1] != seen[1][1]
    pairs, explored = np.asarray([[7, 0], [2, 9], [11, 4]]), np.asarray([[1, 0], [0, 1], [1, 0]], bool)
    np.testing.assert_array_equal(batch["tokens"][:, :, 0], pairs * LENGTH)
    np.testing.assert_array_equal(batch["explored"], explored)
    terms, means = objective_of(batch, config=config)
    assert terms["explore"].weight == 0.25 and terms["explore"].count == 3
    np.testing.assert_allclose(terms["explore"].total, WHOLE[[7, 9, 11]].sum(), rtol=1e-6)
    assert mean_of(means["loss/explore"]) == pytest.approx(WHOLE[[7, 9, 11]].mean(), rel=1e-6)
    plain = {name: x for name, x in batch.items() if name != "explored"}
    jax.tree.map(np.testing.assert_array_equal, terms["dpo"], objective_of(plain)[0]["dpo"])
    own = [0, 2, 4]  # what the policy itself earned
    assert mean_of(means["objective/score"]) == values[own].mean()
    assert mean_of(means["objective/kl"]) == pytest.approx((WHOLE - WHOLE_REF)[own].mean(), rel=1e-5)
    loss = lambda p: make_objective(TOLD, (part("dpo"),), config)(
        p, None, hyper_of("dpo", config), batch, told.key())[0]["explore"].total  # fmt: skip
    slope = np.asarray(jax.grad(loss)(params_of(np.nan_to_num(LOGPROBS)))["logprobs"])
    asked = np.isin(np.arange(ROWS), [7, 9, 11])[:, None] & MASK
    np.testing.assert_array_equal(slope, asked)  # a descent makes them less likely
    weightless = batch | {"weight": np.asarray([1, 0, 1], np.float32)}
    terms, _ = objective_of(weightless, config=config)
    np.testing.assert_allclose(terms["explore"].total, WHOLE[[7, 11]].sum(), rtol=1e-6)
    assert terms["explore"].count == 2


def test_an_adapter_of_zeros_is_the_base_that_xpo_draws_from():
    """Factors of 0, whose product is added to each map; tests/test_models_lora.py has what one of them is worth."""
    model = lora.attach(fields.replace(Config().lora, {"rank": 2}), problem.make_model())
    adapter, base = lora.split(jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), model.shapes()))
    taken = _unadapted(TrainState(adapter, base, None, jnp.int32(0), told.key(), None, {}))
    assert jax.tree.structure(taken) == jax.tree.structure(model.shapes())
    factors, rest = lora.split(taken)
    assert not any(map(np.any, jax.tree.leaves(factors)))
    jax.tree.map(np.testing.assert_array_equal, rest, base)


# ---- configs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model and prompts."""
    folder = tmp_path_factory.mktemp("online")
    tiny.write_model(folder / "model")
    pairs = [json.loads(line) for line in tiny.write_pairs(folder / "pairs.jsonl").read_text().splitlines()]
    prompts = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in pairs[:20]]
    (folder / "prompts.jsonl").write_text("".join(prompts))
    return folder


def config_of(place: pathlib.Path, **changes: Any) -> Config:
    """Rollouts of 16 prompts with two answers each, learnt from in four updates of eight pairs."""
    config = dataclasses.replace(
        make_config(place, "dpo"), algorithm="online", online=AS_SCORED,
        data=Data(path=(str(place / "prompts.jsonl"),), eval_share=0.2),
        rollout=RolloutConfig(max_new_tokens=10, samples=2, epochs=2, minibatches=2, slots=16),
        rewards=RewardsConfig(functions=("tests.rewards:letters",)),
    )  # fmt: skip
    short = {"train.steps": 8, "train.batch_size": 16, "evaluate.every": 4, "optimizer.schedule": "constant"}
    return fields.replace(config, short | {name.replace("__", "."): x for name, x in changes.items()})


def train(place: pathlib.Path, name: str, **changes: Any) -> pathlib.Path:
    run.train(config_of(place, **changes), str(place / name), resume=True)
    return place / name


REFUSED = {
    "one sample": ({"rollout__samples": 1}, "samples=1 leaves nothing to pair a completion with; give 2 or more"),
    "samples that don't divide": ({"rollout__samples": 3}, "= 32 completions, which --config.rollout.samples=3"),
    "explorers among many": ({"online__explore": 1.0, "rollout__samples": 4}, "samples=4 asks for more; give 2"),
    "a negative price": ({"online__explore": -1.0}, "online.explore=-1.0 is not allowed; it must be at least 0"),
    "rows in halves": ({"train__batch_size": 17}, "=17 does not divide into 1 microbatches of rows that stand for"),
    "microbatches": ({"train__microbatches": 3}, "make it a multiple of 6."),
    "a sorted loss": ({"loss__name": "aot"}, "'online' can't run the loss 'aot'; .* or use --config.algorithm=pref"),
    "a loss of tokens": ({"loss__name": "nll"}, "can't run the loss 'nll'; .* or use --config.algorithm=sft"),
    "two losses": ({"loss__name": "dpo+ipo"}, "has one loss of its policy; give one"),
    "a change of written pairs": ({"preference__weighting": "wpo"}, "'online' would ignore --config.preference.weig"),
    "another's section": ({"rejection__least": 0.0}, "'online' would ignore --config.rejection.least"),
    "a column": ({"data__margin": "gap"}, "'online' would ignore --config.data.margin, which is said of written"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_means_nothing_is_one_sentence(place, case):
    changes, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        checks.check(config_of(place, **changes))


def test_a_config_that_means_something_is_not_refused(place):
    for changes in ({}, {"loss__name": "simpo"}, {"rollout__samples": 4}, {"online__explore": 0.0}):
        checks.check(config_of(place, **changes))
    check(OnlineConfig(), RolloutConfig(samples=5))
    assert OnlineConfig(explore=1e-5).numbers == {"missing_end_score": -1.0, "explore": 1e-5}


# ---- whole runs


@pytest.fixture(scope="module")
def whole(place) -> pathlib.Path:
    return train(place, "whole")


def test_a_run_begins_at_log_2_and_moves(whole, place):
    rows, evaluations = lines(whole / "metrics.jsonl"), lines(whole / "eval.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5) and rows[4]["loss"] != rows[0]["loss"]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6) and abs(rows[4]["objective/kl"]) > 1e-6
    assert {"rewards/accuracies", "logps/chosen", "pairs/equal", "completions/ended", "objective/score"} <= set(rows[0])
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    for row in evaluations:
        assert row["eval/loss"] == pytest.approx(-row["eval/score"], rel=1e-6)
    held_out = lines(whole / "held_out.jsonl")
    assert len(held_out) == 5 and all(row["loss"] == pytest.approx(-row["score"]) for row in held_out)
    assert len(lines(whole / "samples.jsonl")) == 3 * 2 * len(held_out)
    assert open_policy(str(whole)).model.shape.head == "words"


def test_a_run_that_was_killed_in_a_rollout_goes_on_to_the_same_bits(whole, place, monkeypatch):
    write = Log.step

    def killed(self: Log, row: dict[str, float], tokens: int) -> None:
        if row["step"] == 6:
            raise Killed
        write(self, row, tokens)

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(Log, "step", killed)
        train(place, "killed", checkpoint__every=1)
    train(place, "killed", checkpoint__every=1)
    assert same(whole, place / "killed") and figures(place / "killed")[-1] == figures(whole)[-1]
    assert figures(place / "killed", "eval.jsonl")[-1] == figures(whole, "eval.jsonl")[-1]


def test_a_mesh_pairs_and_learns_alike(whole, place):
    """What is paired lies on several devices; how a model is cut is of no matter here (tests/test_ppo_runs.py)."""
    several = lines(train(place, "mesh", train__steps=4, mesh__data=4) / "metrics.jsonl")
    for one, other in zip(lines(whole / "metrics.jsonl")[:4], several, strict=True):
        for name in ("loss", "objective/score", "pairs/equal", "logps/chosen", "rewards/margins", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_xpo_draws_from_the_base_of_an_adapter(place):
    config = config_of(place, online__explore=0.01, lora__rank=2)
    started = run.Run([build(config, epath.Path(place / "unused"))], None)
    batch = next(started.prepare(started.whole_state, next(started._feed())[1]))
    real = np.asarray(batch["weight"]) > 0
    assert real.any() and (np.asarray(batch["explored"]).sum(axis=1) == 1)[real].all()
    tokens = np.asarray(batch["tokens"])[real]
    assert (tokens[:, 0] != tokens[:, 1]).any(axis=1).all()
    drawn = batch["drawn"]
    np.testing.assert_array_equal(np.asarray(drawn["weight"]), np.tile([1, 0], (8, 1)))
    assert not np.asarray(drawn["sequence_kl"]).any(), "a new adapter changes nothing"
