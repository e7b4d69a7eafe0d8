"""Name, version and dependencies of the package; every tool is configured in pyproject.toml.

The bounds are what is tested: the lower one is run on Python 3.11 with JAX 0.10, the upper one on
Python 3.13 with JAX 0.12. docs/adr/001-dependencies.md says what each is there for.
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "rlhf_jax" / "__init__.py").read_text())
assert VERSION, "rlhf_jax/__init__.py must set __version__"
README = HERE / "README.md"

# JAX's own extra names the libtpu that matches it; a mismatched pair compiles and then misreports.
TPU = "jax[tpu]>=0.10.2,<0.13"
# It pins the LaTeX parser that its results depend on.
VERIFY = "math-verify>=0.9,<0.10"
# GLAD and MACE; it brings scikit-learn and nltk.
CROWD = "crowd-kit>=1.4.2,<2"
# Judges behind an address: the client, and when it asks again.
JUDGE = ["httpx>=0.28,<1", "tenacity>=9.1,<10"]
# The labelling page: docs/adr/016-the-labelling-page.md.
LABEL = ["starlette>=1.10,<2", "uvicorn>=0.54,<0.55"]
# lm-evaluation-harness, without torch: docs/adr/020-the-harness.md.
HARNESS = "lm-eval>=0.4.13,<0.5"
# The site: docs/adr/019-the-site.md. Sphinx 9.0 is the last for Python 3.11.
DOCS = ["furo>=2025.12.19,<2027", "myst-parser>=5.2,<6", "sphinx>=9.0.4,<10"]

setup(
    name="rlhf_jax",
    version=VERSION[1],
    description="Reinforcement learning from human feedback in JAX, from one CPU to a pod",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlhf_jax", "rlhf_jax.*", "experiments", "experiments.*"]),
    package_data={"rlhf_jax.feedback": ["*.txt", "constitutions/*.toml"], "rlhf_jax.feedback.page": ["static/*"]},
    install_requires=[
        "absl-py>=2.5,<3",
        "chex>=0.1.92,<0.2",
        "datasets>=5.2,<6",
        "etils[epath]>=1.15,<2",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "jax>=0.10.2,<0.13",
        "jinja2>=3.1,<4",
        "matplotlib>=3.11,<4",
        "numpy>=2.4,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "qwix>=0.1.8,<0.2",
        "rich>=15,<16",
        "safetensors>=0.8,<1",
        "scipy>=1.17,<2",
        "tensorboard>=2.21,<3",
        "transformers>=5.23,<6",
    ],
    extras_require={
        "tpu": [TPU],
        "wandb": ["wandb>=0.31,<1"],
        "verify": [VERIFY],
        "aggregate": [CROWD],
        "judge": JUDGE,
        "label": LABEL,
        "harness": [HARNESS],
        "docs": DOCS,
        "test": [
            "hypothesis>=6.170,<7",
            "krippendorff>=0.9,<0.10",  # what its alpha is held against
            "pyright[nodejs]==1.1.414",  # a newer one finds other things
            "pytest>=9.2,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17.6,<0.18",
            VERIFY,
            CROWD,
            *JUDGE,
            *LABEL,
            *DOCS,
            # Compiling for a TPU needs libtpu and no TPU; it is made for this platform only.
            f'{TPU}; sys_platform == "linux" and platform_machine == "x86_64"',
        ],
        # The two sides of tests/parity, and nothing that the package itself imports but for the harness.
        "parity": [
            "pytest>=9.2,<10",
            "pytest-xdist>=3.8,<4",
            "torch==2.13.0",
            "trl==1.16.0",
            "peft==0.21.2",
            "lm-eval==0.4.13",
        ],  # fmt: skip
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
