"""8-bit floating point, with or without an expansion of each block's range."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.blocks import BlockLayout, Blocks, blocked_shape, in_row, merge, split
from microadam_jax.codecs.rounding import dither
from microadam_jax.codecs.scaled import as_blocks, codec_name, require_rounding
from microadam_jax.sharding import state_zeros

FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
STEPS = 16  # exponents are multiples of 1/16
MAX_EXPONENT = 16.0


class Float8Codes(NamedTuple):
    """A tensor ``(*lead, n)`` of ``blocks`` blocks of ``size`` elements.

    Attributes:
        codes: ``(*lead, blocks, size)`` float8.
        scales: ``(*lead, blocks)`` float32, by which the codes are multiplied.
    """

    codes: jax.Array
    scales: jax.Array


class ExpandedFloat8Codes(NamedTuple):
    """A tensor ``(*lead, n)`` of ``blocks`` blocks of ``size`` elements.

    Attributes:
        codes: ``(*lead, blocks, size)`` float8.
        scales: ``(*lead, blocks)`` float32, by which the codes are multiplied.
        exponents: ``(*lead, blocks)`` float32, multiples of 1/16; zero in a block of zeros.
        centers: ``(*lead, blocks)`` float32, geometric centres of the blocks.
    """

    codes: jax.Array
    scales: jax.Array
    exponents: jax.Array
    centers: jax.Array


@dataclasses.dataclass(frozen=True)
class Float8:
    r"""8-bit floating point, scaled so that a block's largest magnitude is the format's.

    Without expansion :math:`s = \max_i |x_i| / q_{\max}` and :math:`q_i` is :math:`x_i / s` in the
    format. With expansion, for the largest and the smallest nonzero magnitude :math:`M, \mu` of a
    block, each is first raised to a power that makes the block fill the format's range:

    .. math::

        c &= \sqrt{M \mu}, \qquad
        k = \frac{1}{16} \left\lfloor 16\,
            \frac{\log_2 (q_{\max}^2 / 2)}{\log_2 (M / \mu)} \right\rfloor \\
        y_i &= \operatorname{sign}(x_i) (|x_i| / c)^k, \qquad s = (M / c)^k / q_{\max}, \qquad
        q_i = \mathrm{fp8}(y_i / s) \\
        Q^{-1}(q_i) &= \operatorname{sign}(q_i)\, |q_i s|^{1/k}\, c

    The released code leaves zeros and constant blocks to chance. Here :math:`\mu` passes over
    zeros, :math:`k` is limited to [1/16, 16] and is 1 in a block of one magnitude, and
    :math:`y_i / s` is clipped to :math:`q_{\max}`, because JAX turns a larger number into NaN. A
    block of zeros is all zero bytes. A block that holds an infinity or a NaN becomes NaN.

    Args:
        format: ``"e4m3"`` (largest number 448) or ``"e5m2"`` (57344).
        expansion: whether blocks are expanded.
        blocks: the rule that cuts rows into blocks.
        rounding: ``"nearest"``, halves to even, or ``"stochastic"``.

    Raises:
        ValueError: if ``format`` or ``rounding`` is not one of those.

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 4.
    """

    format: str = "e4m3"
    expansion: bool = True
    blocks: Blocks = Blocks(128)
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        require_rounding(self.rounding)
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {sorted(FORMATS)}; got {self.format!r}.")

    @property
    def chunkable(self) -> bool:
        """Whether rows can be encoded by themselves: they can."""
        return True

    @property
    def signed(self) -> bool:
        """Whether it holds negative numbers: it does."""
        return True

    @property
    def Encoded(self) -> Any:
        """What it encodes to."""
        return ExpandedFloat8Codes if self.expansion else Float8Codes

    @property
    def name(self) -> str:
        """The codec in a word, as it stands in a checkpoint."""
        return codec_name(self.format + "_expanded" * self.expansion, self.blocks)

    @property
    def needs_key(self) -> bool:
        """Whether ``encode`` must be given a key."""
        return self.rounding == "stochastic"

    def for_layers(self, axis: int | None) -> "Float8":
        """Blocks lie within a row, so layers share nothing."""
        del axis
        return self

    def zeros(self, parameter: jax.Array) -> Any:
        """The encoding of zeros: all bytes zero."""
        layout = self.blocks.layout_of(parameter)
        codes = blocked_shape(parameter.shape, layout, layout.size)
        block = blocked_shape(parameter.shape, layout)
        per_block = len(self.Encoded._fields) - 1
        return self.Encoded(
            state_zeros(parameter, codes, FORMATS[self.format]),
            *(state_zeros(parameter, block, jnp.float32) for _ in range(per_block)),
        )

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Any:
        """Encodes the float32 tensor ``x``; ``key`` is used by stochastic rounding only."""
        layout = self.blocks.layout_of(x)
        xi = None if key is None else split(dither(key, x.shape), layout)
        block = split(x, layout)
        largest = jnp.max(jnp.abs(block), axis=-1)
        largest = jnp.where(jnp.isfinite(largest), largest, jnp.nan)
        if not self.expansion:
            scales = largest / self._largest
            y = block / _usable(scales)[..., None]
            return Float8Codes(self._round(y, xi, scales), scales)

        exponents, centers = self._expansion(block, largest, layout)
        ratio = _power(largest / _usable(centers), exponents)
        scales = jnp.where(centers == 0, 0, ratio / self._largest)
        y = _power(jnp.abs(block) / _usable(centers)[..., None], exponents[..., None])
        y = jnp.sign(block) * y / _usable(scales)[..., None]
        return ExpandedFloat8Codes(self._round(y, xi, scales), scales, exponents, centers)

    def decode(self, encoded: Any, shape: tuple[int, ...]) -> jax.Array:
        """The float32 tensor of ``shape`` that ``encoded`` stands for."""
        q = encoded.codes.astype(jnp.float32)
        x = q * encoded.scales[..., None]
        if self.expansion:
            exponents = jnp.where(encoded.exponents == 0, 1, encoded.exponents)[..., None]
            x = jnp.sign(q) * _power(jnp.abs(x), 1 / exponents) * encoded.centers[..., None]
        return merge(x, self.blocks.layout(shape[-1] if shape else 1), shape)

    @property
    def _largest(self) -> np.float32:
        return np.float32(jnp.finfo(FORMATS[self.format]).max)

    def _expansion(
        self, block: jax.Array, largest: jax.Array, layout: BlockLayout
    ) -> tuple[jax.Array, jax.Array]:
        """The exponents and the centres of the blocks; both zero in a block of zeros."""
        magnitude = jnp.abs(block)
        counts = magnitude > np.finfo(np.float32).tiny
        if layout.padding:
            counts = counts & in_row(layout)
        smallest = jnp.min(jnp.where(counts, magnitude, jnp.inf), axis=-1)
        empty = ~jnp.any(counts, axis=-1) & ~jnp.isnan(largest)
        smallest = jnp.where(jnp.isinf(smallest), 1, smallest)
        spread = jnp.log2(largest) - jnp.log2(smallest)
        span = np.float32(np.log2(float(self._largest) ** 2 / 2))
        k = jnp.floor(STEPS * span / jnp.where(spread > 0, spread, 1)) / STEPS
        k = jnp.where(spread > 0, jnp.clip(k, 1 / STEPS, MAX_EXPONENT), 1)
        centers = jnp.sqrt(largest) * jnp.sqrt(smallest)
        return jnp.where(empty, 0, k), jnp.where(empty, 0, centers)

    def _round(self, y: jax.Array, xi: jax.Array | None, scales: jax.Array) -> jax.Array:
        """``y`` in the format, clipped to its range."""
        y = jnp.clip(y, -self._largest, self._largest)
        y = jnp.where(jnp.isnan(scales)[..., None], 0, y)
        if xi is not None:
            info = jnp.finfo(FORMATS[self.format])
            exponent = jnp.floor(jnp.log2(jnp.maximum(jnp.abs(y), float(info.tiny))))
            step = jnp.exp2(exponent - info.nmant)
            y = jnp.clip(jnp.floor(y / step + xi) * step, -self._largest, self._largest)
        return y.astype(FORMATS[self.format])


def float8(
    format: str = "e4m3",  # noqa: A002
    *,
    expansion: bool = True,
    block: int | Blocks = 128,
    rounding: str = "nearest",
) -> Float8:
    """8-bit floating point; see :class:`Float8`.

    Args:
        format: ``"e4m3"`` or ``"e5m2"``.
        expansion: whether each block's range is expanded to the format's.
        block: the largest number of elements that share a scale, or the rule that cuts rows.
        rounding: ``"nearest"`` or ``"stochastic"``.

    Returns:
        The codec, for first and second moments.

    Raises:
        ValueError: if ``format`` or ``rounding`` does not exist.
    """
    return Float8(format, expansion, as_blocks(block), rounding)


def _usable(x: jax.Array) -> jax.Array:
    """``x``, or 1 where nothing can be divided by it."""
    return jnp.where(jnp.abs(x) > np.finfo(np.float32).tiny, x, jnp.where(jnp.isnan(x), x, 1))


def _power(base: jax.Array, exponent: jax.Array) -> jax.Array:
    """``base ** exponent`` for a base that is not negative, 0 for 0."""
    return jnp.where(base > 0, jnp.exp2(exponent * jnp.log2(base)), jnp.where(base == 0, 0, base))
