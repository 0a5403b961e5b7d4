"""The error-feedback link in one pass on TPUs.

A tile has 128 rows of the tensor and a few blocks of each. It is turned, so that rows are on
lanes: a block is then a run of sublanes, which may begin and end anywhere, its two halves, which
share bytes, are two runs, and what there is per block is a row of 128 numbers. That is also how
the compiler itself lays out arrays whose last axes are short, so that no copy stands between the
kernel and the state.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_tiles
from pallas_kernels.topk_compress.codes_layout import CodesLayout
from pallas_kernels.topk_compress.reference import LEVELS, PADDING, TAKEN
from pallas_kernels.tpu_tiles import LANES, ROWS, cost, float32, tile_of

MAX_K = 7  # rounds of selection, which are written out one after another


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
    """As :func:`pallas_kernels.topk_compress.reference.compress`, for even blocks up to 512."""
    *lead, rows, n = gradient.shape
    count, half = codes.shape[-2:]
    outer = math.prod(lead)
    dtype = gradient.dtype
    gradient = gradient.reshape(outer, rows, n)
    if dtype == jnp.float16:  # which the compiler does not load
        gradient = jax.lax.bitcast_convert_type(gradient, jnp.int16)
    layout = CodesLayout.chosen(count, half)
    tile = tile_of(2 * half, count, layout.together)
    codes = layout.laid_out(codes.reshape(outer, rows, count, half), tile.blocks)
    packed = layout.spec(tile.blocks, half)
    low, high = (x.reshape(outer, rows, count).swapaxes(1, 2) for x in (low, high))

    grid = (outer, pl.cdiv(rows, ROWS), pl.cdiv(count, tile.blocks))
    wide = pl.BlockSpec((None, ROWS, tile.width), lambda o, r, b: (o, r, b))
    each = pl.BlockSpec((None, tile.blocks, ROWS), lambda o, r, b: (o, b, r))
    sent = pl.BlockSpec((None, k, tile.blocks, ROWS), lambda o, r, b: (o, 0, b, r))
    operands = (gradient, codes, low, high)
    results = [
        jax.ShapeDtypeStruct((outer, k, count, rows), jnp.float32),
        jax.ShapeDtypeStruct((outer, k, count, rows), jnp.int32),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (codes, low, high)),
    ]
    turned = layout.scratch(tile.blocks, half)
    values, indices, codes, low, high = pl.pallas_call(
        functools.partial(_kernel, k=k, n=n, size=2 * half, layout=layout),
        grid=grid,
        in_specs=[wide, packed, each, each],
        out_specs=[sent, sent, packed, each, each],
        out_shape=results,
        input_output_aliases={1: 2, 2: 3, 3: 4},
        scratch_shapes=[pltpu.VMEM((tile.width, ROWS), jnp.float32), pltpu.VMEM(turned, jnp.int32)],
        compiler_params=tpu_tiles.compiler_params(
            3 * 4 * ROWS * tile.width,
            4 * math.prod(turned) + ROWS * tile.blocks * (4 * half + 32 + 16 * k),
        ),
        cost_estimate=cost((20 + 6 * k) * gradient.size, (*operands, *results)),
        interpret=interpret,
        name="topk_compress",
    )(*operands)
    values, indices = (
        jnp.moveaxis(x, (1, 2, 3), (3, 2, 1)).reshape(*lead, rows, count, k)
        for x in (values, indices)
    )
    low, high = (x.swapaxes(1, 2).reshape(*lead, rows, count) for x in (low, high))
    codes = layout.as_before(codes, count).reshape(*lead, rows, count, half)
    return values, indices, codes, low, high


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
    turned_ref,
    turned_codes_ref,
    *,
    k: int,
    n: int,
    size: int,
    layout: CodesLayout,
) -> None:
    tile, half = low_ref.shape[0], size // 2
    first_block = pl.program_id(2) * tile

    def turn(chunk: jax.Array, _: None) -> None:
        here = pl.ds(pl.multiple_of(chunk * LANES, LANES), LANES)
        turned_ref[here, :] = float32(gradient_ref[:, here]).T

    jax.lax.fori_loop(0, turned_ref.shape[0] // LANES, turn, None)
    layout.turn(codes_ref, turned_codes_ref)

    def block(number: jax.Array, _: None) -> None:
        here, first = pl.ds(number, 1), number * size
        low, high = low_ref[here, :], high_ref[here, :]
        code = layout.read(codes_ref, turned_codes_ref, number)
        step, halves = (high - low) / LEVELS, []
        for which, level in enumerate((code & 15, code >> 4)):
            position = which * half + jax.lax.broadcasted_iota(jnp.int32, level.shape, 0)
            owed = jnp.abs(level.astype(jnp.float32) * step) + low
            x = turned_ref[pl.ds(first + which * half, half), :] + owed
            in_row = None
            if n % size:
                in_row = (first_block + number) * size + position < n
                x = jnp.where(in_row, x, 0.0)
            # Positions in float32, which holds them exactly, for reductions.
            halves.append(_Half(x, position.astype(jnp.float32), in_row))
        halves, values, indices = _select(halves, k, size)
        code, low, high = _encode(halves)
        layout.write(new_codes_ref, turned_codes_ref, number, code)
        for j in range(k):
            values_ref[j, here, :] = values[j]
            indices_ref[j, here, :] = indices[j].astype(jnp.int32)
        new_low_ref[here, :], new_high_ref[here, :] = low, high

    jax.lax.fori_loop(0, tile, block, None)
    layout.turn_back(turned_codes_ref, new_codes_ref)


class _Half(NamedTuple):
    """The first or the last half of a block of each row.

    Attributes:
        x: ``(size / 2, 128)`` float32.
        position: in the block.
        in_row: which elements belong to the row; None if all do.
    """

    x: jax.Array
    position: jax.Array
    in_row: jax.Array | None


def _select(
    halves: Sequence[_Half], k: int, size: int
) -> tuple[list[_Half], list[jax.Array], list[jax.Array]]:
    """Returns the residual of each row, and the selected values and indices."""
    magnitudes = []
    for half in halves:
        magnitude = jnp.where(jnp.isnan(half.x), jnp.inf, jnp.abs(half.x))
        if half.in_row is not None:
            magnitude = jnp.where(half.in_row, magnitude, PADDING)
        magnitudes.append(magnitude)
    values, indices = [], []
    for _ in range(k):
        largest = _of_both(jnp.maximum, jnp.max, magnitudes)
        pairs = list(zip(halves, magnitudes, strict=True))
        first = [jnp.where(m == largest, half.position, float(size)) for half, m in pairs]
        index = _of_both(jnp.minimum, jnp.min, first)
        here = [half.position == index for half in halves]
        taken = [jnp.where(h, half.x, 0.0) for h, half in zip(here, halves, strict=True)]
        values.append(_of_both(jnp.add, jnp.sum, taken))
        indices.append(index)
        magnitudes = [jnp.where(h, TAKEN, m) for h, m in zip(here, magnitudes, strict=True)]
        left = zip(here, halves, strict=True)
        halves = [half._replace(x=jnp.where(h, 0.0, half.x)) for h, half in left]
    return list(halves), values, indices


def _encode(halves: Sequence[_Half]) -> tuple[jax.Array, jax.Array, jax.Array]:
    first = halves[0].x[:1]
    each = [
        half.x if half.in_row is None else jnp.where(half.in_row, half.x, first) for half in halves
    ]
    # Whether a reduction passes a NaN on depends on the device.
    found = [jnp.where(jnp.isnan(x), 1.0, 0.0) for x in each]
    nan = _of_both(jnp.maximum, jnp.max, found) > 0
    low = jnp.where(nan, jnp.nan, _of_both(jnp.minimum, jnp.min, each))
    high = jnp.where(nan, jnp.nan, _of_both(jnp.maximum, jnp.max, each))
    step = (high - low) / LEVELS
    usable = (step > 0) & (step < jnp.inf)
    levels = []
    for x in each:
        level = jnp.floor((x - low) / jnp.where(usable, step, 1.0) + 0.5)
        levels.append(jnp.where(usable, jnp.clip(level, 0.0, LEVELS), 0.0).astype(jnp.int32))
    return levels[0] | (levels[1] << 4), low, high


def _of_both(join: Any, reduce: Any, halves: Sequence[jax.Array]) -> jax.Array:
    """A reduction of both halves, ``(1, 128)``."""
    one, other = halves
    return reduce(join(one, other), axis=0, keepdims=True)
