"""Exponential moving averages and their bias correction, in float32."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def moving_average(decay: ArrayLike, average: jax.Array, new: jax.Array) -> jax.Array:
    r""":math:`\beta a + (1 - \beta) x`."""
    return jnp.float32(decay) * average.astype(jnp.float32) + jnp.float32(1 - decay) * new


def one_minus_power(decay: ArrayLike, steps: jax.Array) -> jax.Array:
    r""":math:`1 - \beta^t` with the digits that the subtraction loses in float32."""
    if isinstance(decay, int | float):
        log_decay = math.log(decay) if decay > 0 else -math.inf
    else:
        log_decay = jnp.log1p(jnp.asarray(decay, jnp.float32) - 1)
    return -jnp.expm1(log_decay * steps.astype(jnp.float32))
