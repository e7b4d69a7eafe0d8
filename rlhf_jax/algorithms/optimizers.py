"""Optimisers and learning-rate schedules by name.

The keyword-only arguments of an optimiser are its hyper-parameters: they become flags by themselves, and
arrays of the train state, so that none of them is baked into a compiled step.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from rlhf_jax.sharding import path_of

Rate = Any  # a float or a scalar array


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: the matrices, an adapter's and a score's too, no norms, no biases."""
    matrices = ("kernel", "embedding", "head", "lora_a", "lora_b", "score")
    last = lambda keys: path_of(keys).rsplit("/", 1)[-1]
    return jax.tree_util.tree_map_with_path(lambda keys, _: last(keys) in matrices, params)


def adamw(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adam with decoupled decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)


def lion(
    learning_rate: Rate, *, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of the momentum; wants a lower rate than Adam."""
    return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)


def adafactor(
    learning_rate: Rate, *, decay_rate: float = 0.8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) with a given rate and no relative step."""
    return optax.chain(
        optax.adafactor(1.0, decay_rate=decay_rate, multiply_by_parameter_scale=False, eps=1e-30),
        optax.scale(-1.0),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgd(learning_rate: Rate, *, momentum: float = 0.0) -> optax.GradientTransformation:
    """Gradient descent, m <- momentum m + g."""
    return optax.sgd(learning_rate, momentum=momentum)


def _matrices(params: Any) -> Any:
    """For Muon: how each weight of the layers is a stack of matrices; None: Adam takes the leaf."""
    axes = {
        "query": ((1,), (2, 3)), "key": ((1,), (2, 3)), "value": ((1,), (2, 3)), "out": ((1, 2), (3,)),
        "gate": ((1,), (2,)), "up": ((1,), (2,)), "down": ((1,), (2,)), "router": ((1,), (2,)),
    }  # fmt: skip

    def find(keys: tuple[Any, ...], leaf: Any) -> contrib.MuonDimensionNumbers | None:
        parts = path_of(keys).split("/")
        if parts[-1] != "kernel":
            return None
        reduced, output = axes[parts[-2]]
        if leaf.ndim == 4 and "experts" in parts:  # a stack of them a layer
            reduced, output = (2,), (3,)
        return contrib.MuonDimensionNumbers(reduction_axis=reduced, output_axis=output)

    return jax.tree_util.tree_map_with_path(find, params)


def muon(
    learning_rate: Rate, *, momentum: float = 0.95, b1: float = 0.9, b2: float = 0.999, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on the layers' matrices; Adam (b1, b2) on embeddings, norms and biases.

    Adam also takes the factors of an adapter: Muon is made for whole matrices, of which they are only parts.
    """
    return contrib.muon(
        learning_rate, beta=momentum, adam_b1=b1, adam_b2=b2, weight_decay=weight_decay,
        weight_decay_mask=decayed, adam_weight_decay=weight_decay, muon_weight_dimension_numbers=_matrices,
    )  # fmt: skip


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "lion": lion,
    "adafactor": adafactor,
    "sgd": sgd,
    "muon": muon,
}

# Each gives the share of the peak rate at a step, from (steps after the warm-up, share of them that decays).
SCHEDULES: dict[str, Callable[[int, float], optax.Schedule]] = {
    "constant": lambda steps, decay: optax.constant_schedule(1.0),
    "linear": lambda steps, decay: optax.linear_schedule(1.0, 0.0, steps),
    "cosine": lambda steps, decay: optax.cosine_decay_schedule(1.0, steps),
    "wsd": lambda steps, decay: optax.linear_schedule(
        1.0, 0.0, max(1, round(steps * decay)), transition_begin=steps - max(1, round(steps * decay))
    ),
}


def make_schedule(name: str, steps: int, warmup: int, decay: float) -> optax.Schedule:
    """The share of the peak rate at each step: a line from 0 over `warmup` steps, then the named shape."""
    shape = SCHEDULES[name](max(1, steps - warmup), decay)
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), shape], [warmup]) if warmup else shape
