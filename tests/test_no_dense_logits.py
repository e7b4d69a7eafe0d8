"""No compiled program holds the logits of its batch: read off the compiler's own output.

The vocabulary is large and the rest of the model tiny, so that anything of the logits' size stands out. Every
shape of a program is looked at, of any type and any order of dimensions, also those inside fusions.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models.decoder import Model, Numerics, Params
from rlhf_jax.models.shape import Shape
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import TokenStats
from rlhf_jax.sharding import MeshShape, make_mesh
from tests.programs import Program, lower

ROWS, LENGTH, VOCAB, CHUNK = 8, 128, 32_768, 64
SHAPE = Shape(vocab=VOCAB, width=16, layers=1, heads=2, groups=2, head_dim=8, mlp_width=16, length=LENGTH)
WHOLE = ROWS * LENGTH * VOCAB  # numbers in the logits of the batch: 16 chunks of them
SHARE = 2 * CHUNK * VOCAB  # weights, their gradients and moments are [VOCAB, 16], a quarter of a chunk
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}  # machine code is not looked at


class Dense(Model):
    """What must not be: a softmax over all logits at once."""

    def token_stats(
        self, params: Params, rows: Any, *, temperature: Any = 1.0, want: Any = ("logprobs",)
    ) -> TokenStats:
        logits = self.logits(params, self.apply(params, rows["tokens"], rows["segments"], rows["positions"]))
        return picked(logits, rows, want)


class DenseBackward(Model):
    """What must not be either: one row at a time, but each row's softmax is kept for the backward pass."""

    def token_stats(
        self, params: Params, rows: Any, *, temperature: Any = 1.0, want: Any = ("logprobs",)
    ) -> TokenStats:
        hidden = self.apply(params, rows["tokens"], rows["segments"], rows["positions"])

        def one(part: tuple[jax.Array, Any]) -> TokenStats:
            row = jax.tree.map(lambda x: x[None], part)
            return picked(self.logits(params, row[0]), row[1], want)

        return jax.tree.map(lambda x: x[:, 0], jax.lax.map(one, (hidden, rows)))


def picked(logits: jax.Array, rows: Any, want: tuple[str, ...]) -> TokenStats:
    """The plainest log-probabilities, [B, T]."""
    targets = jnp.roll(rows["tokens"], -1, axis=1)[..., None]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)[..., 0]
    found = {"logprobs": logprobs, "logsumexp": jax.nn.logsumexp(logits, axis=-1)}
    return TokenStats(**{name: jnp.where(rows["mask"], found[name], 0) for name in want})


@functools.cache
def compiled(
    program: Program, loss: str, kind: type[Model] = Model, mesh: tuple[int, ...] = (1, 1, 1), parts: int = 1
) -> jax.stages.Compiled:
    model = kind(SHAPE, Numerics(chunk=CHUNK), Layout(make_mesh(MeshShape(*mesh))))
    return lower(program, loss, model, rows=ROWS, length=LENGTH, microbatches=parts).compile(QUICK)


def sizes(text: str) -> dict[str, int]:
    """The shapes of a program, such as f32[8,128,32768], and how many numbers each has."""
    found = set(re.findall(r"\b[a-z]\w*\[[\d,]+\]", re.sub(r'"[^"]*"', "", text)))  # not those in names
    return {shape: math.prod(int(n) for n in re.findall(r"\d+", shape.split("[")[1])) for shape in found}


def too_large(program: jax.stages.Compiled, limit: int) -> dict[str, int]:
    return {shape: size for shape, size in sizes(program.as_text() or "").items() if size > limit}


PROGRAMS: list[tuple[Program, str]] = [
    ("step", "nll"), ("reference", "dpo"), ("evaluation", "nll"), ("evaluation", "kto"), ("step", "jsd"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "loss"), PROGRAMS)
def test_no_program_holds_more_than_a_few_chunks(program: Program, loss: str) -> None:
    """Neither in one piece nor, as the temporaries' sum tells, in many small ones."""
    made = compiled(program, loss)
    assert not too_large(made, SHARE)
    memory, chunks = made.memory_analysis(), 7 if loss == "jsd" else 6  # it reads two heads
    assert memory is not None and memory.temp_size_in_bytes < chunks * CHUNK * VOCAB * 4 < WHOLE * 4 / 2
    assert CHUNK * VOCAB in sizes(made.as_text() or "").values()  # one chunk there is: the head is not left out


def test_no_device_of_a_mesh_does() -> None:
    """CHUNK tokens of each row shard and half the vocabulary of each tensor shard, in two microbatches."""
    made = compiled("step", "dpo", mesh=(1, 2, 2), parts=2)
    assert not too_large(made, SHARE // 2)
    assert CHUNK * VOCAB // 2 in sizes(made.as_text() or "").values()


@pytest.mark.parametrize(("program", "loss"), [("step", "nll"), ("reference", "dpo"), ("evaluation", "nll")])
def test_a_dense_program_is_found_out(program: Program, loss: str) -> None:
    assert max(too_large(compiled(program, loss, Dense), SHARE).values()) >= WHOLE


def test_a_dense_backward_pass_is_found_out() -> None:
    assert not too_large(compiled("reference", "dpo", DenseBackward), SHARE)
    assert max(too_large(compiled("step", "nll", DenseBackward), SHARE).values()) >= WHOLE


def test_any_type_and_order_of_dimensions_is_seen() -> None:
    text = """
      %a = pred[2,3]{1,0} compare(s32[7]{0} %b, s32[] %c), metadata={op_name="f32[99,99]"}
      ROOT %d = (bf16[4,1,5]{0,2,1:T(8,128)(2,1)}, f8e4m3fn[6]{0}, /*index=2*/u32[<=9]{0}) tuple(%a)
    """
    assert sizes(text) == {"pred[2,3]": 6, "s32[7]": 7, "bf16[4,1,5]": 20, "f8e4m3fn[6]": 6}
