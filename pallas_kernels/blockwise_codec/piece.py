"""A piece of a tile: moments from their codes, and codes from moments, in registers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise_codec.rule import Rule
from pallas_kernels.blockwise_codec.tiling import PIECE, Tiling
from pallas_kernels.tpu_tiles import LANES, float32


class Plan(NamedTuple):
    """Holds what is static in a call.

    Attributes:
        rule: the step.
        codecs: those of the moments.
        sizes: elements in a block of each.
        blocks: how many blocks of each a tile has.
        kinds: of each input, whether it has ``"all"`` elements, or one for each ``"row"`` or each
            ``"column"``.
        n: elements in a row.
        tiling: the tiles.
        stride: from row to row, as an int32.
    """

    rule: Rule
    codecs: tuple[Any, ...]
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    n: int
    tiling: Tiling
    stride: np.int32

    def first_column(self, which: int) -> int:
        """Counts the per-block arrays before those of a codec."""
        return sum(codec.statistics for codec in self.codecs[:which])

    @property
    def per_row(self) -> int:
        """The place behind those, of numbers for each row."""
        return self.first_column(len(self.codecs))


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
        """Locates their codes of four bits."""
        return slice(self.number * LANES, (self.number + 1) * LANES)

    def inputs(self, refs: Sequence[Any], columns: Sequence[jax.Array]) -> Iterator[jax.Array]:
        """The inputs, the gradient in float32."""

        def elements(ref: Any, rows: Any) -> jax.Array:
            return ref[rows, self.lanes]

        return inputs_of(self.plan, refs, self.rows, elements, columns[self.plan.per_row])

    def decode(self, which: int, ref: Any, columns: Sequence[jax.Array]) -> jax.Array:
        """A stored moment."""
        codec, size = self.plan.codecs[which], self.plan.sizes[which]
        codes = self._codes(codec, size, ref)
        values = []
        places = self._places(which)
        for block, place in enumerate(places):
            # Behind the last block of the row there may be half a piece, which is not stored.
            at = (places[0] or 0) if place is None else place
            statistics = [x[:, at : at + 1] for x in self._columns(which, columns)]
            part = codes[:, block * size : (block + 1) * size]
            values.append(codec.values_of(part, statistics))
        return jnp.concatenate(values, axis=1)

    def encode(
        self, which: int, x: jax.Array, xi: jax.Array | None, ref: Any, columns: list[jax.Array]
    ) -> None:
        """Stores a moment, and what there is per block in ``columns``."""
        codec, size = self.plan.codecs[which], self.plan.sizes[which]
        lane, codes = iota(columns[0].shape, 1), []
        for block, place in enumerate(self._places(which)):
            part = slice(block * size, (block + 1) * size)
            statistics = codec.measure(x[:, part])
            codes.append(
                codec.codes_of(x[:, part], statistics, None if xi is None else xi[:, part])
            )
            if place is None:
                continue
            for index, number in enumerate(statistics, self.plan.first_column(which)):
                columns[index] = jnp.where(lane == place, number, columns[index])
        self._store(codec, codes, ref)

    def write(self, ref: Any, x: jax.Array) -> None:
        """Stores the output."""
        ref[self.rows, self.lanes] = x

    def _columns(self, which: int, columns: Sequence[jax.Array]) -> Sequence[jax.Array]:
        return columns[self.plan.first_column(which) : self.plan.first_column(which + 1)]

    def _places(self, which: int) -> list[int | None]:
        """For each block, which column is its; None for a block that there is not."""
        each = PIECE[1] // self.plan.sizes[which]
        return [
            block if block < self.plan.blocks[which] else None
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


def inputs_of(
    plan: Plan,
    refs: Sequence[Any],
    rows: Any,
    elements: Callable[[Any, Any], jax.Array],
    per_row: jax.Array,
) -> Iterator[jax.Array]:
    """The inputs of some rows of a tile, the gradient in float32.

    Args:
        plan: of the call.
        refs: the inputs' tiles.
        rows: which rows.
        elements: reads some elements of a tile, given its rows.
        per_row: what there is for each row, in the order of the inputs.
    """
    at = 0
    for index, (ref, kind) in enumerate(zip(refs, plan.kinds, strict=True)):
        if kind == "all":
            x = elements(ref, rows)
            yield x.astype(ref.dtype) if index else float32(x)
        elif kind == "row":
            x = elements(ref, slice(None))
            yield jnp.broadcast_to(x, plan.tiling.piece).astype(ref.dtype)
        else:
            x = per_row[:, at : at + 1]
            yield jnp.broadcast_to(x, plan.tiling.piece).astype(ref.dtype)
            at += 1


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
