"""How a tensor is cut into blocks: runs of its last axis, leading axes untouched.

Every other module asks this one. Cutting only the last axis keeps a parameter's
``PartitionSpec`` valid on each of its per-block state arrays, keeps the compiled step
free of collectives, and makes results independent of the number of devices.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from microadam_jax.arguments import if_traced
from microadam_jax.sharding import explicit_sharding, replicated, shards_along


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """The blocks of one row.

    Attributes:
        row: elements in the row (the length of the tensor's last axis; 1 for a scalar).
        size: elements in a block, a multiple of 2 or 4, so that codes fill whole bytes.
        count: blocks in the row.
    """

    row: int
    size: int
    count: int

    @property
    def padding(self) -> int:
        """Elements that the last block has beyond the end of the row."""
        return self.count * self.size - self.row


@dataclasses.dataclass(frozen=True)
class Blocks:
    r"""Cuts rows into blocks, by the row's length and nothing else.

    For a row of :math:`n` elements the block size is the largest divisor :math:`B` of :math:`n`
    that is a multiple of ``multiple``, with ``size / 2`` :math:`\le B \le` ``size`` and a block
    count :math:`n / B` divisible by ``shards``. Where no divisor qualifies, ``shards`` is halved
    until one does. A row that still has none is a single block if it is no longer than ``size``
    (rounded up to a multiple), and otherwise is cut into blocks of ``size``, the last one padded.

    The rule never looks at the mesh, so a checkpoint does not depend on it.

    Args:
        size: the largest number of elements in a block, a multiple of ``multiple``.
        shards: the block count should be divisible by this, so that the row's blocks divide
            over that many devices (or any divisor of it) exactly where the row itself does.
        multiple: of which the sizes of blocks are multiples: 2 for codes of 4 bits, of which two
            share a byte, and 4 for codes of 2 bits.

    Raises:
        TypeError: if ``size``, ``shards`` or ``multiple`` is not a plain integer.
        ValueError: if ``size`` is not a positive multiple of ``multiple``, ``shards`` not
            positive, or ``multiple`` neither 2 nor 4.

    Examples:
        >>> from microadam_jax import Blocks
        >>> Blocks().layout(4096)
        BlockLayout(row=4096, size=256, count=16)
        >>> Blocks().layout(11008)  # Llama-2's 43 * 256: 43 blocks would divide over no mesh
        BlockLayout(row=11008, size=172, count=64)
    """

    size: int = 256
    shards: int = 8
    multiple: int = 2

    def __post_init__(self) -> None:
        _require_integer("Blocks.size", self.size)
        _require_integer("Blocks.shards", self.shards)
        _require_integer("Blocks.multiple", self.multiple)
        if self.multiple not in (2, 4):
            raise ValueError(f"Blocks.multiple must be 2 or 4; got {self.multiple!r}.")
        if self.size < 1 or self.size % self.multiple:
            raise ValueError(
                f"Blocks.size must be a positive multiple of {self.multiple}; got {self.size}."
            )
        if self.shards < 1:
            raise ValueError(f"Blocks.shards must be a positive integer; got {self.shards}.")

    def layout(self, row: int) -> BlockLayout:
        """Returns the layout of a row of ``row`` elements."""
        shards, multiple = self.shards, self.multiple
        while shards:
            candidates = [
                size
                for size in range(multiple, min(self.size, row) + 1, multiple)
                if 2 * size >= self.size and row % size == 0 and row // size % shards == 0
            ]
            if candidates:
                return BlockLayout(row, candidates[-1], row // candidates[-1])
            shards //= 2
        if row <= self.size:
            return BlockLayout(row, max(multiple, row + -row % multiple), 1 if row else 0)
        return BlockLayout(row, self.size, math.ceil(row / self.size))

    def layout_of(self, tensor: jax.Array | jax.ShapeDtypeStruct) -> BlockLayout:
        """Returns the layout of the rows of ``tensor``."""
        return self.of_shape(tensor.shape)

    def of_shape(self, shape: tuple[int, ...]) -> BlockLayout:
        """Returns the layout of the rows of a tensor of ``shape``; a scalar is a row of one."""
        return self.layout(shape[-1] if shape else 1)


def blocked_shape(shape: tuple[int, ...], layout: BlockLayout, *block: int) -> tuple[int, ...]:
    """The shape ``(*lead, count, *block)`` of what is kept per block of a ``shape`` tensor."""
    return (*shape[:-1], layout.count, *block)


def split(x: jax.Array, layout: BlockLayout) -> jax.Array:
    """Cuts ``x`` of shape ``(*lead, row)`` into ``(*lead, count, size)``, padding with zeros.

    Raises:
        ValueError: if mesh axes are Explicit and cut through a block.
    """
    if x.ndim == 0:
        x = x[None]
    if x.size == 0:
        x = replicated(x)
    sharding = explicit_sharding(x)
    if sharding and layout.count % shards_along(sharding.mesh, sharding.spec[-1]):
        raise ValueError(
            f"The last axis of an array of shape {x.shape} is sharded over {sharding.spec[-1]!r} "
            f"of {dict(sharding.mesh.shape)}, which does not divide its {layout.count} blocks of "
            f"{layout.size} elements. Shard another axis, take smaller blocks, or a mesh whose "
            "axes are Auto, where blocks that straddle devices cost communication."
        )
    if layout.padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, layout.padding)])
    return x.reshape(blocked_shape(x.shape, layout, layout.size))


def merge(blocks: jax.Array, layout: BlockLayout, shape: tuple[int, ...]) -> jax.Array:
    """Joins blocks ``(*lead, count, size)`` into a tensor of ``shape``, dropping the padding."""
    if layout.padding == 0:
        return blocks.reshape(shape)
    return as_row(blocks)[..., : layout.row].reshape(shape)


def as_row(blocks: jax.Array) -> jax.Array:
    """Joins blocks ``(*lead, count, size)`` into ``(*lead, count * size)``, padding and all."""
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])


def as_blocks_of(row: jax.Array, count: int) -> jax.Array:
    """The inverse of :func:`as_row`: cuts ``(*lead, n)`` into ``(*lead, count, n / count)``."""
    return row.reshape(*row.shape[:-1], count, row.shape[-1] // max(count, 1))


def in_row(layout: BlockLayout) -> jax.Array:
    """Marks the elements of blocks ``(count, size)`` that belong to the row: False on padding."""
    shape = layout.count, layout.size
    block, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    # Not their position in the row, which may exceed int32.
    return (block < layout.count - 1) | (lane < layout.size - layout.padding)


def _require_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        hint = if_traced(value, "block_size")
        raise TypeError(f"{name} must be an integer of Python; got {value!r}.{hint}")
