"""Checkpoints of a run: the state, the data position and what was prepared but not yet consumed.

Orbax writes them in the background. A checkpoint counts only once its manifest stands, which lists every file
with its size and is written last: a kill at any moment leaves the one before.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from rlhf_jax.algorithms.step import Batch, TrainState

MANIFEST = "manifest.json"
STAMPED_LATER = "_CHECKPOINT_METADATA"  # Orbax writes the time of the commit into it after our manifest stands


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to write checkpoints and which to keep."""

    every: Annotated[int, "steps between checkpoints; 0: only the last step's"] = 100
    keep_last: Annotated[int, "newest checkpoints kept, 1 or more"] = 2
    keep_best: Annotated[int, "best checkpoints kept besides, by `best`; 0: none"] = 1
    best: Annotated[str, "metric of the last evaluation that says which is best"] = "eval/loss"
    best_mode: Annotated[Literal["min", "max"], "whether a small or a large value is good"] = "min"


class Restored(NamedTuple):
    """A checkpoint's content."""

    state: TrainState
    host: dict[str, Any]
    pending: list[Batch]


class Checkpoints:
    """The checkpoints of one folder, a sub-folder a step."""

    def __init__(self, folder: epath.Path, config: CheckpointConfig = CheckpointConfig()):
        folder = folder if folder.is_absolute() else folder.resolve()  # Orbax takes no other
        self._folder = folder
        self._writing: int | None = None
        sign = 1 if config.best_mode == "max" else -1
        score = lambda metrics: sign * metrics[config.best] if config.best in metrics else -np.inf
        policies: list[Any] = [checkpoint_managers.LatestN(config.keep_last)]
        if config.keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=score, n=config.keep_best))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=score,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        for step in _steps(folder):
            if not is_sealed(step):  # what a kill left behind
                step.rmtree()
        self._manager = ocp.CheckpointManager(folder, options=options)

    def _seal(self) -> None:
        """Orbax calls this when the step's files are all written, before it gives their folder its name."""
        if jax.process_index() == 0:
            folder = next(path for path in self._folder.iterdir() if path.name.split(".")[0] == str(self._writing))
            files = {str(path.relative_to(folder)): path.stat().length for path in _files(folder)}
            files.pop(STAMPED_LATER, None)
            (folder / MANIFEST).write_text(json.dumps({"files": files}))

    def save(
        self, step: int, state: TrainState, host: dict[str, Any], pending: list[Batch], metrics: dict[str, float]
    ) -> None:
        """Starts writing; returns when the arrays are copied, so the step may donate them.

        Args:
          host: what is not an array: the data position, counters. JSON.
          pending: batches prepared and not consumed.
          metrics: of the last evaluation; they decide which checkpoint is best.
        """
        self._manager.wait_until_finished()
        self._writing = step
        shapes = [jax.tree.map(lambda x: [list(x.shape), str(x.dtype)], batch) for batch in pending]
        items = {
            "state": ocp.args.StandardSave(dataclasses.replace(state, frozen=None)),
            "host": ocp.args.JsonSave({**host, "pending": shapes}),
        }
        if pending:
            items["pending"] = ocp.args.StandardSave(pending)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def restore(self, step: int, like: TrainState, rows: jax.sharding.Sharding) -> Restored:
        """A checkpoint's content, placed like `like` (arrays or shapes with shardings); `rows` places batches."""
        host = self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]
        items = {"state": ocp.args.StandardRestore(dataclasses.replace(like, frozen=None))}
        shape = lambda x: jax.ShapeDtypeStruct(tuple(x[0]), np.dtype(x[1]), sharding=rows)
        pending = [jax.tree.map(shape, batch, is_leaf=lambda x: isinstance(x, list)) for batch in host.pop("pending")]
        if pending:
            items["pending"] = ocp.args.StandardRestore(pending)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = dataclasses.replace(restored["state"], frozen=like.frozen)
        return Restored(state, host, list(restored["pending"]) if pending else [])

    def close(self) -> None:
        """Waits until the last checkpoint is whole."""
        self._manager.wait_until_finished()
        self._manager.close()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        yield from _files(path) if path.is_dir() else (path,)


def digest(folder: epath.Path) -> str:
    """A hash of every file below a folder, names and bytes, hex."""
    found = hashlib.blake2b(digest_size=16)
    for file in _files(folder):
        found.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as stream:
            while part := stream.read(2**24):
                found.update(part)
    return found.hexdigest()


def is_sealed(folder: epath.Path) -> bool:
    """Whether a step's folder has its manifest and every file that it lists, whole."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return False
    files = json.loads(manifest.read_text())["files"]
    return all((folder / name).exists() and (folder / name).stat().length == size for name, size in files.items())


def _steps(folder: epath.Path) -> list[epath.Path]:
    """The folders of steps, oldest first."""
    names = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(names, key=lambda path: int(path.name))


def latest(folder: epath.Path) -> int | None:
    """The newest step with a whole checkpoint in a folder of checkpoints."""
    sealed = [int(path.name) for path in _steps(folder) if is_sealed(path)]
    return sealed[-1] if sealed else None


def read_host(folder: epath.Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds besides arrays: see `Checkpoints.save`."""
    folder = folder if folder.is_absolute() else folder.resolve()  # Orbax takes no other
    with ocp.CheckpointManager(folder, item_handlers={"host": ocp.JsonCheckpointHandler()}) as manager:
        return manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]


def restore_params(folder: epath.Path, step: int, like: Any) -> Any:
    """The parameters of a checkpoint alone, placed like `like` (shapes with shardings)."""
    folder = folder if folder.is_absolute() else folder.resolve()  # Orbax takes no other
    item = {"params": like}
    how = ocp.args.PyTreeRestore(
        item=item, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
    )
    with ocp.CheckpointManager(folder, item_handlers={"state": ocp.PyTreeCheckpointHandler()}) as manager:
        return manager.restore(step, args=ocp.args.Composite(state=how))["state"]["params"]
