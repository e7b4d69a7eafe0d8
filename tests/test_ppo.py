"""PPO through its own prepare, objective and step: reference values, one trajectory, the carry.

A model that says what its parameters are is for the arithmetic; for the rest there is the tests' decoder, on meshes,
with completions that don't depend on what it would sample. The optimum is in tests/test_rollouts.py.
"""

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms.parts import Part
from rlhf_jax.algorithms.ppo import PpoConfig, make_advance, make_carry, make_objective, make_prepare, make_skip
from rlhf_jax.algorithms.rollouts import Around, Models, RolloutConfig, Scores
from rlhf_jax.algorithms.step import TrainState, make_state
from rlhf_jax.errors import UserError
from rlhf_jax.losses.policy import PolicyTokens, ppo
from rlhf_jax.ops.kl import adaptive
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import TokenStats
from tests import problem
from tests.problem import scores
from tests.test_step import norm_of

PART = Part("ppo", ppo, PolicyTokens, {})
LOSS = {"loss": {"ppo": {"clip_low": 0.2, "clip_high": 0.2}}, "weights": {"ppo": 1.0}}
PARTS = (PART,)
ONCE = RolloutConfig()
ROLLOUT = RolloutConfig(epochs=2, minibatches=2, temperature=0.7)
key = lambda: jax.random.PRNGKey(0)  # a step takes the state's buffers, this one too
eager = lambda function: function


def same(one: Any, other: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def numbers(config: PpoConfig, **more: float) -> dict[str, Any]:
    """Everything in hyper but the optimiser's."""
    return LOSS | {"ppo": config.numbers | more, "rollout": {"temperature": ROLLOUT.temperature}}


# ---- reference values, from a model that says what its parameters are


class Told:
    """log-probabilities and scores [B, T] are the parameters themselves."""

    shape, layout = types.SimpleNamespace(experts=None), Layout()

    def token_stats(self, params: Any, rows: Any, *, temperature: Any = 1.0, want: Any = ()) -> TokenStats:
        said = jnp.where(rows["mask"], params["logprobs"] / temperature, 0)
        return TokenStats(logprobs=said, entropy=jnp.zeros_like(said))

    def score(self, params: Any, rows: Any) -> jax.Array:
        return jnp.asarray(params["score"])

    def without_adapter(self) -> Any:
        return self


TOLD = cast(Any, Told())
TOLDS = Models(TOLD, TOLD)
N = math.nan
LOGPROBS, REF = [[-1, -2, -0.5, -1.5], [-0.7, -1.2, N, N]], [[-1.1, -1.9, -0.6, -1.4], [-0.9, -1.0, N, N]]
VALUES, SCORES = [[0.1, 0.2, 0.3, 0.4], [0.05, 0.15, 0.25, N]], [1.0, -0.5]


def told(
    config: PpoConfig, more: int = 0, earned: Any = SCORES, ended: Any = (True, True), adapted: bool = False
) -> dict[str, np.ndarray]:
    """The one batch that the golden rollout becomes, in its order; `more` columns and as many rows of padding.

    Args: adapted: the reference is what the policy's parameters adapt, and no model of its own.
    """
    wide = lambda x: jnp.asarray(np.pad(np.asarray(x, np.float32), ((0, more), (1, more)), constant_values=N))
    mask = np.pad(np.isfinite(LOGPROBS), ((0, more), (1, more)))[:, None]
    rows, length = mask.shape[0], mask.shape[2]
    batch = {
        "tokens": np.zeros(mask.shape, np.int32), "mask": mask, "segments": np.ones(mask.shape, np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1, 1)),
        "weight": (np.arange(rows) < 2).astype(np.float32), "index": np.arange(rows, dtype=np.int32),
        "ended": np.pad(np.asarray(ended), (0, more)),
    }  # fmt: skip
    before = jnp.roll(wide(VALUES), -1, axis=1)  # read at the token before
    params = {"policy": {"logprobs": wide(LOGPROBS)}, "value": {"score": before}}
    hyper = jax.tree.map(jnp.float32, numbers(config) | {"rollout": {"temperature": 1.0}})
    base = {"logprobs": wide(REF)}
    frozen, reference = (base, None) if adapted else (None, (TOLD, base))
    state = TrainState(params, frozen, None, jnp.int32(0), key(), make_carry(PARTS, config, params, hyper), hyper)
    score = lambda _: scores(np.pad(np.float32(earned), (0, more), constant_values=N))
    prepare = make_prepare(TOLDS, PARTS, config, reference, eager, Around(lambda *_: batch, score, ONCE))
    (made,) = prepare(state, {})
    order = np.argsort(made["index"])
    return {name: np.asarray(column)[order] for name, column in made.items()}


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("entry", ["k1", "k3", "k1 whiten_rewards"])
def test_a_rollout_has_the_reference_values_however_much_padding_it_has(shared, entry, more):
    golden = json.loads((shared / "golden" / "reference_values.json").read_text())["values"]["ppo_ours"][entry]
    name, _, whitened = entry.partition(" ")
    batch = told(PpoConfig(kl_estimator=cast(Any, name), whiten_rewards=bool(whitened)), more)
    for column in set(golden) - {"rewards"}:
        found = batch[column][batch["mask"] & (batch["weight"][:, None, None] > 0)]
        np.testing.assert_allclose(found, golden[column], rtol=2e-6, atol=2e-6)
        assert not batch[column][~batch["mask"]].any()
    if entry == "k1":
        earned, rewards = batch["score"] + batch["penalty"], golden["rewards"]
        np.testing.assert_allclose(earned[:2], [sum(rewards[:4]), sum(rewards[4:])], rtol=1e-5)
    np.testing.assert_allclose(batch["sequence_kl"][:2], [0.0, 0.0], atol=1e-6)  # as it happens


def test_values_are_read_before_their_token_is_seen_and_explain_a_share_of_the_returns():
    batch = told(PpoConfig())
    np.testing.assert_allclose(batch["values"][batch["mask"]], [0.1, 0.2, 0.3, 0.4, 0.05, 0.15], rtol=1e-6)
    returns, values = (batch[name][batch["mask"]] for name in ("returns", "values"))
    np.testing.assert_allclose(batch["explained"], 1 - np.var(returns - values) / np.var(returns), rtol=1e-5)


def test_the_reference_of_an_adapter_is_what_it_adapts():
    apart, adapted = told(PpoConfig()), told(PpoConfig(), adapted=True)
    np.testing.assert_allclose(adapted["ref_logprobs"][adapted["mask"]], np.asarray(REF)[np.isfinite(REF)], rtol=1e-6)
    assert same(apart, adapted)


@pytest.mark.parametrize(("rule", "expected"), [("replace", -2.0), ("subtract", -2.5)])
def test_a_completion_without_an_end_is_scored_by_the_rule(rule, expected):
    config = PpoConfig(missing_end=rule, missing_end_score=-2.0, kl=0.0, lam=1.0)
    batch = told(config, ended=(True, False))
    np.testing.assert_allclose(batch["score"], [1.0, expected])
    np.testing.assert_allclose(batch["returns"][:, 0, 1], [1.0, expected], rtol=1e-6)
    np.testing.assert_allclose(told(config)["score"], SCORES)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_score_that_is_no_number_names_its_row(wrong):
    with pytest.raises(UserError, match=r"is (nan|inf): rollout 1, row 1 of the data, 2 tokens \(0, 0\); 1 of 2"):
        told(PpoConfig(), more=3, earned=[1.0, wrong])


def objective_of(config: PpoConfig, batch: Any) -> Any:
    """Terms and means of a golden batch, of a policy that has moved since, and of values that are all 0."""
    rows, _, length = batch["tokens"].shape
    wide = np.pad(np.asarray(LOGPROBS, np.float32) + 0.3, ((0, rows - 2), (1, length - 5)), constant_values=N)
    params = {"policy": {"logprobs": wide}, "value": {"score": np.zeros((rows, length), np.float32)}}
    hyper = numbers(config) | {"rollout": {"temperature": 1.0}}
    return make_objective(TOLDS, PARTS, config)(params, None, hyper, batch, key())


def test_the_objective_sees_no_padding():
    config = PpoConfig(entropy=0.1)
    found, wider = (objective_of(config, told(config, more)) for more in (0, 3))
    assert set(found[0]) == {"policy", "value", "entropy"} and found[1]["clip_ratio/high"].total > 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, wider)
    assert found[0]["policy"].count == found[0]["value"].count == 6
    assert float(found[0]["entropy"].weight) == -0.1  # a bonus: what is minimised falls as it rises


def test_the_kl_is_a_term_of_the_loss_or_part_of_the_rewards():
    config = PpoConfig(kl_in="loss", kl=0.3, lam=1.0, whiten_advantages=False)
    batch = told(config, more=3)
    np.testing.assert_allclose(batch["returns"][batch["mask"]], [1, 1, 1, 1, -0.5, -0.5], rtol=1e-6)
    assert not batch["penalty"].any()
    ratio = (np.asarray(LOGPROBS) + 0.3 - REF)[np.isfinite(LOGPROBS)]

    k3 = np.exp(-ratio) - 1 + ratio
    for name, expected in (("k2", ratio**2 / 2), ("k3", k3), (None, k3)):
        terms, means = objective_of(dataclasses.replace(config, kl_estimator=cast(Any, name)), batch)
        np.testing.assert_allclose(terms["kl"].total, 0.3 * expected.sum(), rtol=1e-5)
        assert terms["kl"].count == terms["value"].count == 6
    np.testing.assert_allclose(means["kl"].total, k3.sum(), rtol=1e-5)
    assert "kl" not in objective_of(PpoConfig(), batch)[0]
    with pytest.raises(UserError, match="k1 has no gradient"):
        objective_of(dataclasses.replace(config, kl_estimator="k1"), batch)


# ---- one trajectory, of a decoder


ROWS = 16
CONFIG = PpoConfig(kl_target=1.0, stop_kl=1e9, entropy=0.01)
PLAIN = (1, 1, 1)


class World(NamedTuple):
    """Compiled functions on a mesh, all of one configuration; what differs between tests are numbers."""

    mesh: jax.sharding.Mesh
    prepare: Callable[[TrainState, Any], Iterator[Any]]
    step: Callable[[TrainState, Any], tuple[TrainState, Any]]


@functools.cache
def params() -> Any:
    """A policy, and a value of other weights, on the host."""
    rng = np.random.default_rng(0)
    base = {name: leaf for name, leaf in problem.initial().items() if name != "head"}
    value = jax.tree.map(lambda x: (x + 0.05 * rng.normal(size=x.shape)).astype(np.float32), base)
    value |= {"score": rng.normal(0, 0.2, problem.SHAPE.width).astype(np.float32), "score_bias": np.float32(0.1)}
    return {"policy": problem.initial(), "value": value}


def start(mesh: jax.sharding.Mesh, rate: float = 2e-3, plain: float = 1.0, **more: float) -> TrainState:
    """The state before the first step; its parameters lie as each model's own do."""
    hyper = numbers(CONFIG, **more) | {"optimizer": problem.hyper({}, rate, plain)["optimizer"]}
    state = make_state(params(), hyper, problem.OPTIMIZER, key(), carry=make_carry(PARTS, CONFIG, None, hyper))

    state = jax.tree.map(np.array, state)  # leaves that are one buffer can't both be donated
    return jax.device_put(state, sharding.state_shardings(state, mesh))


def rollout(mesh: jax.sharding.Mesh, params: Any, rows: Any, key: jax.Array) -> Any:
    """Rows of uneven length whose completions the key decides; padding rows hold what must not matter."""
    rng = np.random.default_rng(int(np.asarray(key)[1]))
    made = problem.make_rows(int(rng.integers(100)), ROWS, completions=1)
    kept = {name: made[name] for name in ("tokens", "mask", "segments", "positions", "weight", "index")}
    strange = kept["weight"] == 0
    for name, value in (("segments", 1), ("mask", True), ("tokens", rows["garbage"])):
        kept[name][strange] = value
    return sharding.place_rows(kept | {"ended": np.arange(ROWS) % 3 > 0}, mesh)


def score(batch: Any) -> Scores:
    """How many small tokens a completion has; NaN for padding."""
    tokens, mask = (np.asarray(batch[name])[:, 0] for name in ("tokens", "mask"))
    return scores(np.where(np.asarray(batch["weight"]) > 0, ((tokens < 32) & mask).sum(axis=1), N))


@functools.cache
def world(shape: tuple[int, int, int] = PLAIN, microbatches: int = 1) -> World:
    mesh = sharding.make_mesh(sharding.MeshShape(*shape))
    model = problem.make_model(mesh)
    value = model.with_head("score")
    reference = jax.device_put(problem.initial(), jax.tree.map(lambda x: x.sharding, start(mesh).params["policy"]))
    compiled = lambda function: jax.jit(function, out_shardings=sharding.row_sharding(mesh))
    draw = functools.partial(rollout, mesh)
    models, around = Models(model, value), Around(draw, score, ROLLOUT)
    prepare = make_prepare(models, PARTS, CONFIG, (model, reference), compiled, around)
    objective = make_objective(models, PARTS, CONFIG)
    more = {"advance": make_advance(PARTS, CONFIG), "skip": make_skip(PARTS, CONFIG)}
    return World(mesh, prepare, problem.compiled_step(mesh, objective, start(mesh), microbatches, **more))


def follow(world: World, state: TrainState, rollouts: int = 2, garbage: int = 0) -> tuple[TrainState, list[Any]]:
    """The last state, and the metrics of each step."""
    seen = []
    for _ in range(rollouts):
        for batch in world.prepare(state, {"garbage": garbage}):
            state, metrics = world.step(state, batch)
            seen.append(jax.tree.map(float, metrics))
    return state, seen


@functools.cache
def plainest() -> tuple[Any, list[Any]]:
    state, seen = follow(world(), start(world().mesh))
    return jax.tree.map(np.asarray, state.params), seen


def test_the_trajectory_visibly_moves():
    seen = plainest()[1]
    assert len(seen) == 8
    for name in ("loss", "policy/approxkl", "kl", "val/loss", "objective/kl"):
        assert np.ptp([step[name] for step in seen]) > 1e-3, name
    assert world().step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("shape", "microbatches"), [((2, 2, 2), 2), ((1, 2, 4), 4)])
def test_every_mesh_and_microbatching_takes_the_same_steps(shape, microbatches):
    state, seen = follow(world(shape, microbatches), start(world(shape, microbatches).mesh))
    expected_params, expected = plainest()
    for one, other in zip(seen, expected, strict=True):
        assert set(one) == set(other)
        for name, value in other.items():
            # Beside 1e-5 of itself as much of 1: losses of whitened advantages are small differences.
            assert one[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    off = norm_of(jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, expected_params))
    assert off < 1e-5 * norm_of(expected_params)


def test_the_first_step_is_at_the_sampling_policy_and_at_the_reference():
    batch, *_ = world().prepare(start(world().mesh), {"garbage": 0})
    _, first = world().step(start(world().mesh), batch)
    used = np.asarray(batch["mask"] & (batch["weight"][:, None, None] > 0))
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert first["policy/approxkl"] == pytest.approx(0, abs=1e-9)
    assert first["kl"] == pytest.approx(0, abs=1e-7) and first["clip_ratio/low"] == first["clip_ratio/high"] == 0
    assert first["loss/policy"] == pytest.approx(-np.asarray(batch["advantages"])[used].mean(), abs=1e-6)


def test_without_a_learning_rate_ratios_stay_1_and_the_kl_0():
    state, seen = follow(world(), start(world().mesh, rate=0.0))
    for metrics in seen:
        assert metrics["policy/ratio"] == 1 and metrics["policy/approxkl"] == 0 and metrics["kl"] == 0
        assert metrics["objective/kl"] == 0 and metrics["val/clip"] == 0
    for leaf, before in zip(jax.tree.leaves(state.params), jax.tree.leaves(params()), strict=True):
        np.testing.assert_array_equal(leaf, before)


def batches(**more: float) -> list[Any]:
    """One rollout's minibatches, on the host."""
    return jax.tree.map(np.asarray, list(world().prepare(start(world().mesh, **more), {"garbage": 0})))


def test_whitening_is_over_the_whole_rollout_and_padding_rows_dont_count():
    first, second, *_ = batches()
    both = {name: np.concatenate([first[name], second[name]]) for name in first}
    used = both["mask"] & (both["weight"][:, None, None] > 0)
    assert (both["weight"] == 0).sum() == 2 and sorted(both["index"]) == list(range(ROWS))
    assert both["advantages"][used].mean() == pytest.approx(0, abs=1e-5)
    assert both["advantages"][used].std(ddof=1) == pytest.approx(1, abs=1e-5)
    assert abs(first["advantages"][used[: ROWS // 2]].mean()) > 1e-3, "a minibatch alone has another mean"
    assert not both["advantages"][~used].any() and np.isfinite(both["score"]).all()


def test_what_padding_holds_changes_nothing():
    """Other tokens in padding rows, and NaN in every column where no token is used."""
    state, seen = follow(world(), start(world().mesh), rollouts=1, garbage=63)
    assert seen == plainest()[1][:4]
    spoilt = start(world().mesh)
    for batch in batches():
        unused = ~batch["mask"] | (batch["weight"][:, None, None] == 0)
        for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
            batch[name] = np.where(unused, np.float32(N), batch[name])
        for name in ("score", "penalty", "sequence_kl"):
            batch[name] = np.where(batch["weight"] > 0, batch[name], np.float32(N))
        spoilt, _ = world().step(spoilt, sharding.place_rows(batch, world().mesh))
    assert same(spoilt.params, state.params)


# ---- the carry, and going on


def test_the_price_of_the_kl_moves_once_a_rollout_by_the_whole_rollouts_kl():
    first = start(world().mesh)
    moved, _ = follow(world(), first, rollouts=1)  # so that there is a KL
    prices, price = [], float(moved.carry["kl"])
    assert price == pytest.approx(float(adaptive(0.05, jnp.float32(0), 14, target=1.0, horizon=1e4)))
    state, rows = moved, []
    for batch in world().prepare(state, {"garbage": 0}):
        rows.append(jax.tree.map(np.asarray, batch))
        state, metrics = world().step(state, batch)
        prices.append(float(state.carry["kl"]))
        assert metrics["objective/coefficient"] == pytest.approx(price)
    kl = sum((batch["sequence_kl"] * batch["weight"]).sum() for batch in rows[:2]) / 14
    after = float(adaptive(price, jnp.float32(kl), 14, target=1.0, horizon=1e4))
    assert abs(kl) > 1e-3 and after != price
    np.testing.assert_allclose(prices, [price, price, price, after], rtol=1e-6)


def test_an_early_stop_freezes_the_parameters_until_the_next_rollout():
    """The second minibatch is the first that the policy has moved on; it is the last that counts."""
    state, before, moves, rates = start(world().mesh, plain=0.0, rate=3e-3, stop_kl=1e-7), None, [], []
    for _ in range(2):
        for batch in world().prepare(state, {"garbage": 0}):
            before = jax.tree.map(np.array, (state.params, state.opt_state.inner_state))
            state, metrics = world().step(state, batch)
            moves.append(not same(before, (state.params, state.opt_state.inner_state)))
            rates.append(float(metrics["learning_rate"]))
    assert moves == [True, True, False, False] * 2
    np.testing.assert_allclose(rates, [3e-3, 3e-3, 0, 0] * 2, rtol=1e-6)
    assert int(state.step) == 8 and not state.carry["stop"]


def test_minibatches_that_were_saved_go_on_to_the_same_bits():
    """Two rollouts straight on; and stopped in the first, with what is pending and the state on the host."""
    expected, seen = plainest()
    state, queue = start(world().mesh), world().prepare(start(world().mesh), {"garbage": 0})
    state, first = world().step(state, next(queue))
    pending, kept = jax.tree.map(np.array, (list(queue), state))
    state = jax.device_put(kept, jax.tree.map(lambda x: x.sharding, start(world().mesh)))
    rest = [first]
    for batch in pending:
        state, metrics = world().step(state, sharding.place_rows(batch, world().mesh))
        rest.append(metrics)
    state, more = follow(world(), state, rollouts=1)
    assert jax.tree.map(float, rest) + more == seen
    assert same(state.params, expected)


def test_a_config_without_a_target_or_a_stop_has_no_state_of_its_own():
    plain = PpoConfig()
    assert make_carry(PARTS, plain, None, numbers(plain)) is None
    assert make_advance(PARTS, plain) is make_skip(PARTS, plain) is None
    left_out = {"entropy", "kl_target", "stop_kl", "pretrain", "value_path"}
    switches = {"kl_in", "kl_estimator", "whiten_rewards", "whiten_advantages", "missing_end", "value", "credit"}
    assert set(plain.numbers) == {field.name for field in dataclasses.fields(plain)} - left_out - switches
