"""A second moment as the product of one number for each row and one for each column."""

import jax
import jax.numpy as jnp

from microadam_jax.layout.axes import Shape, Sides
from microadam_jax.layout.partition import Assignment


def sides(assignment: Assignment) -> Sides | None:
    """The axes of the rows and of the columns; None for a parameter that is not factored."""
    if assignment.sharing.matrix is not None:
        return assignment.sharing.matrix
    axes = assignment.axes_of_a_layer
    if len(axes) < 2 or 0 in assignment.shape:
        return None
    return axes[-2:-1], axes[-1:]


def factor_shapes(assignment: Assignment) -> tuple[Shape, Shape]:
    """The shapes of the rows' and of the columns' numbers.

    A parameter that is not factored keeps a number for each element in place of the rows'.
    """
    shape, found = assignment.shape, sides(assignment)
    if found is None:
        return shape, (1,) * len(shape)
    rows, cols = (tuple(1 if i in side else n for i, n in enumerate(shape)) for side in found[::-1])
    return rows, cols


def mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean over ``axes``, which keep size 1."""
    return jnp.mean(x, axis=axes, keepdims=True)


def inverse_root(row: jax.Array, col: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    r""":math:`1 / \sqrt{r c / \bar r}`; the product of the factors itself would underflow."""
    return jax.lax.rsqrt(row / mean(row, rows)) * jax.lax.rsqrt(col)
