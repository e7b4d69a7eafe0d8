"""What training starts from: its parameters, the shapes of its state, the columns of its reference."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import sharding
from rlhf_jax.algorithms.completions import REFERENCE, reference_columns
from rlhf_jax.algorithms.reward import answer_scores, new_head
from rlhf_jax.algorithms.step import ADAPTER, INIT, Batch, TrainState, flat_rows, make_state, whole
from rlhf_jax.build import Built
from rlhf_jax.data import dataset
from rlhf_jax.data.columns import Columns, fill
from rlhf_jax.models import lora, start


def base_params(built: Built) -> Any:
    """The model's weights as training starts from them, each leaf made or read where it lies on the mesh.

    Under an adapter they are frozen, and held as `lora.base` says.
    """
    plain, base = built.model.without_adapter(), built.config.lora.base
    if built.config.model.init == "checkpoint":
        params = start.load(built.start, plain, lambda path, _: sharding.param_sharding(built.mesh, path), base)
        return jax.device_put(params, sharding.param_shardings(params, built.mesh))  # quantised ones may lie elsewhere
    make = lambda key: lora.quantise(built.model, plain.init(key))
    key = jax.random.fold_in(jax.random.key(built.config.seed), INIT)
    places = sharding.param_shardings(lora.base_shapes(built.model), built.mesh)
    return jax.jit(make, out_shardings=places)(key)


def new_adapter(built: Built) -> Any:
    """The adapter that training starts with; it changes nothing yet."""
    places = sharding.param_shardings(_policy_shapes(built), built.mesh)
    make = jax.jit(lambda key: lora.init_adapter(built.model, key), out_shardings=places)
    return make(jax.random.fold_in(jax.random.key(built.config.seed), ADAPTER))


def trained_params(built: Built, base: Any) -> Any:
    """What training starts from, see `trained_shapes`, in buffers of its own but for the base's.

    Args: base: all weights of the model, frozen where they are adapted.
    """
    own = base if built.model.adapter is None else lora.with_score(new_adapter(built), base)
    value = None if built.online is None else built.online.value
    return own if value is None else {"policy": own, "value": value.make()}


def trained_shapes(built: Built) -> Any:
    """The shapes and dtypes of what is trained: all weights, or the adapter; beside a value that of both."""
    own, value = _policy_shapes(built), None if built.online is None else built.online.value
    return own if value is None else {"policy": own, "value": value.shapes}


def _policy_shapes(built: Built) -> Any:
    shapes = built.model.shapes()
    return shapes if built.model.adapter is None else lora.split(shapes)[0]


def new_state(built: Built, params: Any, key: jax.Array, hyper: Any = None) -> TrainState:
    """The state before the first update, without what is frozen.

    Args: hyper: the numbers of another experiment that shares this one's program; None: its own.
    """
    numbers = built.hyper if hyper is None else hyper
    if built.fresh_head and built.config.reward.head == "normal":
        params = new_head(params, key)
    return make_state(params, numbers, built.optimizer, key, carry=built.carry(params, numbers))


def state_shapes(built: Built) -> TrainState:
    """The state's shapes, each with its sharding; without what is frozen."""
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    make = lambda params, key: new_state(built, params, key)
    shapes = jax.eval_shape(make, trained_shapes(built), key)
    places = sharding.state_shardings(shapes, built.mesh)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(place, shapes, places)


# ---- the fixed reference


def _reference_identity(built: Built) -> str:
    """Names the initial model and how it is computed."""
    model, base = built.config.model, built.config.lora.base
    name = start.identity(built.start)
    if model.init == "random":
        name += f"-random{built.config.seed}"
    name += "" if base == "full" else f"-{base}"
    return f"{name}-{model.param_dtype}-{model.compute_dtype}"


Tables = dict[str, tuple[np.ndarray, np.ndarray]]  # column -> tables of the training and of the held-out rows


def reference_tables(builts: Sequence[Built], params: Callable[[], Any], first: int) -> list[Tables]:
    """For each experiment the columns of the reference that they share, from batch `first` on.

    What an earlier run on the same reference and rows has left in the cache is not computed again.

    Args:
      params: gives the reference's parameters; called only if something is missing.
    Returns: tables by example index, see `Columns.table`.
    """
    built = builts[0]
    visited = [_visited(one, first) for one in builts]
    held_out = [list(one.held_out) for one in builts]
    shared = built.config.preference.length_alpha is not None
    names = REFERENCE if shared else REFERENCE[:1]
    folder, identity = os.path.expanduser(built.config.cache), _reference_identity(built)
    stores = {name: Columns(folder, identity, shared=name == "ref_shared") for name in names}
    everywhere = NamedSharding(built.mesh, PartitionSpec())
    model = built.model.without_adapter()
    run = jax.jit(lambda params, batch: reference_columns(model, params, batch, shared), out_shardings=everywhere)

    def compute(examples: Sequence[dataset.Example]) -> dict[str, np.ndarray]:
        print(f"reference: computing {len(examples)} rows", flush=True)
        fixed = params()
        order = sorted(range(len(examples)), key=lambda i: max(map(len, examples[i].completions)))
        place = {example.index: i for i, example in enumerate(examples)}
        shape = len(examples), max(len(example.completions) for example in examples)
        values = {name: np.empty(shape, np.float32) for name in names}
        for part in built.rows_once([examples[i] for i in order], mismatched=False):
            batch = sharding.place_rows(part, built.mesh)
            index = sharding.fetch(batch["index"]).reshape(-1)
            some = index >= 0
            for name, column in run(fixed, batch).items():
                values[name][[place[i] for i in index[some].tolist()]] = sharding.fetch(column)[some]
        return values

    for part in (visited, held_out):
        union = list({example.index: example for rows in part for example in rows}.values())
        fill(stores, union, compute, write=jax.process_index() == 0)
    return [
        {name: (store.table(ours), store.table(theirs)) for name, store in stores.items()}
        for ours, theirs in zip(visited, held_out, strict=True)
    ]


def _visited(built: Built, first: int) -> list[dataset.Example]:
    """The training examples that the run will see, from batch `first` on."""
    loader = built.loader
    span = range(first * loader.batch_size, max(first, built.steps) * loader.batch_size)
    rows = sorted({loader.order(p) for p in span})
    return [loader.examples[place] for row in rows for place in loader.rows[row]]


# ---- where a reward model's scores are 0


def demonstration_sums(built: Built) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
    """(params, frozen, batch of demonstrations) -> the sum of their scores, and how many there are."""

    def sums(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        scores = answer_scores(built.model.score(whole(params, frozen), flat_rows(batch)), batch)
        weight = batch["weight"].reshape(-1, 1)
        return jnp.sum(jnp.where(weight > 0, scores * weight, 0)), jnp.sum(weight)

    return sums
