"""How unlikely choices are, by what each alternative is worth: of one between two, and of a whole ranking."""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def logistic(x: Array, flipped: float | Array) -> Array:
    """-(1 - e) log sig(x) - e log sig(-x), e the chance that the label is flipped; of any shape.

    x is how much more the chosen one is worth (Bradley and Terry 1952, Biometrika 39).
    """
    return -(1 - flipped) * jax.nn.log_sigmoid(x) - flipped * jax.nn.log_sigmoid(-x)


def plackett_luce_nll(worth: Array, rank: Array, present: Array) -> Array:
    """The sum over i of log(exp w_i + sum over the worse j of exp w_j) - w_i, [B]; ties are not compared.

    Args:
      worth, rank: [B, K], the smaller the rank the better.
      present: [B, K] bool, False where a row has fewer than K.
    References: Plackett 1975, JRSS C 24; Luce 1959, Individual Choice Behavior.

    >>> even, order = jnp.zeros((1, 3)), jnp.array([[0.0, 1.0, 2.0]])
    >>> print(plackett_luce_nll(even, order, even == 0))  # log 3 + log 2
    [1.7917595]
    """
    chex.assert_rank([worth, rank, present], 2)
    worth = jnp.where(present, worth, 0)
    itself = jnp.eye(worth.shape[1], dtype=bool)[None]
    worse = (rank[:, :, None] < rank[:, None, :]) & present[:, None, :]
    # Differences first: so a constant in all of them takes no digit away. A row of absent ones would be a logsumexp of
    # nothing: its own entry stands for it, which gives 0.
    ahead = worth[:, None, :] - worth[:, :, None]
    stage = jax.nn.logsumexp(jnp.where(worse | itself, ahead, -jnp.inf), axis=-1)
    return jnp.sum(jnp.where(present, stage, 0), axis=1)
