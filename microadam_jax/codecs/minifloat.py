"""Floating point of eight bits as integers, to the last bit the same on every device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIGN = 128  # the code's highest bit


class MiniFloat(NamedTuple):
    r"""A format of eight bits, of which the mantissa has :math:`m`.

    A code is a sign, an exponent field :math:`e` and a mantissa field :math:`f`, which stand for

    .. math::

        \pm 2^{e - 1 + e_{\min}} (1 + f / 2^m) \quad (e > 0), \qquad
        \pm 2^{e_{\min}} f / 2^m \quad (e = 0) .

    Codes of infinities and NaNs are neither made nor read. Devices differ in whether they convert
    to such formats, and in what becomes of subnormal numbers; all of them add integers alike.

    Attributes:
        mantissa: :math:`m`.
        lowest: :math:`e_{\min}`, the exponent of the smallest normal number.
        largest: the largest number.
    """

    mantissa: int
    lowest: int
    largest: float

    def encode(self, y: jax.Array) -> jax.Array:
        """The codes, as int32, of the nearest numbers to ``y``, halves to even.

        Args:
            y: float32, of any shape, within the largest number.
        """
        magnitude, dropped = jnp.abs(y), 23 - self.mantissa
        bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
        half = 2 ** (dropped - 1) - 1 + ((bits >> dropped) & 1)
        normal = ((bits + half) >> dropped) - self._bias
        # Of a sum with this number a float32 keeps what is a multiple of the smallest subnormal.
        anchor = np.float32(2.0 ** (self.lowest + dropped))
        sum_bits = jax.lax.bitcast_convert_type(magnitude + anchor, jnp.int32)
        subnormal = sum_bits - anchor.view(np.int32)
        code = jnp.where(magnitude < 2.0**self.lowest, subnormal, normal)
        return jnp.where(y < 0, code + SIGN, code)

    def decode(self, codes: jax.Array) -> jax.Array:
        """The float32 numbers that codes stand for."""
        codes = codes.astype(jnp.int32)
        code = codes & (SIGN - 1)
        bits = (code + self._bias) << (23 - self.mantissa)
        normal = jax.lax.bitcast_convert_type(bits, jnp.float32)
        subnormal = code.astype(jnp.float32) * 2.0 ** (self.lowest - self.mantissa)
        magnitude = jnp.where(code < 2**self.mantissa, subnormal, normal)
        return jnp.where(codes < SIGN, magnitude, -magnitude)

    def dithered(self, y: jax.Array, xi: jax.Array) -> jax.Array:
        """The neighbour below ``y`` or the one above, by numbers ``xi`` from [0, 1)."""
        bits = jax.lax.bitcast_convert_type(jnp.abs(y), jnp.int32)
        exponent = jnp.maximum((bits >> 23) - 127, self.lowest) - self.mantissa
        neighbour = jnp.floor(y * power_of_two(-exponent) + xi) * power_of_two(exponent)
        return jnp.clip(neighbour, -self.largest, self.largest)

    @property
    def _bias(self) -> int:
        """Returns the difference to a float32's exponent field."""
        return (127 + self.lowest - 1) << self.mantissa


def power_of_two(exponent: jax.Array) -> jax.Array:
    """A power of two as float32, exactly, of an int32 exponent from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


E4M3 = MiniFloat(mantissa=3, lowest=-6, largest=448.0)
E5M2 = MiniFloat(mantissa=2, lowest=-14, largest=57344.0)
