"""The error-feedback link in one pass on GPUs, through Pallas on Triton.

A program has a few blocks. Their two halves are two arrays, as the two codes of a byte are, so
that nothing is cut or joined in registers; and every array lies in memory as the state does. In
registers a half is padded to a power of two of lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gpu_blocks
from pallas_kernels.gpu_blocks import divide
from pallas_kernels.topk_compress.reference import LEVELS, PADDING, TAKEN

MAX_K = 16  # rounds are written out, one after the other


def unsupported(shape: tuple[int, ...], size: int, k: int) -> str | None:
    """Why this kernel cannot run on a tensor of ``shape``, or None."""
    if k > MAX_K:
        return f"at most {MAX_K} elements of a block are selected; asked for {k}"
    return gpu_blocks.unsupported(shape, size, k)


def compress(
    gradient: jax.Array,
    codes: jax.Array,
    low: jax.Array,
    high: jax.Array,
    k: int,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """As :func:`pallas_kernels.topk_compress.reference.compress`."""
    n, count, half = gradient.shape[-1], low.shape[-1], codes.shape[-1]
    total, tile = low.size, gpu_blocks.per_program(2 * half)
    flat = gradient.reshape(-1), codes.reshape(-1), low.reshape(-1), high.reshape(-1)
    sent = total * k
    values, indices, new_codes, new_low, new_high = pl.pallas_call(
        functools.partial(_kernel, k=k, n=n, count=count, half=half, interpret=interpret),
        grid=(pl.cdiv(total, tile),),
        out_shape=[
            jax.ShapeDtypeStruct((sent,), jnp.float32),
            jax.ShapeDtypeStruct((sent,), jnp.int32),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[1:]),
        ],
        input_output_aliases={1: 2, 2: 3, 3: 4},
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="topk_compress",
    )(*flat)
    values, indices = (x.reshape(*low.shape, k) for x in (values, indices))
    return (
        values,
        indices,
        new_codes.reshape(codes.shape),
        new_low.reshape(low.shape),
        new_high.reshape(low.shape),
    )


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
    count: int,
    half: int,
    interpret: bool,
) -> None:
    total, tile = low_ref.shape[0], gpu_blocks.per_program(2 * half)
    block = pl.program_id(0) * tile + jnp.arange(tile, dtype=jnp.int32)
    exists = block < total
    width = gpu_blocks.padded(half)
    lane = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (tile, width))
    real = lane < half
    lanes = jnp.where(real, lane, 2 * half), jnp.where(real, lane + half, 2 * half)
    byte, stored = block[:, None] * half + lane, exists[:, None] & real
    low = plgpu.load(low_ref.at[block], mask=exists, other=0.0)[:, None]
    high = plgpu.load(high_ref.at[block], mask=exists, other=0.0)[:, None]
    code = plgpu.load(codes_ref.at[byte], mask=stored, other=0).astype(jnp.int32)
    step = divide(high - low, float(LEVELS), interpret)

    halves, in_row = [], []
    for level, position in zip((code & 15, code >> 4), lanes, strict=True):
        element, row_has_it = gpu_blocks.elements(block, position, n, count, 2 * half)
        row_has_it &= exists[:, None]
        g = plgpu.load(gradient_ref.at[element], mask=row_has_it, other=0.0)
        owed = jnp.abs(level.astype(jnp.float32) * step) + low
        halves.append(jnp.where(row_has_it, g.astype(jnp.float32) + owed, 0.0))
        in_row.append(row_has_it)

    magnitudes = [
        jnp.where(here, jnp.where(x != x, jnp.inf, jnp.abs(x)), jnp.where(real, PADDING, TAKEN))
        for x, here in zip(halves, in_row, strict=True)
    ]
    for j in range(k):
        largest = jnp.maximum(*(jnp.max(m, axis=1) for m in magnitudes))[:, None]
        index = jnp.minimum(
            *(
                jnp.min(jnp.where(m == largest, position, 2 * half), axis=1)
                for m, position in zip(magnitudes, lanes, strict=True)
            )
        )
        here = [position == index[:, None] for position in lanes]
        # One of the two is zero.
        value = jnp.add(
            *(jnp.sum(jnp.where(h, x, 0.0), axis=1) for h, x in zip(here, halves, strict=True))
        )
        plgpu.store(values_ref.at[block * k + j], value, mask=exists)
        plgpu.store(indices_ref.at[block * k + j], index, mask=exists)
        magnitudes = [jnp.where(h, TAKEN, m) for h, m in zip(here, magnitudes, strict=True)]
        halves = [jnp.where(h, 0.0, x) for h, x in zip(here, halves, strict=True)]

    # The first element of a block stands for its padding, and changes neither extreme.
    first = jnp.sum(jnp.where(lane == 0, halves[0], 0.0), axis=1)[:, None]
    halves = [jnp.where(here, x, first) for x, here in zip(halves, in_row, strict=True)]
    # Whether a reduction passes a NaN on depends on the device.
    nan = jnp.maximum(*(jnp.max(jnp.where(x != x, 1.0, 0.0), axis=1) for x in halves)) > 0
    low = jnp.where(nan, jnp.nan, jnp.minimum(*(jnp.min(x, axis=1) for x in halves)))
    high = jnp.where(nan, jnp.nan, jnp.maximum(*(jnp.max(x, axis=1) for x in halves)))
    step = divide(high - low, float(LEVELS), interpret)
    usable = ((step > 0) & (step < jnp.inf))[:, None]
    step = jnp.where(usable, step[:, None], 1.0)
    levels = []
    for x in halves:
        level = jnp.floor(divide(x - low[:, None], step, interpret) + 0.5)
        level = jnp.minimum(jnp.maximum(level, 0.0), float(LEVELS))
        levels.append(jnp.where(usable, level, 0.0).astype(jnp.int32))
    new = (levels[0] | (levels[1] << 4)).astype(jnp.uint8)
    plgpu.store(new_codes_ref.at[byte], new, mask=stored)
    plgpu.store(new_low_ref.at[block], low, mask=exists)
    plgpu.store(new_high_ref.at[block], high, mask=exists)
