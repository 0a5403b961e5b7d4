"""An update that is kept whole."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from microadam_jax.compressors.rows import overwrite, row_of, row_shape
from microadam_jax.engine.leaf_loops import in_place


@dataclasses.dataclass(frozen=True)
class Dense:
    """Holds an update as a row ``(*shape, 1)`` of a window ``(*shape, m, 1)``.

    Attributes:
        update: the update, of any float dtype.
        dtype: the dtype in which it shall go on.
    """

    update: jax.Array
    dtype: Any

    def fits(self, window: tuple[jax.Array, jax.Array]) -> bool:
        """Returns True if ``window`` is one of dense rows of this shape."""
        return row_shape(window[0]) == (*self.update.shape, 1)

    def write(
        self, window: tuple[jax.Array, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns ``window`` with this row in it; its second array is not used."""
        rows, unused = window

        def write(window: tuple[jax.Array]) -> tuple[jax.Array]:
            return (overwrite(window[0], self.update[..., None], position),)

        # It is too large to be copied for each that reads it.
        return in_place(write, (rows,), position)[0], unused

    def products(self, window: tuple[jax.Array, jax.Array], position: jax.Array) -> jax.Array:
        """Returns ``(m,)``: the inner products of row ``position`` with every row."""
        rows = window[0].astype(jnp.float32)
        products = rows * row_of(rows, position)[..., None, :]
        # The last axis by itself first: a sum of all at once would lose digits.
        for axes in ((-3,), range(self.update.ndim - 1)) if self.update.ndim else ():
            products = jnp.sum(products, axis=tuple(axes))
        return products[..., 0]

    def combine(self, window: tuple[jax.Array, jax.Array], coefficients: jax.Array) -> jax.Array:
        """Returns the sum of the rows, each times its coefficient."""
        rows = window[0].astype(jnp.float32)
        own = coefficients.reshape((1,) * (rows.ndim - 2) + (-1, 1))
        return jnp.sum(rows * own, axis=(-2, -1))

    def with_bypass(self, update: jax.Array) -> jax.Array:
        """Returns ``update``: nothing bypasses."""
        return update
