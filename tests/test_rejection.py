"""Rejection sampling fine-tuning: which completion is learnt from, as what, and a whole run.

The arithmetic is that of a model that says what its parameters are, see tests/test_group.py.
"""

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checks, run
from rlhf_jax.algorithms import sft
from rlhf_jax.algorithms.online import OnlineConfig
from rlhf_jax.algorithms.rejection import (
    RejectionConfig,
    check,
    make_advance,
    make_carry,
    make_judge,
    make_objective,
    make_prepare,
    make_skip,
    refers,
)
from rlhf_jax.algorithms.rollouts import Around, Models, RolloutConfig
from rlhf_jax.algorithms.step import TrainState
from rlhf_jax.config import Loss
from rlhf_jax.errors import UserError
from rlhf_jax.ops.logprobs import TokenStats
from tests import problem
from tests import test_group as told
from tests.problem import part
from tests.test_group import ENDED, GROUPS, LENGTH, LENGTHS, LOGPROBS, MASK, ROWS, SAMPLES
from tests.test_online import config_of as online_config
from tests.test_online import mean_of, place, scores_of
from tests.test_run import lines

__all__ = ["place"]  # a fixture
AS_SCORED = RejectionConfig(missing_end="subtract", missing_end_score=0.0)
VALUES = np.asarray([0.5, 2, -1, math.nan, 3, 1, -2, math.nan, -1, 7, 7, 6], np.float32)
BEST = np.asarray([1, 4, 8, 9])


class Told(told.Told):
    """As test_group's, with what the other losses of tokens ask for."""

    def token_stats(self, params: Any, rows: Any, *, want: Any = (), temperature: Any = 1.0) -> TokenStats:
        stats = super().token_stats(params, rows, temperature=temperature)
        return stats._replace(logsumexp=stats.logprobs / 2, mean_logprobs=3 * stats.logprobs)


MODELS = Models(cast(Any, Told()), None)
PARAMS = {"logprobs": jnp.asarray(LOGPROBS), "entropy": jnp.asarray(told.ENTROPY)}


def hyper_of(name: str, config: RejectionConfig, temperature: float = 1.0, **numbers: float) -> Any:
    own = {"rejection": config.numbers, "rollout": {"temperature": temperature}}
    return jax.tree.map(jnp.float32, problem.numbers_of(name, **numbers) | own)


def prepared(config: RejectionConfig = AS_SCORED, values: Any = VALUES, more: int = 0, held_out: bool = False) -> Any:
    """The one batch of the four prompts in their order; `more` prompts of padding behind them."""
    state = TrainState(PARAMS, None, None, jnp.int32(0), told.key(), None, hyper_of("nll", config))
    rollout = RolloutConfig(max_new_tokens=told.MOST, samples=SAMPLES)
    around = Around(told.draw, scores_of(values), rollout, held_out=held_out)
    prepare = make_prepare(MODELS, (part("nll"),), config, None, jax.jit, around)
    (made,) = prepare(state, {"index": np.arange(GROUPS + more)})
    made = jax.tree.map(np.asarray, made)
    order = np.argsort(np.where(made["index"] < 0, GROUPS, made["index"]), kind="stable")
    return made if held_out else jax.tree.map(lambda x: x[order], made)


def objective_of(batch: Any, name: str = "nll", config: RejectionConfig = AS_SCORED, **numbers: float) -> Any:
    hyper = hyper_of(name, config, **numbers)
    return make_objective(MODELS, (part(name),), config)(PARAMS, None, hyper, batch, told.key())


@pytest.mark.parametrize("more", [0, 2])
def test_a_prompts_best_judged_completion_is_learnt(more):
    batch = prepared(more=more)
    np.testing.assert_array_equal(batch["tokens"][:GROUPS, 0, 0], BEST * LENGTH)
    np.testing.assert_array_equal(batch["mask"][:GROUPS, 0], MASK[BEST])
    np.testing.assert_array_equal(batch["weight"], [1] * GROUPS + [0] * more)
    terms, means = objective_of(batch)
    total = -np.where(MASK, LOGPROBS, 0)[BEST].sum()
    np.testing.assert_allclose(terms["nll"].total, total, rtol=1e-6)
    assert terms["nll"].count == LENGTHS[BEST].sum()
    assert mean_of(means["nll"]) == pytest.approx(total / LENGTHS[BEST].sum(), rel=1e-6)
    assert mean_of(means["objective/score"]) == pytest.approx(np.nan_to_num(VALUES).mean())
    assert mean_of(means["rejection/best"]) == np.mean([2, 3, -1, 7]) and mean_of(means["rejection/kept"]) == 1
    assert mean_of(means["completions/length"]) == pytest.approx(LENGTHS.mean())
    assert {"kl", "objective/kl"}.isdisjoint(means)


def test_what_scores_too_little_or_is_judged_by_nothing_is_not_learnt():
    config = dataclasses.replace(AS_SCORED, least=3.0)
    values = VALUES.copy()
    values[9:] = math.nan
    batch = prepared(config, values, more=1)
    np.testing.assert_array_equal(batch["weight"], [0, 1, 0, 0, 0])
    terms, means = objective_of(batch, config=config)
    assert terms["nll"].count == LENGTHS[4] and mean_of(means["rejection/kept"]) == 0.25
    without = objective_of(prepared(dataclasses.replace(config, least=100.0)))[0]["nll"]
    assert without.total == without.count == 0


def test_a_completion_without_an_end_is_chosen_by_the_score_that_it_gets():
    config = RejectionConfig(missing_end_score=-9.0, least=-8.0)
    batch = prepared(config, np.arange(ROWS))
    counted = np.where(ENDED, np.arange(ROWS), -9).reshape(GROUPS, SAMPLES)
    np.testing.assert_array_equal(batch["tokens"][:, 0, 0], (counted.argmax(axis=1) + 3 * np.arange(GROUPS)) * LENGTH)
    np.testing.assert_array_equal(batch["score"], counted.max(axis=1))


@pytest.mark.parametrize(
    ("name", "numbers"), [("nll", {"z_loss": 0.1}), ("dft", {}), ("smooth_nll", {"label_smoothing": 0.2})]
)
def test_the_objective_is_that_of_fine_tuning_on_the_same_rows(name, numbers):
    config = dataclasses.replace(AS_SCORED, least=0.0)
    batch = prepared(config, more=2)
    terms, means = objective_of(batch, name, config, **numbers)
    rows = {column: x for column, x in batch.items() if column != "drawn"}
    objective = sft.make_objective(MODELS.policy, (part(name),))
    expected, also = objective(PARAMS, None, hyper_of(name, config, **numbers), rows, told.key())
    jax.tree.map(np.testing.assert_array_equal, (terms, means["nll"]), (expected, also["nll"]))
    assert terms[name].count == LENGTHS[BEST[[0, 1, 3]]].sum()
    halved = objective_of(batch, name, config, temperature=0.5, **numbers)[1]["nll"]
    np.testing.assert_allclose(halved.total, 2 * means["nll"].total, rtol=1e-6)


def test_held_out_rollouts_stay_completions_and_are_judged_by_their_scores():
    batch = prepared(RejectionConfig(missing_end_score=-3.0, least=50.0), more=2, held_out=True)
    np.testing.assert_array_equal(batch["tokens"][:ROWS, 0, 0], np.arange(ROWS) * LENGTH)
    assert not batch["sequence_kl"].any()
    terms, means, rows = make_judge(MODELS, ())({}, None, {}, batch, told.key())
    counted = np.where(ENDED, np.nan_to_num(VALUES), -3)
    np.testing.assert_allclose(rows["loss"][:ROWS], -counted)
    assert set(rows) == {"loss", "score", "length"} and "kl" not in means
    assert terms["loss"].count == ROWS and mean_of(terms["loss"]) == pytest.approx(-counted.mean())


def test_settings_that_choose_nothing_are_refused_and_there_is_no_state(place):
    with pytest.raises(UserError, match="samples=1 leaves nothing to choose a completion from"):
        check(RejectionConfig(), RolloutConfig(samples=1))
    check(RejectionConfig(least=0.0), RolloutConfig(samples=1))
    check(RejectionConfig(), RolloutConfig(samples=2))
    config = dataclasses.replace(online_config(place), algorithm="rejection")
    with pytest.raises(UserError, match="can't run the loss 'dpo'; .* or use --config.algorithm=preference"):
        checks.check(config)
    with pytest.raises(UserError, match="'rejection' would ignore --config.online.missing_end"):
        checks.check(dataclasses.replace(config, loss=Loss(name="nll")))
    assert RejectionConfig().numbers == {"missing_end_score": -1.0} and not refers(RejectionConfig())
    none = make_carry((), RejectionConfig(), {}, {}), make_advance((), RejectionConfig()), make_skip((), None)
    assert none == (None, None, None)


def test_a_run_makes_its_best_answers_likely(place):
    config = online_config(place, optimizer__learning_rate=1e-2, train__steps=4)
    config = dataclasses.replace(
        config, algorithm="rejection", loss=Loss(name="nll"), rejection=AS_SCORED, online=OnlineConfig()
    )
    run.train(config, str(place / "rejection"))
    rows, evaluations = lines(place / "rejection" / "metrics.jsonl"), lines(place / "rejection" / "eval.jsonl")
    for row in rows:
        assert row["loss"] == pytest.approx(row["nll"], rel=1e-5) and row["rejection/kept"] == 1
        assert row["rejection/best"] > row["objective/score"] and "objective/kl" not in row
    assert rows[-1]["nll"] < rows[0]["nll"]
    for row in evaluations:
        assert row["eval/loss"] == pytest.approx(-row["eval/score"], rel=1e-6) and "eval/kl" not in row
