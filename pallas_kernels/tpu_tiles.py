"""The tiles in which TPU kernels go through a tensor."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
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


def are_filled(count: int) -> bool:
    """Whether ``count`` blocks of a row fill the compiler's own tiles, of eight or of four.

    Then it lays out the blocks of a state next to the rows' last axis; otherwise that would pad
    them, and what it chooses depends on the dtype.
    """
    return count % BLOCKS == 0 or count == 4


def cost(operations: int, arrays: Sequence[Any]) -> pl.CostEstimate:
    """What a kernel costs that reads or writes each of ``arrays`` once, for XLA's schedule.

    Args:
        operations: arithmetic operations.
        arrays: all operands and results, one that is updated in place twice.
    """
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=operations, transcendentals=0, bytes_accessed=moved)


def float32(x: jax.Array) -> jax.Array:
    """``x`` in float32; int16 stands for the bits of a float16, which TPUs do not know."""
    if x.dtype != jnp.int16:
        return x.astype(jnp.float32)
    # The bits of a float16: exponents are biased by 15 instead of 127, and the hardware flushes
    # what would be subnormal on the way.
    magnitude = x.astype(jnp.int32) & 0x7FFF
    bias = jnp.where(magnitude >= 0x7C00, 255 - 31, 127 - 15) << 23
    normal = jax.lax.bitcast_convert_type((magnitude << 13) + bias, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0**-24
    result = jnp.where(magnitude < 0x400, subnormal, normal)
    return jnp.where(x.astype(jnp.int32) < 0, -result, result)
