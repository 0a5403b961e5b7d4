"""The numbers that the codes of a few bits stand for, between -1 or 0 and 1."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Rounding = jax.Array | float  # where between two neighbours the upper one begins: 1/2 is nearest


@dataclasses.dataclass(frozen=True)
class TableMap:
    """At most 16 numbers, by comparing with all of them.

    Attributes:
        name: what the map is called in a state.
        numbers: the numbers, in order.
    """

    name: str
    numbers: tuple[float, ...]

    @functools.cached_property
    def bits(self) -> int:
        """Bits of a code."""
        return 2 if len(self.numbers) <= 4 else 4

    @property
    def signed(self) -> bool:
        """Returns True if there are negative numbers."""
        return self.numbers[0] < 0

    @property
    def zero(self) -> int | None:
        """Returns the code of zero."""
        return self.numbers.index(0) if 0 in self.numbers else None

    @property
    def values(self) -> np.ndarray:
        """The numbers as float32."""
        return np.asarray(self.numbers, np.float32)

    def encode(self, y: jax.Array, xi: Rounding) -> jax.Array:
        r"""Counts the thresholds below float32 ``y`` in [-1, 1], which gives int32 codes.

        Between neighbours :math:`v_c \le y < v_{c+1}` the code is :math:`c + 1` where
        :math:`y > v_c + \xi (v_{c+1} - v_c)`: halves go to the lower code.
        """
        code = jnp.zeros(y.shape, jnp.int32)
        for below, above in zip(self.values[:-1], self.values[1:], strict=True):
            code = code + (y > below + xi * (above - below)).astype(jnp.int32)
        return code

    def decode(self, codes: jax.Array) -> jax.Array:
        """Selects among the numbers: no gather, which accelerators are slow at."""
        number = jnp.full(codes.shape, self.values[0], jnp.float32)
        for code, value in enumerate(self.values[1:], 1):
            number = jnp.where(codes >= code, value, number)
        return number


def dynamic_numbers(bits: int, signed: bool) -> list[float]:
    r"""The dynamic exponent map: decades with twice as many numbers in each than in the last.

    With :math:`E` the bits less one, decade :math:`i = 0, \dots, E - 1` divides
    :math:`10^{i-E+1} [0.1, 1]` into :math:`2^i` equal cells (:math:`2^{i+1}` if unsigned) and has
    their centres, with both signs if signed; 0 and 1 complete it.
    """
    decades = bits - 1
    numbers = [0.0, 1.0]
    for i in range(decades):
        cells = 2 ** (i if signed else i + 1)
        centres = [
            10.0 ** (i - decades + 1) * (0.1 + 0.9 * (j + 0.5) / cells) for j in range(cells)
        ]
        numbers += centres
        if signed:
            numbers += [-centre for centre in centres]
    return sorted(numbers)


@dataclasses.dataclass(frozen=True)
class Dynamic8:
    r"""The 8-bit dynamic exponent map, in closed form.

    The magnitudes are numbered so that number :math:`a \ge 1`, or :math:`a + 1` if unsigned,
    lies in decade :math:`\lfloor \log_2 a \rfloor` of :func:`dynamic_numbers`. Codes are these
    numbers around the code of zero.

    Attributes:
        signed: whether negative numbers have codes.
        symmetric: whether -1 has a code, in place of 0.
    """

    bits = 8
    signed: bool = True
    symmetric: bool = False

    @property
    def name(self) -> str:
        """Returns the name of the codebook in a state."""
        return "dynamic8" + ("" if self.signed else "_unsigned") + "_symmetric" * self.symmetric

    @property
    def zero(self) -> int | None:
        """The code of 0, unless -1 took it."""
        if not self.signed:
            return 0
        return None if self.symmetric else 127

    @property
    def values(self) -> np.ndarray:
        """All 256 numbers, as they are decoded."""
        return _table(self)

    @property
    def _offset(self) -> int:
        return 0 if self.signed else 1

    @property
    def _top(self) -> int:
        return 128 if self.signed else 255

    def encode(self, y: jax.Array, xi: Rounding) -> jax.Array:
        """The magnitude below ``|y|``, the one above it, and a comparison."""
        negative = y < 0
        y = jnp.abs(y)
        below, low, high = self._neighbours(y)
        if self.symmetric:
            # Below the smallest magnitude the neighbours are its two signs.
            near = below == 0
            up = _up(negative, y, jnp.where(near, -high, low), high, xi)
            magnitude = jnp.where(near, 1, jnp.minimum(below + up.astype(jnp.int32), 128))
            negative = jnp.where(near, negative == up, negative)
            return jnp.where(negative, 128 - magnitude, 127 + magnitude)
        if not self.signed:
            return below + (y > low + xi * (high - low)).astype(jnp.int32)
        # Down from -low to -high, the upper neighbour is -low.
        up = _up(negative, y, low, high, xi)
        magnitude = below + up.astype(jnp.int32)
        return jnp.where(negative, 127 - jnp.minimum(magnitude, 127), 127 + magnitude)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The magnitude of a code, with its sign."""
        number = codes.astype(jnp.int32).astype(jnp.float32)
        if self.symmetric:
            number = number - jnp.where(number > 127, 127.0, 128.0)
        elif self.signed:
            number = number - 127.0
        centre = jnp.abs(number) + (self._offset + 0.5)  # of the cell, between powers of two
        bits = jax.lax.bitcast_convert_type(centre, jnp.int32)
        part = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32) - 1
        scale = jnp.full(number.shape, _scale(0), jnp.float32)
        for decade in range(1, 7):
            scale = jnp.where(centre >= self._cells(decade), _scale(decade), scale)
        value = jnp.where(centre > self._top + self._offset, 1.0, _within(scale, part))
        return value * jnp.sign(number)

    def _neighbours(self, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Finds the magnitudes on both sides of ``y``, give or take a rounding.

        Returns:
            The number of the magnitude below, as int32, and the two magnitudes.
        """
        columns = [jnp.full(y.shape, constant) for constant in self._decade(0)]
        for decade in range(1, 7):
            above = y > 10.0 ** (decade - 7)
            pairs = zip(self._decade(decade), columns, strict=True)
            columns = [jnp.where(above, constant, before) for constant, before in pairs]
        cells, inverse_scale, scale, last_before, first_after = columns
        cell = jnp.floor((y * inverse_scale - 0.1) / 0.9 * cells - 0.5)
        cell = jnp.clip(cell, -1, cells - 1)
        below = (cells + cell).astype(jnp.int32) - self._offset
        # One over a power of two.
        bits = np.int32(254 << 23) - jax.lax.bitcast_convert_type(cells, jnp.int32)
        width = jax.lax.bitcast_convert_type(bits, jnp.float32)
        low = jnp.where(cell < 0, last_before, _within(scale, (cell + 0.5) * width))
        high = _within(scale, (cell + 1.5) * width)
        return below, low, jnp.where(cell + 1 == cells, first_after, high)

    def _decade(self, decade: int) -> tuple[np.float32, ...]:
        """Returns a decade's cells, one over its scale, its scale, and the magnitudes around it."""

        def centre(decade: int, cell: float) -> np.float32:
            return _within(_scale(decade), np.float32((cell + 0.5) / self._cells(decade)))

        before = centre(decade - 1, self._cells(decade - 1) - 1) if decade else np.float32(0)
        after = centre(decade + 1, 0) if decade < 6 else np.float32(1)
        cells = np.float32(self._cells(decade))
        return cells, np.float32(10.0 ** (6 - decade)), _scale(decade), before, after

    def _cells(self, decade: int) -> int:
        return 2 ** (decade + self._offset)


Map = TableMap | Dynamic8  # increasing numbers, the largest of them 1


def _scale(decade: int) -> np.float32:
    return np.float32(10.0 ** (decade - 6))


def _within(scale: Any, part: Any) -> Any:
    """Returns the magnitude at a part of a decade from a tenth of its scale to its scale."""
    return scale * (0.1 + 0.9 * part)


def _up(
    negative: jax.Array, y: jax.Array, low: jax.Array, high: jax.Array, xi: Rounding
) -> jax.Array:
    """True if a magnitude ``y`` rounds to ``high``; of a negative number ``-low`` is above."""
    # A selection of booleans is nothing that the compiler of TPU kernels takes.
    return (negative & (y >= high + xi * (low - high))) | (
        ~negative & (y > low + xi * (high - low))
    )


@functools.cache
def _table(of: Dynamic8) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(of.decode(jnp.arange(256, dtype=jnp.uint8)))


def _symmetric(numbers: list[float]) -> list[float]:
    """Without 0 and with -1."""
    return sorted(-x for x in numbers if x > 0) + [x for x in numbers if x > 0]


DYNAMIC4 = TableMap("dynamic4", tuple(dynamic_numbers(4, signed=True)))
DYNAMIC4_SYMMETRIC = TableMap(
    "dynamic4_symmetric", tuple(_symmetric(dynamic_numbers(4, signed=True)))
)
# "DE-0": the zero of the unsigned map has been replaced by its neighbour, which has two codes now.
DYNAMIC4_UNSIGNED = TableMap(
    "dynamic4_unsigned", tuple(dynamic_numbers(4, signed=False)[i or 1] for i in range(16))
)
LINEAR4_UNSIGNED = TableMap("linear4_unsigned", tuple((k + 1) / 16 for k in range(16)))
INT4 = TableMap("int4", tuple(k / 7 for k in range(-7, 8)))
LINEAR2 = TableMap("linear2", tuple((2 * k - 3) / 3 for k in range(4)))
LINEAR4 = TableMap("linear4", tuple((2 * k - 15) / 15 for k in range(16)))
# Quantiles of a normal distribution, as QLoRA's Appendix E lists them (arXiv 2305.14314): seven
# below 0, and eight above it.
NF4 = TableMap(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
