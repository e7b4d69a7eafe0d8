"""Every config of the repository loads, and its tiny variant trains through the command line without a download."""

import fcntl
import json
import math
import os
import pathlib
import runpy

import pytest

from experiments import train
from rlhf_jax import flags, run, worlds
from rlhf_jax.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = {file.stem: file for file in sorted((ROOT / "configs").glob("*.py"))}
VARIANTS = {name: runpy.run_path(str(file)).get("VARIANTS", {}) for name, file in FILES.items()}
# What the first step must give, where the policy is its own reference: nats, and IPO's (1 / (2 beta))^2.
FIRST = {
    "dpo": math.log(2), "zephyr": math.log(2), "tulu3": math.log(2), "smollm3": 1.0, "ipo": 2500.0, "kto": 0.5,
}  # fmt: skip


@pytest.fixture(scope="session")
def cache() -> str:
    """A folder that the workers of a session share, so that the start is made once."""
    folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "starts"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        worlds.folder("tiny", str(folder), run.train)
    return str(folder)


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name in FILES for variant in VARIANTS[name]])
def test_every_variant_loads(name, variant):
    assert isinstance(flags.load(f"{FILES[name]}:{variant}"), Config)


@pytest.mark.parametrize("name", FILES)
def test_every_config_has_a_tiny_variant_and_says_its_command(name):
    assert {"default", "tiny"} <= set(VARIANTS[name])
    assert flags.load(str(FILES[name])) == flags.load(f"{FILES[name]}:default")
    text = FILES[name].read_text()
    assert f"python -m experiments.train --config=configs/{name}.py:tiny --workdir=" in text
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("name", FILES)
def test_every_tiny_variant_trains(name, cache, tmp_path):
    argv = ["train", f"--config={FILES[name]}:tiny", f"--workdir={tmp_path}", f"--config.cache={cache}"]
    argv += ["--config.train.steps=2", "--config.evaluate.rows=16", "--config.mesh.data=1"]
    flags.run(train.main, train.Train, argv)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert math.isfinite(second["loss"])
    assert first["loss"] == pytest.approx(FIRST.get(name, first["loss"]), rel=1e-4)
    if name == "rpo":  # the likelihood comes on top
        assert first["loss"] > math.log(2) + 0.1
