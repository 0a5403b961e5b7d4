"""A parameter seen as matrices, of which one side is compressed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from microadam_jax.sharding import explicit_sharding, place_on
from microadam_jax.state_arrays import zeros_sharded_on
from microadam_jax.trees import Shape


@dataclasses.dataclass(frozen=True)
class Layout:
    """Holds the sizes of a state's matrices: a number, or None for that of the parameter's.

    A number stands on the last axis of its side; the other axes of the side have size 1.

    Attributes:
        rows: on the compressed side.
        columns: on the kept side.
    """

    rows: int | None
    columns: int | None


WHOLE = Layout(None, None)
ONE = Layout(1, 1)


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """Names the axes of a parameter that are the rows and the columns of its matrices.

    Rows are what is compressed: a basis has shape ``(rows, rank)`` and the projected gradient
    ``(rank, columns)``, whichever way the parameter lies. States keep the rank and the order of
    the parameter's axes, so that what is not compressed is sharded as it is.

    Attributes:
        shape: of the parameter.
        compressed: the axes of the rows, outermost first.
        kept: the axes of the columns, outermost first. What is in neither is a batch.
    """

    shape: Shape
    compressed: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Returns the size of the compressed side."""
        return math.prod(self.shape[i] for i in self.compressed)

    @property
    def columns(self) -> int:
        """Returns the size of the kept side."""
        return math.prod(self.shape[i] for i in self.kept)

    @property
    def batch(self) -> tuple[int, ...]:
        """Returns the axes that count matrices."""
        sides = (*self.compressed, *self.kept)
        return tuple(i for i in range(len(self.shape)) if i not in sides)

    def shape_of(self, layout: Layout) -> Shape:
        """Returns the shape of a state array, of the parameter's rank."""
        shape = list(self.shape)
        for side, size in ((self.compressed, layout.rows), (self.kept, layout.columns)):
            if size is not None:
                for axis in side:
                    shape[axis] = 1
                shape[side[-1]] = size
        return tuple(shape)

    def zeros(
        self, parameter: jax.Array | jax.ShapeDtypeStruct, layout: Layout, dtype: DTypeLike
    ) -> jax.Array:
        """Returns zeros of ``layout``, sharded as ``parameter`` on its whole axes."""
        return zeros_sharded_on(parameter, self.shape_of(layout), dtype, self._whole(layout))

    def fold(self, x: jax.Array, gathered: bool = False) -> jax.Array:
        """Returns the matrices of ``x``: ``(*batch, rows, columns)``.

        Args:
            x: a parameter or a state.
            gathered: True for whole matrices on each device that has any.
        """
        order = (*self.batch, *self.compressed, *self.kept)
        x = jnp.transpose(_major_axes_only(x, (self.compressed, self.kept)), order)
        sizes = x.shape[: len(self.batch)]
        cut = len(self.batch) + len(self.compressed)
        rows, columns = math.prod(x.shape[len(sizes) : cut]), math.prod(x.shape[cut:])
        folded = x.reshape(*sizes, rows, columns)
        return place_on(folded, folded, range(len(self.batch))) if gathered else folded

    def unfold(self, matrices: jax.Array, layout: Layout, parameter: jax.Array) -> jax.Array:
        """Returns the inverse of :meth:`fold`, placed as :meth:`zeros` places it."""
        order = (*self.batch, *self.compressed, *self.kept)
        shape = self.shape_of(layout)
        x = matrices.reshape([shape[i] for i in order])
        x = jnp.transpose(x, [order.index(i) for i in range(len(order))])
        return place_on(x, parameter, self._whole(layout))

    def _whole(self, layout: Layout) -> tuple[int, ...]:
        rows = self.compressed if layout.rows is None else ()
        columns = self.kept if layout.columns is None else ()
        return (*self.batch, *rows, *columns)


def _major_axes_only(x: jax.Array, sides: tuple[tuple[int, ...], ...]) -> jax.Array:
    """``x`` with no minor axis of a side sharded, because those cannot be merged."""
    sharding = explicit_sharding(x)
    minor = [axis for side in sides for axis in side[1:]]
    if sharding is None or not any(sharding.spec[axis] for axis in minor):
        return x
    return place_on(x, x, [axis for axis in range(x.ndim) if axis not in minor])
