"""Dynamic sampling: which groups stay, how often is drawn, and what stands in the place of groups that are missing."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms.group import GroupConfig, make_prepare
from rlhf_jax.algorithms.rollouts import Around, RolloutConfig, Scores
from rlhf_jax.algorithms.rounds import drawn_in_rounds
from rlhf_jax.algorithms.step import TrainState
from rlhf_jax.errors import UserError
from rlhf_jax.ops.layout import Layout
from tests import test_group as told
from tests.policy_oracles import BASELINES64

SAMPLES, GROUPS, LENGTH = 2, 4, 3
ROLLOUT = RolloutConfig(samples=SAMPLES)
REWARDS = np.asarray([0.5, 1.5], np.float32)  # of a group that teaches something
WEIGHTS = np.asarray([1, -2], np.float32)  # so that totals have either sign


class Sampler:
    """Completions that say whose they are: a token is 10 times the prompt's number and that of the sample."""

    def __init__(self, dull: Any = (), mesh: Any = None, unjudged: Any = (), wrong: Any = (), one: Any = ()):
        self.dull, self.unjudged, self.wrong, self.one, self.mesh = dull, unjudged, wrong, one, mesh
        self.drawn: list[list[int]] = []

    def __call__(self, rows: Any, number: int = 0) -> Any:
        assert number == len(self.drawn)
        index = np.asarray(rows["index"])
        self.drawn.append(index.tolist())
        index = np.repeat(index, SAMPLES)
        token = 10 * index + np.arange(len(index)) % SAMPLES
        wide = np.broadcast_to(token[:, None, None], (len(index), 1, LENGTH)).astype(np.int32)
        made = {
            "tokens": wide, "mask": wide > -100, "segments": np.ones_like(wide), "positions": np.ones_like(wide),
            "weight": (index >= 0).astype(np.float32), "index": index.astype(np.int32), "ended": index > -100,
        }  # fmt: skip
        return made if self.mesh is None else sharding.place_rows(made, self.mesh)

    def score(self, batch: Any) -> Scores:
        index = np.asarray(batch["index"])
        earned = np.where(np.isin(index, self.dull), 1 / 3, np.tile(REWARDS, len(index) // SAMPLES))
        earned[np.isin(index, self.wrong) | (index < 0)] = math.nan
        judged = ~np.isin(index, self.unjudged) & ~(np.isin(index, self.one) & (np.arange(len(index)) % SAMPLES == 0))
        rewards = np.stack([earned, index], axis=1).astype(np.float32)
        return Scores(rewards, np.stack([judged] * 2, axis=1), WEIGHTS, ("earned", "index"))

    def rollout(self, prompts: Any, rounds: int = 2, layout: Layout = Layout()) -> Any:
        around = Around(lambda *_: {}, self.score, ROLLOUT)
        batch = drawn_in_rounds(around, self, {"index": np.asarray(prompts)}, rounds, layout)
        return jax.tree.map(np.asarray, batch)


def check_groups(batch: Any, expected: list[int]) -> None:
    """The groups of these prompts, whole and in this order, and behind them padding, in which everything is nothing."""
    real = len(expected) * SAMPLES
    np.testing.assert_array_equal(batch["index"][:real], np.repeat(expected, SAMPLES))
    tokens = 10 * np.repeat(expected, SAMPLES) + np.tile(np.arange(SAMPLES), len(expected))
    np.testing.assert_array_equal(batch["tokens"][:real, 0, 0], tokens)
    np.testing.assert_array_equal(batch["table"]["given"][:real, 0], np.tile(REWARDS, len(expected)))
    np.testing.assert_allclose(batch["score"][:real], batch["table"]["given"][:real] @ WEIGHTS)
    np.testing.assert_array_equal(batch["rewards"]["index"][:real], batch["index"][:real])
    assert batch["weight"][:real].all() and batch["weight"].shape == (GROUPS * SAMPLES,)
    rest = {name: jax.tree.map(lambda x: x[real:], column) for name, column in batch.items() if name != "kept"}
    assert (rest.pop("index") == -1).all()
    assert not any(leaf.any() for leaf in jax.tree.leaves(rest))


def test_further_prompts_are_drawn_while_groups_are_missing_and_no_longer():
    sampler = Sampler()
    check_groups(sampler.rollout(range(12), rounds=3), [0, 1, 2, 3])
    assert sampler.drawn == [[0, 1, 2, 3]]
    sampler = Sampler(dull=(0, 2))
    batch = sampler.rollout(range(12), rounds=3)
    check_groups(batch, [1, 3, 4, 5])
    assert sampler.drawn == [[0, 1, 2, 3], [4, 5, 6, 7]]
    np.testing.assert_array_equal(batch["kept"], np.float32(6 / 8))


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 8, 1)])
def test_missing_groups_are_padding_on_every_mesh(shape):
    mesh = None if shape is None else sharding.make_mesh(sharding.MeshShape(*shape))
    check_groups(Sampler(dull=(0, 2, 3, 4, 5, 7), mesh=mesh).rollout(range(8), layout=Layout(mesh)), [1, 6])
    check_groups(Sampler(dull=range(8), mesh=mesh).rollout(range(8), layout=Layout(mesh)), [])


def test_groups_without_two_rewards_and_padding_are_not_kept():
    sampler = Sampler(unjudged=(1,), one=(0, 4))
    batch = sampler.rollout([0, 1, -1, 2, 4, 5, -1, -1])
    check_groups(batch, [2, 5])
    np.testing.assert_array_equal(batch["kept"], np.float32(2 / 5))


def test_one_round_keeps_all_as_they_are():
    sampler = Sampler(dull=(0, 2))
    batch = sampler.rollout(range(4), rounds=1)
    np.testing.assert_array_equal(batch["index"], np.repeat(range(4), SAMPLES))
    assert sampler.drawn == [[0, 1, 2, 3]] and "kept" not in batch


def test_a_score_that_is_no_number_stops_the_run_and_prompts_must_divide():
    with pytest.raises(UserError, match="is nan: rollout 2, row 5 of the data"):
        Sampler(dull=(0,), wrong=(5,)).rollout([0, 1, 2, 3, 4, 5, 6, 7])
    with pytest.raises(ValueError, match="8 prompts don't divide into 3 rounds"):
        Sampler().rollout(range(8), rounds=3)


# ---- through prepare


def prepared(config: GroupConfig, rewards: np.ndarray, held_out: bool = False) -> tuple[Any, list[Any]]:
    """The batch of prompts of which the second four are padding, and the key and the rows of each draw."""
    hyper = jax.tree.map(np.float32, told.numbers("grpo", config))
    params = {"logprobs": told.LOGPROBS, "entropy": told.ENTROPY}
    state = TrainState(params, None, None, jnp.int32(0), told.key(), None, hyper)
    seen = []

    def draw(params: Any, rows: Any, key: Any) -> Any:
        seen.append((np.asarray(key).tolist(), len(rows["index"])))
        return told.draw(params, rows, key)

    around = Around(draw, told.scores(rewards, told.ALL), told.ROLLOUT, held_out=held_out)
    prepare = make_prepare(told.TOLD, (), config, None, told.eager, around)
    (batch,) = prepare(state, {"index": np.arange(2 * told.GROUPS)})
    return jax.tree.map(np.asarray, batch), seen


def test_advantages_are_of_the_groups_that_stay_and_every_round_has_a_key_of_its_own():
    """A baseline of the whole batch, in which neither the group that was dropped nor padding has a part."""
    rewards = told.REWARDS.copy()
    rewards[told.SAMPLES : 2 * told.SAMPLES] = 0.3
    batch, seen = prepared(told.of("reinforce_pp", rounds=2), rewards)
    assert len(seen) == 2 and seen[0][0] != seen[1][0] and seen[0][1] == seen[1][1] == told.GROUPS
    stay = [g for g in range(told.GROUPS) if g != 1]
    columns = [x[stay] for x in told.grouped(rewards, told.ALL)] + [np.float64(told.WEIGHTS)]
    expected = BASELINES64["reinforce_pp"](columns, baseline=False).reshape(-1)
    real = batch["weight"] > 0
    order = np.argsort(batch["tokens"][real, 0, 0])
    np.testing.assert_allclose(told.by_row(batch)[real][order], expected, rtol=1e-5, atol=1e-6)
    assert real.sum() == len(stay) * told.SAMPLES and not told.by_row(batch)[~real].any()
    _, means = told.objective_of(told.of("reinforce_pp", rounds=2), batch)
    assert means["groups/kept"].total / means["groups/kept"].count == 0.75


def test_held_out_prompts_are_drawn_at_once_and_all_of_them_stay():
    rewards = np.full_like(told.REWARDS, 0.3)
    batch, seen = prepared(GroupConfig(rounds=2), rewards, held_out=True)
    assert len(seen) == 1 and seen[0][1] == 2 * told.GROUPS
    np.testing.assert_array_equal(batch["weight"], np.arange(2 * told.ROWS) < told.ROWS)
