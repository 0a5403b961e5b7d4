"""Two ways to round a second moment for the sake of Adam's denominator, to be tried in training.

They are no optimizers of the library: :mod:`benchmarks.variants` trains with them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from microadam_jax.blocks import Blocks, split
from microadam_jax.codecs.maps import DYNAMIC4_UNSIGNED, TableMap, dynamic_numbers
from microadam_jax.codecs.rounding import Draw
from microadam_jax.codecs.scaled import Scaled, ScaledCodes, decode_numbers

WITH_ZERO = TableMap("dynamic4_unsigned_with_zero", tuple(dynamic_numbers(4, signed=False)))


@dataclasses.dataclass(frozen=True)
class InverseRoot(Scaled):
    r"""Rounds a second moment so that Adam's factor is right on average (ZIP-SR).

    With :math:`h(v) = 1 / (\sqrt v + \epsilon)`, a number between neighbours
    :math:`a \le v \le b` becomes :math:`b` with the probability

    .. math::

        \frac{h(a) - h(v)}{h(a) - h(b)} .

    From zero that is nearly one for all that is well above :math:`\epsilon^2`, so that the map
    may hold zero. The published :math:`h` corrects the bias of :math:`v`, which comes to a
    smaller :math:`\epsilon` in the first thousand steps.

    Args:
        eps: :math:`\epsilon`, as the optimizer's.

    Reference: Li et al., Rounding in Preconditioner Space (2026), ZIP-SR.
    """

    eps: float = 1e-8

    def codes_of(self, block: jax.Array, statistics: tuple, xi: jax.Array | None) -> jax.Array:
        """Returns the codes of blocks with their scales, as integers."""
        assert xi is not None, "ZIP-SR rounds stochastically"
        (scale,) = statistics
        factor = self._factor(block)
        codes = jnp.zeros(block.shape, jnp.int32)
        for below, above in zip(self.map.values[:-1], self.map.values[1:], strict=True):
            high, low = self._factor(below * scale), self._factor(above * scale)
            codes += factor < high - xi * (high - low)
        return jnp.where(scale > 0, codes, 0)

    def _factor(self, v: jax.Array) -> jax.Array:
        return 1 / (jnp.sqrt(v) + self.eps)


@dataclasses.dataclass(frozen=True)
class Projected(Scaled):
    r"""Rounds to nearest and corrects the scale of each block (ZE-EDEN).

    .. math::

        s' = s\, \frac{\lVert x \rVert^2}{\langle x, Q(x) \rangle}, \qquad
        \text{so that } \langle x, Q'(x) \rangle = \lVert x \rVert^2 .

    Reference: Li et al., Rounding in Preconditioner Space (2026), ZE-EDEN.
    """

    def encode_rows(self, x: jax.Array, key: jax.Array | Draw | None) -> ScaledCodes:
        """Encodes some rows of a tensor; codes keep the axis of blocks."""
        codes, scales = super().encode_rows(x, key)
        block = split(x, self.blocks.layout_of(x))
        relative = block / jnp.where(scales > 0, scales, 1)[..., None]
        rounded = decode_numbers(self.map, codes)
        product = jnp.sum(relative * rounded, -1)
        square = jnp.sum(jnp.square(relative), -1)
        return ScaledCodes(codes, scales * jnp.where(product > 0, square / product, 1))


def zip_sr(eps: float = 1e-8) -> InverseRoot:
    """Returns ZIP-SR's 4 bits, with blocks of 128 and a code for zero."""
    return InverseRoot(WITH_ZERO, Blocks(128), "stochastic", eps=eps)


def ze_eden() -> Projected:
    """Returns ZE-EDEN's 4 bits, with blocks of 128 and none for zero."""
    return Projected(DYNAMIC4_UNSIGNED, Blocks(128))
