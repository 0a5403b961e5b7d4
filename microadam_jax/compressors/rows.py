"""Rows of a window: the axis before the last counts them."""

import jax
import jax.numpy as jnp


def overwrite(rows: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
    """``rows`` of shape ``(..., m, k)`` with ``row`` of shape ``(..., k)`` at ``position``."""
    return jax.lax.dynamic_update_index_in_dim(rows, row.astype(rows.dtype), position, axis=-2)


def row_of(rows: jax.Array, position: jax.Array) -> jax.Array:
    """The row ``(..., k)`` at ``position`` of ``rows`` of shape ``(..., m, k)``."""
    return jax.lax.dynamic_index_in_dim(rows, position, axis=-2, keepdims=False)


def row_shape(rows: jax.Array) -> tuple[int, ...]:
    """The shape of one row."""
    return (*rows.shape[:-2], *rows.shape[-1:])


def per_row(numbers: jax.Array, rows: jax.Array) -> jax.Array:
    """``numbers`` of shape ``(m,)`` with the axes of ``rows``, ``(..., m, k)``."""
    return jnp.expand_dims(numbers, [axis for axis in range(rows.ndim) if axis != rows.ndim - 2])
