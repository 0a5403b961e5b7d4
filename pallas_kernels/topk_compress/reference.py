"""Exact Top-K of each block: by magnitude, ties to the lowest index."""

import math

import jax
import jax.numpy as jnp

MAX_UNROLLED = 8  # survivors up to which the rounds are written out, one after the other
TAKEN, PADDING = -2.0, -1.0  # stand below every magnitude, and the taken below the padding


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
    # CPUs gather cheaply, accelerators do not; and XLA's partial sort, which accelerators
    # have, gathers the whole array on one device when a CPU mesh shards it.
    indices = jax.lax.platform_dependent(
        magnitude,
        cpu=lambda magnitude: _by_tournament(magnitude, k),
        default=lambda magnitude: (
            _by_rounds(magnitude, k) if k <= MAX_UNROLLED else jax.lax.top_k(magnitude, k)[1]
        ),
    )
    return jnp.take_along_axis(blocks, indices, axis=-1), indices


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
    lanes = 16 if k <= MAX_UNROLLED else 2 ** math.ceil(math.log2(size) / 2)
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
