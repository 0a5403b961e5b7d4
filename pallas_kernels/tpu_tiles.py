"""The tiles in which TPU kernels go through a tensor."""

from collections.abc import Sequence
from typing import Any

from jax.experimental import pallas as pl

SIZE = 256  # elements in a block: two registers' lanes, one for each half of a byte's codes
ROWS = 128  # rows of the tensor in a tile
BLOCKS = 8  # blocks of a row in a tile
BYTES = 32  # blocks in a tile of bytes, where it divides them


def unsupported(shape: tuple[int, ...], size: int) -> str | None:
    """Why a tensor of ``shape``, in blocks of ``size``, does not fit the tiles, or None."""
    if size != SIZE:
        return f"blocks must have {SIZE} elements; these have {size}"
    if len(shape) < 2 or 0 in shape:
        return f"the tensor needs two axes or more, none of them empty; its shape is {shape}"
    return None


def cost(operations: int, arrays: Sequence[Any]) -> pl.CostEstimate:
    """What a kernel costs that reads or writes each of ``arrays`` once, for XLA's schedule.

    Args:
        operations: arithmetic operations.
        arrays: all operands and results, one that is updated in place twice.
    """
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=operations, transcendentals=0, bytes_accessed=moved)
