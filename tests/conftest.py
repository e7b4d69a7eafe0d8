"""Settings and fixtures that every test shares.

The tests run on eight virtual CPU devices, so that every mesh of the project can be formed anywhere.
"""

import atexit
import os
import pathlib
import platform
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what the tests do, and code that runs for a second needn't be the fastest. XLA's older emitters
# take a quarter of the time where it still has them; without fused multiply-adds, which these form in one program and
# not in another, what is equal to the bit stays so.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_max_isa=AVX"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
# Runs of the same shapes, also those in processes of their own, compile once a session.
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has these from the process that started it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rlhf_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402 (after the settings above)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with real rows and the real model that may stand beside the clone."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}, which holds the real rows and the real model")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: pathlib.Path) -> pathlib.Path:
    """A real pretrained Llama of 260 thousand parameters."""
    return shared / "models" / "stories260k"
