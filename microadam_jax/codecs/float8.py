"""8-bit floating point, with or without an expansion of each block's range."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.blocks import Blocks, as_blocks_of, as_row, blocked_shape, merge, split
from microadam_jax.codecs.minifloat import E4M3, E5M2, MiniFloat
from microadam_jax.codecs.rounding import Draw, dither
from microadam_jax.codecs.row_by_row import RowByRow
from microadam_jax.codecs.scaled import (
    as_blocks,
    codec_name,
    largest_magnitudes,
    magnitudes,
    require_rounding,
)
from microadam_jax.state_arrays import state_zeros

TINY = np.finfo(np.float32).tiny
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
STEPS = 16  # exponents are multiples of 1/16
MAX_CODE = 255  # of an exponent, in sixteenths


class Float8Codes(NamedTuple):
    """A tensor ``(*lead, n)`` of ``blocks`` blocks of ``size`` elements.

    Attributes:
        codes: ``(*lead, blocks * size)`` uint8, the bits of the 8-bit numbers: CPUs would widen a
            whole array of float8 to write a part of it.
        scales: ``(*lead, blocks)`` float32, by which the codes are multiplied.
    """

    codes: jax.Array
    scales: jax.Array


class ExpandedFloat8Codes(NamedTuple):
    """A tensor ``(*lead, n)`` of ``blocks`` blocks of ``size`` elements.

    Attributes:
        codes: ``(*lead, blocks * size)`` uint8, the bits of the 8-bit numbers: CPUs would widen a
            whole array of float8 to write a part of it.
        largest: ``(*lead, blocks)`` float32, the largest magnitudes.
        exponents: ``(*lead, blocks)`` uint8, in sixteenths; zero in a block of zeros.
    """

    codes: jax.Array
    largest: jax.Array
    exponents: jax.Array


@dataclasses.dataclass(frozen=True)
class Float8(RowByRow):
    r"""Quantizes to 8-bit floating point; a block's largest magnitude becomes the format's.

    With :math:`M` and :math:`\mu`, the largest and the smallest nonzero magnitude of a block, and
    :math:`q_{\max}` the format's largest number, :math:`q_i` is :math:`x_i\, q_{\max} / M` in the
    format. With expansion the magnitudes are raised to a power that makes the block fill the range:

    .. math::

        k &= \frac{1}{16} \left\lfloor 16\,
            \frac{\log_2 (q_{\max}^2 / 2)}{\log_2 (M / \mu)} \right\rfloor \\
        q_i &= \mathrm{fp8}\left(q_{\max} \operatorname{sign}(x_i)
            \left(\frac{|x_i|}{M}\right)^k\right) \\
        Q^{-1}(q_i) &= \operatorname{sign}(q_i) \left(\frac{|q_i|}{q_{\max}}\right)^{1/k} M

    The paper divides by the geometric centre :math:`c = \sqrt{M \mu}` first and by
    :math:`s = (M / c)^k / q_{\max}` after, and keeps both. The centre cancels, so that :math:`M`
    is all that is kept here, and :math:`M` itself comes back exactly.

    The released code leaves zeros and constant blocks to chance. Here :math:`\mu` passes over
    zeros, :math:`k` is limited to [1/16, 255/16] and is 1 in a block of one magnitude. A block of
    zeros is all zero bytes. A block that holds an infinity or a NaN becomes NaN.

    Args:
        format: ``"e4m3"`` (largest number 448) or ``"e5m2"`` (57344).
        expansion: whether blocks are expanded.
        blocks: the rule that cuts rows into blocks.
        rounding: ``"nearest"``, halves to even, or ``"stochastic"``.

    Raises:
        ValueError: if ``format`` or ``rounding`` is not one of those.

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 4.
    """

    signed = True
    bits = 8
    format: str = "e4m3"
    expansion: bool = True
    blocks: Blocks = Blocks(128)
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        require_rounding(self.rounding)
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {sorted(FORMATS)}; got {self.format!r}.")

    @property
    def Encoded(self) -> Any:
        """Returns the NamedTuple of quantized arrays."""
        return ExpandedFloat8Codes if self.expansion else Float8Codes

    @property
    def name(self) -> str:
        """Returns the codec in a word, as it stands in a checkpoint."""
        return codec_name(self.format + "_expanded" * self.expansion, self.blocks)

    @property
    def needs_key(self) -> bool:
        """Returns True if ``encode`` must be given a key."""
        return self.rounding == "stochastic"

    def zeros(self, parameter: jax.Array) -> Any:
        """Returns the encoding of zeros: all bytes zero.

        Raises:
            ValueError: if the sharding of ``parameter`` does not divide its blocks.
        """
        layout = self.blocks.layout_of(parameter)
        codes = (*parameter.shape[:-1], layout.count * layout.size)
        block = blocked_shape(parameter.shape, layout)
        state = [
            state_zeros(parameter, codes, jnp.uint8),
            state_zeros(parameter, block, jnp.float32),
        ]
        if self.expansion:
            state.append(state_zeros(parameter, block, jnp.uint8))
        return self.Encoded(*state)

    def encode(self, x: jax.Array, key: jax.Array | Draw | None = None) -> Any:
        """Encodes the float32 tensor ``x``; ``key`` is used by stochastic rounding only."""
        layout = self.blocks.layout_of(x)
        xi = None if key is None else split(dither(key, x.shape), layout)
        block = split(x, layout)
        statistics = self.measure(block)
        codes = as_row(self.codes_of(block, statistics, xi).astype(jnp.uint8))
        scale, *exponents = (number[..., 0] for number in statistics)
        return self.Encoded(codes, scale, *(k.astype(jnp.uint8) for k in exponents))

    def decode(self, encoded: Any, shape: tuple[int, ...]) -> jax.Array:
        """Returns the float32 tensor of ``shape`` that ``encoded`` stands for."""
        layout = self.blocks.of_shape(shape)
        codes, *statistics = encoded
        x = self.values_of(
            as_blocks_of(codes, layout.count), [number[..., None] for number in statistics]
        )
        return merge(x, layout, shape)

    @property
    def statistics(self) -> int:
        """Counts the values kept for a block: its scale, or its absmax and exponent."""
        return 1 + self.expansion

    @functools.partial(jax.jit, static_argnums=0)
    def measure(self, block: jax.Array) -> tuple[jax.Array, ...]:
        """Returns scales ``(..., 1)`` of blocks ``(..., size)``; NaN where they are not finite."""
        smallest = self.smallest(block) if self.expansion else None
        return self.scales_of(largest_magnitudes(block), smallest)

    def smallest(self, block: jax.Array) -> jax.Array:
        """Returns the smallest magnitudes ``(..., 1)`` of blocks that count, infinity if none."""
        magnitude = magnitudes(block)
        counted = jnp.where(magnitude > TINY, magnitude, jnp.inf)
        return jnp.min(counted, axis=-1, keepdims=True)

    def scales_of(
        self, largest: jax.Array, smallest: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns the scales of blocks, from their extreme magnitudes."""
        largest = jnp.where(jnp.isfinite(largest), largest, jnp.nan)
        if smallest is None:
            return (largest / self._number.largest,)
        largest = jnp.where(largest <= TINY, 0, largest)
        return largest, self._sixteenths(largest, smallest)

    @functools.partial(jax.jit, static_argnums=0)
    def codes_of(
        self, block: jax.Array, statistics: Sequence[jax.Array], xi: jax.Array | None
    ) -> jax.Array:
        """Returns the codes ``(..., size)`` of blocks with their statistics, as integers."""
        return self.codes_of_parts(jnp.abs(block), jnp.sign(block), statistics, xi)

    def codes_of_parts(
        self,
        magnitude: jax.Array,
        sign: jax.Array,
        statistics: Sequence[jax.Array],
        xi: jax.Array | None,
    ) -> jax.Array:
        """Returns the codes of blocks whose magnitudes and signs are computed apart."""
        scale, number = statistics[0], self._number
        ratio = magnitude / _usable(scale)
        if self.expansion:
            ratio = number.largest * _power(ratio, _exponent(statistics[1]))
        y = sign * ratio
        y = jnp.clip(y, -number.largest, number.largest)
        y = jnp.where(jnp.isnan(scale), 0, y)
        return number.encode(y if xi is None else number.dithered(y, xi))

    @functools.partial(jax.jit, static_argnums=0)
    def values_of(self, codes: jax.Array, statistics: Sequence[jax.Array]) -> jax.Array:
        """Returns the float32 numbers ``(..., size)`` that codes of blocks stand for."""
        q, scale = self._number.decode(codes), statistics[0]
        if not self.expansion:
            return q * scale
        root = _power(jnp.abs(q) / self._number.largest, 1 / _exponent(statistics[1]))
        return jnp.sign(q) * root * scale

    @property
    def _number(self) -> MiniFloat:
        return FORMATS[self.format]

    def _sixteenths(self, largest: jax.Array, smallest: jax.Array) -> jax.Array:
        """The exponents of blocks in sixteenths; zero in a block of zeros."""
        spread = jnp.log2(largest) - jnp.log2(smallest)
        span = np.float32(np.log2(self._number.largest**2 / 2))
        k = jnp.floor(STEPS * span / jnp.where(spread > 0, spread, 1))
        k = jnp.where(spread > 0, jnp.clip(k, 1, MAX_CODE), STEPS)
        return jnp.where(largest == 0, 0, k)


def float8(
    format: str = "e4m3",  # noqa: A002
    *,
    expansion: bool = False,
    block: int | Blocks = 128,
    rounding: str = "nearest",
) -> Float8:
    """Returns a codec of 8-bit floating point; see :class:`Float8`.

    Args:
        format: ``"e4m3"`` or ``"e5m2"``.
        expansion: whether each block's range is expanded to the format's.
        block: the largest number of elements that share a scale, or the rule that cuts rows.
        rounding: ``"nearest"`` or ``"stochastic"``.

    Returns:
        The codec, for first and second moments.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``block`` is not positive and even, or ``format`` or ``rounding`` is not one
            of those.
    """
    return Float8(format, expansion, as_blocks(block), rounding)


def _usable(x: jax.Array) -> jax.Array:
    """``x``, or 1 where nothing can be divided by it."""
    return jnp.where(jnp.abs(x) > TINY, x, jnp.where(jnp.isnan(x), x, 1))


def _exponent(sixteenths: jax.Array) -> jax.Array:
    return jnp.where(sixteenths == 0, 1, sixteenths.astype(jnp.float32) / STEPS)


def _power(base: jax.Array, exponent: jax.Array) -> jax.Array:
    """``base ** exponent`` for a base that is not negative, 0 for 0."""
    return jnp.where(base > 0, jnp.exp2(exponent * jnp.log2(base)), jnp.where(base == 0, 0, base))
