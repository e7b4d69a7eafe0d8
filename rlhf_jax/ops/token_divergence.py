"""How far a student is from a teacher at each token, over the whole vocabulary, without their logits in memory.

On-policy distillation reads both output heads through `token_divergence`, which shares the loop over chunks with
`token_logprobs`.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.ops.chunks import Chunks, backward, before_cap, cut, forward, logits_of
from rlhf_jax.ops.layout import Layout
from rlhf_jax.ops.logprobs import Head


class _Static(NamedTuple):
    soft_cap: float | None
    teacher_soft_cap: float | None
    chunks: Chunks


class _Frozen(NamedTuple):
    """What gets no gradient: the teacher and the numbers."""

    hidden: Array  # [B, T, E]
    kernel: Array  # [V, E]
    bias: Array | None  # [V]
    beta: Array
    temperature: Array


def token_divergence(
    student_hidden: Array,
    student_head: Head,
    teacher_hidden: Array,
    teacher_head: Head,
    mask: Array,
    *,
    beta: float | Array,
    temperature: float | Array = 1.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    chunk: int = 1024,
    layout: Layout = Layout(),
) -> Array:
    """Generalised Jensen-Shannon divergence of the student S from the teacher T at each token, nats, [B, T].

    beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S. It falls to 0 with beta and with 1 - beta;
    at the ends themselves the result is its limit divided by that share, a jump of scale: the forward KL(T || S) at
    beta = 0, which has the student cover the teacher, and the reverse KL(S || T) at beta = 1, which has it seek a
    mode. T and S are the softmax of cap(hidden @ kernel.T + bias) / temperature over the same V tokens. Gradients
    flow to `student_hidden` and `student_head` alone. As in `token_logprobs` the heads run on the wanted tokens, and
    the backward pass makes each chunk's logits again.

    Args:
      student_hidden: [B, T, D], any float dtype; products accumulate in float32.
      student_head: kernel [V, D] and bias [V] or None, of student_hidden's dtype.
      teacher_hidden, teacher_head: the same of the teacher, [B, T, E] and [V, E].
      mask: [B, T] bool, True where the result is used. Elsewhere the result is 0 and so is the gradient,
        whatever the hidden states hold (NaN included).
      beta: in [0, 1], the teacher's share of M; an array may change without another compile.
      temperature: > 0, divides the logits of both.
      soft_cap, teacher_soft_cap: the cap of each model's logits, None for none.
      chunk: tokens of one data shard whose logits, the student's and the teacher's, are alive at a time, >= 1.
      layout: the mesh; rows are split over data, fsdp and expert, the vocabulary over tensor.
    Returns: float32 [B, T], never negative; at most log 2 at beta = 1/2.
    References: Agarwal et al. 2024, arXiv:2306.13649; Huszar 2015, arXiv:1511.05101 (the ends).

    >>> student, teacher, head = jnp.array([[[1.0, 2.0, 0.0]]]), jnp.array([[[0.0, 1.5, 1.0]]]), Head(jnp.eye(3))
    >>> for beta in (0.0, 0.5, 1.0):
    ...     print(f"{token_divergence(student, head, teacher, head, jnp.ones((1, 1), bool), beta=beta)[0, 0]:.4f}")
    0.2397
    0.0502
    0.1838
    """
    chex.assert_rank([student_hidden, teacher_hidden, mask, beta, temperature], [3, 3, 2, 0, 0])
    chex.assert_equal_shape_prefix([student_hidden, teacher_hidden, mask], 2)
    sizes = (student_head.kernel.shape[0], teacher_head.kernel.shape[0])
    if sizes[0] != sizes[1]:
        raise ValueError(f"the student has a vocabulary of {sizes[0]} tokens and the teacher one of {sizes[1]}")
    if isinstance(beta, int | float) and not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it is the teacher's share of a mixture, from 0 to 1")
    static = _Static(soft_cap, teacher_soft_cap, cut(mask, chunk, layout))
    gathered = lambda kernel: layout.constrain(kernel, "vocab", None)  # once here, not in every chunk
    frozen = _Frozen(
        teacher_hidden, gathered(teacher_head.kernel), teacher_head.bias,
        jnp.asarray(beta, jnp.float32), jnp.asarray(temperature, jnp.float32),
    )  # fmt: skip
    frozen = jax.lax.stop_gradient(frozen)
    return _divergence(static, student_hidden, gathered(student_head.kernel), student_head.bias, frozen, mask)


def _excess(p: Array, m: Array, log_ratio: Array) -> Array:
    """m - p - p log(m / p) given log(m / p), elementwise: it sums to KL(p || m), and no term of it is negative.

    So rounding can't make a small divergence negative, nor can a small error of a log-sum-exp, which would enter
    sum p log(p / m) in full.
    """
    near = p * jnp.maximum(jnp.expm1(log_ratio) - log_ratio, 0)
    return jnp.where(jnp.abs(log_ratio) < 1, near, m - p - p * log_ratio)


def _log_mixture(d: Array, share: Array, rest: Array) -> Array:
    """log(rest + share exp(d)), elementwise, where rest is 1 - share: its digits are kept near 0, for any d."""
    more = share * jnp.expm1(d)
    larger, smaller = jnp.where(d > 0, share, rest), jnp.where(d > 0, rest, share)
    far = jnp.maximum(d, 0) + jnp.log(larger + smaller * jnp.exp(-jnp.abs(d)))
    far = jnp.maximum(far, jnp.minimum(d, 0))  # where both terms underflow
    return jnp.where(jnp.abs(more) < 0.5, jnp.log1p(more), far)


def _value(log_p: Array, log_q: Array, beta: Array) -> Array:
    """The divergence of one chunk, [B, C], from log T and log S, [B, C, V]."""
    p, q, d, rest = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q, 1 - beta
    m = beta * p + rest * q
    # At an end M is one of the two, whose own part is 0; the other's weight is 1 and not the limit, 0.
    of_teacher = jnp.where(beta == 0, 1, beta) * _excess(p, m, _log_mixture(-d, rest, beta))
    of_student = jnp.where(beta == 1, 1, rest) * _excess(q, m, _log_mixture(d, beta, rest))
    return jnp.sum(of_teacher + of_student, axis=-1)


def _gradient(log_p: Array, log_q: Array, beta: Array) -> Array:
    """The gradient of `_value` at the student's logits, [B, C, V].

    The divergence's derivative by S is (1 - beta) log(S / M) up to a constant; at beta = 0 it is -T / S.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_ratio = -_log_mixture(log_p - log_q, beta, 1 - beta)
    centred = log_ratio - jnp.sum(q * log_ratio, axis=-1, keepdims=True)
    return jnp.where(beta == 0, q - p, jnp.where(beta == 1, 1, 1 - beta) * q * centred)


def _both(
    static: _Static, h: Array, kernel: Array, bias: Array | None, teacher: Array, frozen: _Frozen
) -> tuple[Array, Array, Array]:
    """Of one chunk: log T, log S and the student's logits."""
    layout, temperature = static.chunks.layout, frozen.temperature
    logits = logits_of(layout, h, kernel, bias, static.soft_cap, temperature)
    target = logits_of(layout, teacher, frozen.kernel, frozen.bias, static.teacher_soft_cap, temperature)
    return jax.nn.log_softmax(target), jax.nn.log_softmax(logits), logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(
    static: _Static, hidden: Array, kernel: Array, bias: Array | None, frozen: _Frozen, mask: Array
) -> Array:
    def compute(h: Array, teacher: Array) -> tuple[Array]:
        log_p, log_q, _ = _both(static, h, kernel, bias, teacher, frozen)
        return (_value(log_p, log_q, frozen.beta),)

    return forward(static.chunks, compute, (hidden, frozen.hidden), mask, 1)[0]


def _divergence_forward(static, hidden, kernel, bias, frozen, mask):
    residuals = (hidden, kernel, bias, frozen, mask)
    return _divergence(static, *residuals), residuals


def _divergence_backward(static: _Static, residuals: tuple, cotangent: Array) -> tuple:
    hidden, kernel, bias, frozen, mask = residuals

    def slope(h: Array, teacher: Array, g: Array) -> Array:
        log_p, log_q, logits = _both(static, h, kernel, bias, teacher, frozen)
        at_logits = g[..., None] * _gradient(log_p, log_q, frozen.beta)
        return before_cap(at_logits, logits, static.soft_cap, frozen.temperature)

    columns = (hidden, frozen.hidden, cotangent)
    return *backward(static.chunks, slope, kernel, bias, columns, mask), None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)
