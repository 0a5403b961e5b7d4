"""8-bit floating point for activations and their gradients: one scale for a few neighbours."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.blocks import BlockLayout, merge, split
from microadam_jax.codecs.float8 import FORMATS
from microadam_jax.codecs.minifloat import MiniFloat
from microadam_jax.codecs.rounding import bfloat16_above, dither
from microadam_jax.codecs.scaled import magnitudes, require_rounding

SMALLEST_SCALE = np.finfo(np.float32).tiny  # devices flush what is smaller to zero


class Fp8ActivationCodes(NamedTuple):
    """Holds an array of shape ``(*lead, n)`` in 8-bit floating point.

    Attributes:
        codes: ``(*lead, n)`` uint8, the bits of the 8-bit numbers. They are no float8 array,
            because ``jax.checkpoint`` rounds those that it saves, and makes NaN of each E4M3
            number above 240.
        scales: ``(*lead, ceil(n / group))`` bfloat16, or a float32 scalar for the whole tensor.
    """

    codes: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class Fp8Activation:
    r"""Quantizes to 8-bit floating point with one scale for a group of the last axis.

    With :math:`M` the largest magnitude of a group and :math:`q_{\max}` the format's largest
    number,

    .. math::

        s = M / q_{\max}, \qquad q_i = \mathrm{fp8}(x_i / s), \qquad Q^{-1}(q_i) = s\, q_i .

    The scale of a group is rounded up to bfloat16, so that no element exceeds the format; the
    released code rounds it to nearest and clips. It also adds :math:`10^{-10}` to :math:`M`,
    which would make zeros of a group of small numbers, and is left out here.

    A group of zeros is exactly zero. Elements below :math:`2^{-10} s` (E4M3) become zero, and
    :math:`s` is at least :math:`2^{-126}`. A group that holds an infinity or a NaN becomes NaN.

    Args:
        format: ``"e4m3"`` (largest number 448) or ``"e5m2"`` (57344).
        group: elements that share a scale, the last group of a row may have fewer; None for one
            float32 scale of the whole tensor.
        rounding: ``"nearest"``, halves to even, or ``"stochastic"``, without bias.

    Raises:
        ValueError: if ``format`` or ``rounding`` is not one of those, or ``group`` is not a
            positive integer or None.

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5.
    """

    signed = True
    format: str = "e4m3"
    group: int | None = 16
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        require_rounding(self.rounding)
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {sorted(FORMATS)}; got {self.format!r}.")
        if self.group is not None and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(
                "group must be a positive integer, or None for one scale of the whole tensor; "
                f"got {self.group!r}."
            )

    @property
    def name(self) -> str:
        """Returns the format in a word."""
        return f"{self.format}_{'tensor' if self.group is None else f'g{self.group}'}"

    @property
    def needs_key(self) -> bool:
        """Returns True if ``encode`` must be given a key."""
        return self.rounding == "stochastic"

    @property
    def number(self) -> MiniFloat:
        """Returns the 8-bit format."""
        return FORMATS[self.format]

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> Fp8ActivationCodes:
        """Quantizes an array.

        Args:
            x: floating point of any shape; the arithmetic is float32.
            key: a typed random key, for stochastic rounding only.

        Returns:
            The codes and the scales.
        """
        x = x.astype(jnp.float32)
        xi = None if key is None else dither(key, x.shape)
        if self.group is None:
            # The largest of the groups' maxima, which the producer's loop can find on its way.
            scale = self._scale(jnp.max(magnitudes(x), initial=0))
            return Fp8ActivationCodes(self._codes(x, scale, xi), scale)
        layout = self._layout(x.shape)
        groups = split(x, layout)
        scales = bfloat16_above(self._scale(jnp.max(magnitudes(groups), axis=-1, initial=0)))
        scales = scales.astype(jnp.bfloat16)
        xi = None if xi is None else split(xi, layout)
        codes = merge(self._codes(groups, _of_each(scales, groups), xi), layout, x.shape)
        return Fp8ActivationCodes(codes, scales)

    def decode(self, encoded: Fp8ActivationCodes, shape: tuple[int, ...]) -> jax.Array:
        """Returns the float32 array of ``shape`` that the codes stand for."""
        codes, scales = encoded
        if self.group is None:
            return self.number.decode(codes) * scales
        layout = self._layout(shape)
        groups = split(codes, layout)
        return merge(self.number.decode(groups) * _of_each(scales, groups), layout, shape)

    def _layout(self, shape: tuple[int, ...]) -> BlockLayout:
        row = shape[-1] if shape else 1
        size = max(1, min(self.group or row, row))
        return BlockLayout(row, size, -(-row // size))

    def _scale(self, largest: jax.Array) -> jax.Array:
        scale = jnp.maximum(largest / self.number.largest, SMALLEST_SCALE)
        return jnp.where(jnp.isfinite(largest), jnp.where(largest == 0, 0, scale), jnp.nan)

    def _codes(self, x: jax.Array, scale: jax.Array, xi: jax.Array | None) -> jax.Array:
        # Of a scale of zero all elements are zero; with NaN for a scale codes mean nothing.
        y = x / jnp.where(scale > 0, scale, 1)
        y = jnp.clip(y, -self.number.largest, self.number.largest)
        y = y if xi is None else self.number.dithered(y, xi)
        return self.number.encode(y).astype(jnp.uint8)


def _of_each(scales: jax.Array, groups: jax.Array) -> jax.Array:
    """The float32 scale of each element. TPUs keep what is broadcast, in half the bytes here."""
    return jnp.broadcast_to(scales[..., None], groups.shape).astype(jnp.float32)


def fp8_activation(
    format: str = "e4m3",  # noqa: A002
    *,
    group: int | None = 16,
    rounding: str = "nearest",
) -> Fp8Activation:
    """Returns 8-bit floating point for activations; see :class:`Fp8Activation`.

    Args:
        format: ``"e4m3"`` or ``"e5m2"``.
        group: elements of the last axis that share a bfloat16 scale; None for one float32 scale
            of the whole tensor.
        rounding: ``"nearest"`` or ``"stochastic"``.

    Returns:
        The codec.

    Raises:
        ValueError: if ``format`` or ``rounding`` is not one of those, or ``group`` is not a
            positive integer or None.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.layers import fp8_activation
        >>> codec = fp8_activation()
        >>> x = jnp.array([448.0, -3.3, 0.0, 1e-3])
        >>> codes, scales = codec.encode(x)
        >>> print(codes, scales)
        [126 197   0   1] [1]
        >>> print(codec.decode((codes, scales), x.shape))
        [ 4.480000e+02 -3.250000e+00  0.000000e+00  1.953125e-03]

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5.
    """
    return Fp8Activation(format, group, rounding)
