"""DPO through its own prepare, objective and step on tables of logits: the optimum that PPO reaches too."""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms.optimizers import adamw
from rlhf_jax.algorithms.parts import Part
from rlhf_jax.algorithms.preference import PreferenceConfig, make_objective, make_prepare
from rlhf_jax.algorithms.step import Optimizer, make_state, make_step
from rlhf_jax.losses.preference import Pair, dpo
from tests.test_ppo import key
from tests.test_rollouts import ACTIONS, Tables, tables

PAIRS, ROWS, EPOCHS = 100_000, 20_000, 40  # pairs of each table, rows of an update
PART = Part("dpo", dpo, Pair, {"divergence": "reverse_kl"})


@functools.cache
def pairs() -> dict[str, np.ndarray]:
    """Answers drawn from the reference, the first preferred with the chance sigmoid(r1 - r2); both tables mixed."""
    (rewards, logits), rng = tables(), np.random.default_rng(2)
    rows = []
    for number, count in enumerate(ACTIONS):
        chances = np.exp(logits[number, :count].astype(float))
        drawn = rng.choice(count, (PAIRS, 2), p=chances / chances.sum())
        first = rng.random(PAIRS) < 1 / (1 + np.exp(-(rewards[number, drawn[:, 0]] - rewards[number, drawn[:, 1]])))
        rows.append(np.where(first[:, None], drawn, drawn[:, ::-1]))
    actions = np.concatenate(rows)
    tokens = np.stack([np.repeat([0, 1], PAIRS)[:, None].repeat(2, axis=1), actions], axis=2).astype(np.int32)
    which = tokens[..., 0]
    return {"tokens": tokens, "ref_logprob": np.asarray(jax.nn.log_softmax(logits))[which, actions]}


def batch(rows: np.ndarray) -> dict[str, Any]:
    tokens = pairs()["tokens"][rows]
    ones, place = np.ones_like(tokens), np.broadcast_to(np.arange(2, dtype=np.int32), tokens.shape)
    weight = np.ones(len(rows), np.float32)
    return {
        "tokens": tokens, "mask": place > 0, "segments": ones, "positions": place, "weight": weight,
        "labels": np.broadcast_to([True, False], tokens.shape[:2]), "index": rows.astype(np.int32),
        "probability": weight, "margin": 0 * weight, "ref_logprob": pairs()["ref_logprob"][rows],
    }  # fmt: skip


@functools.cache
def learner() -> tuple[Optimizer, Any, Any]:
    model, steps = cast(Any, Tables()), EPOCHS * 2 * PAIRS // ROWS
    optimizer = Optimizer(adamw, optax.cosine_decay_schedule(1.0, steps))
    prepare = make_prepare(model, [PART], PreferenceConfig(), None)
    return optimizer, prepare, jax.jit(make_step(make_objective(model, [PART]), optimizer), donate_argnums=0)


def likeliest(number: int) -> np.ndarray:
    """The rewards under which the labels of a table's pairs are likeliest, mean 0, by Newton's method in float64."""
    count = ACTIONS[number]
    actions = pairs()["tokens"][number * PAIRS : (number + 1) * PAIRS, :, 1]
    wins = np.zeros((count, count))
    np.add.at(wins, tuple(actions.T), 1)
    rewards, both = np.zeros(count), wins + wins.T
    for _ in range(20):
        chance = 1 / (1 + np.exp(rewards[None] - rewards[:, None]))
        slope = (wins - both * chance).sum(axis=1)
        weight = both * chance * (1 - chance)
        curve = np.diag(weight.sum(axis=1)) - weight
        rewards += np.linalg.solve(curve + 1 / count, slope)  # the constant is free: ones fix it
    return rewards - rewards.mean()


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpo_reaches_the_optimum_from_pairs_of_the_reference(beta):
    """pi_ref exp(r / beta), normalised, of 16 and of 64 actions, from 100,000 noisy pairs each.

    With beta 0.3 the labels themselves don't say it to 0.02, but to 0.03 and 0.06: what they say is an r of their own,
    which is reached.
    """
    (rewards, logits), (optimizer, prepare, step) = tables(), learner()
    rates = {
        "learning_rate": 0.1 / beta,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": math.inf,
    }
    hyper = {"loss": {"dpo": {"beta": beta, "label_smoothing": 0.0, "margin": 0.0}}, "weights": {"dpo": 1.0}}
    state = make_state({"logits": jnp.array(logits)}, hyper | {"optimizer": rates}, optimizer, key())
    rng = np.random.default_rng(3)
    for _ in range(EPOCHS):
        for rows in rng.permutation(2 * PAIRS).reshape(-1, ROWS):
            for made in prepare(state, batch(rows)):
                state, _ = step(state, made)
    found, reference = (np.asarray(jax.nn.softmax(x)) for x in (state.params["logits"], logits))
    for number, count in enumerate(ACTIONS):
        said = [rewards[number, :count], likeliest(number)]
        best, likely = (reference[number, :count] * np.exp(r / beta) for r in said)
        distance = [0.5 * np.abs(found[number, :count] - p / p.sum()).sum() for p in (best, likely)]
        assert distance[1] < 0.005, (count, distance)
        assert distance[0] < (0.02 if beta == 1 else 0.06), (count, distance)
