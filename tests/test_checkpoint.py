"""A checkpoint counts only when it is whole; it comes back bit for bit, also on another mesh."""

import jax
import numpy as np
import pytest
from etils import epath

from rlhf_jax import sharding
from rlhf_jax.checkpoint import CheckpointConfig, Checkpoints, is_sealed, latest, restore_params
from rlhf_jax.sharding import MeshShape
from tests import problem


def shapes_of(state, mesh):
    places = sharding.state_shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)


@pytest.fixture
def state():
    return problem.start(sharding.make_mesh(MeshShape(2, 2, 2)), problem.hyper({"beta": 0.1}))


def test_state_position_and_pending_come_back_on_another_mesh(tmp_path, state):
    folder = epath.Path(tmp_path / "checkpoints")
    mesh = sharding.make_mesh(MeshShape(1, 4, 1))
    rows = {**problem.make_rows(3), "nested": {"tokens": np.arange(32, dtype=np.int32)}}
    pending = [sharding.place_rows(rows, sharding.make_mesh(MeshShape(2, 2, 2)))]
    before = Checkpoints(folder)
    before.save(7, state, {"position": 123456789012}, pending, {})
    before.close()
    like = shapes_of(state, mesh)
    found = Checkpoints(folder).restore(7, like, sharding.row_sharding(mesh))
    assert found.host == {"position": 123456789012}
    jax.tree.map(np.testing.assert_array_equal, found.state, state)
    jax.tree.map(np.testing.assert_array_equal, found.pending, [rows])
    up = found.state.params["layers"]["up"]["kernel"]
    assert up.sharding.mesh.shape == mesh.shape and up.addressable_shards[0].data.shape == (2, 8, 48)
    params = restore_params(folder, 7, like.params)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_a_checkpoint_cut_short_does_not_count(tmp_path, state):
    folder = epath.Path(tmp_path / "checkpoints")
    assert latest(folder) is None
    writer = Checkpoints(folder, CheckpointConfig(keep_last=3, keep_best=0))
    for step in (1, 2, 3):
        writer.save(step, state, {}, [], {})
    writer.close()
    assert latest(folder) == 3
    (folder / "3" / "manifest.json").unlink()
    assert latest(folder) == 2
    largest = max((folder / "2").glob("state/ocdbt.process_0/d/*"), key=lambda path: path.stat().length)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert latest(folder) == 1 and not is_sealed(folder / "2")
    Checkpoints(folder)  # a run that resumes clears away what doesn't count
    assert sorted(path.name for path in folder.iterdir()) == ["1"]


def test_the_newest_and_the_best_are_kept(tmp_path, state):
    folder = epath.Path(tmp_path / "checkpoints")
    config = CheckpointConfig(keep_last=2, keep_best=1, best="eval/rewards/accuracies", best_mode="max")
    writer = Checkpoints(folder, config)
    for step, share in enumerate([0.5, 0.9, 0.6, 0.7, 0.8], start=1):
        writer.save(step, state, {}, [], {"eval/rewards/accuracies": share})
    writer.close()
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "5"]
