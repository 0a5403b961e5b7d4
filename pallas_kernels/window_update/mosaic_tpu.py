"""The window link in one pass on TPUs.

Rows of the tensor lie on lanes, as the compiler lays out the window by itself. Entries that
share an element are combined first, all with all: each then knows its element's whole update,
and the dense tile is written by one select per entry, in which it does not matter who is last.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_tiles
from pallas_kernels.tpu_tiles import BLOCKS, BYTES, LANES, ROWS, cost, tile_of
from pallas_kernels.window_update.descent import descent

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
    size: int,
    n: int,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """As :func:`pallas_kernels.window_update.reference.window_update`, blocks up to 512."""
    *lead, rows, _, _, _ = values.shape
    # float16 is nothing that the compiler stores.
    stored = jnp.dtype(jnp.float32) if dtype == jnp.float16 else jnp.dtype(dtype)
    scalars = mu_weights, nu_weights, jnp.reshape(eps, (1,))
    result = jax.ShapeDtypeStruct((math.prod(lead), rows, n), stored)
    kernel = _update_kernel
    update = _call("window_update", kernel, scalars, values, indices, result, size, interpret)
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
    size: int,
    interpret: bool = False,
) -> jax.Array:
    """As the reference, for blocks up to 512; ``params`` are updated in place."""
    *lead, rows, n = params.shape
    each = [eps, step, jnp.zeros_like(step) if decay is None else decay]
    scalars = mu_weights, nu_weights, jnp.stack([x.astype(jnp.float32) for x in each])
    kernel = functools.partial(_apply_kernel, decays=decay is not None)
    stacked = params.reshape(math.prod(lead), rows, n)
    result = jax.ShapeDtypeStruct(stacked.shape, stacked.dtype)
    window = values, indices, result, size, interpret
    moved = _call("window_apply", kernel, scalars, *window, stacked)
    return moved.reshape(params.shape)


def _call(
    name: str,
    kernel: Callable[..., None],
    scalars: tuple[jax.Array, ...],
    values: jax.Array,
    indices: jax.Array,
    result: jax.ShapeDtypeStruct,
    size: int,
    interpret: bool,
    *in_place: jax.Array,
) -> jax.Array:
    """Runs ``kernel`` on each tile of a window and of the ``(outer, rows, n)`` result."""
    outer, rows, _ = result.shape
    *_, count, length, k = values.shape
    entries = length * k
    _, tile, width = tile_of(size, count)
    # Where 32 divides the blocks, bytes lie in tiles of 32, which are fetched whole.
    fetched = max(BYTES, tile) if count % BYTES == 0 else tile
    # The order that the compiler chooses for the state, so that this moves nothing.
    values, indices = (x.reshape(outer, rows, count, length, k) for x in (values, indices))
    each = pl.BlockSpec((None, entries, tile, ROWS), lambda o, r, b: (o, 0, b, r))
    indices = indices.transpose(0, 3, 4, 2, 1).reshape(outer, entries, count, rows)
    if k == 2 and values.dtype == jnp.bfloat16:
        # A pair of these fills a sublane.
        values = values.transpose(0, 2, 3, 4, 1)
        each = pl.BlockSpec((None, tile, length, k, ROWS), lambda o, r, b: (o, b, 0, 0, r))
    else:
        values = values.transpose(0, 3, 4, 2, 1).reshape(outer, entries, count, rows)
    if not interpret and tpu_tiles.are_filled(count):
        # A window that the compiler fetches ahead of time gets its new row on the chip, and all
        # of it is written back; where it lies, only the row is.
        values, indices = (
            pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (values, indices)
        )
    places = pl.BlockSpec(
        (None, entries, fetched, ROWS), lambda o, r, b: (o, 0, b * tile // fetched, r)
    )
    dense = pl.BlockSpec((None, ROWS, width), lambda o, r, b: (o, r, b))
    in_smem = [pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars)
    operations = 2 * entries * result.size
    return pl.pallas_call(
        functools.partial(kernel, k=k, size=size),
        grid=(outer, pl.cdiv(rows, ROWS), pl.cdiv(count, tile)),
        in_specs=[*in_smem, each, places, *[dense] * len(in_place)],
        out_specs=dense,
        out_shape=result,
        input_output_aliases={len(scalars) + 2: 0} if in_place else {},
        scratch_shapes=[
            pltpu.VMEM((entries, tile, ROWS), jnp.int32),
            pltpu.VMEM((entries, tile, ROWS), jnp.float32),
            pltpu.VMEM((entries, tile, ROWS), jnp.float32),
            pltpu.VMEM((width, ROWS), jnp.float32),
        ],
        compiler_params=tpu_tiles.compiler_params(
            (3 + 2 * len(in_place)) * 4 * ROWS * width, entries * ROWS * (18 * tile + 2 * fetched)
        ),
        cost_estimate=cost(operations, (values, indices, result, *in_place)),
        interpret=interpret,
        name=name,
    )(*scalars, values, indices, *in_place)


def _update_kernel(
    mu_ref, nu_ref, eps_ref, values_ref, indices_ref, out_ref, *scratch, k: int, size: int
) -> None:
    window = mu_ref, nu_ref, eps_ref, values_ref, indices_ref
    dense_ref = _expand(*window, *scratch, k=k, size=size)

    def write(here: Any) -> None:
        out_ref[:, here] = dense_ref[here, :].T.astype(out_ref.dtype)

    _for_each_register(out_ref.shape[1], write)


def _apply_kernel(
    mu_ref,
    nu_ref,
    scalars_ref,
    values_ref,
    indices_ref,
    params_ref,
    out_ref,
    *scratch,
    k: int,
    size: int,
    decays: bool,
) -> None:
    window = mu_ref, nu_ref, scalars_ref, values_ref, indices_ref
    dense_ref = _expand(*window, *scratch, k=k, size=size)
    step, decay = scalars_ref[1], scalars_ref[2] if decays else None

    def write(here: Any) -> None:
        params = params_ref[:, here].astype(jnp.float32)
        moved = params + descent(dense_ref[here, :].T, params, step, decay)
        out_ref[:, here] = moved.astype(out_ref.dtype)

    _for_each_register(out_ref.shape[1], write)


def _expand(
    mu_ref,
    nu_ref,
    eps_ref,
    values_ref,
    indices_ref,
    index_ref,
    value_ref,
    update_ref,
    dense_ref,
    *,
    k: int,
    size: int,
) -> Any:
    """Writes the dense direction of a tile, turned, and returns where."""
    entries, tile, _ = index_ref.shape
    fetched = indices_ref.shape[1]
    for start in range(0, fetched, tile):

        @pl.when(pl.program_id(2) * tile % fetched == start)
        def _(part: slice = slice(start, start + tile)) -> None:
            index_ref[...] = indices_ref[:, part].astype(jnp.int32)

    if values_ref.ndim == 3:
        value_ref[...] = values_ref[...].astype(jnp.float32)
    else:
        for row in range(entries // k):
            pair = values_ref[:, row].astype(jnp.float32)
            for j in range(k):
                value_ref[row * k + j] = pair[:, j]
    together = BLOCKS if tile % BLOCKS == 0 else tile

    length = entries // k

    def combine(number: jax.Array, _: None) -> None:
        """Finds the whole updates of the elements of a row's entries, for a few blocks."""
        first, blocks = number % length * k, pl.ds(number // length * together, together)
        if together == tile:
            blocks = slice(None)
        targets = [index_ref[first + j, blocks] for j in range(k)]
        mu = nu = [jnp.zeros(targets[0].shape, jnp.float32)] * k
        for entry in range(entries):
            value, index = value_ref[entry, blocks], index_ref[entry, blocks]
            here = [index == target for target in targets]
            mu_term, nu_term = value * mu_ref[entry // k], value * value * nu_ref[entry // k]
            mu = [x + jnp.where(h, mu_term, 0.0) for x, h in zip(mu, here, strict=True)]
            nu = [x + jnp.where(h, nu_term, 0.0) for x, h in zip(nu, here, strict=True)]
        for j in range(k):
            update = mu[j] / (jnp.sqrt(nu[j]) + eps_ref[0])
            update_ref[first + j, blocks] = jnp.where(nu[j] == 0, 0.0, update)

    jax.lax.fori_loop(0, length * (tile // together), combine, None)

    def write(block: jax.Array, _: None) -> None:
        for first in range(0, size, ROWS):
            shape = min(ROWS, size - first), ROWS
            position = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            dense = jnp.zeros(shape, jnp.float32)
            for entry in range(entries):
                index = index_ref[entry, pl.ds(block, 1)]
                update = update_ref[entry, pl.ds(block, 1)]
                dense = jnp.where(position == index, update, dense)
            dense_ref[pl.ds(block * size + first, shape[0]), :] = dense

    jax.lax.fori_loop(0, tile, write, None)
    return dense_ref


def _for_each_register(width: int, function: Callable[[Any], None]) -> None:
    """Calls ``function`` with the place of each 128 elements of the rows."""

    def run(number: jax.Array, _: None) -> None:
        function(pl.ds(pl.multiple_of(number * LANES, LANES), LANES))

    jax.lax.fori_loop(0, width // LANES, run, None)
