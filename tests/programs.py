"""The project's jitted programs from shapes alone, lowered as `run` would run them: to compile, not to execute."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import sharding
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.completions import reference_columns
from rlhf_jax.algorithms.optimizers import OPTIMIZERS, make_schedule
from rlhf_jax.algorithms.rollouts import Models
from rlhf_jax.algorithms.step import Optimizer, Taught, make_state, make_step
from rlhf_jax.losses.distillation import TwoHeads
from rlhf_jax.losses.preference import Pair
from rlhf_jax.losses.supervised import Tokens
from rlhf_jax.losses.unpaired import Answer
from rlhf_jax.models.decoder import Model
from tests import problem

Program = Literal["step", "evaluation", "reference"]
LOSSES = {
    "nll": ("sft", Tokens), "dpo": ("preference", Pair), "kto": ("preference", Answer), "jsd": ("distill", TwoHeads),
}  # fmt: skip
NUMBERS = {"nll": {"z_loss": 0.0}, "dpo": {"beta": 0.1}, "kto": {"beta": 0.1}, "jsd": {"beta": 0.5}}


def shapes_of_batch(rows: int, completions: int, length: int, place: NamedSharding) -> dict[str, Any]:
    """Every column that an objective may read, `rows` x `completions` x `length` tokens."""
    array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    tokens = {n: array(rows, completions, length, dtype=jnp.int32) for n in ("tokens", "segments", "positions")}
    return tokens | {
        "mask": array(rows, completions, length, dtype=jnp.bool_),
        "labels": array(rows, completions, dtype=jnp.bool_),
        "ref_logprob": array(rows, completions, dtype=jnp.float32),
        "weight": array(rows, dtype=jnp.float32),
        "baseline": array(rows, dtype=jnp.float32),
        "ended": array(rows, dtype=jnp.bool_),
    }


def lower(
    program: Program, loss: str, model: Model, *, rows: int, length: int, microbatches: int = 1
) -> jax.stages.Lowered:
    """One program of a model, which must have a mesh; `rows` counts the rows of tokens: a pair is two of them."""
    mesh = model.layout.mesh
    assert mesh is not None
    name, takes = LOSSES[loss]
    algorithm = ALGORITHMS[name]
    teacher = dataclasses.replace(model, shape=dataclasses.replace(model.shape, width=2 * model.shape.width))
    models = Models(model, None, teacher) if takes is TwoHeads else model
    objective = algorithm.make_objective(models, [problem.part(loss)])
    optimizer = Optimizer(OPTIMIZERS["adamw"], make_schedule("constant", 1, 0, 0.1))
    hyper = {**problem.numbers_of(loss, **NUMBERS[loss]), "optimizer": {"learning_rate": 1e-3, "clip_norm": 1.0}}
    hyper |= {"rollout": {"temperature": 1.0}} if takes is TwoHeads else {}
    params, key = jax.eval_shape(model.init, jax.random.key(0)), jax.eval_shape(lambda: jax.random.PRNGKey(0))
    state = jax.eval_shape(lambda p, k: make_state(p, hyper, optimizer, k), params, key)
    places, everywhere = sharding.state_shardings(state, mesh), NamedSharding(mesh, PartitionSpec())
    if takes is TwoHeads:
        there = sharding.param_shardings(teacher.shapes(), mesh)
        state = dataclasses.replace(state, frozen=Taught(None, teacher.shapes()))
        places = dataclasses.replace(places, frozen=Taught(None, there))
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
    completions = 2 if takes is Pair else 1
    batch = shapes_of_batch(rows // completions, completions, length, sharding.row_sharding(mesh))
    if program == "step":
        step = make_step(objective, optimizer, microbatches=microbatches, layout=model.layout)
        return jax.jit(step, out_shardings=(places, everywhere), donate_argnums=0).lower(state, batch)
    if program == "evaluation":
        arguments = state.params, state.frozen, state.hyper, batch, state.key
        return jax.jit(objective, out_shardings=everywhere).lower(*arguments)
    reference = lambda params, batch: reference_columns(model, params, batch)
    return jax.jit(reference, out_shardings=everywhere).lower(state.params, batch)
