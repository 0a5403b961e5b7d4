"""The sparse updates that links of a chain hand to each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from microadam_jax.blocks import BlockLayout, merge
from microadam_jax.compressors.rows import overwrite_each, per_row, row_of, row_shape
from microadam_jax.trees import Compressed
from pallas_kernels.window_update import expand, values_at, written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSparse(Compressed):
    """Holds an update of which each block keeps ``k`` elements: a pytree node, never a state.

    Attributes:
        values: ``(*lead, blocks, k)`` float32, the elements kept, signed.
        indices: ``(*lead, blocks, k)`` int32, their positions within the block, distinct.
        bypass: float32 of the dense shape, or None: what goes to the parameters as it is,
            past the preconditioner, in gradient units.
        shape: the dense shape ``(*lead, n)``.
        dtype: the dtype that the dense update had.
        layout: how a row is cut into blocks.

    Raises:
        TypeError: if ``indices`` are floating-point numbers, as after arithmetic on a sparse
            update.
    """

    values: jax.Array
    indices: jax.Array
    bypass: jax.Array | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    layout: BlockLayout = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if jnp.issubdtype(getattr(self.indices, "dtype", jnp.int32), jnp.floating):
            raise TypeError(
                "A sparse update (BlockSparse) reached a transformation that does arithmetic "
                "on dense updates. Put microadam_jax.to_dense() before it in the chain."
            )

    def kept(self) -> jax.Array:
        """Returns the dense float32 array of the elements kept, zero elsewhere."""
        blocks = expand(self.values[..., None, :], self.indices[..., None, :], self.layout.size)
        return merge(written(blocks), self.layout, self.shape)

    def rest_of(self, update: jax.Array) -> jax.Array:
        """Returns the float32 ``update`` with zeros where an element was kept."""
        # Not a difference: infinity less infinity would stay behind as NaN.
        return jnp.where(self.kept() != 0, 0.0, update)

    def to_dense(self) -> jax.Array:
        """Returns the dense update, in its original dtype."""
        return self.with_bypass(self.kept()).astype(self.dtype)

    def with_bypass(self, update: jax.Array) -> jax.Array:
        """Returns ``update`` plus what bypasses the preconditioner."""
        return update if self.bypass is None else update + self.bypass

    @property
    def survivors(self) -> int:
        """Counts the elements of a block that are kept."""
        return self.values.shape[-1]

    def fits(self, window: tuple[jax.Array, jax.Array]) -> bool:
        """Returns True if ``window`` holds as many elements of as many blocks."""
        return all(row_shape(kept) == self.values.shape for kept in window)

    def write(
        self, window: tuple[jax.Array, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns ``window``, values and indices ``(*lead, blocks, m, k)``, with this row in it."""
        values, indices = overwrite_each(window, (self.values, self.indices), position)
        return values, indices

    def products(self, window: tuple[jax.Array, jax.Array], position: jax.Array) -> jax.Array:
        """Returns ``(m,)``: the inner products of row ``position`` with every row."""
        values, indices = window
        values = values.astype(jnp.float32)
        own = row_of(values, position), row_of(indices, position)
        found = values_at(*own, indices, self.layout.size)
        return jnp.sum(values * found, axis=(*range(values.ndim - 2), -1))

    def combine(self, window: tuple[jax.Array, jax.Array], coefficients: jax.Array) -> jax.Array:
        """Returns the dense sum of the rows, each times its coefficient."""
        return combined(window, coefficients, self.layout, self.shape)


def combined(
    window: tuple[jax.Array, jax.Array],
    coefficients: jax.Array,
    layout: BlockLayout,
    shape: tuple[int, ...],
) -> jax.Array:
    """The dense sum, of ``shape``, of a window's rows, each times its coefficient."""
    values, indices = window
    values = values.astype(jnp.float32) * per_row(coefficients, values)
    return merge(written(expand(values, indices, layout.size)), layout, shape)
