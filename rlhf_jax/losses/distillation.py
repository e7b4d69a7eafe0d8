"""What a student minimises that learns what its teacher would say next: losses of two heads, [B, T] each."""

from typing import NamedTuple

from jax import Array

from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import Head
from rlhf_jax.ops.token_divergence import token_divergence


class Reading(NamedTuple):
    """How the two heads of `TwoHeads` are read."""

    temperature: float | Array = 1.0  # divides the logits of both
    soft_cap: float | None = None  # of the student's logits
    teacher_soft_cap: float | None = None
    chunk: int = 1024  # tokens of one data shard whose logits are alive at a time
    layout: Layout = Layout()


class TwoHeads(NamedTuple):
    """A student and a teacher at the same tokens, their logits not yet made."""

    hidden: Array  # [B, T, D], of the student
    head: Head  # [V, D]
    teacher_hidden: Array  # [B, T, E]
    teacher_head: Head  # [V, E], of the same V tokens
    mask: Array  # [B, T] bool, True where the next token is one that is learnt
    reading: Reading = Reading()


def jsd(heads: TwoHeads, *, beta: float = 0.5) -> Array:
    """Generalised Jensen-Shannon divergence of the student S from the teacher T at each position, nats, [B, T].

    beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S; KL(T || S) at beta = 0 and KL(S || T) at
    beta = 1. 0 where the mask is False. Gradients flow to the student alone.
    References: Agarwal et al. 2024, arXiv:2306.13649.
    """
    how = heads.reading
    return token_divergence(
        heads.hidden, heads.head, heads.teacher_hidden, heads.teacher_head, heads.mask, beta=beta,
        temperature=how.temperature, soft_cap=how.soft_cap, teacher_soft_cap=how.teacher_soft_cap, chunk=how.chunk,
        layout=how.layout,
    )  # fmt: skip


DISTILLATION = {"jsd": jsd}
