"""Codes scaled by the largest magnitude of each row and of each column."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from microadam_jax.blocks import Blocks, as_blocks_of, as_row, merge, split
from microadam_jax.codecs.maps import DYNAMIC4_UNSIGNED, LINEAR4_UNSIGNED, Map
from microadam_jax.codecs.rounding import Draw, dither
from microadam_jax.codecs.scaled import (
    Scaled,
    as_blocks,
    code_zeros,
    codec_name,
    decode_numbers,
    encode_scaled,
    magnitudes,
    require_rounding,
)
from microadam_jax.state_arrays import moment_zeros


class RankOneCodes(NamedTuple):
    """A tensor ``(*lead, n)`` as a matrix whose columns are its last axis.

    Attributes:
        codes: ``(*lead, blocks * size / 2)`` uint8, two codes in a byte.
        rows: ``(*lead, 1)`` float32, the largest magnitude of each row; of a vector, that of each
            of its blocks.
        columns: ``(1, ..., n)`` float32, the largest magnitude of each column; of stacked layers,
            in each layer. A vector has none: one zero.
    """

    codes: jax.Array
    rows: jax.Array
    columns: jax.Array


@dataclasses.dataclass(frozen=True)
class RankOne:
    r"""Quantizes elements over the smaller of their row's and their column's largest magnitude.

    With the numbers :math:`v_c` of a map,

    .. math::

        M_{ij} = \min\bigl(\max_l |x_{il}|, \max_l |x_{lj}|\bigr), \qquad
        Q(x_{ij}) = \arg\min_c |x_{ij} / M_{ij} - v_c|, \qquad Q^{-1}(c) = M_{ij}\,v_c .

    A tensor of more than two axes is a matrix whose columns are its last axis; layers that are
    stacked keep columns of their own. Vectors are scaled by blocks. Rows and columns hold the
    whole tensor's maxima, so a step over a sharded tensor reduces them over devices.

    Args:
        map: the numbers.
        blocks: the rule that cuts rows into blocks whose codes are packed together, and vectors
            into blocks with a scale.
        rounding: ``"nearest"`` or ``"stochastic"``.
        layer_axis: the axis of stacked layers; :func:`quantize_state` finds it.

    Raises:
        ValueError: if ``rounding`` is not one of those.

    Reference: Li et al., 4-bit optimizers (arXiv 2309.01507), Section 4.2.
    """

    Encoded = RankOneCodes
    map: Map
    blocks: Blocks
    rounding: str = "nearest"
    layer_axis: int | None = None

    def __post_init__(self) -> None:
        require_rounding(self.rounding)

    @property
    def name(self) -> str:
        """Returns the codec in a word, as it stands in a checkpoint."""
        return codec_name(f"rank1_{self.map.name}", self.blocks)

    @property
    def signed(self) -> bool:
        """Returns True if it holds negative numbers."""
        return self.map.signed

    @property
    def needs_key(self) -> bool:
        """Returns True if ``encode`` must be given a key."""
        return self.rounding == "stochastic"

    def for_layers(self, axis: int | None) -> "RankOne":
        """Returns the codec for layers that are stacked along ``axis``."""
        return dataclasses.replace(self, layer_axis=axis)

    def zeros(self, parameter: jax.Array) -> RankOneCodes:
        """Returns the encoding of zeros: all bytes zero.

        Raises:
            ValueError: if the sharding of ``parameter`` does not divide its blocks.
        """
        codes = code_zeros(parameter, self.map, self.blocks)
        if self._is_vector(parameter.shape):
            scales = self._by_block.zeros(parameter).scales
            return RankOneCodes(
                codes, scales, moment_zeros(parameter, (1,) * parameter.ndim, jnp.float32)
            )
        shape = parameter.shape
        columns = tuple(n if self._keeps_column(i, len(shape)) else 1 for i, n in enumerate(shape))
        return RankOneCodes(
            codes,
            moment_zeros(parameter, (*shape[:-1], 1), jnp.float32),
            moment_zeros(parameter, columns, jnp.float32),
        )

    def encode(self, x: jax.Array, key: jax.Array | Draw | None = None) -> RankOneCodes:
        """Encodes the float32 tensor ``x``; ``key`` is used by stochastic rounding only."""
        codes, rows, columns = self.encode_rows(x, key, self.maxima(x))
        return RankOneCodes(as_row(codes), rows, columns)

    def maxima(self, x: jax.Array, runs: tuple[int, ...] = ()) -> jax.Array:
        """Returns the largest magnitudes of the columns, which all rows share.

        Args:
            x: some rows of a tensor, or all.
            runs: into how many runs of rows to cut each axis but the last: the result has a part
                for each of them, and the maxima of all are those of the largest parts.
        """
        if self._is_vector(x.shape):
            return jnp.zeros((1,) * x.ndim, jnp.float32)
        columns = magnitudes(x)
        for axis, rows in enumerate(x.shape[:-1]):
            if self._keeps_column(axis, x.ndim):
                continue
            count = runs[axis] if runs else 1
            pieces = (*columns.shape[:axis], count, rows // count, *x.shape[axis + 1 :])
            columns = jnp.max(columns.reshape(pieces), axis=axis + 1, initial=0)
        return columns

    def encode_rows(
        self, x: jax.Array, key: jax.Array | Draw | None, columns: jax.Array
    ) -> RankOneCodes:
        """Encodes some rows of a tensor whose columns have the largest magnitudes ``columns``.

        Codes keep the axis of blocks.
        """
        if self._is_vector(x.shape):
            return RankOneCodes(*self._by_block.encode_rows(x, key), columns)
        xi = None if key is None else dither(key, x.shape)
        rows = jnp.max(magnitudes(x), axis=-1, keepdims=True, initial=0)
        layout = self.blocks.layout_of(x)
        codes = encode_scaled(
            self.map,
            split(x, layout),
            split(jnp.minimum(rows, columns), layout),
            None if xi is None else split(xi, layout),
        )
        return RankOneCodes(codes, rows, columns)

    def decode(self, encoded: RankOneCodes, shape: tuple[int, ...]) -> jax.Array:
        """Returns the float32 tensor of ``shape`` that ``encoded`` stands for."""
        codes, rows, columns = encoded
        if self._is_vector(shape):
            return self._by_block.decode(self._by_block.Encoded(codes, rows), shape)
        layout = self.blocks.layout(shape[-1])
        numbers = merge(decode_numbers(self.map, as_blocks_of(codes, layout.count)), layout, shape)
        scale = jnp.minimum(rows, columns)
        return numbers * jnp.where(jnp.isfinite(scale), scale, jnp.nan)

    @property
    def _by_block(self) -> Scaled:
        return Scaled(self.map, self.blocks, self.rounding)

    def _is_vector(self, shape: tuple[int, ...]) -> bool:
        return len(shape) - (self.layer_axis is not None) < 2

    def _keeps_column(self, axis: int, ndim: int) -> bool:
        return axis in (self.layer_axis, ndim - 1)


def rank1_linear4(block: int | Blocks = 128, *, rounding: str = "nearest") -> RankOne:
    """Returns 4 bits from 1/16 to 1, scaled by rows and columns; see :class:`RankOne`.

    Args:
        block: the largest number of elements of a vector that share a scale, or the rule that
            cuts rows.
        rounding: ``"nearest"`` or ``"stochastic"``.

    Returns:
        The codec, for second moments.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``block`` is not positive and even, or ``rounding`` is not one of those.
    """
    return RankOne(LINEAR4_UNSIGNED, as_blocks(block), rounding)


def rank1_dynamic4(block: int | Blocks = 128, *, rounding: str = "nearest") -> RankOne:
    """Returns 4 bits on the unsigned dynamic map without zero, scaled by rows and columns.

    Args:
        block: the largest number of elements of a vector that share a scale, or the rule that
            cuts rows.
        rounding: ``"nearest"`` or ``"stochastic"``.

    Returns:
        The codec, for second moments.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``block`` is not positive and even, or ``rounding`` is not one of those.
    """
    return RankOne(DYNAMIC4_UNSIGNED, as_blocks(block), rounding)
