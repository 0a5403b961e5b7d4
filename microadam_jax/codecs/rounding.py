"""Random numbers for stochastic rounding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.execution import scope
from pallas_kernels.blockwise_codec.reference import uniform
from pallas_kernels.key_words import key_words


def key_of_layer(key: jax.Array | None) -> jax.Array | None:
    """Returns a key of the layer's own, for kernels, which count positions in the leaf they see."""
    index = scope().layer
    return key if key is None or index is None else jax.random.fold_in(key, index)


class Rows(NamedTuple):
    """Locates the rows of a chunk in its leaf: along each axis, segments at equal distances.

    Attributes:
        sizes: the leaf's sizes along all axes but the last; none if the chunk is the leaf.
        starts: int32 scalars, where the first run begins.
        lengths: how many rows a run has.
        steps: the distances from run to run.
        holds: boolean scalar, always true, which the compiler cannot know, where what is computed
            of the chunk may be written before it is read; see ``leaf_loops.written``.
    """

    sizes: tuple[int, ...] = ()
    starts: tuple[jax.Array | int, ...] = ()
    lengths: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    holds: jax.Array | None = None


class Draw(NamedTuple):
    """Draws the random numbers of a chunk.

    Attributes:
        key: the leaf's typed random key.
        rows: the rows that the chunk holds.
    """

    key: jax.Array
    rows: Rows = Rows()


def dither(draw: jax.Array | Draw, shape: tuple[int, ...]) -> jax.Array:
    """Uniform random numbers in [0, 1) that take no memory.

    Each number is a hash of the key and of the element's position in the whole leaf, so it is
    the same on any number of devices and in chunks of any size, and the compiler computes it
    where it is used. ``jax.random`` would write a tensor of them first, which is eight times a
    4-bit state. The generators ``threefry2x32`` and ``rbg`` give the same numbers; see
    :func:`~pallas_kernels.key_words.key_words`.

    Args:
        draw: a typed random key of any generator, or the key and the rows of a chunk.
        shape: the shape of the numbers.

    Returns:
        float32 multiples of 2^-24.
    """
    key, rows = draw if isinstance(draw, Draw) else Draw(draw)
    low, high = key_words(key)
    whole = (*rows.sizes, *shape[len(rows.sizes) :])
    position = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        if axis < len(rows.sizes):
            length, step = np.uint32(rows.lengths[axis]), np.uint32(rows.steps[axis])
            start = jnp.asarray(rows.starts[axis], jnp.uint32)
            index = start + index // length * step + index % length
        position = position + index * np.uint32(stride % 2**32)
        stride *= whole[axis]
    layer = scope().layer
    if layer is not None:
        position = position + layer.astype(jnp.uint32) * np.uint32(stride % 2**32)
    return uniform(position.astype(jnp.int32), low, high)


def bfloat16_below(x: jax.Array) -> jax.Array:
    """Returns the greatest bfloat16 number at or below each float32 number, as float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Without the half of its bits that bfloat16 lacks a number is nearer to zero: one below zero
    # takes the next of larger magnitude, unless these bits are zero.
    half = np.uint32(0xFFFF)
    negative = bits > np.uint32(0x7FFFFFFF)
    bits = jnp.where(negative, bits + half, bits) & ~half
    return jnp.where(jnp.isnan(x), x, jax.lax.bitcast_convert_type(bits, jnp.float32))


def bfloat16_above(x: jax.Array) -> jax.Array:
    """Returns the least bfloat16 number at or above each float32 number, as float32."""
    return -bfloat16_below(-x)


def bfloat16_stochastic(x: jax.Array, draw: jax.Array | Draw) -> jax.Array:
    r"""Rounds float32 numbers to one of their two bfloat16 neighbours, without bias.

    Between neighbours :math:`a \le x \le b` the result is :math:`b` with the probability
    :math:`(x - a) / (b - a)`, exactly, and a number that is a bfloat16 stays what it is.

    Args:
        x: float32.
        draw: a typed random key, or the key and the rows of a chunk.

    Returns:
        bfloat16; infinities and NaNs stay what they are.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    below = jnp.floor(dither(draw, x.shape) * 2**16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + below) & ~np.uint32(0xFFFF), jnp.float32)
    # Sums with the bits of a NaN could be those of a number, and of infinity those of a NaN.
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
