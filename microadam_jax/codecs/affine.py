"""MicroAdam's 4-bit codec: sixteen levels between the least and greatest value of a bucket."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from microadam_jax.blocks import BlockLayout, Blocks, blocked_shape, in_row, merge, split
from microadam_jax.codecs.rounding import Draw, bfloat16_above, bfloat16_below, dither
from microadam_jax.codecs.row_by_row import RowByRow
from microadam_jax.codecs.scaled import as_blocks, codec_name, require_rounding
from microadam_jax.state_arrays import state_zeros
from pallas_kernels.topk_compress import decode, encode, extremes


class AffineCodes(NamedTuple):
    """Holds a tensor ``(*lead, n)`` of ``buckets`` buckets of ``size`` elements in four bits.

    Attributes:
        codes: ``(*lead, buckets, size / 2)`` uint8. Element ``j`` of a bucket lies in the low
            half of byte ``j``, element ``j + size / 2`` in the high half.
        low: ``(*lead, buckets)``, the value of level 0.
        high: ``(*lead, buckets)``, the value of level 15.
    """

    codes: jax.Array
    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class Affine4(RowByRow):
    r"""Quantizes to four bits per element, affine between a bucket's minimum and maximum.

    For a bucket with minimum :math:`\delta` and maximum :math:`\Delta`, with
    :math:`u = (\Delta - \delta) / 15`,

    .. math::

        Q(x) = \min(15, \lfloor (x - \delta) / u + \xi \rfloor), \qquad
        Q^{-1}(q) = q\,u + \delta,

    where :math:`\xi = 1/2` rounds to nearest and :math:`\xi \sim U[0, 1)` rounds
    stochastically, without bias. A constant bucket (:math:`u = 0`) decodes to its constant,
    so that all-zero buckets stay exactly zero. A bucket that holds an infinity or a NaN, or
    whose range overflows float32, becomes NaN.

    Args:
        buckets: the rule that cuts rows into buckets; share it with the Top-K blocks so that
            one pass over a block does both.
        rounding: ``"nearest"`` or ``"stochastic"``.
        statistics: ``"float32"``, or ``"bfloat16"`` with the minimum rounded down and the
            maximum up, so that no element leaves the sixteen levels.

    Raises:
        ValueError: if ``rounding`` or ``statistics`` is not one of those.

    Reference: MicroAdam (arXiv 2405.15593), Algorithm 1, lines 8 and 9, and its quantizer lemma.
    """

    Encoded = AffineCodes
    signed = True
    buckets: Blocks = Blocks()
    rounding: str = "nearest"
    statistics: str = "float32"

    def __post_init__(self) -> None:
        require_rounding(self.rounding)
        if self.statistics not in ("float32", "bfloat16"):
            raise ValueError(
                f"Affine4.statistics must be 'float32' or 'bfloat16'; got {self.statistics!r}."
            )

    @property
    def name(self) -> str:
        """Names the codec in a word, as it stands in a checkpoint."""
        statistics = "" if self.statistics == "float32" else f"_{self.statistics}"
        return codec_name(f"affine4{statistics}", self.buckets)

    @property
    def needs_key(self) -> bool:
        """Returns True if ``encode`` must be given a key."""
        return self.rounding == "stochastic"

    def zeros(self, parameter: jax.Array) -> AffineCodes:
        """Returns the encoding of zeros: every level 0, every bucket from 0 to 0.

        Raises:
            ValueError: if the sharding of ``parameter`` does not divide its buckets.
        """
        layout = self.buckets.layout_of(parameter)
        codes = blocked_shape(parameter.shape, layout, layout.size // 2)
        bucket = blocked_shape(parameter.shape, layout)
        return AffineCodes(
            codes=state_zeros(parameter, codes, jnp.uint8),
            low=state_zeros(parameter, bucket, self.statistics),
            high=state_zeros(parameter, bucket, self.statistics),
        )

    def encode(self, x: jax.Array, key: jax.Array | Draw | None = None) -> AffineCodes:
        """Encodes the float32 tensor ``x``; ``key`` is used by stochastic rounding only."""
        layout = self.buckets.layout_of(x)
        bucket = _repeat_into_padding(split(x, layout), layout)
        low, high = extremes(bucket)
        if self.statistics == "bfloat16":
            low, high = bfloat16_below(low), bfloat16_above(high)
        xi = 0.5 if key is None else dither(key, bucket.shape)
        codes, low, high = encode(bucket, low, high, xi)
        return AffineCodes(codes, low.astype(self.statistics), high.astype(self.statistics))

    def decode(self, encoded: AffineCodes, shape: tuple[int, ...]) -> jax.Array:
        """Returns the float32 tensor of ``shape`` that ``encoded`` stands for."""
        return merge(decode(*encoded), self.buckets.of_shape(shape), shape)


def affine4(
    bucket: int | Blocks = 256, rounding: str = "nearest", statistics: str = "float32"
) -> Affine4:
    """Returns MicroAdam's 4-bit codec; see :class:`Affine4`.

    Args:
        bucket: the largest number of elements that share a minimum and a maximum, or the rule
            that cuts rows into buckets.
        rounding: ``"nearest"`` or ``"stochastic"``.
        statistics: ``"float32"`` or ``"bfloat16"``.

    Returns:
        The codec.

    Raises:
        TypeError: if ``bucket`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``bucket`` is not positive and even, or ``rounding`` or ``statistics`` is not
            one of those.
    """
    return Affine4(as_blocks(bucket), rounding, statistics)


def _repeat_into_padding(bucket: jax.Array, layout: BlockLayout) -> jax.Array:
    """Fills the padding with the bucket's first element, which leaves its extremes alone."""
    if layout.padding == 0:
        return bucket
    return jnp.where(in_row(layout), bucket, bucket[..., :1])
