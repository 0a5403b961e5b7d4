"""A float32 number in the two bytes of a bfloat16 and one or two more."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.codecs.rounding import Draw, dither
from microadam_jax.state_arrays import state_zeros

_LARGEST = np.int32(0x7F7FFFFF)  # the bits of the largest finite float32


class SplitCodes(NamedTuple):
    """``codes``: the parameter's shape, int8 or int16."""

    codes: jax.Array


@dataclasses.dataclass(frozen=True)
class Split:
    r"""Keeps what a bfloat16 lacks of a float32, as the difference of their bits.

    With the bits :math:`b(x)` of a float32, read as an integer, the bfloat16 :math:`q` has the
    bits :math:`\lfloor (b(x) + 2^{15}) / 2^{16} \rfloor` and the code is

    .. math::

        c = \bigl(b(x) - 2^{16} b(q)\bigr) / 2^{16 - n}

    in :math:`n` bits, between :math:`-2^{n-1}` and :math:`2^{n-1} - 1`. There is no scale that
    could underflow: a step of :math:`c` is :math:`2^{-n}` of a unit in the last place of
    :math:`q`. With 16 bits every float32 is restored exactly. With 8 bits it is first rounded to
    24, stochastically: to nearest, a change of less than :math:`2^{-17}` would be lost for ever.

    It differs from the split of FlashOptim in that its 16 bits restore all numbers and not 99.9 %
    of them, and in the stochastic rounding of its 8 bits.

    Args:
        bits: 8 or 16.

    Raises:
        ValueError: if ``bits`` is neither.

    Reference: FlashOptim (arXiv 2602.23349), the split of master weights.
    """

    Encoded = SplitCodes
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (8, 16):
            raise ValueError(f"Split.bits must be 8 or 16; got {self.bits!r}.")

    @property
    def name(self) -> str:
        """The dtype of the codes."""
        return f"int{self.bits}"

    @property
    def needs_key(self) -> bool:
        """True if a float32 is rounded before it is split."""
        return self.bits == 8

    def zeros(self, parameter: jax.Array) -> SplitCodes:
        """Returns the codes of a parameter that is what its bfloat16 says."""
        return SplitCodes(state_zeros(parameter, parameter.shape, self.name))

    def split(self, x: jax.Array, key: jax.Array | Draw | None) -> tuple[jax.Array, SplitCodes]:
        """Splits float32 numbers.

        Args:
            x: float32.
            key: of the stochastic rounding; not needed for 16 bits.

        Returns:
            The bfloat16 and the codes.
        """
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        if self.bits == 8:
            assert key is not None
            # The bits of a magnitude grow with it, so that a sum of bits rounds away from zero.
            below = jnp.floor(dither(key, x.shape) * 256).astype(jnp.uint32)
            bits = (bits + below) & ~np.uint32(0xFF)
        high = (bits + np.uint32(0x8000)) >> 16
        rest = jax.lax.bitcast_convert_type(bits - (high << 16), jnp.int32) >> (16 - self.bits)
        near = jax.lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16)
        # Rounded up, the bits of a NaN could become those of a number.
        finite = jnp.isfinite(x)
        near = jnp.where(finite, near, x.astype(jnp.bfloat16))
        return near, SplitCodes(jnp.where(finite, rest, 0).astype(self.name))

    def join(self, near: jax.Array, encoded: SplitCodes) -> jax.Array:
        """Returns the float32 numbers that were split.

        Args:
            near: the bfloat16. If it was changed since, the codes count from what it is now.
            encoded: the codes.
        """
        wide = near.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
        sign = bits & np.uint32(0x80000000)
        magnitude = jax.lax.bitcast_convert_type(bits ^ sign, jnp.int32)
        rest = encoded.codes.astype(jnp.int32) << (16 - self.bits)
        # A parameter that was set to zero since has nothing that a code could be taken from.
        magnitude = jnp.clip(magnitude + rest, 0, _LARGEST)
        whole = sign | jax.lax.bitcast_convert_type(magnitude, jnp.uint32)
        return jnp.where(jnp.isfinite(wide), jax.lax.bitcast_convert_type(whole, jnp.float32), wide)
