"""Where the logical axes of an array lie on the device mesh.

Models and operations name axes by what they are ("rows", "heads"); this file alone says which mesh axis
that is, so that a function written for one device is the same function on a pod.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = {
    "rows": ("data", "fsdp", "expert"), "heads": "tensor", "mlp": "tensor", "vocab": "tensor", "experts": "expert",
    None: None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with the axes data, fsdp, expert and tensor, or none (arrays then stay where they are)."""

    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        """In how many pieces the rows of a batch are cut."""
        return self.size("rows")

    def size(self, axis: str) -> int:
        """In how many pieces the arrays' dimension of this name is cut."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in _names(axis))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical names."""
        return PartitionSpec(*(AXES[axis] for axis in axes))

    def sharding(self, *axes: str | None) -> NamedSharding | None:
        """Where such an array lies; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(*axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pins `x` to its place on the mesh; a hint to the partitioner that changes no value."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*axes)))

    def per_shard(self, function: Callable[..., Any], *, inputs: tuple[Any, ...], output: Any) -> Callable[..., Any]:
        """`function` run on each device's own piece, for kernels that the partitioner cannot split.

        Args:
          inputs, output: the partition of each argument and of the result, or trees of them. What isn't cut
            over a mesh axis must be the same on all devices along it.
        """
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=output, check_vma=False)

    # What a function that runs per shard may ask of the other devices along an axis: nothing where there are none.

    def index(self, axis: str) -> Any:
        """Which piece of a dimension of this name the device holds."""
        return jax.lax.axis_index(_names(axis)) if self.size(axis) > 1 else 0

    def gather(self, x: jax.Array, axis: str) -> jax.Array:
        """All devices' pieces one behind the other, along the first dimension."""
        return jax.lax.all_gather(x, _names(axis), tiled=True) if self.size(axis) > 1 else x

    def sum(self, x: jax.Array, axis: str) -> jax.Array:
        """The sum of all devices' arrays."""
        return jax.lax.psum(x, _names(axis)) if self.size(axis) > 1 else x

    def scatter_sum(self, x: jax.Array, axis: str) -> jax.Array:
        """The sum of all devices' arrays, of which each device gets the piece that it gave to `gather`."""
        return jax.lax.psum_scatter(x, _names(axis), tiled=True) if self.size(axis) > 1 else x


def _names(axis: str) -> tuple[str, ...]:
    names = AXES[axis]
    return (names,) if isinstance(names, str) else names or ()
