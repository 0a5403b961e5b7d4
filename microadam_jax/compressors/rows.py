"""Rows of a window: the axis before the last counts them."""

import jax
import jax.numpy as jnp


def overwrite(rows: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
    """``rows`` of shape ``(..., m, k)`` with ``row`` of shape ``(..., k)`` at ``position`` >= 0."""
    row = row.astype(rows.dtype)[..., None, :]
    zero = jnp.zeros_like(position)
    start = *[zero] * (rows.ndim - 2), position, zero
    # Said aloud, or each row of each leaf takes seven operations to get it right.
    return jax.lax.dynamic_update_slice(rows, row, start, allow_negative_indices=False)


def overwrite_each(
    window: tuple[jax.Array, ...], sent: tuple[jax.Array, ...], position: jax.Array
) -> tuple[jax.Array, ...]:
    """``window`` with what is sent in row ``position`` of each of its arrays."""
    return tuple(overwrite(*pair, position) for pair in zip(window, sent, strict=True))


def row_of(rows: jax.Array, position: jax.Array) -> jax.Array:
    """The row ``(..., k)`` at ``position`` of ``rows`` of shape ``(..., m, k)``."""
    return jax.lax.dynamic_index_in_dim(rows, position, axis=-2, keepdims=False)


def row_shape(rows: jax.Array) -> tuple[int, ...]:
    """The shape of one row."""
    return (*rows.shape[:-2], *rows.shape[-1:])


def per_row(numbers: jax.Array, rows: jax.Array) -> jax.Array:
    """``numbers`` of shape ``(m,)`` with the axes of ``rows``, ``(..., m, k)``."""
    return jnp.expand_dims(numbers, [axis for axis in range(rows.ndim) if axis != rows.ndim - 2])
