"""NF4 with double quantization: the format of frozen weights, 4.127 bits each."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.arguments import require_positive
from microadam_jax.blocks import Blocks, as_blocks_of, as_row, blocked_shape, split
from microadam_jax.blocks import merge as merge_blocks
from microadam_jax.codecs.maps import NF4, Dynamic8
from microadam_jax.codecs.packing import pack_codes
from microadam_jax.codecs.scaled import as_blocks, magnitudes, unpacked
from microadam_jax.sharding import replicated

SCALES = Dynamic8()  # the 8-bit codebook of the scales


class Nf4Codes(NamedTuple):
    """Holds a tensor ``(*lead, n)`` of ``blocks`` blocks of ``size`` elements in each row.

    Attributes:
        codes: ``(*lead, blocks * size / 2)`` uint8: element ``j`` of a block in the low half of
            its byte ``j``, element ``j + size / 2`` in the high half.
        scales: ``(*lead, blocks)`` uint8, codes of the blocks' scales.
        groups: ``(ceil(total blocks / group),)`` float32, the absmax of each group of scales.
        mean: float32 scalar, the mean of the tensor's scales.
    """

    codes: jax.Array
    scales: jax.Array
    groups: jax.Array
    mean: jax.Array


@dataclasses.dataclass(frozen=True)
class Nf4:
    r"""Quantizes weights to NF4, and the scales of their blocks to 8 bits.

    With the levels :math:`v_c` of NF4, the absmax :math:`s_b = \max_{i \in b} |w_i|` of each
    block, their mean :math:`\bar s`, the levels :math:`u_k` of the 8-bit dynamic exponent codebook
    and :math:`S_g = \max_{b \in g} |s_b - \bar s|` over groups :math:`g` of blocks,

    .. math::

        c_i = \arg\min_c |w_i / s_b - v_c|, \qquad
        k_b = \arg\min_k |(s_b - \bar s) / S_g - u_k|, \qquad
        \hat w_i = v_{c_i} (\bar s + S_g u_{k_b}) .

    Halves go to the lower code. A zero comes back as exactly zero. A NaN or an infinity anywhere
    makes the whole tensor NaN. A weight takes :math:`4 + 8/64 + 32/(64 \cdot 256) = 4.127` bits.

    Blocks are contiguous segments of the last axis, groups are contiguous in the row-major order
    of all blocks. Where the row is a multiple of the block these are the published segments, but
    of the array as it is given: released code quantizes ``(out, in)`` weights, and a JAX kernel is
    ``(in, out)``. Stacked layers are quantized one by one with ``jax.vmap(codec.encode)``.

    Args:
        blocks: the rule that cuts rows into blocks.
        group: number of blocks whose scales share a second scale.

    Raises:
        ValueError: if ``group`` is not a positive integer.

    Reference: Dettmers et al., QLoRA (arXiv 2305.14314), Section 3 and Appendix E. The paper
    stores scales in an 8-bit floating point format; this is the codebook of the released code.
    """

    signed = True
    needs_key = False
    blocks: Blocks
    group: int = 256

    def __post_init__(self) -> None:
        require_positive("group", self.group)

    @property
    def name(self) -> str:
        """Returns the format in a word."""
        return f"nf4_b{self.blocks.size}_g{self.group}"

    @functools.partial(jax.jit, static_argnums=0)
    def encode(self, x: jax.Array, key: None = None) -> Nf4Codes:
        """Quantizes an array.

        Args:
            x: ``(*lead, n)`` of any float dtype.
            key: not used.

        Returns:
            The codes, the codes of the scales, and the scales of these.
        """
        del key
        block = split(x.astype(jnp.float32), self.blocks.layout_of(x))
        scale = jnp.max(magnitudes(block), axis=-1)
        # 0 has a code of its own, so a block of zeros may have any scale once that is quantized.
        divisor = jnp.where(scale > np.finfo(np.float32).tiny, scale, 1)[..., None]
        # Halves apart, as in `scaled.packed`: CPUs are slow at coding the whole and cutting it.
        low, high = (
            NF4.encode(half / divisor, 0.5).astype(jnp.uint8) for half in jnp.split(block, 2, -1)
        )
        scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
        mean = jnp.mean(scale) if scale.size else jnp.float32(0)
        # Of numbers that are divided before, the sum is finite where they are.
        mean = jnp.where(jnp.isinf(mean), jnp.sum(scale / max(scale.size, 1)), mean)
        grouped = self._grouped(scale - mean)
        largest = jnp.max(jnp.abs(grouped), axis=-1)
        largest = jnp.where(jnp.isfinite(mean), largest, jnp.nan)
        y = grouped / jnp.where(largest > 0, largest, 1)[:, None]
        scale_codes = SCALES.encode(y, 0.5).astype(jnp.uint8).reshape(-1)[: scale.size]
        return Nf4Codes(
            as_row(pack_codes([low, high])), scale_codes.reshape(scale.shape), largest, mean
        )

    @functools.partial(jax.jit, static_argnums=(0, 2, 3))
    def decode(
        self, encoded: Nf4Codes, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32
    ) -> jax.Array:
        """Returns the array that codes stand for.

        Args:
            encoded: what :meth:`encode` returned.
            shape: the shape of the array that was quantized.
            dtype: of the result; products are float32.
        """
        layout = self.blocks.of_shape(shape)
        codes = unpacked(NF4, as_blocks_of(encoded.codes, layout.count))
        values = NF4.decode(codes) * self.decode_scales(encoded)[..., None]
        return merge_blocks(values.astype(dtype), layout, shape)

    @functools.partial(jax.jit, static_argnums=0)
    def decode_scales(self, encoded: Nf4Codes) -> jax.Array:
        """Returns the float32 scales ``(*lead, blocks)`` of the blocks."""
        levels = self._grouped(SCALES.decode(encoded.scales))
        flat = (encoded.mean + encoded.groups[:, None] * levels).reshape(-1)
        return flat[: encoded.scales.size].reshape(encoded.scales.shape)

    def zeros(self, like: jax.Array | jax.ShapeDtypeStruct) -> Nf4Codes:
        """Returns arrays of the shapes and dtypes of the codes of ``like``.

        For ``jax.eval_shape``: what a tensor will take, without the tensor.
        """
        layout = self.blocks.layout_of(like)
        scales = blocked_shape(like.shape, layout)
        return Nf4Codes(
            jnp.full((*like.shape[:-1], layout.count * layout.size // 2), 0x77, jnp.uint8),
            jnp.full(scales, 127, jnp.uint8),
            jnp.zeros(math.ceil(math.prod(scales) / self.group), jnp.float32),
            jnp.float32(0),
        )

    def _grouped(self, scales: jax.Array) -> jax.Array:
        """Cuts arrays of one number for each block into ``(groups, group)``, padded with zeros."""
        # Groups know no axes; scales are few.
        flat = replicated(scales).reshape(-1)
        return jnp.pad(flat, (0, -flat.size % self.group)).reshape(-1, self.group)


def nf4(block: int | Blocks = Blocks(64, shards=1), *, group: int = 256) -> Nf4:
    """Returns NF4 with double quantization, the format of QLoRA's frozen weights.

    Args:
        block: the largest number of elements that share a scale, or the rule that cuts rows. With
            an integer the number of blocks is made divisible by 8, if need be with smaller blocks:
            see :class:`microadam_jax.Blocks`. The default keeps the published 64.
        group: number of blocks whose scales share a second scale.

    Returns:
        The codec.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`.
        ValueError: if ``block`` is not positive and even, or ``group`` is not a positive integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.codecs import nf4
        >>> codec = nf4()
        >>> x = jnp.array([1.0, -0.7, 0.5, 0.0])
        >>> print([f"{y:.4f}" for y in codec.decode(codec.encode(x), x.shape)])
        ['1.0000', '-0.6962', '0.4407', '0.0000']

    Reference: Dettmers et al., QLoRA (arXiv 2305.14314), Section 3.
    """
    return Nf4(as_blocks(block), group)
