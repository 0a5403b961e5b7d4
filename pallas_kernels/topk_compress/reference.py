"""Error feedback on blocks: decode the residual, add, select the Top-K, encode the rest."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.window_update.reference import expand

MAX_UNROLLED = 8  # survivors up to which the rounds are written out, one after the other
LEVELS = 15  # steps between the sixteen levels of four bits
TAKEN, PADDING = -2.0, -1.0  # stand below every magnitude, and the taken below the padding


def compress(
    gradient: jax.Array, codes: jax.Array, low: jax.Array, high: jax.Array, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Sends the Top-K of gradient plus residual, and keeps the rest in four bits.

    .. math::

        a &= g + Q^{-1}(e) \\
        c &= \mathrm{TopK}(a) \\
        e &\leftarrow Q(a - c)

    where :math:`Q` has sixteen levels from a block's minimum to its maximum, :func:`encode`.

    Args:
        gradient: ``(*lead, n)`` float32, bfloat16 or float16.
        codes: ``(*lead, blocks, size / 2)`` uint8, two to a byte.
        low: ``(*lead, blocks)`` float32, the value of level 0.
        high: ``(*lead, blocks)`` float32, the value of level 15.
        k: survivors per block.

    Returns:
        ``(*lead, blocks, k)`` float32 values and int32 indices of :math:`c`, and the new
        ``codes``, ``low`` and ``high``.
    """
    size = 2 * codes.shape[-1]
    x = in_blocks(gradient, low, size) + decode(codes, low, high)
    in_row = row_mask(low.shape[-1], size, gradient.shape[-1])
    if in_row is not None:
        x = jnp.where(in_row, x, 0.0)
    values, indices = select_top_k(x, k, in_row)
    # Not a difference: infinity less infinity would stay behind as NaN.
    rest = jnp.where(expand(values[..., None, :], indices[..., None, :], size) != 0, 0.0, x)
    if in_row is not None:
        # The first element changes neither extreme.
        rest = jnp.where(in_row, rest, rest[..., :1])
    return values, indices, *encode(rest, *extremes(rest))


def in_blocks(gradient: jax.Array, low: jax.Array, size: int) -> jax.Array:
    """The gradient in blocks of ``size``, float32, padded with zeros."""
    x, padding = gradient.astype(jnp.float32), low.shape[-1] * size - gradient.shape[-1]
    if padding:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return x.reshape(*low.shape, size)


def row_mask(count: int, size: int, n: int) -> jax.Array | None:
    """Marks the elements of blocks ``(count, size)`` that belong to a row; None if all do."""
    if count * size == n:
        return None
    block, lane = (jax.lax.broadcasted_iota(jnp.int32, (count, size), i) for i in range(2))
    # Not their position in the row, which may exceed int32.
    return (block < count - 1) | (lane < n - size * (count - 1))


def extremes(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest value of each block, both NaN if it holds one."""
    # Whether a reduction passes a NaN on depends on the device and on what it is fused with.
    nan = jnp.any(jnp.isnan(blocks), axis=-1)
    low, high = jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)
    return jnp.where(nan, jnp.nan, low), jnp.where(nan, jnp.nan, high)


def decode(codes: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The float32 blocks ``(..., size)`` of codes ``(..., size / 2)``: ``low`` to ``high``."""
    level = jnp.concatenate([codes & 0xF, codes >> 4], axis=-1).astype(jnp.float32)
    low, high = (x.astype(jnp.float32)[..., None] for x in (low, high))
    # The absolute value changes nothing and keeps compilers from fusing the product with the
    # sum, which they do in some loops and not in others: the residual is the same to the
    # last bit on any number of devices. They see through lax.reduce_precision.
    return jnp.abs(level * ((high - low) / LEVELS)) + low


def encode(
    blocks: jax.Array, low: jax.Array, high: jax.Array, xi: jax.typing.ArrayLike = 0.5
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The nearest of sixteen levels, :math:`\min(15, \lfloor (x - low) / u + \xi \rfloor)`.

    Element ``j`` of a block goes to the low half of byte ``j``, element ``j + size / 2`` to the
    high half. All levels of a block without a finite, positive step :math:`u` are 0.

    Args:
        blocks: ``(..., size)`` float32.
        low: ``(...)`` float32, the value of level 0.
        high: ``(...)`` float32, the value of level 15.
        xi: 1/2 rounds to nearest, a uniform number in [0, 1) stochastically.

    Returns:
        ``(..., size / 2)`` uint8 codes, ``low`` and ``high``.
    """
    level = levels(blocks, low, high, xi)
    first, second = jnp.split(level, 2, axis=-1)
    return first | (second << 4), low, high


def levels(
    blocks: jax.Array, low: jax.Array, high: jax.Array, xi: jax.typing.ArrayLike
) -> jax.Array:
    """The codes ``(..., size)`` of elements, uint8; see :func:`encode`."""
    step = ((high - low) / LEVELS)[..., None]
    usable = (step > 0) & (step < jnp.inf)
    level = jnp.floor((blocks - low[..., None]) / jnp.where(usable, step, 1) + xi)
    return jnp.where(usable, jnp.clip(level, 0, LEVELS), 0).astype(jnp.uint8)


def select_top_k(
    blocks: jax.Array, k: int, selectable: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Values and indices of the ``k`` elements of largest magnitude in each block.

    Ties go to the lowest index. A NaN counts as infinitely large, so that it leaves the block
    with the survivors instead of staying in what the block keeps. A block with fewer than
    ``k`` selectable elements fills the rest with unselectable ones, which must be zero.

    Args:
        blocks: ``(..., size)`` float32.
        k: survivors per block, at most ``size``.
        selectable: boolean, broadcastable to ``blocks``; None selects from all.

    Returns:
        ``(..., k)`` float32 values, and ``(..., k)`` int32 indices into the block, in order of
        decreasing magnitude.
    """
    magnitude = jnp.where(jnp.isnan(blocks), jnp.inf, jnp.abs(blocks))
    if selectable is not None:
        magnitude = jnp.where(selectable, magnitude, PADDING)
    # CPUs gather cheaply, accelerators do not. XLA's partial sort is faster than many rounds, but
    # gathers the whole array on one device when a CPU mesh shards it.
    few, sorts = k <= MAX_UNROLLED, jax.device_count() == 1
    indices = jax.lax.platform_dependent(
        magnitude,
        cpu=functools.partial(_by_tournament if few or not sorts else _by_sorting_rows, k=k),
        default=functools.partial(_by_rounds if few else _by_sorting, k=k),
    )
    return jnp.take_along_axis(blocks, indices, axis=-1), indices


def _by_sorting(magnitude: jax.Array, k: int) -> jax.Array:
    return jax.lax.top_k(magnitude, k)[1]


def _by_sorting_rows(magnitude: jax.Array, k: int) -> jax.Array:
    """As :func:`_by_sorting`: XLA sorts partly on CPUs, but whole rows of more than two axes."""
    rows = magnitude.reshape(math.prod(magnitude.shape[:-1]), magnitude.shape[-1])
    return _by_sorting(rows, k).reshape(*magnitude.shape[:-1], k)


def _by_rounds(magnitude: jax.Array, k: int) -> jax.Array:
    """``k`` times: find the largest, take it out."""
    indices = []
    for _ in range(k):
        index = _first(magnitude, jnp.max(magnitude, axis=-1, keepdims=True))
        indices.append(index)
        magnitude = _take_out(magnitude, index)
    return jnp.concatenate(indices, axis=-1)


def _by_tournament(magnitude: jax.Array, k: int) -> jax.Array:
    """As :func:`_by_rounds`, but a round looks at the groups' maxima and at one group only."""
    size = magnitude.shape[-1]
    lanes = 32 if k <= MAX_UNROLLED else 2 ** math.ceil(math.log2(size) / 2)
    padding = [(0, 0)] * (magnitude.ndim - 1) + [(0, -size % lanes)]
    magnitude = jnp.pad(magnitude, padding, constant_values=TAKEN)
    groups = magnitude.reshape(*magnitude.shape[:-1], magnitude.shape[-1] // lanes, lanes)
    maxima = jnp.max(groups, axis=-1)

    def play(
        groups: jax.Array, maxima: jax.Array, taken: list[jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        largest = jnp.max(maxima, axis=-1, keepdims=True)
        winner = _first(maxima, largest)
        group = jnp.take_along_axis(groups, winner[..., None], axis=-2)[..., 0, :]
        for index in taken:
            group = _take_out(group, index - winner * lanes)
        lane = _first(group, largest)
        group = _take_out(group, lane)
        here = _positions(maxima) == winner
        maxima = jnp.where(here, jnp.max(group, axis=-1, keepdims=True), maxima)
        return winner, group, maxima, winner * lanes + lane

    if k <= MAX_UNROLLED:
        indices: list[jax.Array] = []
        for _ in range(k):
            _, _, maxima, index = play(groups, maxima, taken=indices)
            indices.append(index)
        return jnp.concatenate(indices, axis=-1)

    def play_and_update(
        carry: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        groups, maxima = carry
        winner, group, maxima, index = play(groups, maxima, taken=[])
        place = jnp.broadcast_to(winner[..., None], (*winner.shape, lanes))
        groups = jnp.put_along_axis(groups, place, group[..., None, :], axis=-2, inplace=False)
        return (groups, maxima), index[..., 0]

    _, by_round = jax.lax.scan(play_and_update, (groups, maxima), length=k)
    return jnp.moveaxis(by_round, 0, -1)


def _positions(x: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def _first(x: jax.Array, value: jax.Array) -> jax.Array:
    """The lowest index at which ``x`` equals ``value``, keeping the axis."""
    here = jnp.where(x == value, _positions(x), x.shape[-1])
    return jnp.min(here, axis=-1, keepdims=True)


def _take_out(magnitude: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.where(_positions(magnitude) == index, TAKEN, magnitude)
