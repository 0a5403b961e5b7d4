"""The window link in one pass on TPUs.

Rows of the tensor lie on lanes, as the compiler lays out the window by itself. Entries that
share an element are combined first, all with all: each then knows its element's whole update,
and the dense tile is written by one select per entry, in which it does not matter who is last.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_tiles
from pallas_kernels.tpu_tiles import BLOCKS, BYTES, ROWS, SIZE, cost
from pallas_kernels.window_update.reference import descent

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
    *lead, rows, _, _, _ = values.shape
    # float16 is nothing that the compiler stores.
    stored = jnp.dtype(jnp.float32) if dtype == jnp.float16 else jnp.dtype(dtype)
    scalars = mu_weights, nu_weights, jnp.reshape(eps, (1,))
    result = jax.ShapeDtypeStruct((math.prod(lead), rows, n), stored)
    update = _call("window_update", _update_kernel, scalars, values, indices, result, interpret)
    return update.reshape(*lead, rows, n).astype(dtype)


def window_apply(
    values: jax.Array,
    indices: jax.Array,
    params: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
    eps: jax.Array,
    step: jax.Array,
    decay: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As the reference, for blocks of 256; ``params`` are updated in place."""
    *lead, rows, n = params.shape
    each = [eps, step, jnp.zeros_like(step) if decay is None else decay]
    scalars = mu_weights, nu_weights, jnp.stack([x.astype(jnp.float32) for x in each])
    kernel = functools.partial(_apply_kernel, decays=decay is not None)
    stacked = params.reshape(math.prod(lead), rows, n)
    result = jax.ShapeDtypeStruct(stacked.shape, stacked.dtype)
    moved = _call("window_apply", kernel, scalars, values, indices, result, interpret, stacked)
    return moved.reshape(params.shape)


def _call(
    name: str,
    kernel: Callable[..., None],
    scalars: tuple[jax.Array, ...],
    values: jax.Array,
    indices: jax.Array,
    result: jax.ShapeDtypeStruct,
    interpret: bool,
    *in_place: jax.Array,
) -> jax.Array:
    """Runs ``kernel`` on each tile of a window and of the ``(outer, rows, n)`` result."""
    outer, rows, _ = result.shape
    *_, count, length, k = values.shape
    entries, tile = length * k, min(BLOCKS, count)
    # Where 32 divides the blocks, bytes lie in tiles of 32, which are fetched whole.
    fetched = BYTES if count % BYTES == 0 else tile
    # The order that the compiler chooses for the state, so that this moves nothing.
    values, indices = (
        x.reshape(outer, rows, count, length, k)
        .transpose(0, 3, 4, 2, 1)
        .reshape(outer, entries, count, rows)
        for x in (values, indices)
    )
    if not interpret and tpu_tiles.are_filled(count):
        # A window that the compiler fetches ahead of time gets its new row on the chip, and all
        # of it is written back; where it lies, only the row is.
        values, indices = (
            pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (values, indices)
        )
    each = pl.BlockSpec((None, entries, tile, ROWS), lambda o, r, b: (o, 0, b, r))
    places = pl.BlockSpec(
        (None, entries, fetched, ROWS), lambda o, r, b: (o, 0, b * tile // fetched, r)
    )
    dense = pl.BlockSpec((None, ROWS, tile * SIZE), lambda o, r, b: (o, r, b))
    in_smem = [pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars)
    operations = 2 * entries * result.size
    return pl.pallas_call(
        functools.partial(kernel, k=k),
        grid=(outer, pl.cdiv(rows, ROWS), pl.cdiv(count, tile)),
        in_specs=[*in_smem, each, places, *[dense] * len(in_place)],
        out_specs=dense,
        out_shape=result,
        input_output_aliases={len(scalars) + 2: 0} if in_place else {},
        scratch_shapes=[
            pltpu.VMEM((entries, tile, ROWS), jnp.int32),
            pltpu.VMEM((entries, tile, ROWS), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=cost(operations, (values, indices, result, *in_place)),
        interpret=interpret,
        name=name,
    )(*scalars, values, indices, *in_place)


def _update_kernel(
    mu_ref, nu_ref, eps_ref, values_ref, indices_ref, out_ref, index_ref, update_ref, *, k: int
) -> None:
    window = mu_ref, nu_ref, eps_ref, values_ref, indices_ref
    for block, dense in _blocks(*window, index_ref, update_ref, k=k):
        out_ref[:, block] = dense.astype(out_ref.dtype)


def _apply_kernel(
    mu_ref,
    nu_ref,
    scalars_ref,
    values_ref,
    indices_ref,
    params_ref,
    out_ref,
    index_ref,
    update_ref,
    *,
    k: int,
    decays: bool,
) -> None:
    window = mu_ref, nu_ref, scalars_ref, values_ref, indices_ref
    step, decay = scalars_ref[1], scalars_ref[2] if decays else None
    for block, dense in _blocks(*window, index_ref, update_ref, k=k):
        params = params_ref[:, block].astype(jnp.float32)
        out_ref[:, block] = (params + descent(dense, params, step, decay)).astype(out_ref.dtype)


def _blocks(
    mu_ref, nu_ref, eps_ref, values_ref, indices_ref, index_ref, update_ref, *, k: int
) -> Iterator[tuple[slice, jax.Array]]:
    """Where each block of a tile lies in its rows, and its dense direction."""
    entries, tile, _ = index_ref.shape
    fetched = indices_ref.shape[1]
    for start in range(0, fetched, tile):

        @pl.when(pl.program_id(2) * tile % fetched == start)
        def _(part: slice = slice(start, start + tile)) -> None:
            index_ref[...] = indices_ref[:, part].astype(jnp.int32)

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
        yield slice(block * SIZE, (block + 1) * SIZE), dense.T
