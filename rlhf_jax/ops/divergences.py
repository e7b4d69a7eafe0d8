"""f-divergences as maps of a log-ratio: what a preference loss compares in the place of log pi - log ref."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# exp is continued by its tangent from here on: squares of it and their sums stay finite in float32 (IPO squares
# it), and an example out there still has a slope, which it would lose if the exponent were only cut.
STEEPEST = 36.0


def log_ratio_map(u: Array, divergence: Divergence, alpha: float | Array = 0.5) -> Array:
    """g(u) = f'(exp u) less its value at 0, elementwise; u = log pi - log ref in nats, g in nats.

    The optimum of reward - beta D_f(pi || ref) has reward beta f'(pi / ref) up to a constant of the prompt, which a
    margin g(a) - g(b) doesn't see. reverse_kl: u. forward_kl: 1 - exp(-u). js: log 2 + log sig(u). alpha:
    (exp((alpha - 1) u) - 1) / (alpha - 1), which is u at alpha = 1 and forward_kl at alpha = 0; the paper's alpha is
    1 - alpha here. Every g increases and has slope 1 at 0 (js: 1/2).
    References: Wang et al. 2023, arXiv:2309.16240.

    >>> print(f'{log_ratio_map(jnp.float32(1), "forward_kl"):.3f}')
    0.632
    """
    return MAPS[divergence](u, alpha)


def box_cox(u: Array, power: float | Array) -> Array:
    """(exp(power u) - 1) / power, elementwise, and u at power = 0; linear in u past power u = STEEPEST.

    >>> print(f"{box_cox(jnp.float32(2), 0.0):.3f} {box_cox(jnp.float32(2), 1.0):.3f}")
    2.000 6.389
    """
    power = jnp.asarray(power, u.dtype)
    linear = jnp.abs(power) < 1e-10  # for hundreds of nats float32 can't tell the two apart
    power = jnp.where(linear, 1, power)  # the branch that isn't taken mustn't divide by 0: its gradient would be NaN
    x = power * u
    low = jnp.minimum(x, STEEPEST)
    exponential = jnp.exp(low)
    # expm1 is exact near 0, but its derivative is taken as expm1 + 1, which is nothing but rounding far below 0.
    less_one = jnp.where(jnp.abs(low) < 0.5, jnp.expm1(low), exponential - 1)
    return jnp.where(linear, u, (less_one + exponential * (x - low)) / power)


MAPS: dict[Divergence, Callable[[Array, float | Array], Array]] = {
    "reverse_kl": lambda u, alpha: u,
    "forward_kl": lambda u, alpha: box_cox(u, -1.0),
    "js": lambda u, alpha: jnp.log(2.0).astype(u.dtype) + jax.nn.log_sigmoid(u),
    "alpha": lambda u, alpha: box_cox(u, alpha - 1),
}
