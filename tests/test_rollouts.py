"""Rollouts placed, measured and cut into minibatches, their loss over rows or tokens, and what PPO on them reaches."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms.asked import Asked, measure
from rlhf_jax.algorithms.optimizers import adamw
from rlhf_jax.algorithms.parts import Part
from rlhf_jax.algorithms.ppo import PpoConfig, make_objective, make_prepare
from rlhf_jax.algorithms.rollouts import (
    Around,
    Models,
    RolloutConfig,
    keys,
    minibatches,
    place,
    policy_term,
    sampled,
)
from rlhf_jax.algorithms.step import STEP, Optimizer, flat_rows, make_state, make_step
from rlhf_jax.losses.policy import PolicyTokens, grpo
from rlhf_jax.ops.kl import k2
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import TokenStats
from rlhf_jax.sampling.sampler import Completion
from rlhf_jax.scoring import _answer_scores
from tests import problem
from tests.problem import scores
from tests.test_ppo import PART, PARTS, Told, key, numbers, params

N = math.nan


def completion(row: int, tokens: list[int], stop: str) -> Completion:
    nothing = np.zeros(len(tokens), np.float32)
    return Completion(row, 0, np.asarray(tokens, np.int32), nothing, nothing, stop)


def test_prompts_and_completions_are_placed_from_the_left():
    prompts = [np.asarray([5, 6, 7]), np.asarray([8])]
    said = [completion(1, [9, 2], "end"), completion(0, [4], "length")]
    batch = place(prompts, said, 6, rows=3, index=[40, 41])
    np.testing.assert_array_equal(batch["tokens"][:, 0], [[8, 9, 2, 0, 0, 0], [5, 6, 7, 4, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["mask"][:, 0], [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["segments"][:, 0], [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["positions"][:, 0], [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["weight"], [1, 1, 0])
    np.testing.assert_array_equal(batch["index"], [41, 40, -1])
    np.testing.assert_array_equal(batch["ended"], [True, False, False])
    assert {str(batch[name].dtype) for name in ("tokens", "segments", "positions", "index")} == {"int32"}
    assert place(prompts, said, 4)["tokens"].shape == (2, 1, 4)
    for length, rows in ((3, 2), (6, 1)):
        with pytest.raises(ValueError, match="no place in 3|more than the 1 rows"):
            place(prompts, said, length, rows=rows)


@pytest.mark.parametrize(("pieces", "mesh"), [(1, None), (4, None), (2, (2, 2, 2))])
def test_measured_columns_are_of_the_tempered_softmax_and_of_the_score_before_each_token(pieces: int, mesh: Any):
    several = None if mesh is None else sharding.make_mesh(sharding.MeshShape(*mesh))
    model, rows = problem.make_model(several), problem.make_rows(3, 8, 1)
    value = model.with_head("score")
    batch = {name: jnp.asarray(rows[name]) for name in ("tokens", "mask", "segments", "positions")}
    policy, judged = Asked(model, params()["policy"]), Asked(value, params()["value"])

    @jax.jit
    def look(batch: Any) -> Any:
        flat = flat_rows(batch)
        found = measure(policy, batch, temperature=0.7, reference=policy, value=judged, pieces=pieces)
        hidden = model.apply(policy.params, flat["tokens"], flat["segments"], flat["positions"])
        return found, model.logits(policy.params, hidden), value.score(judged.params, flat)

    found, logits, scores = jax.tree.map(np.asarray, look(batch))
    dense = np.log(np.exp(logits / 0.7) / np.exp(logits / 0.7).sum(-1, keepdims=True))
    said = np.take_along_axis(dense[:, :-1], rows["tokens"][:, 0, 1:, None], axis=2)[..., 0]
    mask = rows["mask"][:, 0, 1:]
    np.testing.assert_allclose(found["old_logprobs"][:, 0, 1:][mask], said[mask], atol=1e-5)
    np.testing.assert_array_equal(found["ref_logprobs"], found["old_logprobs"])
    whole, told = (_answer_scores(value, n, judged.params, batch | {"weight": rows["weight"]}) for n in (1, pieces))
    np.testing.assert_allclose(told, whole, rtol=1e-5, atol=1e-6)
    rtol = 1e-6 if pieces == 1 else 1e-5  # in pieces it is another program, and rounds otherwise
    np.testing.assert_allclose(found["values"][:, 0, 1:][mask], scores[:, :-1][mask], rtol=rtol)
    for column in found.values():
        assert column.shape == rows["mask"].shape and not column[~rows["mask"]].any()


# ---- minibatches


def test_the_keys_of_a_rollout_are_of_the_run_its_purpose_and_the_step():
    seen = [np.asarray(one).tolist() for step in (0, 1) for one in keys(key(), jnp.int32(step))]
    seen += [np.asarray(one).tolist() for one in keys(jax.random.PRNGKey(1), jnp.int32(0))]
    seen.append(np.asarray(jax.random.fold_in(jax.random.fold_in(key(), STEP), 0)).tolist())
    assert len({tuple(one) for one in seen}) == 7
    assert seen[:2] == [np.asarray(one).tolist() for one in keys(key(), jnp.int32(0))]


def columns(rows: int) -> dict[str, np.ndarray]:
    return {
        "index": np.arange(rows),
        "weight": np.ones(rows, np.float32),
        "tokens": np.arange(rows * 3).reshape(-1, 1, 3),
    }


def test_minibatches_take_each_row_once_an_epoch_in_a_new_order():
    made = list(minibatches(columns(24), 3, 4, key()))
    orders = np.stack([np.concatenate([b["index"] for b in made[i : i + 4]]) for i in (0, 4, 8)])
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(24), (3, 1)))
    assert not any((one == other).all() for one, other in ((orders[0], orders[1]), (orders[1], orders[2])))
    assert (orders[0] != np.arange(24)).any()
    for batch in made:
        assert batch["index"].shape == (6,)
        np.testing.assert_array_equal(batch["tokens"][:, 0, 0], 3 * batch["index"])
    assert [bool(batch["last"].all()) for batch in made] == [False] * 11 + [True]
    assert not made[-2]["last"].any()
    with pytest.raises(ValueError, match="24 rollouts don't divide into 5 minibatches"):
        next(minibatches(columns(24), 1, 5, key()))


def test_minibatches_depend_on_the_key_alone_and_not_on_the_mesh():
    mesh = sharding.make_mesh(sharding.MeshShape(2, 2, 2))
    indices = lambda made: np.stack([np.asarray(batch["index"]) for batch in made])
    plain = indices(minibatches(columns(24), 2, 3, key()))
    placed = sharding.place_rows(columns(24), mesh)
    on_mesh = list(minibatches(placed, 2, 3, key(), Layout(mesh)))
    np.testing.assert_array_equal(indices(on_mesh), plain)
    for column in jax.tree.leaves(on_mesh):
        assert column.sharding.is_equivalent_to(sharding.row_sharding(mesh), column.ndim)
    np.testing.assert_array_equal(indices(minibatches(columns(24), 2, 3, key())), plain)
    assert (indices(minibatches(columns(24), 2, 3, jax.random.PRNGKey(1))) != plain).any()


# ---- the loss


def test_a_loss_is_a_mean_over_what_it_returns_and_nan_outside_the_mask_reaches_no_gradient():
    """On-policy: -A over all tokens for `ppo`, and over each row's tokens first for `grpo`; padding has no part."""
    mask = np.asarray([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]], bool)
    logprobs = np.where(mask, np.float32(-1), np.float32(N))
    advantages = np.where(mask, np.asarray([[0, 1, 2, 3], [0, 5, 0, 0], [0, 9, 9, 0]], np.float32), np.float32(N))
    batch = {"mask": mask[:, None], "weight": np.asarray([1, 1, 0], np.float32)}
    batch |= {"old_logprobs": logprobs[:, None], "ref_logprobs": logprobs[:, None], "advantages": advantages[:, None]}
    assert not jax.grad(lambda x: jnp.sum(k2(sampled(x, batch).ref_ratio)))(jnp.asarray(logprobs)).any()
    hyper = {"loss": {"ppo": {}, "grpo": {}}, "weights": {"ppo": 0.5, "grpo": 2.0}}
    for part, weight, total, count in ((PART, 0.5, -11, 4), (Part("grpo", grpo, PolicyTokens, {}), 2.0, -7, 2)):
        term = lambda logprobs, part=part: policy_term(part, sampled(logprobs, batch), hyper, batch)
        found = term(jnp.asarray(logprobs))
        assert tuple(map(float, found)) == (weight, total, count)
        slope = jax.grad(lambda x, term=term: term(x).total)(jnp.asarray(logprobs))
        share = advantages if part.name == "ppo" else advantages / mask.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(slope, np.where(mask & (batch["weight"][:, None] > 0), -share, 0), rtol=1e-6)


# ---- the optimum, of two tables of logits


ACTIONS, MOST, DRAWN = (16, 64), 64, 256
ITERATIONS, PLAIN, TWICE = 100, PpoConfig(), RolloutConfig(epochs=2, minibatches=2)


class Tables(Told):
    """The first token says which table of logits, and value, the second is drawn from."""

    def token_stats(self, params: Any, rows: Any, *, temperature: Any = 1.0, want: Any = ()) -> TokenStats:
        logp, mask, which = jax.nn.log_softmax(params["logits"] / temperature), rows["mask"], rows["tokens"][:, :1]
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=1)
        said = jnp.where(mask, logp[which, rows["tokens"]], 0)
        return TokenStats(logprobs=said, entropy=jnp.where(mask, entropy[which], 0))

    def score(self, params: Any, rows: Any) -> jax.Array:
        return jnp.where(rows["segments"] > 0, params["score"][rows["tokens"][:, :1]], 0)


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Rewards and the reference's logits, [tables, actions]; actions that a table lacks are never drawn."""
    rng = np.random.default_rng(1)
    rewards, logits = np.zeros((2, MOST), np.float32), np.full((2, MOST), -1e9, np.float32)
    for number, count in enumerate(ACTIONS):
        rewards[number, :count] = rng.normal(0, 1, count)
        logits[number, :count] = np.log(rng.dirichlet(np.full(count, 3.0)))
    return rewards, logits


@jax.jit
def draw_from_tables(params: Any, rows: Any, key: jax.Array) -> dict[str, jax.Array]:
    which = jnp.arange(2 * DRAWN) % 2
    tokens = jnp.stack([which, jax.random.categorical(key, params["logits"][which])], axis=1)[:, None]
    place = jnp.broadcast_to(jnp.arange(2)[None, None], tokens.shape)
    row = jnp.arange(2 * DRAWN)
    return {
        "tokens": tokens, "mask": place > 0, "segments": jnp.ones_like(tokens), "positions": place,
        "weight": jnp.ones(row.shape), "index": row, "ended": row >= 0,
    }  # fmt: skip


@functools.cache
def learner() -> tuple[Any, Callable, Callable]:
    """The optimiser, prepare and the step that both prices of the KL share."""
    rewards, logits = tables()
    model = cast(Any, Tables())
    score = lambda batch: scores(rewards[tuple(np.asarray(batch["tokens"])[:, 0].T)])
    models, around = Models(model, model), Around(draw_from_tables, score, TWICE)
    prepare = make_prepare(models, PARTS, PLAIN, (model, {"logits": jnp.asarray(logits)}), jax.jit, around)
    optimizer = Optimizer(adamw, optax.cosine_decay_schedule(1.0, ITERATIONS * TWICE.updates))
    step = make_step(make_objective(models, PARTS, PLAIN), optimizer)
    return optimizer, prepare, jax.jit(step, donate_argnums=0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_ppo_reaches_the_optimum_of_rewards_less_their_kl(beta):
    """It is pi_ref exp(r / beta), normalised, of 16 and of 64 actions."""
    (rewards, logits), (optimizer, prepare, step) = tables(), learner()
    rates = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-5, "weight_decay": 0.0, "clip_norm": math.inf}
    hyper = numbers(PLAIN, kl=beta, value_weight=1.0, value_clip=math.inf)
    hyper |= {"optimizer": rates, "rollout": {"temperature": 1.0}}
    begin = {"policy": {"logits": jnp.array(logits)}, "value": {"score": jnp.zeros(2)}}
    state = make_state(begin, hyper, optimizer, key())
    for _ in range(ITERATIONS):
        for batch in prepare(state, {}):
            state, _ = step(state, batch)
    found, reference = (np.asarray(jax.nn.softmax(x)) for x in (state.params["policy"]["logits"], logits))
    best = reference * np.exp(rewards / beta)
    best /= best.sum(axis=1, keepdims=True)
    distance = lambda p: 0.5 * np.abs(p - best).sum(axis=1)
    assert distance(reference).min() > 0.15, "there must be something to learn"
    assert distance(found).max() < 0.005, distance(found)
