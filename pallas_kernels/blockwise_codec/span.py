"""One block of a tile, wherever it begins, in registers and back."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise_codec.piece import Plan, inputs_of, iota
from pallas_kernels.tpu_tiles import LANES, float32, rounded_up


class Span(NamedTuple):
    """Lanes of a tile that begin at any multiple of their number.

    Registers are read and written whole. So the registers that may hold a part of the span are,
    and are rotated until the span begins with the first lane.

    Attributes:
        rows: of the tile.
        start: the first lane.
        size: how many there are.
        width: lanes of the tile.
    """

    rows: Any
    start: jax.Array
    size: int
    width: int

    @property
    def registers(self) -> int:
        """Lanes of the registers in which the span fits wherever it begins."""
        latest = LANES - math.gcd(self.size, LANES)
        return min(rounded_up(latest + self.size, LANES), self.width)

    @property
    def base(self) -> jax.Array:
        """The first lane of those registers."""
        base = jnp.minimum(self.start // LANES * LANES, self.width - self.registers)
        return pl.multiple_of(base, LANES)

    def load(self, ref: Any) -> jax.Array:
        """The span in 32 bits, and as many other numbers as fill its registers."""
        x = ref[self.rows, pl.ds(self.base, self.registers)]
        x = x.astype(jnp.int32) if x.dtype == jnp.uint8 else float32(x)
        if self.size % LANES:
            back = (self.registers - (self.start - self.base)) % self.registers
            x = pltpu.roll(x, back, axis=1)
        return x[:, : rounded_up(self.size, LANES)]

    def store(self, ref: Any, x: jax.Array) -> None:
        """Writes what :meth:`load` read, and leaves its neighbours as they are."""
        place = self.rows, pl.ds(self.base, self.registers)
        if self.size % LANES == 0:
            ref[place] = x.astype(ref.dtype)
            return
        shift = self.start - self.base
        x = pltpu.roll(filled_up(x, self.registers), shift, axis=1)
        lane = iota(x.shape, 1)
        here = (lane >= shift) & (lane < shift + self.size)
        ref[place] = jnp.where(here, x, ref[place].astype(x.dtype)).astype(ref.dtype)


class Block(NamedTuple):
    """A block of some rows, of the size that all moments have.

    Attributes:
        plan: of the call.
        rows: of the tile.
        numbers: the same rows of what there is per block.
        number: of the block in the tile.
    """

    plan: Plan
    rows: Any
    numbers: Any
    number: jax.Array

    @property
    def size(self) -> int:
        """Counts its elements of a row."""
        return self.plan.sizes[0]

    def inputs(self, refs: Sequence[Any], columns_ref: Any) -> Iterator[jax.Array]:
        """The inputs, the gradient in float32."""

        def elements(ref: Any, rows: Any) -> jax.Array:
            return self._elements._replace(rows=rows).load(ref)

        per_row = columns_ref[self.plan.per_row, self.numbers, :]
        return inputs_of(self.plan, refs, self.rows, elements, per_row)

    def decode(self, which: int, ref: Any, columns_ref: Any) -> jax.Array:
        """A stored moment."""
        codec, first = self.plan.codecs[which], self.plan.first_column(which)
        statistics = [
            self._rotated(columns_ref[first + k, self.numbers, :])[:, :1]
            for k in range(codec.statistics)
        ]
        return codec.values_of(self._codes(codec, ref), statistics)

    def encode(
        self, which: int, x: jax.Array, xi: jax.Array | None, ref: Any, columns_ref: Any
    ) -> None:
        """Stores a moment, which is zero behind the end of the block."""
        codec, first = self.plan.codecs[which], self.plan.first_column(which)
        statistics = codec.measure(x)
        codes = codec.codes_of(x, statistics, xi)
        for k, number in enumerate(statistics):
            columns = columns_ref[first + k, self.numbers, :]
            here = iota(columns.shape, 1) == self.number
            columns_ref[first + k, self.numbers, :] = jnp.where(here, number, columns)
        if codec.bits == 8:
            self._elements.store(ref, codes)
            return
        half, lanes = self.size // 2, codes.shape[1]
        high = pltpu.roll(codes, lanes - half, axis=1) if half < lanes else codes
        nibbles = self._nibbles
        byte = (codes | (high << 4))[:, : rounded_up(half, LANES)]
        nibbles.store(ref, byte)

    def write(self, ref: Any, x: jax.Array) -> None:
        """Stores the output."""
        self._elements.store(ref, x.astype(jnp.float32))

    def _codes(self, codec: Any, ref: Any) -> jax.Array:
        if codec.bits == 8:
            return self._elements.load(ref)
        packed = self._nibbles.load(ref)
        packed = filled_up(packed, rounded_up(self.size, LANES))
        half = self.size // 2
        high = pltpu.roll(packed >> 4, half, axis=1)
        return jnp.where(iota(packed.shape, 1) < half, packed & 15, high)

    @property
    def _elements(self) -> Span:
        return Span(self.rows, self.number * self.size, self.size, self.plan.tiling.width)

    @property
    def _nibbles(self) -> Span:
        half = self.size // 2
        return Span(self.rows, self.number * half, half, self.plan.tiling.width // 2)

    def _rotated(self, columns: jax.Array) -> jax.Array:
        """``columns`` with that of the block at the front."""
        return pltpu.roll(columns, (LANES - self.number) % LANES, axis=1)


def filled_up(x: jax.Array, lanes: int) -> jax.Array:
    """``x`` with zeros behind, on so many lanes."""
    if x.shape[1] == lanes:
        return x
    return jnp.concatenate([x, jnp.zeros((x.shape[0], lanes - x.shape[1]), x.dtype)], axis=1)
