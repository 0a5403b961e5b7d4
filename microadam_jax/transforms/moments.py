"""Exponential moving averages and their bias correction, in float32."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike


def moment_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which a moment is kept.

    Raises:
        ValueError: if ``dtype`` is not a floating dtype.
    """
    try:
        if not isinstance(dtype, jax.Array) and jnp.issubdtype(dtype, jnp.floating):
            return jnp.dtype(dtype)
    except TypeError:  # no dtype at all
        pass
    raise ValueError(
        f"mu_dtype must be a floating dtype such as 'float32' or 'bfloat16'; got {dtype!r}. Under "
        "optax.inject_hyperparams give its name, because a type is taken for a schedule there."
    )


def moving_average(decay: ArrayLike, average: jax.Array, new: jax.Array) -> jax.Array:
    r""":math:`\beta a + (1 - \beta) x`."""
    return jnp.float32(decay) * average.astype(jnp.float32) + jnp.float32(1 - decay) * new


def zero_moments(params: Any) -> tuple[Any, Any]:
    """Returns two trees of float32 zeros of the parameters' shapes."""

    def zeros() -> Any:
        return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), params)

    return zeros(), zeros()


def adam_moments(b1: ArrayLike, b2: ArrayLike, updates: Any, mu: Any, nu: Any) -> tuple[Any, Any]:
    r"""Returns Adam's next moments, :math:`\beta_1 m + (1 - \beta_1) g` and that of :math:`g^2`."""
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    return (
        jax.tree.map(lambda g, m: moving_average(b1, m, g), wide, mu),
        jax.tree.map(lambda g, v: moving_average(b2, v, jnp.square(g)), wide, nu),
    )


def power(decay: ArrayLike, steps: jax.Array) -> jax.Array:
    r""":math:`\beta^t`."""
    return jnp.power(jnp.asarray(decay, jnp.float32), steps.astype(jnp.float32))


def one_minus_power(decay: ArrayLike, steps: jax.Array) -> jax.Array:
    r""":math:`1 - \beta^t` with the digits that the subtraction loses in float32."""
    if isinstance(decay, int | float):
        log_decay = math.log(decay) if decay > 0 else -math.inf
    else:
        log_decay = jnp.log1p(jnp.asarray(decay, jnp.float32) - 1)
    return -jnp.expm1(log_decay * steps.astype(jnp.float32))
