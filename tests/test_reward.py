"""Reward models: objective and judge against plain numpy, in pieces and on meshes, packed and padded."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms import reward
from rlhf_jax.algorithms.step import flat_rows, make_state
from rlhf_jax.losses import LOSSES
from rlhf_jax.models.decoder import Model
from rlhf_jax.sharding import MeshShape
from tests import problem
from tests.oracles import all_pairs64, bradley_terry64, outcome64, plackett_luce64, process64

KEY = jax.random.PRNGKey(0)
NUMBERS = {
    "bradley_terry": {"label_smoothing": 0.1, "margin": 0.2, "centre": 0.05},
    "all_pairs": {"centre": 0.05},
    "plackett_luce": {},
    "outcome": {},
    "process": {"neutral": 0.8},
}
LANES = {"bradley_terry": 2, "all_pairs": 3, "plackett_luce": 3, "outcome": 1, "process": 1}


def make_model(mesh: jax.sharding.Mesh | None = None) -> Model:
    return problem.make_model(mesh).with_head("score")


@functools.cache
def params_of(zero: bool = False) -> Any:
    """Random parameters; the head too, unless it is to be as it begins."""
    made = jax.tree.map(np.asarray, jax.jit(make_model().init)(jax.random.key(0)))
    return made if zero else jax.tree.map(np.asarray, reward.new_head(made, KEY) | {"score_bias": np.float32(0.3)})


def rows_of(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of the form that a loss reads; every eighth is padding, and a group of three may have two answers."""
    rng, lanes = np.random.default_rng(seed), LANES[name]
    rows = problem.make_rows(seed, completions=lanes)
    if lanes == 3:
        gone = rng.random(problem.ROWS) < 0.3
        for column in ("mask", "segments", "positions"):
            rows[column][gone, 2] = 0
        rows["ranks"] = rng.integers(0, 3, (problem.ROWS, 3)).astype(np.float32)
        rows["preferred"] = rng.random((problem.ROWS, 3, 3), np.float32)
        del rows["labels"]
    if name == "outcome":
        rows["labels"] = rng.random((problem.ROWS, 1)) < 0.5
    if name == "process":
        ends = rows["mask"] & (rng.random(rows["mask"].shape) < 0.4)
        rows["step_ends"] = ends
        rows["step_labels"] = np.where(ends, rng.choice(np.asarray([0, 0.5, 1], np.float32), ends.shape), 0)
        del rows["labels"]
    return rows


@jax.jit
def scores_of(params: Any, rows: Any) -> jax.Array:
    return make_model().score(params, flat_rows(rows))


def hyper(name: str) -> dict[str, Any]:
    return problem.numbers_of(name, **NUMBERS[name])


@functools.cache
def judged(name: str) -> Any:
    """The compiled judge with its gradient."""
    judge = reward.make_judge(make_model(), [problem.part(name)])

    def loss(params: Any, batch: Any) -> Any:
        terms, means, rows = judge(params, None, hyper(name), batch, KEY)
        return terms[name].total / terms[name].count, (terms, means, rows)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def last_scores(rows: dict[str, np.ndarray], per_token: np.ndarray) -> np.ndarray:
    """[B, K], the score at each answer's last token, float64; 0 where there is none."""
    length = rows["segments"].astype(bool).sum(-1)
    per_token = np.asarray(per_token, np.float64).reshape(rows["tokens"].shape)
    found = np.take_along_axis(per_token, np.maximum(length - 1, 0)[..., None], axis=-1)[..., 0]
    return np.where(length > 0, found, 0)


def expected_rows(name: str, rows: dict[str, np.ndarray]) -> np.ndarray:
    """The loss of each row, or of each token."""
    per_token = np.asarray(scores_of(params_of(), rows), np.float64)
    scores, numbers = last_scores(rows, per_token), NUMBERS[name]
    present = rows["segments"].any(-1)
    match name:
        case "bradley_terry":
            return bradley_terry64(list(scores.T), **numbers)
        case "all_pairs":
            return all_pairs64([scores, rows["preferred"].astype(np.float64), present], **numbers)
        case "plackett_luce":
            return plackett_luce64([scores, rows["ranks"], present])
        case "outcome":
            return outcome64([scores[:, 0], rows["labels"][:, 0]])
        case _:
            return process64([per_token.reshape(rows["tokens"].shape), rows["step_labels"]], **numbers)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_objective_is_the_oracles(name):
    rows = rows_of(name)
    (value, (terms, means, said)), _ = judged(name)(params_of(), rows)
    expected, weight = expected_rows(name, rows), rows["weight"].astype(np.float64)
    if name == "process":
        used = rows["step_ends"] * weight[:, None, None]
        np.testing.assert_allclose(terms[name].count, used.sum())
        np.testing.assert_allclose(value, (expected * used).sum() / used.sum(), rtol=1e-5)
        return
    real = weight > 0
    np.testing.assert_allclose(terms[name].count, weight.sum())
    np.testing.assert_allclose(value, expected[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(said["loss"][real], expected[real], rtol=1e-5, atol=1e-6)
    if name == "bradley_terry":
        margin = np.subtract(*last_scores(rows, np.asarray(scores_of(params_of(), rows))).T)[real]
        np.testing.assert_allclose(means["rewards/accuracies"].total, (margin > 0).sum())
        np.testing.assert_allclose(said["margin"][real], margin, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(said["correct"][real], margin > 0)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_gradient_of_the_head_is_that_of_finite_differences_of_the_oracle(name):
    """The head is linear, so a step of it moves every score by a known amount, whatever rounding the model has."""
    rows, params = rows_of(name), params_of()
    _, grads = judged(name)(params, rows)
    weight, step = rows["weight"].astype(np.float64), 1e-2
    hidden = np.asarray(
        jax.jit(make_model().apply)(params, *(flat_rows(rows)[n] for n in ("tokens", "segments", "positions"))),
        np.float64,
    )
    way = np.random.default_rng(1).normal(size=hidden.shape[-1])
    base = np.asarray(scores_of(params, rows), np.float64)

    def total(size: float) -> float:
        per_token = base + size * (hidden @ way)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "scores_of", lambda *_: per_token)
            lost = expected_rows(name, rows)
        used = rows["step_ends"] * weight[:, None, None] if name == "process" else weight
        return float((lost * used).sum() / used.sum())

    slope = (8 * (total(step) - total(-step)) - (total(2 * step) - total(-2 * step))) / (12 * step)
    np.testing.assert_allclose(np.asarray(grads["score"], np.float64) @ way, slope, rtol=1e-4, atol=1e-6)


def test_the_first_loss_is_log_two_where_the_head_begins_at_zero():
    for name in ("bradley_terry", "outcome", "process"):
        judge = reward.make_judge(make_model(), [problem.part(name)])
        numbers = problem.numbers_of(name, **({"neutral": 1.0} if name == "process" else {}))
        terms, means, _ = jax.jit(lambda p, b, j=judge, n=numbers: j(p, None, n, b, KEY))(
            params_of(zero=True), rows_of(name)
        )
        np.testing.assert_allclose(terms[name].total / terms[name].count, np.log(2), rtol=1e-6)
        np.testing.assert_allclose(means["rewards/accuracies"].total / means["rewards/accuracies"].count, 0.5)


@pytest.mark.parametrize("name", NUMBERS)
def test_nothing_under_the_padding_matters(name):
    """More padding, and whatever it holds, in rows and in rows of padding."""
    rows = rows_of(name)
    spoilt = dict(rows)
    blank = rows["segments"] == 0
    spoilt["tokens"] = np.where(blank, 63, rows["tokens"])
    padding = rows["weight"] == 0
    if "preferred" in rows:
        spoilt["preferred"] = np.where(padding[:, None, None], 7, rows["preferred"])
    if "step_labels" in rows:
        spoilt["step_labels"] = np.where(rows["step_ends"], rows["step_labels"], 9).astype(np.float32)
    (value, _), grads = judged(name)(params_of(), rows)
    (same, _), others = judged(name)(params_of(), spoilt)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_more_padding_changes_nothing():
    rows = rows_of("bradley_terry")
    columns = [n for n, x in rows.items() if x.ndim == 3]
    wider = rows | {n: np.pad(rows[n], ((0, 0), (0, 0), (0, 8))) for n in columns}
    (value, _), _ = judged("bradley_terry")(params_of(), rows)
    (wide, _), _ = judged("bradley_terry")(params_of(), wider)
    np.testing.assert_allclose(wide, value, rtol=1e-5)


@pytest.mark.parametrize("name", ["bradley_terry", "all_pairs", "process"])
def test_packed_rows_are_the_single_rows(name):
    """Two examples one behind the other in each row."""
    rows = rows_of(name)
    half = problem.ROWS // 2
    single = {n: np.concatenate([x[:half], x[half:]]) for n, x in rows.items()}
    lanes, length = LANES[name], problem.LENGTH
    shape = (half, lanes, 2 * length)
    packed: dict[str, Any] = {n: np.zeros(shape, rows[n].dtype) for n in rows if rows[n].shape[1:] == (lanes, length)}
    for b in range(half):
        for lane in range(lanes):
            end = 0
            for number, row in enumerate((b, b + half), start=1):
                count = int((single["segments"][row, lane] > 0).sum())
                here = slice(end, end + count)
                for column in packed:
                    value = single[column][row, lane, :count]
                    packed[column][b, lane, here] = value * number if column == "segments" else value
                end += count
    for column, x in rows.items():
        if column not in packed:
            packed[column] = np.stack([x[:half], x[half:]], axis=1)
    (value, (_, _, said)), _ = judged(name)(params_of(), rows)
    judge = reward.make_judge(make_model(), [problem.part(name)])
    terms, _, of_packed = jax.jit(lambda p, b: judge(p, None, hyper(name), b, KEY))(params_of(), packed)
    np.testing.assert_allclose(terms[name].total / terms[name].count, value, rtol=1e-5)
    real = rows["weight"] > 0
    for figure in said:
        ours = np.asarray(of_packed[figure]).reshape(half, 2).T.reshape(-1)
        np.testing.assert_allclose(ours[real], np.asarray(said[figure])[real], rtol=1e-4, atol=1e-5)


def test_the_tie_of_a_pair_is_no_comparison():
    rows = rows_of("bradley_terry")
    rows["probability"] = np.where(np.arange(problem.ROWS) % 2, 0.5, 1.0).astype(np.float32)
    (_, (_, means, _)), _ = judged("bradley_terry")(params_of(), rows)
    assert means["rewards/accuracies"].count == (rows["weight"] * (rows["probability"] == 1)).sum()


# ---- one trajectory, whatever the mesh and the pieces


def trajectory(name: str, shape: tuple[int, int, int], parts: int) -> np.ndarray:
    """Loss and gradient norm of each step."""
    mesh = sharding.make_mesh(MeshShape(*shape))
    objective = reward.make_objective(make_model(mesh), [problem.part(name)])
    numbers = problem.hyper({}) | hyper(name)
    make = lambda: make_state(params_of(), numbers, problem.OPTIMIZER, KEY)
    state = jax.tree.map(np.asarray, jax.jit(make)())
    state = jax.device_put(state, sharding.state_shardings(state, mesh))
    step, seen = problem.compiled_step(mesh, objective, state, parts), []
    for seed in range(3):
        state, metrics = step(state, sharding.place_rows(rows_of(name, seed), mesh))
        seen.append((metrics["loss"], metrics["grad_norm"]))
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    return np.asarray(seen, np.float64)


@pytest.mark.parametrize("name", ["bradley_terry", "all_pairs", "process"])
def test_every_mesh_and_microbatching_takes_the_same_steps(name):
    expected = trajectory(name, (1, 1, 1), 1)
    assert np.ptp(expected[:, 0]) > 0.01 * expected[0, 0]
    meshes = [((2, 2, 2), 4), ((1, 2, 4), 1)] if name == "bradley_terry" else [((2, 2, 2), 4)]
    for shape, parts in meshes:
        np.testing.assert_allclose(trajectory(name, shape, parts), expected, rtol=1e-5)


def test_every_loss_of_scores_is_tested_here():
    assert set(NUMBERS) == {name for name in LOSSES if problem.part(name).takes in reward.READS}
