"""A teacher: another model that a student is held against at each step, opened and checked before anything compiles."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models.decoder import Model
from rlhf_jax.workdir import Policy, check_note

FLAG = "--config.distill.teacher"


class Teacher(NamedTuple):
    """A model that never moves, of the student's tokens."""

    name: str  # as it was given
    model: Model
    params: Any  # on the student's mesh, in the compute dtype
    identity: str  # of the weights


def open_teacher(
    name: str, opened: Callable[[str, str], Policy], student: Model, tokenizer: Any, length: int
) -> Teacher:
    """The teacher as the student's run computes it.

    It never moves, so that it is held in the compute dtype. Templates, what a text begins with and what ends it may
    differ: both read prompts as the student's tokenizer writes them, and the student ends its answers.

    Args:
      opened: gives the model behind a name on the student's mesh; also takes the flag that named it.
      tokenizer: the student's.
      length: most tokens of a prompt with its completion.
    Errors: UserError for a model of other tokens, and for one with a shorter context.
    """
    policy = opened(name, FLAG)
    if policy.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"the teacher {name} has another tokenizer than the student, and a token must mean the same to both; give "
            f"{FLAG} a model with the student's."
        )
    sizes = student.shape.vocab, policy.model.shape.vocab
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the student has a vocabulary of {sizes[0]} tokens and the teacher {name} one of {sizes[1]}, so that "
            f"their distributions can't be compared; give {FLAG} a model with {sizes[0]}."
        )
    if policy.model.shape.length < length:
        raise UserError(
            f"rows may have {length} tokens and the context of the teacher {name} is {policy.model.shape.length}; "
            f"lower --config.data.length or give another {FLAG}."
        )
    numerics = dataclasses.replace(student.numerics, param_dtype=student.numerics.compute_dtype)
    model = dataclasses.replace(policy.model, numerics=numerics)
    held = jax.tree.map(lambda x, shape: jnp.asarray(x, shape.dtype), policy.params, model.shapes())
    mesh = student.layout.mesh
    held = held if mesh is None else jax.device_put(held, sharding.param_shardings(held, mesh))
    return Teacher(name, model, held, policy.identify())


def check_teacher(workdir: epath.Path, teacher: Teacher, write: bool = False) -> None:
    """Holds a run to the teacher that it was started with, which its checkpoints don't hold.

    Args: write: note it if the folder has no note yet.
    Errors: UserError if it isn't the one that is noted.
    """
    says = (
        f"the teacher {teacher.name} is not the one that {str(workdir)!r} was started with; put its weights back (of "
        f"a run that went on, name the checkpoint: {FLAG}=WORKDIR@STEP) or give another --workdir."
    )
    check_note(workdir / "teacher", teacher.identity, says, write)
