"""A piece of a tile: moments from their codes, and codes from moments, in registers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise_codec.rule import Rule
from pallas_kernels.tpu_tiles import float32

LANES = 128
PIECE = (32, 256)  # rows, of a register of bytes, and elements of them, two of which share a byte


class Plan(NamedTuple):
    """What is known of a call when it is compiled.

    Attributes:
        rule: the step.
        codecs: those of the moments.
        sizes: elements in a block of each.
        blocks: how many blocks of each a tile has.
        kinds: of each input, whether it has ``"all"`` elements, or one for each ``"row"`` or each
            ``"column"``.
        n: elements in a row.
        width: elements of a row in a tile.
        stride: from row to row, as an int32.
    """

    rule: Rule
    codecs: tuple[Any, ...]
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    n: int
    width: int
    stride: np.int32


class Piece(NamedTuple):
    """A part of a tile that fits in registers.

    Attributes:
        plan: of the call.
        rows: of the tile.
        number: of the piece in those rows.
    """

    plan: Plan
    rows: Any
    number: int

    @property
    def lanes(self) -> slice:
        """The elements of the rows."""
        return slice(self.number * PIECE[1], (self.number + 1) * PIECE[1])

    @property
    def bytes_of_nibbles(self) -> slice:
        """Where their codes of four bits are."""
        return slice(self.number * LANES, (self.number + 1) * LANES)

    def inputs(self, refs: Sequence[Any], columns: jax.Array) -> Iterator[jax.Array]:
        """The inputs, the gradient in float32."""
        at = sum(
            c.statistics * blocks
            for c, blocks in zip(self.plan.codecs, self.plan.blocks, strict=True)
        )
        for index, (ref, kind) in enumerate(zip(refs, self.plan.kinds, strict=True)):
            if kind == "all":
                x = ref[self.rows, self.lanes]
                yield x if index else float32(x)
            elif kind == "row":
                yield jnp.broadcast_to(ref[:, self.lanes], PIECE)
            else:
                yield jnp.broadcast_to(columns[:, at : at + 1], PIECE).astype(ref.dtype)
                at += 1

    def decode(self, which: int, ref: Any, columns: jax.Array) -> jax.Array:
        """A stored moment."""
        codec, size = self.plan.codecs[which], self.plan.sizes[which]
        codes = self._codes(codec, size, ref)
        values = []
        for block, places in enumerate(self._statistics(which)):
            # Behind the last block of the row there may be half a piece, which is not stored.
            statistics = [columns[:, at : at + 1] for at in places or self._statistics(which)[0]]
            part = codes[:, block * size : (block + 1) * size]
            values.append(codec.values_of(part, statistics))
        return jnp.concatenate(values, axis=1)

    def encode(
        self, which: int, x: jax.Array, xi: jax.Array | None, ref: Any, columns: jax.Array
    ) -> jax.Array:
        """Stores a moment, and returns ``columns`` with what there is per block."""
        codec, size = self.plan.codecs[which], self.plan.sizes[which]
        lane, codes = iota(columns.shape, 1), []
        for block, places in enumerate(self._statistics(which)):
            part = slice(block * size, (block + 1) * size)
            statistics = codec.measure(x[:, part])
            codes.append(
                codec.codes_of(x[:, part], statistics, None if xi is None else xi[:, part])
            )
            for at, number in zip(places, statistics, strict=False):
                columns = jnp.where(lane == at, number, columns)
        self._store(codec, codes, ref)
        return columns

    def _statistics(self, which: int) -> list[list[int]]:
        """For each block, which columns are its; none for a block that there is not."""
        plan = self.plan
        counts = [c.statistics * blocks for c, blocks in zip(plan.codecs, plan.blocks, strict=True)]
        first, blocks = sum(counts[:which]), plan.blocks[which]
        each = PIECE[1] // plan.sizes[which]
        return [
            [first + k * blocks + block for k in range(plan.codecs[which].statistics)]
            if block < blocks
            else []
            for block in range(self.number * each, (self.number + 1) * each)
        ]

    def _codes(self, codec: Any, size: int, ref: Any) -> jax.Array:
        if codec.bits == 8:
            return ref[self.rows, self.lanes].astype(jnp.int32)
        packed = ref[self.rows, self.bytes_of_nibbles].astype(jnp.int32)
        return jnp.concatenate(_halves(packed & 15, packed >> 4, size), axis=1)

    def _store(self, codec: Any, codes: Sequence[jax.Array], ref: Any) -> None:
        both = jnp.concatenate(codes, axis=1)
        if codec.bits == 8:
            ref[self.rows, self.lanes] = both.astype(jnp.uint8)
            return
        low, high = _halves(both[:, :LANES], both[:, LANES:], PIECE[1] // len(codes))
        ref[self.rows, self.bytes_of_nibbles] = (low | (high << 4)).astype(jnp.uint8)


def _halves(one: jax.Array, other: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Two blocks from the first and the last halves of both, or these from the blocks.

    One block of 256 elements has a register of first halves and one of last ones; of two
    blocks of 128, each has half of both.
    """
    if size == PIECE[1]:
        return one, other
    first = iota(one.shape, 1) < LANES // 2
    return (
        jnp.where(first, one, pltpu.roll(other, LANES // 2, axis=1)),
        jnp.where(first, pltpu.roll(one, LANES // 2, axis=1), other),
    )


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Each element's number along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
