"""Random numbers for stochastic rounding."""

import jax
import jax.numpy as jnp
import numpy as np


def dither(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform random numbers in [0, 1) that take no memory.

    Each number is a hash of the key and of the element's position in the whole tensor, so it is
    the same on any number of devices, and the compiler computes it where it is used.
    ``jax.random`` would write a tensor of them first, which is eight times a 4-bit state.

    Args:
        key: a typed random key.
        shape: the shape of the numbers.

    Returns:
        float32 multiples of 2^-24.
    """
    low, high = jax.random.key_data(key).astype(jnp.uint32)
    position = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(_strides(shape)):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position = position + index * np.uint32(stride % 2**32)
    bits = _mix(_mix(position ^ low) + high)
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _strides(shape: tuple[int, ...]) -> list[int]:
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return strides[::-1][: len(shape)] if shape else []


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which each bit of ``x`` flips about half of the bits.

    Two multiplications between three shifts, with the constants that Chris Wellons found to be
    the least biased of this form.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
