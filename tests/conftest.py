"""Settings and fixtures that every test shares.

The tests run on eight virtual CPU devices, so that every mesh of the project can be formed anywhere.
"""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

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
