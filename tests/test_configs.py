"""Every config of the repository loads, and its tiny variant trains through the command line without a download."""

import dataclasses
import fcntl
import json
import math
import os
import pathlib
import runpy
from collections.abc import Iterator

import pytest

from experiments import train
from rlhf_jax import flags, run, worlds
from rlhf_jax.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Those of several runs, which tests/test_chain.py and tests/test_constitutional_checks.py have.
SEVERAL = ("chain", "constitutional")
FILES = {file.stem: file for file in sorted((ROOT / "configs").glob("*.py")) if file.stem not in SEVERAL}
VARIANTS = {name: runpy.run_path(str(file)).get("VARIANTS", {}) for name, file in FILES.items()}
# What the first step must give, where the policy is its own reference: nats, and IPO's (1 / (2 beta))^2.
FIRST: dict[str, float] = {
    "dpo": math.log(2), "ipo": 2500.0, "kto": 0.5, "reward": math.log(2), "process_reward": math.log(2),
}  # fmt: skip
EVALUATED = ("dpo", "sft")  # the others would compile the same once more
# Recipes that differ from others in numbers and a loss, which tests of their own have.
ALIKE = (
    "zephyr", "tulu3", "smollm3", "instructgpt", "rloo", "grpo", "dr_grpo", "gspo", "online_dpo", "xpo", "rejection",
    "nash_md", "distill",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache() -> Iterator[str]:
    """A folder that the workers of a session share, so that a start like world:tiny, but ignorant, is made once."""
    folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "starts"
    folder.mkdir(exist_ok=True)
    tiny = worlds.RECIPES["tiny"]
    rows = dataclasses.replace(tiny.world, documents=1000, demonstrations=200, prompts=100, prompts_held_out=40)
    short = {stage: dataclasses.replace(getattr(tiny, stage), steps=4, warmup=0) for stage in ("pretrain", "sft")}
    with pytest.MonkeyPatch.context() as patch, (folder / "lock").open("w") as lock:
        patch.setitem(worlds.RECIPES, "tiny", dataclasses.replace(tiny, world=rows, **short))
        fcntl.flock(lock, fcntl.LOCK_EX)
        worlds.folder("tiny", str(folder), run.train)
        fcntl.flock(lock, fcntl.LOCK_UN)
        yield str(folder)


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


@pytest.mark.parametrize("name", [name for name in FILES if name not in ALIKE])
def test_every_tiny_variant_trains(name, cache, tmp_path):
    argv = ["train", f"--config={FILES[name]}:tiny", f"--workdir={tmp_path}", f"--config.cache={cache}"]
    argv += ["--config.train.steps=2", "--config.mesh.data=1"]
    if name not in EVALUATED:
        argv += ["--config.data.eval_path=", "--config.data.eval_share=0"]
    flags.run(train.main, train.Train, argv)
    folder = tmp_path / "members/seed=0" if name == "ensemble" else tmp_path
    first, second = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert math.isfinite(second["loss"])
    assert first["loss"] == pytest.approx(FIRST.get(name, first["loss"]), rel=1e-4)
    if name == "rpo":  # the likelihood comes on top
        assert first["loss"] > math.log(2) + 0.1
