"""Where the logical axes of an array lie on the device mesh.

Models and operations name axes by what they are ("rows", "heads"); this file alone says which mesh axis
that is, so that a function written for one device is the same function on a pod.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = {"rows": ("data", "fsdp"), "heads": "tensor", "mlp": "tensor", "vocab": "tensor", None: None}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with the axes data, fsdp and tensor, or none (arrays then stay where they are)."""

    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        """In how many pieces the rows of a batch are cut."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

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

    def per_shard(
        self, function: Callable[..., Any], *, inputs: tuple[PartitionSpec, ...], output: PartitionSpec
    ) -> Callable[..., Any]:
        """`function` run on each device's own piece, for kernels that the partitioner cannot split."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=output, check_vma=False)
