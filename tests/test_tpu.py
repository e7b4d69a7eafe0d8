"""The train steps compile for TPUs ahead of time, on a machine that has none.

libtpu is loaded in processes of their own, which see no device of this one: its compiler works from the
description of a machine, here a v5e of 2 x 2 chips.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.requirements import Requirement

from rlhf_jax.models.decoder import Model, Numerics
from rlhf_jax.models.shape import Kind, Shape
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sharding import MeshShape, make_mesh
from tests.programs import lower
from tests.test_no_dense_logits import sizes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, which is made for Linux on x86-64 alone: pip install 'rlhf_jax[tpu]'",
)
ROOT = pathlib.Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the process has no TPU to start
    "TPU_SKIP_MDS_QUERY": "1",  # nor a cloud to ask for one
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
TOPOLOGY, MESH = "v5e:2x2", MeshShape(1, 2, 2)
ROWS, LENGTH, VOCAB, CHUNK = 8, 256, 2048, 128
SHAPE = Shape(vocab=VOCAB, width=256, layers=3, heads=4, groups=2, head_dim=64, mlp_width=512, length=LENGTH)
# Layers with a window and one without, as Gemma 2 has them.
MIXED: dict[str, Any] = dict(
    kinds=(Kind(window=100), Kind()), pattern=(0, 1, 0), attention_soft_cap=50.0, norms="sandwich"
)
# Between them: both dtypes, both head sizes, windows and capped scores, and what the backward pass makes again.
CASES = {
    "nll": (SHAPE, Numerics(chunk=CHUNK)),
    "dpo": (
        dataclasses.replace(SHAPE, head_dim=128, **MIXED),
        Numerics(compute_dtype="bfloat16", remat="full", chunk=CHUNK),
    ),
}
KERNELS = ("splash_mqa_fwd", "splash_mqa_dq", "splash_mqa_dkv")


def compile_for_tpu(loss: str) -> dict[str, Any]:
    """What the compiler says of a step: to be called where libtpu may be loaded."""
    from jax.experimental import topologies

    shape, numerics = CASES[loss]
    devices = topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices
    model = Model(shape, numerics, Layout(make_mesh(MESH, list(devices))))
    compiled = lower("step", loss, model, rows=ROWS, length=LENGTH).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    return {
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "kernels": re.findall(r"%(\S+) = [^\n]* custom-call\([^\n]*custom_call_target=\"tpu_custom_call\"", text),
        "largest": max(sizes(text).values()),
    }


@pytest.fixture(scope="module")
def compiling() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One process for each step, side by side."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TPU_"))}
    started = {
        loss: subprocess.Popen(
            [sys.executable, "-m", "tests.test_tpu", loss], cwd=ROOT, env=kept | ENVIRONMENT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for loss in CASES
    }  # fmt: skip
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("loss", CASES)
def test_a_step_compiles_for_a_v5e(compiling: dict[str, subprocess.Popen[str]], loss: str) -> None:
    """Both in two minutes, with the kernel forward and backward, and libtpu stays out of this process."""
    out, err = compiling[loss].communicate(timeout=120)
    assert compiling[loss].returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    for kernel in KERNELS:
        assert any(name.startswith(kernel) for name in found["kernels"]), found["kernels"]
    assert found["arguments"] < found["peak"] < 2**27
    assert found["largest"] < ROWS * LENGTH * VOCAB // 4  # the logits of a device's rows, its share of the words
    assert "libtpu.so" not in pathlib.Path("/proc/self/maps").read_text()


def test_libtpu_is_the_one_that_jax_asks_for() -> None:
    """Another one compiles too, but its programs can't be read and its figures are wrong."""
    stated = [Requirement(line) for line in importlib.metadata.requires("jax") or ()]
    wanted = next(requirement.specifier for requirement in stated if requirement.name == "libtpu")
    assert wanted.contains(importlib.metadata.version("libtpu"))


if __name__ == "__main__":
    print(json.dumps(compile_for_tpu(sys.argv[1])))
