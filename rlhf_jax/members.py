"""Experiments that share one program: the same functions with a leading axis of members, or without one for a single.

Members differ in numbers alone (hyper-parameters, seeds and so the rows of a batch); what they share (weights that
are frozen, a fixed reference) has no such axis.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax import fields, sharding
from rlhf_jax.algorithms.step import Batch
from rlhf_jax.build import Built
from rlhf_jax.checkpoint import Checkpoints, Restored
from rlhf_jax.config import Config
from rlhf_jax.metrics import Log
from rlhf_jax.workdir import evaluations

Way = Literal["map", "vmap"]


class Axis:
    """The leading axis of the members; none if there is one member."""

    def __init__(self, members: int, mesh: Mesh, way: Way = "map"):
        """Args: way: one member after the other in one program (`lax.map`), or all at once (`vmap`)."""
        self.members, self.mesh, self.way = members, mesh, way
        self._take = jax.jit(lambda tree, member: jax.tree.map(lambda x: x[member], tree))

    def over(self, function: Callable[..., Any], shared: Sequence[int] = ()) -> Callable[..., Any]:
        """The function for all members; its arguments at `shared` are the same for all of them."""
        if self.members == 1:
            return function

        def for_all(*args: Any) -> Any:
            own = {place: arg for place, arg in enumerate(args) if place not in shared}
            one = lambda own: function(*(own.get(place, arg) for place, arg in enumerate(args)))
            return jax.vmap(one)(own) if self.way == "vmap" else jax.lax.map(one, own)

        return for_all

    def places(self, shardings: Any) -> Any:
        """Where arrays with the axis lie, from where each member's would."""
        if self.members == 1:
            return shardings
        return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec)), shardings)

    def stack(self, trees: Sequence[Any]) -> Any:
        """All members' trees of arrays as one; each stays where it lies."""
        if self.members == 1:
            return trees[0]
        places = self.places(jax.tree.map(lambda x: x.sharding, trees[0]))
        join = lambda *several: jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
        return jax.jit(join, out_shardings=places)(*trees)

    def pick(self, tree: Any, member: int) -> Any:
        """One member's part of a tree of arrays on devices."""
        if self.members == 1:
            return tree
        places = jax.tree.map(lambda x: NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:])), tree)
        return jax.device_put(self._take(tree, member), places)

    def place(self, batches: Sequence[Batch]) -> Batch:
        """This process's rows of each member's batch, numpy, as global arrays."""
        if self.members == 1:
            return sharding.place_rows(batches[0], self.mesh)
        rows = self.places(sharding.row_sharding(self.mesh))
        together = jax.tree_util.tree_map_with_path(_stacked, *batches)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), together)

    def split(self, values: Any) -> list[Any]:
        """The parts of a tree of numpy arrays, a tree a member."""
        if self.members == 1:
            return [values]
        return [jax.tree.map(lambda x, i=i: x[i], values) for i in range(self.members)]


def _stacked(path: tuple[Any, ...], *arrays: np.ndarray) -> np.ndarray:
    """Stacks arrays of which some are longer than others, the rest filled with padding, which is nobody's row."""
    largest = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    together = np.full((len(arrays), *largest), -1 if path[-1].key == "index" else 0, arrays[0].dtype)
    for place, array in zip(together, arrays, strict=True):
        place[tuple(map(slice, array.shape))] = array
    return together


class Patience:
    """Ends a run whose held-out loss has stopped falling."""

    def __init__(self, most: int):
        self.most, self.best, self.since = most, float("inf"), 0  # evaluations since the best one

    def see(self, loss: float) -> None:
        """Takes the loss of the next evaluation."""
        lower = loss < self.best
        self.best, self.since = (loss, 0) if lower else (self.best, self.since + 1)

    @property
    def ended(self) -> bool:
        return 0 < self.most <= self.since


def patience(workdir: epath.Path, config: Config, step: int) -> Patience:
    """What the evaluations of a run, up to a step, left of its patience."""
    made = Patience(config.evaluate.patience)
    for row in evaluations(workdir):
        if row["step"] <= step:
            made.see(row["eval/loss"])
    return made


class Member:
    """One experiment's own folder and counters."""

    def __init__(self, built: Built, step: int | None):
        """Args: step: the checkpoint to go on from; None starts anew."""
        self.built, self.config = built, built.config
        self.checkpoints = Checkpoints(built.workdir / "checkpoints", built.config.checkpoint)
        self.tokens, self.evaluated = 0, {}
        self.scored: int | None = None  # the step of the last evaluation that a checkpoint was saved with
        self.patience = patience(built.workdir, built.config, -1 if step is None else step)
        self.row: dict[str, float] = {}  # the last that was written

    def open_log(self, step: int | None, progress: bool) -> None:
        """Starts writing, from a step on."""
        resolved, main = fields.to_dict(self.config), jax.process_index() == 0
        self.log = Log(
            self.built.workdir, self.config.log, start=step or 0, steps=self.built.steps, resolved=resolved, main=main,
            progress=progress,
        )  # fmt: skip

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One step's metrics, numbers on the host."""
        tokens = int(values.pop("tokens"))
        self.tokens += tokens
        self.row = {"step": step} | {name: float(value) for name, value in values.items()}
        self.row["num_tokens"] = self.tokens
        self.log.step(self.row, tokens)

    def save(self, step: int, position: int, state: Any, pending: list[Batch], shift: float) -> None:
        """Starts writing a checkpoint; returns when the arrays are copied. `shift`: see `workdir.Held`."""
        host = {"position": position, "tokens": self.tokens, "evaluated": self.evaluated, "shift": shift}
        host["data"] = self.built.data.fingerprint
        # An evaluation scores one checkpoint, the first after it: of equal scores the newest would be kept.
        at = self.evaluated.get("step")
        self.checkpoints.save(step, state, host, pending, {} if at == self.scored else self.evaluated)
        self.scored = at

    def restore(self, step: int, shapes: Any, rows: NamedSharding) -> Restored:
        """A checkpoint; the counters go on from it."""
        restored = self.checkpoints.restore(step, shapes, rows)
        self.tokens, self.evaluated = restored.host["tokens"], restored.host["evaluated"]
        self.scored = self.evaluated.get("step")
        return restored

    def close(self) -> None:
        """Finishes the checkpoint under way and the files."""
        self.checkpoints.close()
        self.log.close()
