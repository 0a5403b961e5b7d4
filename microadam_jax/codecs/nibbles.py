"""Two 4-bit codes in a byte."""

import jax
import jax.numpy as jnp


def pack_nibbles(low: jax.Array, high: jax.Array) -> jax.Array:
    """Packs codes below 16, the first and the second half of a block, into as many bytes."""
    return low | (high << 4)


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """The codes ``(..., size)`` of bytes ``(..., size / 2)``."""
    return jnp.concatenate([packed & 0xF, packed >> 4], axis=-1)
