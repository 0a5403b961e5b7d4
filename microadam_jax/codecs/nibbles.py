"""Two 4-bit codes in a byte."""

import jax
import jax.numpy as jnp


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """Packs codes ``(..., size)`` below 16 into bytes ``(..., size / 2)``, first half low."""
    low, high = jnp.split(codes, 2, axis=-1)
    return low | (high << 4)


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """The inverse of :func:`pack_nibbles`."""
    return jnp.concatenate([packed & 0xF, packed >> 4], axis=-1)
