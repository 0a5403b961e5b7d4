"""The error-feedback step in one pass on GPUs, as a Triton kernel.

A program has a few blocks. Their two halves are two arrays, as the two codes of a byte are.
Importing this module needs Triton.
"""

import triton
import triton.language as tl


def compress_kernel(
    gradient_ref,
    codes_ref,
    low_ref,
    high_ref,
    values_ref,
    indices_ref,
    total: tl.constexpr,
    count: tl.constexpr,
    n: tl.constexpr,
    half: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
    k: tl.constexpr,
):
    """Compresses ``tile`` blocks.

    Args:
        gradient_ref: ``(rows * n,)`` float32, bfloat16 or float16.
        codes_ref: ``(total * half,)`` uint8, updated.
        low_ref: ``(total,)`` float32, updated.
        high_ref: ``(total,)`` float32, updated.
        values_ref: ``(total * k,)`` float32, written.
        indices_ref: ``(total * k,)`` int32, written.
        total: blocks in all rows.
        count: blocks in a row.
        n: elements in a row.
        half: elements in half a block.
        width: ``half`` or the next power of two, which arrays in registers have of elements.
        tile: blocks in a program.
        k: selected entries of a block.
    """
    block = tl.program_id(0) * tile + tl.arange(0, tile)
    exists = block < total
    lane = tl.arange(0, width)[None, :] + tl.zeros((tile, width), tl.int32)
    real = lane < half
    byte = block[:, None] * half + lane
    stored = exists[:, None] & real
    # Positions of the halves; those of no element lie behind all.
    first, second = tl.where(real, lane, 2 * half), tl.where(real, lane + half, 2 * half)
    start, column = (block // count) * n, (block % count) * 2 * half
    in_first = exists[:, None] & real & (column[:, None] + first < n)
    in_second = exists[:, None] & real & (column[:, None] + second < n)
    at = (start + column)[:, None]
    x = tl.load(gradient_ref + at + first, mask=in_first, other=0.0).to(tl.float32)
    y = tl.load(gradient_ref + at + second, mask=in_second, other=0.0).to(tl.float32)
    low = tl.load(low_ref + block, mask=exists, other=0.0)
    high = tl.load(high_ref + block, mask=exists, other=0.0)
    code = tl.load(codes_ref + byte, mask=stored, other=0).to(tl.int32)

    step = tl.div_rn(high - low, tl.full((tile,), 15.0, tl.float32))[:, None]
    # The absolute value changes nothing and keeps product and sum from being one operation.
    x = tl.where(in_first, x + (tl.abs((code & 15).to(tl.float32) * step) + low[:, None]), 0.0)
    y = tl.where(in_second, y + (tl.abs((code >> 4).to(tl.float32) * step) + low[:, None]), 0.0)

    # Below every magnitude stand padding, -1, and what is no element or taken, -2.
    none = tl.where(real, -1.0, -2.0)
    in_x = tl.where(in_first, tl.where(x != x, float("inf"), tl.abs(x)), none)
    in_y = tl.where(in_second, tl.where(y != y, float("inf"), tl.abs(y)), none)
    for j in tl.static_range(k):
        largest = tl.maximum(tl.max(in_x, axis=1), tl.max(in_y, axis=1))[:, None]
        index = tl.minimum(
            tl.min(tl.where(in_x == largest, first, 2 * half), axis=1),
            tl.min(tl.where(in_y == largest, second, 2 * half), axis=1),
        )
        here, there = first == index[:, None], second == index[:, None]
        # One of the two sums is zero.
        value = tl.sum(tl.where(here, x, 0.0), axis=1) + tl.sum(tl.where(there, y, 0.0), axis=1)
        tl.store(values_ref + block * k + j, value, mask=exists)
        tl.store(indices_ref + block * k + j, index, mask=exists)
        in_x, in_y = tl.where(here, -2.0, in_x), tl.where(there, -2.0, in_y)
        x, y = tl.where(here, 0.0, x), tl.where(there, 0.0, y)

    # The first element of a block stands for its padding, and changes neither extreme.
    head = tl.sum(tl.where(lane == 0, x, 0.0), axis=1)[:, None]
    x, y = tl.where(in_first, x, head), tl.where(in_second, y, head)
    # Whether a reduction passes a NaN on depends on the device.
    nan_x = tl.max(tl.where(x != x, 1, 0), axis=1)
    nan_y = tl.max(tl.where(y != y, 1, 0), axis=1)
    nan = (nan_x + nan_y) > 0
    low = tl.where(nan, float("nan"), tl.minimum(tl.min(x, axis=1), tl.min(y, axis=1)))
    high = tl.where(nan, float("nan"), tl.maximum(tl.max(x, axis=1), tl.max(y, axis=1)))
    step = tl.div_rn(high - low, tl.full((tile,), 15.0, tl.float32))
    usable = (step > 0) & (step < float("inf"))
    divisor = tl.where(usable, step, 1.0)[:, None] + tl.zeros((tile, width), tl.float32)
    x = tl.floor(tl.div_rn(x - low[:, None], divisor) + 0.5)
    y = tl.floor(tl.div_rn(y - low[:, None], divisor) + 0.5)
    x = tl.where(usable[:, None], tl.minimum(tl.maximum(x, 0.0), 15.0), 0.0)
    y = tl.where(usable[:, None], tl.minimum(tl.maximum(y, 0.0), 15.0), 0.0)
    code = x.to(tl.int32) | (y.to(tl.int32) << 4)
    tl.store(codes_ref + byte, code.to(tl.uint8), mask=stored)
    tl.store(low_ref + block, low, mask=exists)
    tl.store(high_ref + block, high, mask=exists)


compiled_kernel = triton.jit(compress_kernel)
