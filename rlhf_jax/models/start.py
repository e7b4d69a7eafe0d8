"""What a run starts from: a Hugging Face folder, or a PEFT adapter of one, whose product is added to its weights."""

import functools
import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint, lora, peft
from rlhf_jax.models.checkpoint import Place
from rlhf_jax.models.decoder import Model, Numerics, Params
from rlhf_jax.ops.layout import Layout


class Start(NamedTuple):
    """Local folders."""

    base: epath.Path  # of config.json and the weights
    adapter: epath.Path | None = None  # of a PEFT adapter on them

    @property
    def folder(self) -> epath.Path:
        """The one that the user named."""
        return self.base if self.adapter is None else self.adapter

    def with_file(self, *names: str) -> epath.Path:
        """The folder that holds one of these files: the adapter's own come before the base's."""
        both = [self.folder, self.base]
        return next((folder for folder in both if any((folder / name).exists() for name in names)), self.base)


def find(name: str, flag: str = "--config.model.path") -> Start:
    """The folders behind a path or Hub name; `flag`, for messages, gave it.

    Errors: UserError where there is no folder, or none of the model that an adapter names as its base.
    """
    folder = checkpoint.folder(name, flag)
    note = folder / peft.CONFIG
    if not note.exists() or (folder / "config.json").exists():
        return Start(folder)
    try:
        base = json.loads(note.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError):  # no JSON, or no object
        base = None
    if not isinstance(base, str):
        raise UserError(f"{note} names no base_model_name_or_path; write the base model's folder there.")
    try:
        return Start(checkpoint.folder(base, flag), folder)
    except UserError as error:
        raise UserError(
            f"{name!r} is an adapter of {base!r}, which can't be had; correct base_model_name_or_path in {note}."
        ) from error


def describe(
    start: Start,
    numerics: Numerics = Numerics(),
    layout: Layout = Layout(),
    head: Literal["words", "score"] | None = None,
) -> Model:
    """The model, without its weights; an adapter leaves no trace in it.

    Args: head: the one that is wanted; a score on a language model begins at 0; None: as the folder has it.
    Errors: UserError where words are wanted of a reward model.
    """
    model = checkpoint.describe(start.base, numerics, layout)
    if head == "words" and model.shape.head == "score":
        raise UserError(
            f"{start.base} holds a reward model, not a language model; give a folder whose architectures in "
            "config.json end in ForCausalLM."
        )
    return model if head is None else model.with_head(head)


def scores(start: Start) -> bool:
    """Whether it is a reward model already."""
    return describe(start).shape.head == "score"


def check(start: Start, model: Model) -> None:
    """Reads the headers alone. Errors: UserError naming the first tensor that is missing or doesn't fit."""
    checkpoint.check(start.base, model)
    if start.adapter is not None:
        peft.read_peft(start.adapter, model)


def load(start: Start, model: Model, place: Place | None = None, base: str = "full") -> Params:
    """The parameters, each leaf put where `place` says, the adapter's product added.

    Args:
      model: without an adapter of its own.
      base: how the kernels are held: full, int8 or nf4. Each is changed as soon as it is read, so that the whole
        model is never there in a wide form.
    """
    factors: Params = {}
    if start.adapter is not None:
        adapted, factors = peft.read_peft(start.adapter, model)
        scale = adapted.scale
    layers = factors.get("layers", {})

    def change(path: tuple[str, ...], leaf: jax.Array) -> Any:
        if path[-1] == "kernel" and path[1] in layers:
            leaf = _adder(leaf.sharding)(leaf, layers[path[1]], scale)
        return leaf if base == "full" else _quantiser(path, base)(leaf)

    return checkpoint.load(start.base, model, place, change)


@functools.cache
def _adder(place: jax.sharding.Sharding) -> Callable[[jax.Array, Params, float], jax.Array]:
    add = lambda kernel, factors, scale: kernel.astype(jnp.float32) + scale * lora.product(factors)
    return jax.jit(lambda kernel, *others: add(kernel, *others).astype(kernel.dtype), out_shardings=place)


@functools.cache
def _quantiser(path: tuple[str, ...], base: str) -> Callable[[jax.Array], Any]:
    return jax.jit(lambda leaf: lora.quantise_leaf(path, leaf, base))


def identity(start: Start) -> str:
    """A hash of every byte that the parameters come from, hex."""
    own = checkpoint.identity(start.base)
    return own if start.adapter is None else f"{own}-{checkpoint.identity(start.adapter)}"
