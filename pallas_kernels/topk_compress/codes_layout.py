"""How the compiler of TPUs lays out the codes of a residual, and how a kernel reads them."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tpu_tiles
from pallas_kernels.tpu_tiles import BLOCKS, BYTES, LANES, ROWS, rounded_up


class CodesLayout(enum.Enum):
    """Orders the axes of codes ``(rows, blocks, half)`` as the compiler does, which pads little.

    Where a half fills lanes, it does. Otherwise rows are on lanes, and of the others that one is
    on sublanes which fills them.
    """

    BLOCKS_HALF = enum.auto()
    ROWS_HALF = enum.auto()
    HALF_ROWS = enum.auto()
    BLOCKS_ROWS = enum.auto()

    @classmethod
    def chosen(cls, count: int, half: int) -> "CodesLayout":
        """The layout of ``count`` blocks of twice ``half`` elements."""
        if half % LANES == 0:
            return cls.BLOCKS_HALF if tpu_tiles.are_filled(count) else cls.ROWS_HALF
        padding = rounded_up(half, BLOCKS) / half
        if count % BLOCKS == 0 and padding > 1:
            return cls.BLOCKS_ROWS
        return cls.HALF_ROWS

    @property
    def together(self) -> int:
        """Counts the blocks of a row that a tile must have together."""
        return BYTES if self is CodesLayout.BLOCKS_ROWS else BLOCKS

    def laid_out(self, codes: jax.Array, tile: int) -> jax.Array:
        """Codes ``(outer, rows, blocks, half)`` with the axes in order, which moves nothing."""
        if self is CodesLayout.BLOCKS_HALF:
            # The tiles have an axis of their own: where 32 divides the blocks, bytes lie in tiles
            # of 32, and none could be cut from those.
            outer, rows, count, half = codes.shape
            return codes.reshape(outer, rows, count // tile, tile, half)
        return codes.transpose(self._order)

    def as_before(self, codes: jax.Array, count: int) -> jax.Array:
        """The inverse of :meth:`laid_out`."""
        if self is CodesLayout.BLOCKS_HALF:
            return codes.reshape(*codes.shape[:2], count, codes.shape[-1])
        inverse = sorted(range(4), key=self._order.__getitem__)
        return codes.transpose(inverse)

    def spec(self, tile: int, half: int) -> pl.BlockSpec:
        """The codes of a tile of ``tile`` blocks."""
        if self is CodesLayout.BLOCKS_HALF:
            return pl.BlockSpec((None, ROWS, None, tile, half), lambda o, r, b: (o, r, b, 0, 0))
        if self is CodesLayout.ROWS_HALF:
            return pl.BlockSpec((None, tile, ROWS, half), lambda o, r, b: (o, b, r, 0))
        if self is CodesLayout.HALF_ROWS:
            return pl.BlockSpec((None, tile, half, ROWS), lambda o, r, b: (o, b, 0, r))
        return pl.BlockSpec((None, half, tile, ROWS), lambda o, r, b: (o, 0, b, r))

    def scratch(self, tile: int, half: int) -> tuple[int, ...]:
        """The shape of the integers that :meth:`turn` fills."""
        if self is CodesLayout.BLOCKS_HALF:
            return tile, half, ROWS
        if self is CodesLayout.BLOCKS_ROWS:
            return half, tile, ROWS
        return 1, BLOCKS, ROWS  # not used

    def turn(self, codes_ref: Any, turned_ref: Any) -> None:
        """Makes integers of bytes where single blocks cannot be read from these."""
        if self is CodesLayout.BLOCKS_HALF:
            for block in range(turned_ref.shape[0]):
                turned_ref[block] = codes_ref[:, block].astype(jnp.int32).T
        elif self is CodesLayout.BLOCKS_ROWS:
            turned_ref[...] = codes_ref[...].astype(jnp.int32)

    def turn_back(self, turned_ref: Any, codes_ref: Any) -> None:
        """Makes bytes of what :meth:`write` left as integers."""
        if self is CodesLayout.BLOCKS_HALF:
            for block in range(turned_ref.shape[0]):
                codes_ref[:, block] = turned_ref[block].T.astype(jnp.uint8)
        elif self is CodesLayout.BLOCKS_ROWS:
            codes_ref[...] = turned_ref[...].astype(jnp.uint8)

    def read(self, codes_ref: Any, turned_ref: Any, block: jax.Array) -> jax.Array:
        """The codes ``(half, 128)`` of a block of each row, as integers."""
        if self is CodesLayout.BLOCKS_HALF:
            return turned_ref[block]
        if self is CodesLayout.ROWS_HALF:
            return codes_ref[block].astype(jnp.int32).T
        if self is CodesLayout.HALF_ROWS:
            return codes_ref[block].astype(jnp.int32)
        return turned_ref[:, block]

    def write(self, codes_ref: Any, turned_ref: Any, block: jax.Array, code: jax.Array) -> None:
        """Stores what :meth:`read` read."""
        if self is CodesLayout.BLOCKS_HALF:
            turned_ref[block] = code
        elif self is CodesLayout.ROWS_HALF:
            codes_ref[block] = code.T.astype(jnp.uint8)
        elif self is CodesLayout.HALF_ROWS:
            codes_ref[block] = code.astype(jnp.uint8)
        else:
            turned_ref[:, block] = code

    @property
    def _order(self) -> tuple[int, int, int, int]:
        orders = {
            CodesLayout.ROWS_HALF: (0, 2, 1, 3),
            CodesLayout.HALF_ROWS: (0, 2, 3, 1),
            CodesLayout.BLOCKS_ROWS: (0, 3, 2, 1),
        }
        return orders[self]
