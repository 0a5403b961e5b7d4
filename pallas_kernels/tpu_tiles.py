"""The tiles in which TPU kernels go through a tensor."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MAX_SIZE = 512  # elements in a block: what is worked on at once
ROWS = 128  # rows of the tensor in a tile
BLOCKS = 8  # blocks of a row in a tile, or a multiple
BYTES = 32  # blocks in a tile of bytes, where it divides them
WIDTH = 2048  # elements of a row in a tile, where blocks allow as few
MAX_WIDTH = 32768  # the most of them: with what else there is, half of the smallest chip's memory
ENOUGH = 16 * 2**20  # bytes that a kernel may take of the chip's memory unless it asks for more


class Tile(NamedTuple):
    """A tile begins with a block, and with a register of 128 elements.

    Attributes:
        size: elements in a block.
        blocks: of a row in a tile.
        width: elements of a row in a tile.
    """

    size: int
    blocks: int
    width: int


def tile_of(size: int, count: int, together: int = BLOCKS) -> Tile:
    """The tile for rows of ``count`` blocks of ``size`` elements.

    Args:
        size: elements in a block.
        count: blocks in a row.
        together: a tile has a multiple of so many blocks, unless it has all.
    """
    blocks = math.lcm(together, LANES // math.gcd(size, LANES))
    if count * size <= WIDTH or count <= blocks:
        blocks = count
    return Tile(size, blocks, rounded_up(blocks * size, LANES))


def unsupported(shape: tuple[int, ...], size: int) -> str | None:
    """Why a tensor of ``shape``, in blocks of ``size``, does not fit the tiles, or None."""
    if size > MAX_SIZE or size % 2:
        return f"blocks must have an even size up to {MAX_SIZE}; these have {size} elements"
    if len(shape) < 2 or 0 in shape:
        return f"the tensor needs two axes or more, none of them empty; its shape is {shape}"
    if tile_of(size, -(-shape[-1] // size), BYTES).width > MAX_WIDTH:
        return f"tiles of whole blocks of {size} in rows of {shape[-1]} are too large"
    return None


def compiler_params(elements: int, others: int) -> pltpu.CompilerParams:
    """Parameters of a kernel over independent tiles, with the memory that it needs.

    Args:
        elements: bytes of dense arrays of a tile, with their copies for the next one.
        others: bytes of all else.
    """
    needed = elements + others
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel"),
        vmem_limit_bytes=None if needed < ENOUGH * 3 // 4 else needed + ENOUGH // 4,
    )


def rounded_up(number: int, multiple: int) -> int:
    """The least multiple that is not below ``number``."""
    return -(-number // multiple) * multiple


def are_filled(count: int) -> bool:
    """Returns True if ``count`` blocks of a row fill the compiler's own tiles, of eight or of four.

    Then it lays out the blocks of a state next to the rows' last axis; otherwise that would pad
    them, and what it chooses depends on the dtype.
    """
    return count % BLOCKS == 0 or count == 4


def cost(operations: int, arrays: Sequence[Any]) -> pl.CostEstimate:
    """Estimates the cost of a kernel that reads or writes each of ``arrays`` once, for XLA.

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
