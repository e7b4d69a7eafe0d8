"""Losses of single tokens: what supervised fine-tuning minimises, [B, T] each."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array


class Tokens(NamedTuple):
    """Trained tokens, float32 [B, T] each; entries of other tokens are not used."""

    logprobs: Array
    logsumexp: Array


class SmoothTokens(NamedTuple):
    """Trained tokens, float32 [B, T] each; entries of other tokens are not used."""

    logprobs: Array
    mean_logprobs: Array  # mean over the vocabulary of log p


def nll(tokens: Tokens, *, z_loss: float = 0.0) -> Array:
    """Negative log-likelihood of each token, nats, [B, T], plus z_loss * logsumexp^2.

    The z-loss keeps the logits' normaliser near 1 (Chowdhery et al. 2022, arXiv:2204.02311, sec. 5).
    """
    chex.assert_rank(list(tokens), 2)
    return -tokens.logprobs + z_loss * jnp.square(tokens.logsumexp)


def dft(tokens: Tokens) -> Array:
    """Dynamic fine-tuning: each token's NLL weighted by its own probability, held fixed, [B, T].

    References: Wu et al. 2025, arXiv:2508.05629, Eq. 9.
    """
    chex.assert_rank(list(tokens), 2)
    return -jax.lax.stop_gradient(jnp.exp(tokens.logprobs)) * tokens.logprobs


def smooth_nll(tokens: SmoothTokens, *, label_smoothing: float = 0.1) -> Array:
    """Cross-entropy of each token to a target of 1 - e on it and e spread evenly over the vocabulary, nats, [B, T].

    References: Szegedy et al. 2016, arXiv:1512.00567, sec. 7.
    """
    chex.assert_rank(list(tokens), 2)
    return -(1 - label_smoothing) * tokens.logprobs - label_smoothing * tokens.mean_logprobs


SUPERVISED = {"nll": nll, "dft": dft, "smooth_nll": smooth_nll}
