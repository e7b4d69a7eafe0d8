"""The device mesh and where everything lies on it.

There is no single-device path: a laptop is a mesh of 1 x 1 x 1 x 1. Rows are split over data, fsdp and expert,
weights over fsdp and tensor, and experts over expert too, by the rules below; optimiser moments like the weights
they belong to.
"""

import dataclasses
import math
import re
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.layout import AXES

P = PartitionSpec
Batch = dict[str, Any]  # arrays whose first axis is the row, maybe nested one level

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding|head", P("tensor", "fsdp")),
    (r"layers/(query|key|value)/kernel(/values|/scales)?", P(None, "fsdp", "tensor", None)),
    (r"layers/(query|key|value)/bias", P(None, "tensor", None)),
    (r"layers/out/kernel(/values|/scales)?", P(None, "tensor", None, "fsdp")),
    (r"layers/(gate|up)/kernel(/values|/scales)?", P(None, "fsdp", "tensor")),
    (r"layers/(gate|up)/bias", P(None, "tensor")),
    (r"layers/down/kernel(/values|/scales)?", P(None, "tensor", "fsdp")),
    (r"layers/(out|down)/bias", P(None, None)),
    (r"layers/experts/router/kernel", P(None, "fsdp", None)),
    (r"layers/experts/(gate|up)/kernel", P(None, "expert", "fsdp", "tensor")),
    (r"layers/experts/down/kernel", P(None, "expert", "tensor", "fsdp")),
    # An adapter's factors are cut as the kernel is, and whole along the rank.
    (r"layers/(query|key|value|gate|up)/lora_a", P(None, "fsdp", None)),
    (r"layers/out/lora_a", P(None, "tensor", None, None)),
    (r"layers/down/lora_a", P(None, "tensor", None)),
    (r"layers/(query|key|value)/lora_b", P(None, None, "tensor", None)),
    (r"layers/(gate|up)/lora_b", P(None, None, "tensor")),
    (r"layers/(out|down)/lora_b", P(None, None, "fsdp")),
    (r"layers/\w+_norm(_bias)?", P(None, None)),
    (r"final_norm(_bias)?", P(None)),
    (r"positions/embedding", P(None, "fsdp")),
    (r"score", P(None)),
    (r"score_bias", P()),
)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; one axis may be -1: all that are left."""

    data: Annotated[int, "copies of the model, each with its own rows; -1: all devices that are left"] = -1
    fsdp: Annotated[int, "pieces of each weight that also have their own rows"] = 1
    tensor: Annotated[int, "pieces of each weight that share rows"] = 1
    expert: Annotated[int, "groups of a mixture's experts, each also with its own rows"] = 1


# Neighbours in the mesh are neighbours on the machine: what talks most comes last.
ORDER = ("data", "fsdp", "expert", "tensor")


def make_mesh(shape: MeshShape, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, expert, tensor over the first devices.

    Errors: UserError if the devices are too few or an axis is neither positive nor the one -1.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = {name: getattr(shape, name) for name in ORDER}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes} is not allowed: sizes are 1 or more and at most one axis is -1.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name in free:
        sizes[name] = max(1, len(devices) // fixed)
    total = math.prod(sizes.values())
    if total > len(devices) or (jax.process_count() > 1 and total != len(devices)):
        raise UserError(
            f"mesh {'x'.join(map(str, sizes.values()))} ({' x '.join(ORDER)}) wants {total} devices, "
            f"but there are {len(devices)}; change --config.mesh.data, .fsdp, .expert or .tensor."
        )
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices[:total])


def path_of(keys: tuple[Any, ...]) -> str:
    """A tree path as names joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def rule(path: str) -> PartitionSpec:
    """The partition of the parameter at `path`, of a model alone or of one of several.

    Errors: KeyError naming a path no rule matches.
    """
    own = re.sub("^(policy|value|reference|base|teacher)/", "", path)
    for pattern, spec in RULES:
        if re.fullmatch(pattern, own):
            return spec
    raise KeyError(f"no partition rule matches the parameter {path}; add one to sharding.RULES")


def check_divides(model: Model, mesh: Mesh) -> None:
    """Errors: UserError naming the first parameter and dimension that the mesh doesn't divide."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(model.shapes()):
        for size, axis in zip(leaf.shape, rule(path_of(keys)), strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh axis {axis}={mesh.shape[axis]} does not divide the {size} of {path_of(keys)} "
                    f"{leaf.shape}; choose a --config.mesh.{axis} that does."
                )


def param_sharding(mesh: Mesh, path: tuple[str, ...]) -> NamedSharding:
    """Where the parameter with this path lies."""
    return NamedSharding(mesh, rule("/".join(path)))


def _leaf_spec(mesh: Mesh, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of a leaf; parts of a quantised kernel are smaller and not cut where the mesh doesn't divide."""
    spec = rule(path)
    if not path.endswith(("/values", "/scales")):
        return spec
    divides = lambda size, axis: axis is None or size % mesh.shape[axis] == 0
    return P(*(axis if divides(size, axis) else None for size, axis in zip(shape, spec, strict=True)))


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """Where each leaf of a tree of parameters, given as arrays or shapes, lies."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, _leaf_spec(mesh, path_of(keys), leaf.shape)), params
    )


def for_decoding(params: Any, model: Any) -> Any:
    """A copy of the parameters as sampling reads them: in the compute dtype, whole along fsdp.

    Decoding reads every weight for every token; cut along fsdp they would be gathered as often. Quantised
    kernels stay as they are, and so do norms, scores and single numbers, which may be computed in more than the
    compute dtype.

    Args: model: a `Model`, or a mixture of two; its numerics and its layout are read.
    """

    def place(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        path, mesh = path_of(keys), model.layout.mesh
        if leaf.ndim == 0:
            return leaf
        if not path.endswith(("/values", "/scales", "_norm")) and path not in ("score", "score_bias"):
            leaf = leaf.astype(model.numerics.compute_dtype)
        if mesh is None:
            return leaf
        spec = P(*(None if axis == "fsdp" else axis for axis in _leaf_spec(mesh, path, leaf.shape)))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, params)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a whole train state, given as arrays or shapes.

    A parameter, frozen or not, goes by `RULES`; a leaf elsewhere whose path ends in a parameter's and that has its
    shape (an optimiser's moment, a moving reference) goes with it; scalars and the small leftovers of factored
    moments are on every device. Errors: KeyError naming a parameter that no rule matches.
    """
    trees = (jax.tree_util.tree_leaves_with_path(tree) for tree in (state.params, state.frozen))
    params = {path_of(keys): leaf for tree in trees for keys, leaf in tree}

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = path_of(keys).split("/")
        for start in range(len(parts)):
            suffix = "/".join(parts[start:])
            if suffix in params and params[suffix].shape == leaf.shape:
                return NamedSharding(mesh, _leaf_spec(mesh, suffix, leaf.shape))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, state)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: its first axis over data, fsdp and expert."""
    return NamedSharding(mesh, P(AXES["rows"]))


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """Which rows of a global batch this process feeds."""
    indices = row_sharding(mesh).addressable_devices_indices_map((batch_size,))
    spans = [index[0].indices(batch_size) for index in indices.values() if index is not None]
    return slice(min(span[0] for span in spans), max(span[1] for span in spans))


def place_rows(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows of a batch, numpy, as global arrays on the mesh."""
    sharding = row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def fetch(array: jax.Array) -> np.ndarray:
    """A global array on the host of every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
