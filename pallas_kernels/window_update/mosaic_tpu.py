"""The window link in one pass on TPUs.

Rows of the tensor lie on lanes, as the compiler lays out the window by itself. Entries that
share an element are combined first, all with all: each then knows its element's whole update,
and the dense tile is written by one select per entry, in which it does not matter who is last.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_tiles
from pallas_kernels.tpu_tiles import BLOCKS, ROWS, SIZE, cost

MAX_ENTRIES = 64  # of a block's window; comparing all with all grows with the square


def unsupported(shape: tuple[int, ...], size: int, entries: int) -> str | None:
    """Why this kernel cannot run on a tensor of ``shape``, or None."""
    if entries > MAX_ENTRIES:
        return f"the window of a block may hold {MAX_ENTRIES} entries; it holds {entries}"
    return tpu_tiles.unsupported(shape, size)


def window_update(
    values: jax.Array,
    indices: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
    eps: jax.Array,
    *,
    n: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """As :func:`pallas_kernels.window_update.reference.window_update`, for blocks of 256."""
    *lead, rows, count, length, k = values.shape
    outer, entries = math.prod(lead), length * k
    tile = min(BLOCKS, count)
    # The order that the compiler chooses for the state, so that this moves nothing.
    values, indices = (
        x.reshape(outer, rows, count, length, k)
        .transpose(0, 3, 4, 2, 1)
        .reshape(outer, entries, count, rows)
        for x in (values, indices)
    )
    each = pl.BlockSpec((None, entries, tile, ROWS), lambda o, r, b: (o, 0, b, r))
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    # float16 is nothing that the compiler stores.
    stored = jnp.dtype(jnp.float32) if dtype == jnp.float16 else jnp.dtype(dtype)
    result = jax.ShapeDtypeStruct((outer, rows, n), stored)
    update = pl.pallas_call(
        functools.partial(_kernel, k=k),
        grid=(outer, pl.cdiv(rows, ROWS), pl.cdiv(count, tile)),
        in_specs=[scalars, scalars, scalars, each, each],
        out_specs=pl.BlockSpec((None, ROWS, tile * SIZE), lambda o, r, b: (o, r, b)),
        out_shape=result,
        scratch_shapes=[
            pltpu.VMEM((entries, tile, ROWS), jnp.int32),
            pltpu.VMEM((entries, tile, ROWS), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=cost(2 * entries * result.size, (values, indices, result)),
        interpret=interpret,
        name="window_update",
    )(mu_weights, nu_weights, jnp.reshape(eps, (1,)), values, indices)
    return update.reshape(*lead, rows, n).astype(dtype)


def _kernel(
    mu_ref, nu_ref, eps_ref, values_ref, indices_ref, out_ref, index_ref, update_ref, *, k: int
) -> None:
    entries, tile, _ = index_ref.shape
    index_ref[...] = indices_ref[...].astype(jnp.int32)
    indices = index_ref[...]
    mu = nu = jnp.zeros(indices.shape, jnp.float32)
    for entry in range(entries):
        value = values_ref[entry].astype(jnp.float32)
        here = indices == index_ref[entry][None]
        mu = mu + jnp.where(here, (value * mu_ref[entry // k])[None], 0.0)
        nu = nu + jnp.where(here, (value * value * nu_ref[entry // k])[None], 0.0)
    update_ref[...] = jnp.where(nu == 0, 0.0, mu / (jnp.sqrt(nu) + eps_ref[0]))

    position = jax.lax.broadcasted_iota(jnp.int32, (SIZE, ROWS), 0)
    for block in range(tile):
        dense = jnp.zeros((SIZE, ROWS), jnp.float32)
        for entry in range(entries):
            index = index_ref[entry, block : block + 1, :]
            update = update_ref[entry, block : block + 1, :]
            dense = jnp.where(position == index, update, dense)
        out_ref[:, block * SIZE : (block + 1) * SIZE] = dense.T.astype(out_ref.dtype)
