"""The error-feedback link in one pass on TPUs.

A tile has 128 rows of the tensor on sublanes and a few blocks of 256 elements on lanes, so
that a block's halves, and its two codes to a byte, are whole registers. What there is per
block lies with the rows on lanes: that is how the compiler itself lays out arrays whose last
axes are short, and no copy stands between the kernel and the state.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_tiles
from pallas_kernels.topk_compress.reference import LEVELS, PADDING, TAKEN
from pallas_kernels.tpu_tiles import BLOCKS, ROWS, SIZE, cost, float32

MAX_K = 7  # what a tile emits, 2 k + 2 numbers for each block, fits in 128 columns


def unsupported(shape: tuple[int, ...], size: int, k: int) -> str | None:
    """Why this kernel cannot run on a tensor of ``shape``, or None."""
    if k > MAX_K:
        return f"at most {MAX_K} elements of a block are selected; asked for {k}"
    return tpu_tiles.unsupported(shape, size)


def compress(
    gradient: jax.Array,
    codes: jax.Array,
    low: jax.Array,
    high: jax.Array,
    k: int,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """As :func:`pallas_kernels.topk_compress.reference.compress`, for blocks of 256."""
    *lead, rows, n = gradient.shape
    count = low.shape[-1]
    outer = math.prod(lead)
    dtype = gradient.dtype
    gradient = gradient.reshape(outer, rows, n)
    if dtype == jnp.float16:  # which the compiler does not load
        gradient = jax.lax.bitcast_convert_type(gradient, jnp.int16)
    tile = min(BLOCKS, count)
    # As the compiler lays out the state.
    rows_inside = not tpu_tiles.are_filled(count)
    if rows_inside:
        codes = codes.reshape(outer, rows, count, SIZE // 2).swapaxes(1, 2)
        packed = pl.BlockSpec((None, tile, ROWS, SIZE // 2), lambda o, r, b: (o, b, r, 0))
    else:
        # The tiles have an axis of their own, which moves nothing: where 32 divides the blocks,
        # bytes lie in tiles of 32, and none could be cut from those.
        codes = codes.reshape(outer, rows, count // tile, tile, SIZE // 2)
        packed = pl.BlockSpec((None, ROWS, None, tile, SIZE // 2), lambda o, r, b: (o, r, b, 0, 0))
    low, high = (x.reshape(outer, rows, count).swapaxes(1, 2) for x in (low, high))

    grid = (outer, pl.cdiv(rows, ROWS), pl.cdiv(count, tile))
    wide = pl.BlockSpec((None, ROWS, tile * SIZE), lambda o, r, b: (o, r, b))
    each = pl.BlockSpec((None, tile, ROWS), lambda o, r, b: (o, b, r))
    sent = pl.BlockSpec((None, k, tile, ROWS), lambda o, r, b: (o, 0, b, r))
    operands = (gradient, codes, low, high)
    results = [
        jax.ShapeDtypeStruct((outer, k, count, rows), jnp.float32),
        jax.ShapeDtypeStruct((outer, k, count, rows), jnp.int32),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (codes, low, high)),
    ]
    values, indices, codes, low, high = pl.pallas_call(
        functools.partial(_kernel, k=k, n=n, rows_inside=rows_inside),
        grid=grid,
        in_specs=[wide, packed, each, each],
        out_specs=[sent, sent, packed, each, each],
        out_shape=results,
        input_output_aliases={1: 2, 2: 3, 3: 4},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=cost((20 + 6 * k) * gradient.size, (*operands, *results)),
        interpret=interpret,
        name="topk_compress",
    )(*operands)
    values, indices = (
        jnp.moveaxis(x, (1, 2, 3), (3, 2, 1)).reshape(*lead, rows, count, k)
        for x in (values, indices)
    )
    low, high = (x.swapaxes(1, 2).reshape(*lead, rows, count) for x in (low, high))
    codes = codes.swapaxes(1, 2) if rows_inside else codes
    return values, indices, codes.reshape(*lead, rows, count, SIZE // 2), low, high


def _kernel(
    gradient_ref,
    codes_ref,
    low_ref,
    high_ref,
    values_ref,
    indices_ref,
    new_codes_ref,
    new_low_ref,
    new_high_ref,
    *,
    k: int,
    n: int,
    rows_inside: bool,
) -> None:
    tile = low_ref.shape[0]
    lane = _iota((ROWS, SIZE))
    column = _iota((ROWS, ROWS))
    statistics = _columns([low_ref[...], high_ref[...]])
    out = jnp.zeros((ROWS, ROWS), jnp.float32)
    for block in range(tile):
        low = statistics[:, block : block + 1]
        high = statistics[:, tile + block : tile + block + 1]
        place = block if rows_inside else (slice(None), block)
        code = codes_ref[place].astype(jnp.int32)
        level = jnp.concatenate([code & 15, code >> 4], axis=1).astype(jnp.float32)
        owed = jnp.abs(level * ((high - low) / LEVELS)) + low
        x = float32(gradient_ref[:, block * SIZE : (block + 1) * SIZE]) + owed
        in_row = None
        if n % SIZE:
            in_row = (pl.program_id(2) * tile + block) * SIZE + lane < n
            x = jnp.where(in_row, x, 0.0)
        x, values, indices = _select(x, k, in_row, lane)
        code, low, high = _encode(x, in_row, lane)
        new_codes_ref[place] = code.astype(jnp.uint8)
        for position, number in enumerate([*values, *indices, low, high]):
            out = jnp.where(column == position * tile + block, number, out)
    out = out.T
    for j in range(k):
        values_ref[j] = out[j * tile : (j + 1) * tile]
        indices_ref[j] = out[(k + j) * tile : (k + j + 1) * tile].astype(jnp.int32)
    new_low_ref[...] = out[2 * k * tile : (2 * k + 1) * tile]
    new_high_ref[...] = out[(2 * k + 1) * tile : (2 * k + 2) * tile]


def _select(
    x: jax.Array, k: int, in_row: jax.Array | None, lane: jax.Array
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """What stays of each row, and the values and indices of what goes, as columns."""
    magnitude = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    if in_row is not None:
        magnitude = jnp.where(in_row, magnitude, PADDING)
    values, indices = [], []
    for _ in range(k):
        largest = jnp.max(magnitude, axis=1, keepdims=True)
        # Indices in float32, in which lanes reduce and transpose; it holds them exactly.
        first = jnp.where(magnitude == largest, lane.astype(jnp.float32), float(SIZE))
        index = jnp.min(first, axis=1, keepdims=True)
        here = lane.astype(jnp.float32) == index
        values.append(jnp.sum(jnp.where(here, x, 0.0), axis=1, keepdims=True))
        indices.append(index)
        magnitude = jnp.where(here, TAKEN, magnitude)
        x = jnp.where(here, 0.0, x)
    return x, values, indices


def _encode(
    x: jax.Array, in_row: jax.Array | None, lane: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if in_row is not None:
        x = jnp.where(in_row, x, x[:, :1])
    # Whether a reduction passes a NaN on depends on the device.
    nan = jnp.max(jnp.where(jnp.isnan(x), 1.0, 0.0), axis=1, keepdims=True) > 0
    low = jnp.where(nan, jnp.nan, jnp.min(x, axis=1, keepdims=True))
    high = jnp.where(nan, jnp.nan, jnp.max(x, axis=1, keepdims=True))
    step = (high - low) / LEVELS
    usable = (step > 0) & (step < jnp.inf)
    level = jnp.floor((x - low) / jnp.where(usable, step, 1.0) + 0.5)
    level = jnp.where(usable, jnp.clip(level, 0.0, LEVELS), 0.0).astype(jnp.int32)
    return level[:, : SIZE // 2] | (level[:, SIZE // 2 :] << 4), low, high


def _columns(numbers: Sequence[jax.Array]) -> jax.Array:
    """Arrays ``(m, 128)``, one below the other, as columns of 128 rows."""
    stacked = jnp.concatenate(numbers, axis=0)
    padding = jnp.zeros((ROWS - stacked.shape[0], ROWS), stacked.dtype)
    return jnp.concatenate([stacked, padding], axis=0).T


def _iota(shape: tuple[int, int]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)
