"""The tiles in which the TPU kernel goes through a leaf."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.tpu_tiles import (
    BLOCKS,
    BYTES,
    LANES,
    MAX_SIZE,
    MAX_WIDTH,
    ROWS,
    WIDTH,
    rounded_up,
)

PIECE = (32, 256)  # rows, of a register of bytes, and elements of them, two of which share a byte
AREA = 2**18  # elements in a tile, unless the fewest rows have more


class Tiling(NamedTuple):
    """Tiles for blocks of some sizes in rows of some length.

    Attributes:
        rows: of the leaf in a tile; 128 or a part of them.
        width: elements of a row in a tile.
        unit: elements of a row that are worked on at once.
        by_block: whether they are a block, of the one size that all moments have.
    """

    rows: int
    width: int
    unit: int
    by_block: bool

    @property
    def piece(self) -> tuple[int, int]:
        """The shape of what is worked on at once, in whole registers."""
        return PIECE[0], rounded_up(self.unit, LANES)


def tiling(
    sizes: Sequence[int], bits: Sequence[int], statistics: Sequence[int], n: int
) -> Tiling | str:
    """The tiles, or why there are none.

    A tile begins with a block, and with a register of elements and of codes.

    Args:
        sizes: elements in a block of each moment.
        bits: of the codes of each.
        statistics: how many numbers are kept of a block of each; those behind the first in bytes.
        n: elements of a row.
    """
    whole = rounded_up(n, PIECE[1])
    # So many blocks of a row lie in one of the compiler's own tiles.
    together = BYTES if max(statistics) > 1 else BLOCKS
    if len(set(sizes)) > 1 and all(size in (LANES, 2 * LANES) for size in sizes):
        return Tiling(ROWS, min(max(WIDTH, together * max(sizes)), whole), PIECE[1], by_block=False)
    size = sizes[0]
    if len(set(sizes)) > 1 or size > MAX_SIZE or size % 2:
        return (
            f"blocks must have an even size up to {MAX_SIZE}, the same for all moments, or {LANES}"
            f" and {2 * LANES} elements; these have {list(sizes)}"
        )
    unit = math.lcm(size * together, LANES * 8 // min(bits))
    width = unit * max(1, min(WIDTH, LANES * size) // unit)
    if whole <= max(WIDTH, width) and n <= LANES * size:
        width = whole
    elif width > MAX_WIDTH or width > LANES * size:
        return f"tiles of whole blocks of {size} in rows of {n} are too large"
    rows = ROWS
    while rows > PIECE[0] and rows * width > AREA:
        rows //= 2
    return Tiling(rows, width, size, by_block=True)
