"""Expanding the sparse rows of a block's window into dense blocks."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.window_update.descent import descent

MAX_MATCHES = 8  # up to this many entries, comparing each with each beats a gather
MAX_COMPARES = 64  # up to this many entries, comparing each with each lane beats a scatter


@functools.partial(jax.jit, static_argnames="size")
def expand(values: jax.Array, indices: jax.Array, size: int) -> jax.Array:
    """Sums the rows of sparse entries of each block into a dense block.

    Args:
        values: ``(..., rows, k)`` float32.
        indices: ``(..., rows, k)`` integers below ``size``, distinct within a row.
        size: elements in a block.

    Returns:
        ``(..., size)`` float32. The sum runs in the order of the rows, whatever the device.
    """
    rows, k = values.shape[-2:]
    few = rows * k <= MAX_COMPARES
    if rows == 1 and few:
        return _expand_by_comparing(values, indices, size)
    # A CPU adds one entry after another; other devices those of a row at once.
    at_once = functools.partial(_expand_by_scattering, size=size, together=rows)
    by_row = functools.partial(_expand_by_scattering, size=size, together=1)
    by_comparing = functools.partial(_expand_by_comparing, size=size)
    default = by_comparing if few else by_row
    return jax.lax.platform_dependent(values, indices, cpu=at_once, default=default)


def written(blocks: jax.Array) -> jax.Array:
    """Expanded ``blocks``, on TPUs as an array of their own; to be joined into rows.

    There joining moves data, and the compiler would rather join the operands of each compare:
    for a window of 30 entries it wrote 360 bytes of temporaries for each element.
    """
    return jax.lax.platform_dependent(
        blocks, tpu=jax.lax.optimization_barrier, default=lambda blocks: blocks
    )


def values_at(values: jax.Array, indices: jax.Array, positions: jax.Array, size: int) -> jax.Array:
    """Returns the values of a block of sparse entries at some positions: zero without an entry.

    Args:
        values: ``(..., k)`` float32.
        indices: ``(..., k)`` integers below ``size``, distinct where the value is not zero.
        positions: ``(..., rows, j)`` integers below ``size``.
        size: elements in a block.

    Returns:
        ``(..., rows, j)`` float32.
    """
    k = values.shape[-1]
    if k <= MAX_MATCHES:
        same = positions[..., None] == indices[..., None, None, :].astype(positions.dtype)
        return jnp.sum(jnp.where(same, values[..., None, None, :], 0.0), axis=-1)

    def take(block: jax.Array, positions: jax.Array) -> jax.Array:
        return block[positions]

    for _ in range(values.ndim - 1):
        take = jax.vmap(take)
    return take(
        expand(values[..., None, :], indices[..., None, :], size), positions.astype(jnp.int32)
    )


def window_update(
    values: jax.Array,
    indices: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
    eps: jax.typing.ArrayLike,
    *,
    size: int,
    n: int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """:func:`window_adam` for the tensor ``(*lead, n)``, in ``dtype``, without padding."""
    blocks = written(window_adam(values, indices, mu_weights, nu_weights, eps, size))
    if blocks.shape[-2] * size != n:
        rows = blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * size)
        return rows[..., :n].astype(dtype)
    return blocks.reshape(*blocks.shape[:-2], n).astype(dtype)


def window_apply(
    values: jax.Array,
    indices: jax.Array,
    params: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
    eps: jax.typing.ArrayLike,
    step: jax.Array,
    decay: jax.Array | None = None,
    *,
    size: int,
) -> jax.Array:
    """``params`` after a step along :func:`window_update`, in their dtype."""
    window = values, indices, mu_weights, nu_weights, eps
    u = window_update(*window, size=size, n=params.shape[-1], dtype=params.dtype)
    return (params + descent(u, params, step, decay)).astype(params.dtype)


def window_adam(
    values: jax.Array,
    indices: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
    eps: jax.typing.ArrayLike,
    size: int,
) -> jax.Array:
    r"""The Adam direction of a window of sparse gradients.

    .. math::

        u = \frac{\sum_i w^\mu_i V_i}{\sqrt{\sum_i w^\nu_i V_i^2} + \epsilon}

    Args:
        values: ``(..., rows, k)``, the stored gradient entries :math:`V`.
        indices: ``(..., rows, k)``, where they belong in the block.
        mu_weights: ``(rows,)`` float32, :math:`w^\mu`.
        nu_weights: ``(rows,)`` float32, :math:`w^\nu`.
        eps: added to the root.
        size: elements in a block.

    Returns:
        ``(..., size)`` float32; elements absent from the window are zero.
    """
    rows, k = values.shape[-2:]
    values = values.astype(jnp.float32)
    of_row = [axis for axis in range(values.ndim) if axis != values.ndim - 2]
    mu_weights, nu_weights = (jnp.expand_dims(x, of_row) for x in (mu_weights, nu_weights))
    terms = values * mu_weights, jnp.square(values) * nu_weights
    of_blocks = functools.partial(adam_of_blocks, size=size)
    if rows * k > MAX_COMPARES:
        return of_blocks(*terms, indices, eps)
    of_entries = functools.partial(adam_of_entries, size=size)
    return jax.lax.platform_dependent(*terms, indices, eps, cpu=of_entries, default=of_blocks)


def adam_of_blocks(
    mu_terms: jax.Array,
    nu_terms: jax.Array,
    indices: jax.Array,
    eps: jax.typing.ArrayLike,
    size: int,
) -> jax.Array:
    """The direction from both sums of each element, which a compiler fuses into a pass."""
    mu, nu = expand(mu_terms, indices, size), expand(nu_terms, indices, size)
    return _direction(mu, nu, eps)


def adam_of_entries(
    mu_terms: jax.Array,
    nu_terms: jax.Array,
    indices: jax.Array,
    eps: jax.typing.ArrayLike,
    size: int,
) -> jax.Array:
    """The direction with all arithmetic on entries, which are far fewer than elements.

    Each entry sums those of its position, in the order of rows, so that the bits are the same.
    """
    *lead, rows, k = indices.shape
    mu_terms, nu_terms, indices = (
        x.reshape(*lead, rows * k) for x in (mu_terms, nu_terms, indices.astype(jnp.int32))
    )
    positions = _entries(indices)
    mu, nu = mu_terms, nu_terms
    # Entries of one row share no position: sums of one term, which XLA forms for each element.
    if rows > 1:
        mu = nu = jnp.zeros((), jnp.float32)
        for position, *terms in zip(positions, _entries(mu_terms), _entries(nu_terms), strict=True):
            same = indices == position
            mu, nu = (
                total + jnp.where(same, x, 0.0) for total, x in zip((mu, nu), terms, strict=True)
            )
    u = _direction(mu, nu, eps)
    lane = jax.lax.broadcasted_iota(jnp.int32, (*lead, size), len(lead))
    dense = jnp.zeros((), jnp.float32)
    for position, x in zip(positions, _entries(u), strict=True):
        dense = jnp.where(position == lane, x, dense)
    return dense


def _direction(mu: jax.Array, nu: jax.Array, eps: jax.typing.ArrayLike) -> jax.Array:
    # An element that the window lacks has mu = nu = 0: the guard gives 0 even for eps = 0.
    return jnp.where(nu == 0, 0.0, mu / (jnp.sqrt(nu) + eps))


def _expand_by_comparing(values: jax.Array, indices: jax.Array, size: int) -> jax.Array:
    lane = jax.lax.broadcasted_iota(jnp.int32, (*values.shape[:-2], size), values.ndim - 2)
    dense = jnp.zeros((), jnp.float32)
    for row in zip(
        *(jnp.unstack(x, axis=-2) for x in (indices.astype(jnp.int32), values)), strict=True
    ):
        for position, value in zip(*map(_entries, row), strict=True):
            dense = dense + jnp.where(position == lane, value, 0.0)
    return dense


def _entries(x: jax.Array) -> list[jax.Array]:
    """Each element of the last axis, with that axis: in one operation, not one for each."""
    return jnp.split(x, x.shape[-1], axis=-1)


def _expand_by_scattering(
    values: jax.Array, indices: jax.Array, size: int, together: int
) -> jax.Array:
    """The sum, to which the entries of ``together`` rows are added in one operation."""

    def add(dense: jax.Array, entries: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        values, indices = (x.reshape(-1) for x in entries)
        return dense.at[indices].add(values, unique_indices=together == 1), None

    def expand_block(values: jax.Array, indices: jax.Array) -> jax.Array:
        shape = -1, together, values.shape[-1]
        groups = values.reshape(shape), indices.reshape(shape)
        # A few rows at a time: all of a long window at once take minutes to compile.
        return jax.lax.scan(add, jnp.zeros(size, jnp.float32), groups, unroll=8)[0]

    for _ in range(values.ndim - 2):
        expand_block = jax.vmap(expand_block)
    return expand_block(values, indices.astype(jnp.int32))
