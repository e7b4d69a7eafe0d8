"""Group methods on the tests' decoder: one trajectory on every mesh, with completions that nobody samples.

Terms of both denominators, a mean over rows and one over tokens, are in one loss; the arithmetic is in
tests/test_group.py.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms.group import Baseline, GroupConfig, make_objective, make_prepare
from rlhf_jax.algorithms.rollouts import Around, Models, RolloutConfig, Scores
from rlhf_jax.algorithms.step import Objective, TrainState, make_state
from rlhf_jax.models.decoder import Model
from tests import problem
from tests.test_group import key, numbers, part
from tests.test_step import norm_of

N = math.nan
COMPLETIONS = 16
CONFIG = GroupConfig(
    baseline=Baseline("rloo"), kl=0.1, truncated="mask", overlong=8, top_entropy=0.6, entropy=0.01
)  # fmt: skip
ROLLOUT = RolloutConfig(max_new_tokens=16, samples=2, epochs=2, minibatches=2)
LOSSES = "grpo", "dapo"  # a mean over rows, and one over tokens


class World(NamedTuple):
    """Compiled functions on a mesh; what differs between tests are numbers."""

    mesh: jax.sharding.Mesh
    prepare: Callable[[TrainState, Any], Iterator[Any]]
    step: Callable[[TrainState, Any], tuple[TrainState, Any]]


def start(mesh: jax.sharding.Mesh, rate: float = 2e-3) -> TrainState:
    one, other = (numbers(name, CONFIG) for name in LOSSES)
    both = {name: one[name] | other[name] for name in ("loss", "weights")}
    hyper = one | both | {"optimizer": problem.hyper({}, rate, 1.0)["optimizer"]}
    state = jax.tree.map(np.array, make_state(problem.initial(), hyper, problem.OPTIMIZER, key()))
    return jax.device_put(state, sharding.state_shardings(state, mesh))


class Once:
    """A model that looks at the rows of one trace once, however many objectives ask."""

    def __init__(self, model: Model):
        self.model, self.shape, self.seen = model, model.shape, None

    def token_stats(self, *args: Any, **named: Any) -> Any:
        self.seen = self.seen or self.model.token_stats(*args, **named)
        return self.seen


def both_losses(model: Model) -> Objective:
    """All terms of the first loss, and the policy's of the second."""

    def objective(params, frozen, hyper, batch, key):
        models = Models(cast(Any, Once(model)), None)
        made = [make_objective(models, (part(name),), CONFIG)(params, frozen, hyper, batch, key) for name in LOSSES]
        (terms, means), (others, _) = made
        return terms | {LOSSES[1]: others["policy"]}, means

    return objective


def rollout(mesh: jax.sharding.Mesh, params: Any, rows: Any, key: jax.Array) -> Any:
    """Rows of uneven length that the key decides; a group of padding holds what must not matter."""
    rng = np.random.default_rng(int(np.asarray(key)[1]))
    made = problem.make_rows(int(rng.integers(100)), COMPLETIONS, completions=1)
    kept = {name: made[name] for name in ("tokens", "mask", "segments", "positions", "weight", "index")}
    strange = np.repeat(np.arange(COMPLETIONS // 2) % 4 == 3, 2)
    kept |= {"weight": (~strange).astype(np.float32), "index": np.where(strange, -1, kept["index"] // 2)}
    for name, value in (("segments", 1), ("mask", True), ("tokens", int(rows["garbage"][0]))):
        kept[name][strange] = value
    return sharding.place_rows(kept | {"ended": np.arange(COMPLETIONS) % 3 > 0}, mesh)


def small_tokens(batch: Any) -> Scores:
    """How many small tokens a completion has, and of some the share of even ones; NaN for padding."""
    tokens, mask = (np.asarray(batch[name])[:, 0] for name in ("tokens", "mask"))
    share = lambda what: (what & mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    given = np.stack([(mask & (tokens < 32)).sum(axis=1), share(tokens % 2 == 0)], axis=1).astype(np.float32)
    given[np.asarray(batch["weight"]) == 0] = N
    applies = np.stack([np.ones(len(given), bool), np.arange(len(given)) % 4 > 1], axis=1)
    return Scores(given, applies, np.asarray([0.5, 2.0], np.float32), ("small", "even"))


@functools.cache
def world(shape: tuple[int, int, int] = (1, 1, 1), microbatches: int = 1) -> World:
    mesh = sharding.make_mesh(sharding.MeshShape(*shape))
    model = problem.make_model(mesh)
    reference = jax.device_put(problem.initial(), sharding.param_shardings(problem.initial(), mesh))
    compiled = lambda function: jax.jit(function, out_shardings=sharding.row_sharding(mesh))
    around = Around(functools.partial(rollout, mesh), small_tokens, ROLLOUT)
    prepare = make_prepare(Models(model, None), (), CONFIG, (model, reference), compiled, around)
    return World(mesh, prepare, problem.compiled_step(mesh, both_losses(model), start(mesh), microbatches))


def follow(world: World, rate: float = 2e-3, rollouts: int = 2, garbage: int = 0) -> tuple[TrainState, Sequence[Any]]:
    """The last state, and the metrics of each step."""
    state, seen = start(world.mesh, rate), []
    for _ in range(rollouts):
        for batch in world.prepare(state, prompts(garbage)):
            state, metrics = world.step(state, batch)
            seen.append(jax.tree.map(float, metrics))
    return jax.tree.map(np.asarray, state), seen


prompts = lambda garbage: {"garbage": np.full(COMPLETIONS // ROLLOUT.samples, garbage)}
plainest = functools.cache(lambda: follow(world()))


def test_every_mesh_and_microbatching_takes_the_same_steps():
    (expected, first), (state, seen) = plainest(), follow(world((2, 2, 2), 2))
    assert len(first) == 8
    for metric in ("loss", "policy/approxkl", "kl", "objective/kl", "groups/spread", "loss/kl", "rewards/even"):
        assert np.ptp([step[metric] for step in first]) > 1e-4, metric
    for one, other in zip(seen, first, strict=True):
        assert set(one) == set(other)
        for metric, value in other.items():
            assert one[metric] == pytest.approx(value, rel=1e-5, abs=1e-5), metric
    off = norm_of(jax.tree.map(lambda x, y: x - y, state.params, expected.params))
    assert off < 1e-5 * norm_of(expected.params)


def test_without_a_learning_rate_ratios_stay_1_and_the_kl_0():
    state, seen = follow(world(), rate=0.0)
    for metrics in seen:
        assert metrics["policy/ratio"] == 1 and metrics["policy/approxkl"] == 0 and metrics["kl"] == 0
        assert metrics["objective/kl"] == metrics["loss/kl"] == metrics["clip_ratio/high"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, problem.initial())


def test_what_padding_holds_changes_nothing():
    """Other tokens in padding rows, and NaN in every column where no token is used."""
    state, seen = follow(world(), rollouts=1, garbage=63)
    assert seen == plainest()[1][:4]
    spoilt = start(world().mesh)
    for batch in jax.tree.map(np.array, list(world().prepare(spoilt, prompts(0)))):
        unused = ~batch["mask"] | (batch["weight"][:, None, None] == 0)
        for name in ("old_logprobs", "ref_logprobs", "advantages"):
            batch[name][unused] = N
        for name in ("score", "sequence_kl", "spread", "equal"):
            batch[name][batch["weight"] == 0] = N
        spoilt, _ = world().step(spoilt, sharding.place_rows(batch, world().mesh))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, spoilt.params), state.params)
