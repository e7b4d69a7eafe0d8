"""A small training problem that several test files share: a random decoder and rows of very uneven length."""

import dataclasses
import functools
import inspect
from typing import Any, get_type_hints

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import sharding
from rlhf_jax.algorithms import preference, reward, sft
from rlhf_jax.algorithms.parts import Part
from rlhf_jax.algorithms.rollouts import Scores
from rlhf_jax.algorithms.step import Objective, Optimizer, TrainState, make_state, make_step
from rlhf_jax.losses import LOSSES
from rlhf_jax.models.decoder import Model, Numerics
from rlhf_jax.models.rope import Rope
from rlhf_jax.models.shape import Kind, Shape
from rlhf_jax.ops.layout import Layout

SHAPE = Shape(
    vocab=64, width=32, layers=2, heads=4, groups=4, head_dim=8, mlp_width=48, length=64,
    kinds=(Kind(rope=Rope(theta=100.0)),), tied=False, qkv_bias=True, spread=0.3,
)  # fmt: skip
ROWS, LENGTH = 32, 24
PARTNERS = ("margin_partner", "chosen_partner", "rejected_partner")


def make_model(mesh: jax.sharding.Mesh | None = None, **numerics: Any) -> Model:
    """The decoder on a mesh; a few chunks of logits a batch."""
    return Model(SHAPE, Numerics(chunk=128, **numerics), Layout(mesh))


def make_rows(seed: int = 0, rows: int = ROWS, completions: int = 2) -> dict[str, np.ndarray]:
    """Preference rows [B, K, T] with completions of 1 to 16 tokens, every eighth row padding."""
    rng = np.random.default_rng(seed)
    shape = (rows, completions, LENGTH)
    prompt = rng.integers(1, 8, (rows, 1, 1))
    total = prompt + np.maximum(1, (rng.random((rows, completions, 1)) ** 3 * 16).astype(int))
    place = np.arange(LENGTH)[None, None]
    real = place < total
    weight = (np.arange(rows) % 8 != 7).astype(np.float32)
    real &= weight[:, None, None] > 0
    segments = real.astype(np.int32)
    length = np.sum(real & (place >= prompt), axis=-1)
    return {
        "tokens": rng.integers(0, SHAPE.vocab, shape).astype(np.int32),
        "mask": real & (place >= prompt),
        "segments": segments,
        "positions": (place * segments).astype(np.int32),
        "weight": weight,
        "index": np.arange(rows, dtype=np.int32),
        "labels": np.tile(np.arange(completions) == 0, (rows, 1)),
        "ref_logprob": (-4.5 * length + rng.normal(size=(rows, completions))).astype(np.float32),
        "baseline": np.full(rows, 0.3, np.float32),
        "shift": np.full(rows, 0.2, np.float32),
        **{name: rng.normal(size=rows).astype(np.float32) for name in PARTNERS},
    }


def either(learning_rate: Any, *, plain: float = 0.0, weight_decay: float = 0.01) -> optax.GradientTransformation:
    """AdamW, or plain descent if `plain` is 1: both in one program, so that a test compiles half as often."""
    adam, descent = optax.adamw(learning_rate, weight_decay=weight_decay), optax.sgd(learning_rate)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        first, state = adam.update(grads, state, params)
        second, _ = descent.update(grads, descent.init(params), params)
        return jax.tree.map(lambda a, b: jax.numpy.where(plain > 0, b, a), first, second), state

    return optax.GradientTransformation(adam.init, update)  # pyright: ignore[reportArgumentType]


OPTIMIZER = Optimizer(either, optax.constant_schedule(1.0))
OBJECTIVES = {takes: algorithm.make_objective for algorithm in (preference, sft, reward) for takes in algorithm.READS}


def part(name: str) -> Part:
    """A loss of the project with its defaults."""
    loss = LOSSES[name]
    first = next(iter(inspect.signature(loss).parameters))
    return Part(name, loss, get_type_hints(loss)[first], {})


def objective_of(name: str, model: Any) -> Objective:
    """The objective of one loss; its hyper-parameters are `numbers_of`."""
    one = part(name)
    return OBJECTIVES[one.takes](model, [one], preference.PreferenceConfig())


def numbers_of(name: str, **numbers: Any) -> dict[str, Any]:
    """hyper["loss"] and hyper["weights"] of one loss."""
    return {"loss": {name: numbers}, "weights": {name: 1.0}}


def hyper(loss: dict[str, float], learning_rate: float = 3e-2, plain: float = 0.0) -> dict[str, Any]:
    """The hyper-parameters of `OPTIMIZER` and a loss."""
    return {"loss": loss, "optimizer": {"learning_rate": learning_rate, "plain": plain, "clip_norm": 1e9}}


@functools.cache
def initial() -> Any:
    """One set of random parameters, on the host."""
    model = make_model()
    return jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0)))


@functools.cache
def _blank(family_numbers: tuple[str, ...]) -> TrainState:
    """The state before the first step, on the host."""
    params = initial()
    make = lambda: make_state(params, hyper(dict.fromkeys(family_numbers, 0.0)), OPTIMIZER, jax.random.PRNGKey(0))
    return jax.tree.map(np.asarray, jax.jit(make)())


def start(mesh: jax.sharding.Mesh, numbers: dict[str, Any]) -> TrainState:
    """The state before the first step, on the mesh; placed and not compiled, so that a test may make many."""
    state = dataclasses.replace(_blank(tuple(numbers["loss"])), hyper=jax.tree.map(np.float32, numbers))
    return jax.device_put(state, sharding.state_shardings(state, mesh))


def compiled_step(mesh: jax.sharding.Mesh, objective: Objective, state: TrainState, microbatches: int, **more: Any):
    """The jitted step as `run` makes it: pinned shardings, donated state."""
    places = jax.tree.map(lambda x: x.sharding, state)
    step = make_step(objective, OPTIMIZER, microbatches=microbatches, layout=Layout(mesh), **more)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step, in_shardings=(places, sharding.row_sharding(mesh)), out_shardings=(places, everywhere), donate_argnums=0
    )


def scores(values: Any) -> Scores:
    """Of one reward that always applies."""
    values = np.asarray(values, np.float32)[:, None]
    return Scores(values, np.ones(values.shape, bool), np.ones(1, np.float32), ("told",))
