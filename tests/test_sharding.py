"""The rules are total, moments lie with their weights, and every optimiser learns on a mesh in one compile."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax import sharding
from rlhf_jax.algorithms.optimizers import OPTIMIZERS, SCHEDULES, decayed, make_schedule
from rlhf_jax.algorithms.step import Optimizer, make_state, make_step
from rlhf_jax.errors import UserError
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sharding import MeshShape
from tests import problem

NUMBERS = {
    "adamw": {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1},
    "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1},
    "adafactor": {"decay_rate": 0.8, "weight_decay": 0.1},
    "sgd": {"momentum": 0.9},
    "muon": {"momentum": 0.95, "b1": 0.9, "b2": 0.99, "weight_decay": 0.1},
}
RATES = {"adamw": 3e-3, "lion": 3e-4, "adafactor": 3e-3, "sgd": 3e-2, "muon": 3e-3}


def test_the_rules_are_total_and_an_unknown_parameter_is_named():
    for keys, leaf in jax.tree_util.tree_leaves_with_path(problem.initial()):
        assert len(sharding.rule(sharding.path_of(keys))) == leaf.ndim
    with pytest.raises(KeyError, match="layers/router"):
        sharding.rule("layers/router")


@pytest.mark.parametrize("shape", [(-1, 2, 2), (2, -1, 2), (1, 1, 1)])
def test_a_mesh_fills_its_free_axis(shape):
    mesh = sharding.make_mesh(MeshShape(*shape))
    sizes = dict(zip(("data", "fsdp", "tensor"), (2 if size == -1 else size for size in shape), strict=True))
    assert mesh.shape == sizes | {"expert": 1}


@pytest.mark.parametrize("shape", [(-1, -1, 1), (0, 1, 1), (16, 1, 1), (1, 3, 3)])
def test_an_impossible_mesh_is_refused(shape):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(MeshShape(*shape))


def test_a_mesh_that_does_not_divide_the_model_names_the_weight():
    with pytest.raises(UserError, match="tensor=8 does not divide the 4 of layers/key/bias"):
        sharding.check_divides(problem.make_model(), sharding.make_mesh(MeshShape(1, 1, 8)))


def test_weight_decay_leaves_norms_and_biases_alone():
    flags = {sharding.path_of(k): v for k, v in jax.tree_util.tree_leaves_with_path(decayed(problem.initial()))}
    assert {path for path, on in flags.items() if not on} == {
        path for path in flags if "norm" in path or path.endswith("bias")
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_learns_on_a_mesh_in_one_compile(name):
    mesh = sharding.make_mesh(MeshShape(2, 2, 2))
    optimizer = Optimizer(OPTIMIZERS[name], make_schedule("linear", 20, 0, 0.2))
    objective = problem.objective_of("dpo", problem.make_model(mesh))
    numbers = {"learning_rate": RATES[name], "clip_norm": 1.0, **NUMBERS[name]}
    params = problem.initial()
    hyper = {**problem.numbers_of("dpo", beta=0.1), "optimizer": numbers}
    state = make_state(params, hyper, optimizer, jax.random.PRNGKey(0))
    places = sharding.state_shardings(state, mesh)
    state = jax.device_put(state, places)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        path = sharding.path_of(keys)
        if path.endswith("layers/up/kernel") and leaf.shape == (2, 32, 48):
            assert leaf.sharding.spec == P(None, "fsdp", "tensor"), path
    step = jax.jit(
        make_step(objective, optimizer, layout=Layout(mesh)),
        in_shardings=(places, sharding.row_sharding(mesh)),
        out_shardings=(places, None),
        donate_argnums=0,
    )
    rows = sharding.place_rows(problem.make_rows(), mesh)
    seen = []
    for _ in range(8):
        state, metrics = step(state, rows)
        seen.append((float(metrics["loss"]), float(metrics["learning_rate"])))
    assert seen[-1][0] < 0.97 * seen[0][0], seen
    np.testing.assert_allclose([rate for _, rate in seen], RATES[name] * (1 - np.arange(8) / 20), rtol=1e-6)
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_rise_to_one_and_fall_to_their_end(name):
    schedule = make_schedule(name, 100, 10, 0.2)
    values = np.asarray([schedule(step) for step in range(101)])
    assert values[0] == 0 and values[10] == pytest.approx(1) and np.all(np.diff(values[:11]) > 0)
    assert values[100] == pytest.approx(1 if name == "constant" else 0, abs=1e-6)
    assert np.all(np.diff(values[10:]) <= 1e-7)
    if name == "wsd":
        assert values[82] == 1 > values[83]
