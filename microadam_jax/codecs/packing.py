"""Codes of 2 or 4 bits, several in a byte."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def pack_codes(parts: Sequence[jax.Array]) -> jax.Array:
    """Packs the equal parts of a block, two of 4-bit codes or four of 2-bit codes, into bytes.

    Args:
        parts: uint8 arrays of one shape; the first becomes the lowest bits.

    Returns:
        As many bytes as a part has codes.
    """
    bits = 8 // len(parts)
    return functools.reduce(operator.or_, (part << (i * bits) for i, part in enumerate(parts)))


def unpack_codes(packed: jax.Array, bits: int) -> jax.Array:
    """The codes ``(..., size)`` of bytes ``(..., size * bits / 8)``."""
    last = (1 << bits) - 1
    parts = [packed >> shift & last for shift in range(0, 8 - bits, bits)]
    return jnp.concatenate([*parts, packed >> (8 - bits)], axis=-1)
