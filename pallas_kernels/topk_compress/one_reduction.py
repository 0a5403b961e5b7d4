"""The error-feedback step as GPUs run XLA's program: a reduction of each block, then its codes.

Written as rounds of a maximum, as the reference is, XLA writes the sum of gradient and residual and
reads it again in each round. Here one reduction finds all that a block's codes depend on, and its
operands, like those of the codes, are computed where they are read.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.topk_compress.reference import LEVELS, in_blocks, levels, row_mask

MAX_K = 4  # with more entries the reduction has too many operands
NONE = np.int32(-(2**31))  # the rank of no element: below that of padding, which is -1
INFINITE = np.int32(0x7F800000)  # the bits of infinity, which stand for those of a NaN too
NOWHERE = np.int32(2**31 - 1)  # the index of no element

Entry = tuple[jax.Array, ...]  # a rank, an index and a value


def compress(
    gradient: jax.Array, codes: jax.Array, low: jax.Array, high: jax.Array, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """As :func:`pallas_kernels.topk_compress.reference.compress`, on a CPU to the last bit.

    Args:
        gradient: ``(*lead, n)`` float32, bfloat16 or float16.
        codes: ``(*lead, blocks, size / 2)`` uint8.
        low: ``(*lead, blocks)`` float32.
        high: ``(*lead, blocks)`` float32.
        k: selected entries of a block, at most ``MAX_K``.

    Returns:
        ``(*lead, blocks, k)`` values and indices, and the new ``codes``, ``low`` and ``high``.
    """
    size, n = 2 * codes.shape[-1], gradient.shape[-1]
    x = in_blocks(gradient, low, size) + _owed(unpacked(codes), low, high)
    values, indices, least, greatest = _selected(x, row_mask(low.shape[-1], size, n), k)
    # The second pass shall compute the sum again, and not read what the first has written.
    again = jax.lax.optimization_barrier((gradient, codes, low, high, least, greatest, indices))
    gradient, codes, low, high, bottom, top, taken = again
    blocks, halves = in_blocks(gradient, low, size), []
    for which, level in enumerate((codes & 0xF, codes >> 4)):
        # By halves: a byte of the new codes then depends on the same byte alone, and is its place.
        lanes = slice(which * size // 2, (which + 1) * size // 2)
        rest = blocks[..., lanes] + _owed(level, low, high)
        lane = jax.lax.broadcasted_iota(jnp.int32, rest.shape, rest.ndim - 1) + lanes.start
        for index in taken:
            rest = jnp.where(lane == index[..., None], 0.0, rest)
        halves.append(rest)
    if (mask := row_mask(low.shape[-1], size, n)) is not None:
        first = halves[0][..., :1]
        masks = mask[..., : size // 2], mask[..., size // 2 :]
        halves = [jnp.where(m, x, first) for m, x in zip(masks, halves, strict=True)]
    first, second = (levels(half, bottom, top, 0.5) for half in halves)
    new = first | (second << 4)
    return jnp.stack(values, axis=-1), jnp.stack(indices, axis=-1), new, least, greatest


def unpacked(codes: jax.Array, bits: int = 4) -> jax.Array:
    """Returns the codes ``(..., size)`` of 2 or 4 bits in bytes ``(..., size * bits / 8)``.

    Not the parts joined: a fusion would write them.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = (codes[..., None, :] >> shifts) & ((1 << bits) - 1)
    return parts.reshape(*codes.shape[:-1], 8 // bits * codes.shape[-1])


def _owed(level: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The dequantized residual, as :func:`pallas_kernels.topk_compress.reference.decode`."""
    step = ((high - low) / LEVELS)[..., None]
    return jnp.abs(level.astype(jnp.float32) * step) + low[..., None]


def _selected(
    x: jax.Array, in_row: jax.Array | None, k: int
) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
    """Of each block the values and indices of the Top-K, and the extremes of all else and zero."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)
    rank = jnp.minimum(bits, INFINITE)
    if in_row is not None:
        rank, x = jnp.where(in_row, rank, -1), jnp.where(in_row, x, 0.0)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)

    def everywhere(value: np.number | np.bool) -> jax.Array:
        return jnp.full(x.shape, value)

    nothing = NONE, NOWHERE, np.float32(0)
    extremes = np.float32(np.inf), np.float32(-np.inf), np.bool_(False)
    operands = [rank, lane, x, *map(everywhere, nothing * (k - 1)), *map(everywhere, extremes)]
    found = jax.lax.reduce(operands, [*nothing * k, *extremes], _merged, (x.ndim - 1,))
    low, high, nan = found[3 * k :]
    # What was selected is zero now.
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    low, high = jnp.where(nan, jnp.nan, low), jnp.where(nan, jnp.nan, high)
    return list(found[2 : 3 * k : 3]), list(found[1 : 3 * k : 3]), low, high


def _merged(one: list[jax.Array], other: list[jax.Array]) -> list[jax.Array]:
    """The Top-K of two parts of a block, in order, and the extremes of what is not among them."""
    *ours, low, high, nan = one
    *theirs, other_low, other_high, other_nan = other
    first, second = (
        [tuple(part[i : i + 3]) for i in range(0, len(part), 3)] for part in (ours, theirs)
    )
    low, high = jnp.minimum(low, other_low), jnp.maximum(high, other_high)
    nan = nan | other_nan
    # Of two sorted lists, one of them backwards, the larger of each pair are the Top-K of both.
    pairs = [_ordered(a, b) for a, b in zip(first, reversed(second), strict=True)]
    for _, (rank, _, value) in pairs:
        real = rank >= 0
        low = jnp.where(real, jnp.minimum(low, value), low)
        high = jnp.where(real, jnp.maximum(high, value), high)
        nan = nan | (real & (value != value))
    top = [larger for larger, _ in pairs]
    for end in range(len(top) - 1, 0, -1):
        for i in range(end):
            top[i], top[i + 1] = _ordered(top[i], top[i + 1])
    return [*(part for entry in top for part in entry), low, high, nan]


def _ordered(one: Entry, other: Entry) -> tuple[Entry, Entry]:
    """Two entries, that of the larger rank first, or of the lower index where they are equal."""
    swap = (other[0] > one[0]) | ((other[0] == one[0]) & (other[1] < one[1]))
    first = tuple(jnp.where(swap, b, a) for a, b in zip(one, other, strict=True))
    second = tuple(jnp.where(swap, a, b) for a, b in zip(one, other, strict=True))
    return first, second
