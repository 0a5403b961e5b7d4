"""The low-rank updates that links of a chain hand to each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from microadam_jax.compressors.rows import overwrite_each, per_row, row_of, row_shape
from microadam_jax.sharding import contract
from microadam_jax.trees import Compressed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Compressed):
    r"""Holds an update :math:`P Q^\top`, all axes but the last by the last: a pytree node.

    The factors keep the axes of the parameter, with size 1 where they have no own, so that its
    ``PartitionSpec`` fits them. Where layers are stacked, the first axis of both counts layers.

    Attributes:
        left: ``(*lead, 1, r)`` float32, :math:`P`.
        right: ``(1, ..., 1, n, r)`` float32, :math:`Q`; ``(layers, 1, ..., n, r)`` if stacked.
        bypass: float32 of the dense shape, or None: what goes to the parameters as it is,
            past the preconditioner, in gradient units.
        mark: an int32 that arithmetic would turn into a float, and so betrays itself.
        shape: the dense shape ``(*lead, n)``.
        dtype: the dtype that the dense update had.

    Raises:
        TypeError: if ``mark`` is a floating-point number, as after arithmetic on a low-rank update.
    """

    left: jax.Array
    right: jax.Array
    bypass: jax.Array | None
    mark: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if jnp.issubdtype(getattr(self.mark, "dtype", jnp.int32), jnp.floating):
            raise TypeError(
                "A low-rank update (LowRank) reached a transformation that does arithmetic "
                "on dense updates. Put microadam_jax.to_dense() before it in the chain."
            )

    def kept(self) -> jax.Array:
        r"""Returns the dense float32 :math:`P Q^\top`."""
        rows, col, whole = axes_of(self.right.shape[:-1])
        return contract(f"{rows}r,{col}r->{whole}", only_rows(self.left), only_columns(self.right))

    def rest_of(self, update: jax.Array) -> jax.Array:
        """Returns the float32 ``update`` less what is kept."""
        return update - self.kept()

    def to_dense(self) -> jax.Array:
        """Returns the dense update, in its original dtype."""
        return self.with_bypass(self.kept()).astype(self.dtype)

    def with_bypass(self, update: jax.Array) -> jax.Array:
        """Returns ``update`` plus what bypasses the preconditioner."""
        return update if self.bypass is None else update + self.bypass

    def fits(self, window: tuple[jax.Array, jax.Array]) -> bool:
        """Returns True if ``window`` holds factors of these shapes."""
        shapes = self.left.shape, self.right.shape
        return tuple(row_shape(factor) for factor in window) == shapes

    def write(
        self, window: tuple[jax.Array, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns ``window``, ``(*lead, 1, m, r)`` and ``(..., n, m, r)``, with this row in it."""
        left, right = overwrite_each(window, (self.left, self.right), position)
        return left, right

    def products(self, window: tuple[jax.Array, jax.Array], position: jax.Array) -> jax.Array:
        r"""Returns ``(m,)``: :math:`\sum (P_i^\top P_j) \circ (Q_i^\top Q_j)` of row :math:`i`."""
        left, right = (factor.astype(jnp.float32) for factor in window)
        rows, col, _ = axes_of(self.right.shape[:-1])
        layer = col[:-1]
        own = only_rows(row_of(left, position)), only_columns(row_of(right, position))
        by_left = contract(f"{rows}mr,{rows}s->{layer}mrs", only_rows(left, 2), own[0])
        by_right = contract(f"{col}mr,{col}s->{layer}mrs", only_columns(right, 2), own[1])
        both = by_left * by_right
        return jnp.sum(both, axis=(*range(both.ndim - 3), -2, -1))

    def combine(self, window: tuple[jax.Array, jax.Array], coefficients: jax.Array) -> jax.Array:
        r"""Returns the dense :math:`\sum_i y_i P_i Q_i^\top`, one matrix product."""
        left, right = (factor.astype(jnp.float32) for factor in window)
        left = left * per_row(coefficients, left)
        rows, col, whole = axes_of(self.right.shape[:-1])
        return contract(f"{rows}mr,{col}mr->{whole}", only_rows(left, 2), only_columns(right, 2))


def axes_of(right: tuple[int, ...]) -> tuple[str, str, str]:
    """Letters of the axes of the left factor, of the right factor and of the whole.

    Args:
        right: the axes of the right factor but the rank.
    """
    rows = "abcdefghijkl"[: len(right) - 1]
    return rows, "az" if _stacks_layers(right) else "z", f"{rows}z"


def only_rows(left: jax.Array, others: int = 1) -> jax.Array:
    """A left factor without the axis that it lacks; its last ``others`` axes are none of it."""
    return jnp.squeeze(left, left.ndim - others - 1)


def only_columns(right: jax.Array, others: int = 1) -> jax.Array:
    """A right factor without the axes that it lacks."""
    return jnp.squeeze(right, absent_axes(right.shape[: right.ndim - others]))


def absent_axes(right: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a parameter that its right factor lacks."""
    return tuple(range(1 if _stacks_layers(right) else 0, len(right) - 1))


def _stacks_layers(right: tuple[int, ...]) -> bool:
    return len(right) > 2 and right[0] > 1
