"""On-policy distillation: the loss and its gradient against float64, and what a student learns.

The arithmetic is that of models whose hidden state is an entry of a table for the token that stands there; whole runs
are in tests/test_distill_runs.py.
"""

import json
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from rlhf_jax.algorithms.distill import (
    DistillConfig,
    make_advance,
    make_carry,
    make_judge,
    make_objective,
    make_prepare,
    make_skip,
    refers,
)
from rlhf_jax.algorithms.rollouts import Around, Models, RolloutConfig, Scores
from rlhf_jax.algorithms.step import Taught, TrainState, make_state, make_step
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import Head
from tests import problem, tiny
from tests.problem import part
from tests.test_group import key
from tests.test_ops_token_divergence import BETAS, slope64, softmax64, token64

V, ROWS, LENGTH, PROMPT = 12, 8, 7, 2
CAPS = (3.0, None)  # of student and teacher
LENGTHS = np.asarray([5, 1, 3, 4, 2, 5, 1, 3])  # of the completions
REAL = np.arange(ROWS) % 4 != 3
MASK = (np.arange(LENGTH) >= PROMPT) & (np.arange(LENGTH) < PROMPT + LENGTHS[:, None])
USED = MASK & REAL[:, None]


class Table:
    """A model of bigrams: the state of a token is an entry of a table, and the head reads that."""

    def __init__(self, soft_cap: float | None):
        self.shape = types.SimpleNamespace(experts=None, soft_cap=soft_cap)
        self.numerics, self.layout = types.SimpleNamespace(chunk=8), Layout()

    def states(self, params: Any, rows: Any, weigh: bool = False) -> Any:
        return jnp.asarray(params["table"])[rows["tokens"]], None

    def head(self, params: Any) -> Head:
        return Head(jnp.asarray(params["kernel"]))


MODELS = Models(cast(Any, Table(CAPS[0])), None, cast(Any, Table(CAPS[1])))


def table(seed: int, width: int) -> Any:
    rng = np.random.default_rng(seed)
    wide = lambda scale: (scale * rng.standard_normal((V, width))).astype(np.float32)
    return {"table": wide(1.0), "kernel": wide(2 / width**0.5)}


STUDENT, TEACHER = table(0, 4), table(1, 5)


def hyper_of(beta: float, temperature: float = 1.0, **more: Any) -> Any:
    own = {"distill": DistillConfig().numbers, "rollout": {"temperature": temperature}}
    return jax.tree.map(jnp.float32, problem.numbers_of("jsd", beta=beta) | own | more)


def rollout(tokens: np.ndarray, **more: Any) -> Any:
    """Completions in a batch; every fourth row is padding, which holds what must not matter."""
    shape = (len(tokens), 1, LENGTH)
    return {
        "tokens": tokens[:, None].astype(np.int32), "mask": MASK[:, None], "segments": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape), "weight": REAL.astype(np.float32),
        "index": np.where(REAL, np.arange(ROWS), -1).astype(np.int32), "ended": np.arange(ROWS) % 3 > 0, **more,
    }  # fmt: skip


SCORE = np.where(REAL, np.arange(ROWS), 7e9).astype(np.float32)
BATCH = rollout(np.random.default_rng(2).integers(0, V, (ROWS, LENGTH)), score=SCORE)


def logits64(params: Any, batch: Any = BATCH) -> np.ndarray:
    """What the head gives, in the state before each token, [B, T, V]; before the cap."""
    raw = np.asarray(params["table"], np.float64) @ np.asarray(params["kernel"], np.float64).T
    return np.roll(raw[batch["tokens"][:, 0]], 1, axis=1)


def oracle(beta: float, temperature: float) -> tuple[np.ndarray, Any]:
    """The divergence of each token, and the gradient of the mean over tokens at the student's parameters."""
    student, teacher = logits64(STUDENT), logits64(TEACHER)
    found, at_table, at_kernel = np.zeros(USED.shape), np.zeros((V, 4)), np.zeros((V, 4))
    how = {"temperature": temperature, "soft_cap": CAPS[0], "teacher_soft_cap": CAPS[1]}
    for row, place in zip(*np.nonzero(USED), strict=True):
        pair, before = (student[row, place].tolist(), teacher[row, place].tolist()), BATCH["tokens"][row, 0, place - 1]
        found[row, place] = token64(*pair, beta, **how)
        slope = np.asarray(slope64(*pair, beta, **how)) / USED.sum()
        at_table[before] += slope @ STUDENT["kernel"]
        at_kernel += np.outer(slope, STUDENT["table"][before])
    return found, {"table": at_table, "kernel": at_kernel}


objective, judge = make_objective(MODELS, (part("jsd"),)), make_judge(MODELS, (part("jsd"),))


@jax.jit
def said_of(params: Any, teacher: Any, hyper: Any, batch: Any) -> Any:
    """Terms and means, and the gradients of the loss at the student and at the teacher."""

    def loss(params: Any, teacher: Any) -> Any:
        terms, means = objective(params, Taught(None, teacher), hyper, batch, key())
        return terms["jsd"].total / terms["jsd"].count, (terms, means)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, teacher)


judged: Any = jax.jit(lambda params, hyper, batch: judge(params, Taught(None, TEACHER), hyper, batch, key()))


def mean_of(mean: Any) -> float:
    return float(mean.total / mean.count)


def log64(params: Any, cap: float | None, temperature: float) -> np.ndarray:
    """The log-probability of each token, 0 where none is used."""
    logits = logits64(params)
    found = np.zeros(USED.shape)
    for at in zip(*np.nonzero(USED), strict=True):
        found[at] = np.log(softmax64(logits[at].tolist(), cap, temperature)[BATCH["tokens"][:, 0][at]])
    return found


# ---- the loss


@pytest.mark.parametrize(("beta", "temperature"), [*((beta, 1.0) for beta in BETAS), (0.3, 0.6)])
def test_the_loss_and_its_gradient_are_the_oracles(beta, temperature):
    hyper = hyper_of(beta, temperature)
    found, gradient = oracle(beta, temperature)
    (slopes, at_teacher), (terms, _) = said_of(STUDENT, TEACHER, hyper, BATCH)
    assert terms["jsd"].count == USED.sum() and mean_of(terms["jsd"]) == pytest.approx(found[USED].mean(), rel=2e-5)
    for name, slope in gradient.items():
        np.testing.assert_allclose(slopes[name], slope, rtol=1e-4, atol=1e-6)
    assert not any(map(np.any, jax.tree.leaves(at_teacher)))
    _, _, rows = judged(STUDENT, hyper, BATCH)
    np.testing.assert_allclose(rows["loss"], found.sum(axis=1) / LENGTHS * REAL, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_plotted_beside_it(temperature):
    hyper = hyper_of(0.5, temperature)
    _, (terms, means) = said_of(STUDENT, TEACHER, hyper, BATCH)
    d = np.subtract(*(log64(p, cap, temperature) for p, cap in zip((STUDENT, TEACHER), CAPS, strict=True)))
    softmax = [softmax64(x.tolist(), CAPS[0], temperature) for x in logits64(STUDENT)[USED]]
    expected = {
        "kl": (np.exp(-d) - 1 + d)[USED].mean(), "objective/kl": d.sum(axis=1)[REAL].mean(),
        "entropy": -np.mean([np.dot(p, np.log(p)) for p in softmax]), "completions/length": LENGTHS[REAL].mean(),
        "completions/ended": BATCH["ended"][REAL].mean(), "objective/score": BATCH["score"][REAL].mean(),
    }  # fmt: skip
    assert {name: mean_of(mean) for name, mean in means.items()} == pytest.approx(expected, rel=1e-4)
    found, told, rows = judged(STUDENT, hyper, BATCH)
    assert mean_of(found["jsd"]) == pytest.approx(mean_of(terms["jsd"]), rel=1e-6)
    names = {"kl": "objective/kl", "score": "objective/score"} | {n: n for n in expected if n.startswith("completions")}
    assert {names[name]: mean_of(mean) for name, mean in told.items()} == pytest.approx(
        {name: expected[name] for name in names.values()}, rel=1e-4
    )
    assert set(rows) == {"loss", "kl", "length", "score"}


def test_a_student_that_says_what_the_teacher_says_has_nothing_to_learn():
    alike = Models(MODELS.policy, None, MODELS.policy)

    @jax.jit
    def said(params: Any, hyper: Any) -> Any:
        found = lambda p: make_objective(alike, (part("jsd"),))(p, Taught(None, STUDENT), hyper, BATCH, key())
        return jax.value_and_grad(lambda p: found(p)[0]["jsd"].total)(params), found(params)[1]

    for beta in BETAS:
        (value, slopes), means = said(STUDENT, hyper_of(beta))
        assert value == means["kl"].total == means["objective/kl"].total == 0
        assert all(np.abs(slope).max() < 1e-6 for slope in jax.tree.leaves(slopes))


def test_microbatches_change_nothing():
    """Two pieces with unequal numbers of tokens, and the slope of the whole batch."""
    hyper = hyper_of(0.3, 0.8, optimizer=problem.hyper({}, 0.5, 1.0)["optimizer"])
    state = make_state(STUDENT, hyper, problem.OPTIMIZER, key(), frozen=Taught(None, TEACHER))
    state, metrics = jax.jit(make_step(objective, problem.OPTIMIZER, microbatches=2))(state, BATCH)
    (slopes, _), (terms, means) = said_of(STUDENT, TEACHER, hyper_of(0.3, 0.8), BATCH)
    assert metrics["loss"] == pytest.approx(mean_of(terms["jsd"]), rel=1e-6) and metrics["grad_norm"] > 0.01
    assert {n: float(metrics[n]) for n in means} == pytest.approx({n: mean_of(x) for n, x in means.items()}, rel=1e-5)
    for name, slope in slopes.items():
        np.testing.assert_allclose(state.params[name], STUDENT[name] - 0.5 * slope, rtol=1e-5, atol=1e-6)


def test_there_is_no_state_no_number_and_no_reference():
    none = make_carry((), DistillConfig(), {}, {}), make_advance((), DistillConfig()), make_skip((), None)
    assert none == (None, None, None) and not refers(DistillConfig()) and not DistillConfig().numbers


# ---- learning


def drawn(params: Any, rows: Any, key: Any) -> Any:
    """Completions that the student of bigrams draws."""
    table, kernel = (np.asarray(params[name]) for name in ("table", "kernel"))
    logits = CAPS[0] * np.tanh(table @ kernel.T / CAPS[0])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rng, tokens = np.random.default_rng(np.asarray(key)), np.zeros((ROWS, LENGTH), int)
    tokens[:, :PROMPT] = np.arange(ROWS)[:, None] + np.arange(PROMPT)
    for place in range(PROMPT, LENGTH):
        tokens[:, place] = [rng.choice(V, p=p[token] / p[token].sum()) for token in tokens[:, place - 1]]
    return rollout(tokens)


def scores(*rewards: float) -> Any:
    """Of each reward the same for all completions."""
    told = np.tile(np.asarray(rewards, np.float32), (ROWS, 1))
    names = tuple(f"{number}" for number in range(len(rewards)))
    return lambda batch: Scores(told, np.ones(told.shape, bool), np.ones(len(rewards), np.float32), names)


def prepared(params: Any, score: Any, step: int = 0, held_out: bool = False) -> Any:
    around = Around(drawn, score, RolloutConfig(), held_out=held_out)
    prepare = make_prepare(MODELS, (part("jsd"),), DistillConfig(), None, jax.jit, around)
    state = TrainState(params, Taught(None, TEACHER), None, jnp.int32(step), key(), None, {})
    (batch,) = prepare(state, {})
    return batch


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_comes_to_say_what_its_teacher_says(beta):
    """Wide enough to say it, in a few dozen updates on what it says itself."""
    params, hyper, adam, said = table(3, 8), hyper_of(beta), optax.adam(0.1), []
    moments, held_out = adam.init(params), prepared(params, scores(1.0), held_out=True)
    for step in range(60):
        (slopes, _), (terms, _) = said_of(params, TEACHER, hyper, prepared(params, scores(1.0), step))
        updates, moments = adam.update(slopes, moments)
        params = jax.tree.map(lambda x, y: np.asarray(x + y), params, updates)
        said.append(mean_of(terms["jsd"]))
    assert np.mean(said[-5:]) < 0.15 * np.mean(said[:2])
    first, last = (said_of(p, TEACHER, hyper, held_out)[1][0]["jsd"] for p in (table(3, 8), params))
    assert mean_of(last) < 0.2 * mean_of(first)


def test_rewards_are_told_where_there_are_some():
    batch = prepared(STUDENT, scores())
    assert "score" not in batch and "last" in batch and "last" not in prepared(STUDENT, scores(), held_out=True)
    means = jax.eval_shape(lambda: objective(STUDENT, Taught(None, TEACHER), hyper_of(0.5), batch, key())[1])
    assert "kl" in means and "objective/score" not in means
    batch = prepared(STUDENT, scores(1.0, 2.5))
    means = objective(STUDENT, Taught(None, TEACHER), hyper_of(0.5), batch, key())[1]
    told = {name: mean_of(means[name]) for name in ("objective/score", "rewards/0", "rewards/1")}
    assert told == {"objective/score": 3.5, "rewards/0": 1.0, "rewards/1": 2.5}


def test_a_mixture_of_experts_keeps_its_balance(tmp_path):
    """Its term stands beside the divergence; from shapes alone."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.MIXTURE))
    model = hf.describe(epath.Path(tmp_path))
    made = make_objective(Models(model, None, model), (part("jsd"),))
    hyper = hyper_of(0.5) | {"balance": jnp.float32(0.01)}
    said = lambda params: made(params, Taught(None, params), hyper, BATCH, key())
    terms, means = jax.eval_shape(said, model.shapes())
    assert set(terms) == {"jsd", "balance"} and "balance" in means
