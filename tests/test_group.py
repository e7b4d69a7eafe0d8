"""Group methods through their own prepare and objective, of a model that says what its parameters are.

Float64 oracles and laws; trajectories of a decoder are in tests/test_group_runs.py, dynamic sampling in
tests/test_rounds.py.
"""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import fields
from rlhf_jax.algorithms.group import (
    Baseline,
    GroupConfig,
    check,
    make_advance,
    make_carry,
    make_judge,
    make_objective,
    make_prepare,
    make_skip,
)
from rlhf_jax.algorithms.parts import Part
from rlhf_jax.algorithms.rollouts import Around, Models, RolloutConfig, Scores
from rlhf_jax.algorithms.step import TrainState
from rlhf_jax.errors import UserError
from rlhf_jax.losses.policy import POLICY, PolicyTokens
from rlhf_jax.ops.advantages import BASELINES
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import TokenStats
from tests.policy_oracles import BASELINES64, POLICY64
from tests.test_policy_losses import BY_ROW, NUMBERS

N = math.nan
key = lambda: jax.random.PRNGKey(0)  # a step takes the state's buffers, this one too
eager = lambda function: function
part = lambda name: Part(name, POLICY[name], PolicyTokens, {})
OPTIONS = {"grpo": {"scale": "group"}, "reinforce_pp": {"baseline": False}}


def numbers(name: str, config: GroupConfig) -> dict[str, Any]:
    """Everything in hyper but the optimiser's."""
    own = {"loss": {name: NUMBERS[name]}, "weights": {name: 1.0}}
    return own | {"group": config.numbers, "rollout": {"temperature": 1.0}}


# ---- a model that says what its parameters are: tokens are places in tables


class Told:
    """Log-probabilities and entropies of a token are the parameters' entries at its number."""

    shape, layout = types.SimpleNamespace(experts=None), Layout()

    def token_stats(self, params: Any, rows: Any, *, temperature: Any, want: Any = ()) -> TokenStats:
        said = {name: jnp.ravel(params[name])[rows["tokens"]] for name in ("logprobs", "entropy")}
        return TokenStats(**{name: jnp.where(rows["mask"], x / temperature, 0) for name, x in said.items()})

    def without_adapter(self) -> Any:
        return self


TOLD = Models(cast(Any, Told()), None)
GROUPS, SAMPLES, LENGTH, MOST = 4, 3, 6, 5
ROWS = GROUPS * SAMPLES
ROLLOUT = RolloutConfig(max_new_tokens=MOST, samples=SAMPLES)
LENGTHS = 1 + np.arange(ROWS) * 7 % MOST
MASK = (np.arange(LENGTH)[None] > 0) & (np.arange(LENGTH)[None] <= LENGTHS[:, None])
RNG = np.random.default_rng(0)
dyadic = lambda low, high, *shape: (np.round(RNG.uniform(low, high, shape) * 64) / 64).astype(np.float32)
LOGPROBS, REF = (np.where(MASK, dyadic(-4, -1, *MASK.shape), np.float32(N)) for _ in range(2))
ENTROPY = np.where(MASK, RNG.permutation(MASK.size).reshape(MASK.shape).astype(np.float32) / 16, np.float32(N))
REWARDS, WEIGHTS = dyadic(-2, 2, ROWS, 2), np.asarray([1, 0.5], np.float32)
APPLIES = np.arange(2 * ROWS).reshape(-1, 2) % 5 > 0
APPLIES[4] = False  # nothing judges this one
ENDED = np.arange(ROWS) % 4 != 1
ALL = np.ones(REWARDS.shape, bool)


def draw(params: Any, rows: Any, key: Any) -> dict[str, np.ndarray]:
    """The completions of prompts 0 to 3; a prompt of another number is padding, which holds what must not matter."""
    number = (np.asarray(rows["index"])[:, None] * SAMPLES + np.arange(SAMPLES)).reshape(-1)
    real = (number >= 0) & (number < ROWS)
    row = np.where(real, number, 0)
    place = np.arange(LENGTH, dtype=np.int32)
    return {
        "tokens": (row[:, None] * LENGTH + place)[:, None].astype(np.int32), "mask": MASK[row][:, None],
        "segments": np.ones((len(row), 1, LENGTH), np.int32), "positions": np.tile(place, (len(row), 1, 1)),
        "weight": real.astype(np.float32), "index": np.where(real, number // SAMPLES, -1).astype(np.int32),
        "ended": ENDED[row],
    }  # fmt: skip


def scores(rewards: np.ndarray, applies: np.ndarray, weights: np.ndarray = WEIGHTS) -> Callable[[Any], Scores]:
    names = ("first", "second")[: len(weights)]

    def score(batch: Any) -> Scores:
        row, real = np.asarray(batch["tokens"])[:, 0, 0] // LENGTH, np.asarray(batch["weight"])[:, None] > 0
        given = np.where(real & applies[row], rewards[row], np.float32(N))
        return Scores(given.astype(np.float32), np.where(real, applies[row], True), weights, names)

    return score


def told(
    config: GroupConfig,
    rewards: np.ndarray = REWARDS,
    applies: np.ndarray = APPLIES,
    weights: np.ndarray = WEIGHTS,
    more: int = 0,
    name: str = "grpo",
    adapted: bool = False,
    held_out: bool = False,
) -> dict[str, Any]:
    """The one batch that the four groups become, in their order; `more` groups of padding behind them.

    Args: adapted: the reference is what the policy's parameters adapt, and no model of its own.
    """
    base = {"logprobs": jnp.asarray(REF), "entropy": jnp.asarray(ENTROPY)}
    frozen, reference = (base, None) if adapted or config.kl is None else (None, (TOLD.policy, base))
    params = {"logprobs": jnp.asarray(LOGPROBS), "entropy": jnp.asarray(ENTROPY)}
    hyper = jax.tree.map(jnp.float32, numbers(name, config))
    state = TrainState(params, frozen, None, jnp.int32(0), key(), None, hyper)
    around = Around(draw, scores(rewards, applies, weights), ROLLOUT, held_out=held_out)
    prepare = make_prepare(TOLD, (part(name),), config, reference, eager, around)
    (made,) = prepare(state, {"index": np.arange(GROUPS + more)})
    if not held_out:
        order = np.lexsort((np.asarray(made["tokens"])[:, 0, 0], np.asarray(made["weight"]) == 0))
        made = jax.tree.map(lambda column: np.asarray(column)[order], made)
    return jax.tree.map(np.asarray, made)


def objective_of(config: GroupConfig, batch: Any, name: str = "grpo", moved: float = 0.0) -> Any:
    """Terms and means, of a policy that has moved."""
    params = {"logprobs": jnp.asarray(LOGPROBS + moved), "entropy": jnp.asarray(ENTROPY)}
    return make_objective(TOLD, (part(name),), config)(params, None, numbers(name, config), batch, key())


def by_row(batch: Any) -> np.ndarray:
    """The advantage of each completion, [B], which must stand on all of its tokens and nowhere else."""
    advantages, used = batch["advantages"][:, 0], batch["mask"][:, 0] & (batch["weight"][:, None] > 0)
    each = advantages[:, 1]
    np.testing.assert_array_equal(advantages, np.where(used, each[:, None], 0))
    return each


def grouped(*columns: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(x, np.float64).reshape(GROUPS, SAMPLES, -1) for x in columns]


def oracle(baseline: str, rewards: Any = REWARDS, applies: Any = APPLIES, weights: Any = WEIGHTS) -> np.ndarray:
    columns = [*grouped(rewards, applies), np.asarray(weights, np.float64)]
    return BASELINES64[baseline](columns, **OPTIONS.get(baseline, {})).reshape(-1)


of = lambda baseline, **more: GroupConfig(baseline=Baseline(name=baseline), **more)


@pytest.mark.parametrize(
    ("name", "baseline"), [(n, "grpo") for n in POLICY] + [("dapo", b) for b in BASELINES if b != "grpo"]
)
def test_the_first_step_is_at_the_sampling_policy_and_its_loss_is_the_oracles(name, baseline):
    config = of(baseline)
    batch = told(config, name=name, more=2)
    np.testing.assert_allclose(by_row(batch)[:ROWS], oracle(baseline), rtol=2e-5, atol=2e-6)
    assert by_row(batch)[4] == 0 and batch["weight"][4] == 1, "nothing judges it; it stays"
    terms, means = objective_of(config, batch, name)
    assert means["policy/ratio"].total == means["policy/ratio"].count == LENGTHS.sum()
    assert means["policy/approxkl"].total == 0
    spread = np.broadcast_to(oracle(baseline)[:, None], MASK.shape)
    losses = POLICY64[name]([np.float64(LOGPROBS), np.float64(LOGPROBS), spread, MASK], **NUMBERS[name])
    count = ROWS if name in BY_ROW else LENGTHS.sum()
    assert terms["policy"].count == count and set(terms) == {"policy"}
    np.testing.assert_allclose(terms["policy"].total / count, losses.sum() / count, rtol=2e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, objective_of(config, told(config, name=name), name), (terms, means))


@pytest.mark.parametrize(
    ("name", "baseline"), [(n, "grpo") for n in POLICY] + [("dapo", b) for b in BASELINES if b != "grpo"]
)
def test_groups_of_equal_rewards_move_nothing(name, baseline):
    """Their rewards are no round numbers; a baseline of the whole batch needs them equal throughout."""
    level = np.asarray([0.1] * 4 if baseline == "reinforce_pp" else [0.1, 1 / 3, -7.7, 1e4], np.float32)
    rewards = np.repeat(np.stack([level, level / 3], axis=1), SAMPLES, axis=0)
    config = of(baseline, overlong=1, overlong_weight=0.0)
    batch = told(config, rewards, ALL, name=name)
    assert not batch["advantages"].any() and batch["equal"].all() and not batch["spread"].any()
    params = {"logprobs": jnp.asarray(LOGPROBS), "entropy": jnp.asarray(ENTROPY)}
    objective = make_objective(TOLD, (part(name),), config)
    slope = jax.grad(lambda p: objective(p, None, numbers(name, config), batch, key())[0]["policy"].total)(params)
    assert not np.asarray(slope["logprobs"]).any()


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_constant_in_all_rewards_leaves_advantages_and_a_groups_order_goes_through(baseline):
    """Rewards and the constant are multiples of 1/64, which float32 and its sums hold exactly."""
    config = of(baseline)
    plain = by_row(told(config, REWARDS, ALL))
    np.testing.assert_array_equal(by_row(told(config, REWARDS + 8, ALL)), plain)
    order = np.concatenate([SAMPLES * g + RNG.permutation(SAMPLES) for g in range(GROUPS)])
    np.testing.assert_allclose(by_row(told(config, REWARDS[order], ALL)), plain[order], rtol=1e-6, atol=1e-7)


def test_what_is_plotted_of_groups():
    rewards = REWARDS.copy()
    rewards[:SAMPLES] = 0.3
    batch = told(GroupConfig(), rewards, ALL, more=2)
    totals = (rewards * WEIGHTS).sum(axis=1)
    np.testing.assert_allclose(batch["score"], [*totals, *[0] * 6], rtol=1e-6)
    spread = np.repeat(totals.reshape(GROUPS, SAMPLES).std(axis=1, ddof=1), SAMPLES)
    np.testing.assert_allclose(batch["spread"][:ROWS], spread, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch["equal"][:ROWS], np.arange(ROWS) < SAMPLES)
    means = objective_of(GroupConfig(), batch)[1]
    mean = lambda name: float(means[name].total / means[name].count)
    assert mean("groups/equal") == 0.25 and mean("objective/score") == pytest.approx(totals.mean(), rel=1e-5)
    assert mean("rewards/second") == pytest.approx(rewards[:, 1].mean(), rel=1e-5)
    assert mean("groups/spread") == pytest.approx(spread.mean(), rel=1e-5)
    assert mean("completions/length") == pytest.approx(LENGTHS.mean())
    assert {"table", "entropy", "counted", "kept"}.isdisjoint(batch)


# ---- what is learnt from


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_masking_truncated_completions_equals_dropping_them_from_the_loss_alone(name):
    config, plain = (GroupConfig(truncated=how, kl=0.1, entropy=0.2) for how in ("mask", "keep"))
    batch = told(config, name=name)
    np.testing.assert_array_equal(batch["advantages"], told(plain, name=name)["advantages"])
    dropped = batch | {"weight": batch["weight"] * ENDED}
    (terms, means), (expected, _) = objective_of(config, batch, name, 0.1), objective_of(plain, dropped, name, 0.1)
    jax.tree.map(np.testing.assert_array_equal, terms, expected)
    assert terms["policy"].count == (ENDED.sum() if name == "grpo" else LENGTHS[ENDED].sum())
    assert terms["kl"].count == terms["entropy"].count == means["policy/ratio"].count == LENGTHS[ENDED].sum()
    entropy = ENTROPY[MASK & ENDED[:, None]].sum()
    assert terms["entropy"].weight == -0.2 and terms["entropy"].total == entropy, "a bonus"
    assert means["completions/ended"].total == ENDED.sum() and means["completions/ended"].count == ROWS
    assert means["completions/length"].total == LENGTHS.sum() and means["objective/score"].count == ROWS


def test_the_overlong_reward_falls_over_the_last_tokens_and_is_one_of_the_rewards():
    config = of("gdpo", overlong=2, overlong_weight=0.5)
    batch = told(config, REWARDS, APPLIES)
    late = np.asarray([0, 0, 0, -0.5, -1])[LENGTHS - 1]
    judged = APPLIES.any(axis=1)
    expected = (REWARDS * WEIGHTS * APPLIES).sum(axis=1) + 0.5 * late * judged
    np.testing.assert_allclose(batch["score"], expected, rtol=1e-6)
    three = oracle("gdpo", np.c_[REWARDS, late], np.c_[APPLIES, judged], [*WEIGHTS, 0.5])
    np.testing.assert_allclose(by_row(batch), three, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("share", "truncated"), [(0.25, "keep"), (0.5, "mask"), (1.0, "keep"), (1e-6, "keep")])
def test_the_policy_learns_from_the_tokens_of_the_highest_entropy_of_the_rollout(share, truncated):
    config = GroupConfig(top_entropy=share, truncated=truncated, entropy=0.1)
    used = MASK & (ENDED[:, None] | (truncated == "keep"))
    keep = max(round(share * used.sum()), 1)
    expected = used & (ENTROPY >= np.sort(ENTROPY[used])[-keep])
    batch = told(config, more=2)
    np.testing.assert_array_equal(batch["counted"][:ROWS, 0], expected)
    assert not batch["counted"][ROWS:].any() and batch["counted"].sum() == keep and "entropy" not in batch
    advantages = np.where(expected, oracle("grpo")[:, None], 0)
    terms, means = objective_of(config, batch, "dapo")
    np.testing.assert_allclose(terms["policy"].total, -advantages.sum(), rtol=1e-5, atol=1e-6)
    assert terms["policy"].count == keep and terms["entropy"].count == means["entropy"].count == used.sum()
    terms, _ = objective_of(config, batch, "grpo")
    rows = -advantages.sum(axis=1) / np.maximum(expected.sum(axis=1), 1)
    np.testing.assert_allclose(terms["policy"].total, rows.sum(), rtol=1e-5, atol=1e-6)


# ---- the reference


def test_the_kl_is_one_of_the_rewards_or_a_term_of_the_loss():
    ratio = np.where(MASK, LOGPROBS - REF, 0)
    one, weight = REWARDS[:, :1], np.ones(1, np.float32)
    config = of("rloo", kl=0.25, kl_in="reward")
    batch = told(config, one, ALL[:, :1], weight)
    np.testing.assert_allclose(batch["sequence_kl"], ratio.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(batch["score"], one[:, 0])
    np.testing.assert_allclose(batch["penalty"], -0.25 * ratio.sum(axis=1), rtol=1e-6)
    expected = oracle("rloo", one[:, 0] - 0.25 * ratio.sum(axis=1), ALL[:, 0], [1])
    np.testing.assert_allclose(by_row(batch), expected, rtol=1e-5, atol=1e-6)
    terms, means = objective_of(config, batch)
    assert set(terms) == {"policy"}
    np.testing.assert_allclose(means["objective/kl"].total, ratio.sum(), rtol=1e-5)
    earned = means["objective/rlhf_reward"]
    np.testing.assert_allclose(earned.total, one.sum() - 0.25 * ratio.sum(), rtol=1e-5)

    k3 = np.where(MASK, np.exp(-ratio - 0.5) - 1 + ratio + 0.5, 0)
    half_square = np.where(MASK, (ratio + 0.5) ** 2 / 2, 0)
    for name, expected in ((None, k3), ("k3_plus", k3), ("k2", half_square)):
        config = of("rloo", kl=0.25, kl_estimator=cast(Any, name))
        batch = told(config, one, ALL[:, :1], weight)
        terms, means = objective_of(config, batch, moved=0.5)
        np.testing.assert_allclose(terms["kl"].total, expected.sum(), rtol=1e-5)
        assert terms["kl"].weight == 0.25 and terms["kl"].count == LENGTHS.sum()
        np.testing.assert_allclose(means["kl"].total, k3.sum(), rtol=1e-5)
        assert "objective/rlhf_reward" not in means
    np.testing.assert_allclose(by_row(batch), oracle("rloo", one, ALL[:, :1], [1]), rtol=1e-5, atol=1e-6)


def test_the_reference_of_an_adapter_is_what_it_adapts_and_without_a_price_there_is_none():
    config = GroupConfig(kl=0.1, kl_in="reward")
    apart, adapted = told(config), told(config, adapted=True)
    jax.tree.map(np.testing.assert_array_equal, apart, adapted)
    alone = told(GroupConfig(), adapted=True)
    assert "ref_logprobs" not in alone and "penalty" not in alone and not alone["sequence_kl"].any()
    means = objective_of(GroupConfig(), alone)[1]
    assert {"kl", "objective/kl"}.isdisjoint(means)
    terms, means, rows = make_judge(TOLD, (), GroupConfig())({}, None, {}, alone, key())
    assert "kl" not in means and "kl" not in rows and set(rows) == {"loss", "score", "length"}


def test_held_out_rollouts_stay_in_order_and_are_judged_less_the_price_of_their_kl():
    cost = np.where(MASK, LOGPROBS - REF, 0).sum(axis=1)
    for config in (GroupConfig(kl=0.5, truncated="mask"), GroupConfig(kl=0.5, kl_in="reward", rounds=2)):
        batch = told(config, more=2, held_out=True)
        np.testing.assert_array_equal(batch["tokens"][:ROWS, 0, 0], np.arange(ROWS) * LENGTH)
        np.testing.assert_array_equal(batch["index"], [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [-1] * 6)
        terms, means, rows = make_judge(TOLD, (), config)({}, None, numbers("grpo", config), batch, key())
        score = np.where(APPLIES, REWARDS * WEIGHTS, 0).sum(axis=1)
        np.testing.assert_allclose(rows["loss"][:ROWS], 0.5 * cost - score, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows["score"][:ROWS], score, rtol=1e-6)
        np.testing.assert_allclose(terms["loss"].total, (0.5 * cost - score).sum(), rtol=1e-5)
        assert terms["loss"].count == means["kl"].count == ROWS


# ---- configs


@pytest.mark.parametrize(
    ("config", "rollout", "message"),
    [
        (GroupConfig(), {"samples": 1}, r"rollout.samples=1 leaves baseline 'grpo' nothing to hold"),
        (GroupConfig(baseline=Baseline("reinforce_pp", baseline=True)), {"samples": 1}, "'reinforce_pp' nothing"),
        (of("reinforce_pp", rounds=2), {"samples": 1}, "rounds=2 replaces groups of equal rewards, which all are"),
        (GroupConfig(rounds=0), {}, "rounds=0 is not allowed; it must be at least 1"),
        (GroupConfig(overlong=6), {}, "overlong=6 is not allowed; it must be from 1 to rollout.max_new_tokens=5"),
        (GroupConfig(overlong=0), {}, "overlong=0"),
        (GroupConfig(top_entropy=0.0), {}, "top_entropy=0.0 is not allowed; it must be above 0 and at most 1"),
        (GroupConfig(kl=-0.1), {}, "kl=-0.1 is not allowed; it must be at least 0"),
        (GroupConfig(kl_in="reward"), {}, "kl_in would be ignored without --config.group.kl;"),
        (GroupConfig(kl_estimator="k2"), {}, "kl_estimator would be ignored"),
        (GroupConfig(overlong_weight=0.5), {}, "overlong_weight would be ignored without --config.group.overlong;"),
        (GroupConfig(kl=0.1, kl_estimator="k1"), {}, "k1 has no gradient on average"),
        (of("grpp"), {}, "there is no baseline 'grpp'; the nearest is 'grpo'"),
        (GroupConfig(baseline=Baseline("rloo", scale="batch")), {}, "'rloo' would ignore scale"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config, rollout, message):
    with pytest.raises(UserError, match=message):
        check(config, dataclasses.replace(ROLLOUT, **rollout))


def test_settings_that_mean_something_are_not():
    alone = dataclasses.replace(ROLLOUT, samples=1)
    for config, rollout in (
        (GroupConfig(), ROLLOUT),
        (GroupConfig(kl=0.0, kl_in="reward", kl_estimator="k1", overlong=5, top_entropy=1.0, rounds=3), ROLLOUT),
        (of("reinforce_pp"), alone),
        (GroupConfig(baseline=Baseline("grpo", scale="none")), ROLLOUT),
    ):
        check(config, rollout)
    assert GroupConfig(kl=1, rounds=3, overlong=2).numbers == {"kl": 1, "overlong_weight": 1.0}
    options = [leaf.path for leaf in fields.leaves(GroupConfig()) if leaf.path.startswith("baseline.")]
    assert options == ["baseline.name", "baseline.scale", "baseline.baseline"]
    assert (
        make_carry((), GroupConfig(), {}, {}) is make_advance((), GroupConfig()) is make_skip((), GroupConfig()) is None
    )
