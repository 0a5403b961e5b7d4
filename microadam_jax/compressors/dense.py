"""An update that is kept whole."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from microadam_jax.compressors.rows import overwrite, row_of, row_shape
from microadam_jax.sharding import contract


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
        return overwrite(rows, self.update[..., None], position), unused

    def products(self, window: tuple[jax.Array, jax.Array], position: jax.Array) -> jax.Array:
        """Returns ``(m,)``: the inner products of row ``position`` with every row."""
        rows = window[0].astype(jnp.float32)
        axes = _letters(self.update.ndim)
        return contract(f"{axes}mo,{axes}o->m", rows, row_of(rows, position))

    def combine(self, window: tuple[jax.Array, jax.Array], coefficients: jax.Array) -> jax.Array:
        """Returns the sum of the rows, each times its coefficient."""
        axes = _letters(self.update.ndim)
        return contract(f"{axes}mo,m->{axes}", window[0].astype(jnp.float32), coefficients)

    def with_bypass(self, update: jax.Array) -> jax.Array:
        """Returns ``update``: nothing bypasses."""
        return update


def _letters(axes: int) -> str:
    return "abcdefghijkl"[:axes]
