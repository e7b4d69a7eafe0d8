"""One experiment, composed: every section beside the code that it configures."""

import dataclasses
from typing import Annotated, Literal

from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.optimizers import OPTIMIZERS, SCHEDULES
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.data.config import Data
from rlhf_jax.flags import generated
from rlhf_jax.losses import LOSSES
from rlhf_jax.metrics import LogConfig
from rlhf_jax.models.decoder import Numerics
from rlhf_jax.sharding import MeshShape
