"""Decode, step and encode in one pass on GPUs, through Pallas on Triton.

A program has a few spans, each as long as the largest block. In registers all arrays have sizes
that are powers of two: a span is cut into units, half the smallest block, and each unit is padded.
So a block of any codec is a row of registers, and so is each half of it, which share bytes.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gpu_blocks
from pallas_kernels.blockwise_codec.reference import codecs_unsupported, uniform
from pallas_kernels.blockwise_codec.rule import Rule, evaluate
from pallas_kernels.gpu_blocks import MAX_SIZE

DTYPES = ("float32", "bfloat16", "float16")


def unsupported(codecs: Sequence[Any], inputs: Sequence[jax.Array]) -> str | None:
    """Why this kernel cannot run, or None."""
    shape = inputs[0].shape
    if not shape or 0 in shape:
        return f"the tensor needs an axis, and none that is empty; its shape is {shape}"
    reason = codecs_unsupported(codecs)
    if reason is not None:
        return reason
    sizes = [codec.blocks.layout(shape[-1]).size for codec in codecs]
    largest = max(sizes)
    if largest > MAX_SIZE:
        return f"blocks must have at most {MAX_SIZE} elements; these have {sizes}"
    if any(largest % size or (largest // size).bit_count() != 1 for size in sizes):
        return f"blocks must be 1, 2, 4, ... times as long as the shortest; these have {sizes}"
    if math.prod(shape[:-1]) * (shape[-1] + max(sizes)) >= 2**31:
        return f"offsets are 32 bits, too few for a tensor of shape {shape}"
    for x in inputs:
        if x.dtype.name not in DTYPES:
            return f"it takes float32, bfloat16 and float16; got {x.dtype}"
    return None


def tiles(codecs: Sequence[Any], inputs: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    """The arguments of the rule in the kernel: moments and gradient in float32, then others."""
    n = inputs[0].shape[-1]
    spans = Spans.of([codec.blocks.layout(n).size for codec in codecs], 1, n)
    dtypes = [jnp.dtype(jnp.float32)] * (len(codecs) + 1) + [x.dtype for x in inputs[1:]]
    return [jax.ShapeDtypeStruct(spans.shape, dtype) for dtype in dtypes]


class Spans(NamedTuple):
    """The spans of a program.

    Attributes:
        size: elements in a span, as many as in the largest block.
        unit: elements in half a block of the smallest.
        padded: elements that a unit has in registers.
        tile: spans in a program.
        rows: of the tensor.
        n: elements in a row.
    """

    size: int
    unit: int
    padded: int
    tile: int
    rows: int
    n: int

    @classmethod
    def of(cls, sizes: Sequence[int], rows: int, n: int) -> "Spans":
        """Those of a tensor that is cut into blocks of these sizes."""
        size, unit = max(sizes), min(sizes) // 2
        padded = gpu_blocks.padded(unit)
        return cls(size, unit, padded, gpu_blocks.per_program(size // unit * padded), rows, n)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a program's elements in registers."""
        return self.tile, self.size // self.unit * self.padded

    @property
    def programs(self) -> int:
        """Counts them."""
        return pl.cdiv(self.rows * pl.cdiv(self.n, self.size), self.tile)

    def cut(self, size: int, part: int | None = None) -> "Blocks":
        """The blocks of ``size`` elements of this program, or the first ``part`` of each."""
        each, units = self.size // size, (part or size) // self.unit
        block = pl.program_id(0) * (self.tile * each) + _iota(self.tile * each)[:, None]
        span, width = block // each, pl.cdiv(self.n, self.size)
        lane = _iota(units * self.padded)[None]
        row, block = span // width, span % width * each + block % each
        position = lane // self.padded * self.unit + lane % self.padded
        exists = (row < self.rows) & (block * size < self.n)
        return Blocks(row, block, position, exists, exists & (lane % self.padded < self.unit))


class Blocks(NamedTuple):
    """Blocks of one size, or the beginnings of such.

    Attributes:
        row: ``(blocks, 1)``, that of the tensor.
        number: ``(blocks, 1)``, in the row.
        position: ``(1, m)``, in the block.
        exists: ``(blocks, 1)``, whether there is such a block.
        real: ``(blocks, m)``, whether an element is one of the block's.
    """

    row: jax.Array
    number: jax.Array
    position: jax.Array
    exists: jax.Array
    real: jax.Array


def _iota(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)


class Plan(NamedTuple):
    """Holds what is static in a call.

    Attributes:
        rule: the step.
        codecs: those of the moments.
        sizes: elements in a block of each.
        spans: of a program.
        shape: of the gradient.
        shapes: of the inputs.
        interpret: whether the kernel runs as ordinary operations.
    """

    rule: Rule
    codecs: tuple[Any, ...]
    sizes: tuple[int, ...]
    spans: Spans
    shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    interpret: bool


def step(
    rule: Rule,
    codecs: tuple[Any, ...],
    whole: tuple[int, ...],
    encoded: Sequence[Any],
    inputs: Sequence[jax.Array],
    places: Sequence[jax.Array],
    words: Sequence[jax.Array],
    scalars: Sequence[jax.Array],
    *,
    replaces: int,
    interpret: bool,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """As :func:`pallas_kernels.blockwise_codec.mosaic_tpu.step`."""
    shape = inputs[0].shape
    rows, n = math.prod(shape[:-1]), shape[-1]
    sizes = tuple(codec.blocks.layout(whole[-1]).size for codec in codecs)
    spans = Spans.of(sizes, rows, n)
    read = [_in_memory(x) for x in scalars]
    if places:
        row, column = places
        first_column = column.reshape(-1)[:1]
        starts = jnp.broadcast_to(row, (*shape[:-1], 1)).reshape(-1) + first_column
        read += [starts, jnp.concatenate(words)]
    output = jax.ShapeDtypeStruct((rows * n,), rule.results[0].dtype)
    stored, structure = jax.tree.flatten(tuple(encoded))
    first = len(read) + len(inputs)
    aliases = {first + i: 1 + i for i in range(len(stored))}
    if inputs[replaces].shape == shape and inputs[replaces].dtype == output.dtype:
        aliases[len(read) + replaces] = 0
    flat = [x.reshape(-1) for x in (*read, *inputs, *stored)]
    shapes = tuple(x.shape for x in inputs)
    plan = Plan(rule, codecs, sizes, spans, shape, shapes, interpret)
    new, *news = pl.pallas_call(
        functools.partial(_kernel, plan=plan, draws=bool(places)),
        grid=(spans.programs,),
        out_shape=[output, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[first:])],
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="blockwise_codec",
    )(*flat)
    news = [x.reshape(before.shape) for x, before in zip(news, stored, strict=True)]
    return new.reshape(shape), structure.unflatten(news)


def _in_memory(scalar: jax.Array) -> jax.Array:
    """A scalar in a dtype in which it can be read."""
    return scalar.astype(jnp.int32) if scalar.dtype == jnp.bool_ else scalar


def _kernel(*refs, plan: Plan, draws: bool) -> None:
    remaining = iter(refs)

    def take(count: int) -> list[Any]:
        return [next(remaining) for _ in range(count)]

    scalars = [
        ref[0].astype(x.dtype) if x.dtype != jnp.bool_ else ref[0] != 0
        for ref, x in zip(take(len(plan.rule.scalars)), plan.rule.scalars, strict=True)
    ]
    draw_refs, input_refs = take(2 if draws else 0), take(len(plan.shapes))
    stored = [take(1 + codec.statistics) for codec in plan.codecs]
    (output_ref,) = take(1)
    new = [take(1 + codec.statistics) for codec in plan.codecs]

    spans, exact = plan.spans, gpu_blocks.exact(plan.interpret)
    whole = spans.cut(spans.size)
    column = whole.number * spans.size + whole.position
    in_row = whole.real & (column < spans.n)
    inputs = []
    for ref, shape in zip(input_refs, plan.shapes, strict=True):
        at = jnp.broadcast_to(_offset(whole.row, column, shape, plan.shape), spans.shape)
        inputs.append(plgpu.load(ref.at[at], mask=in_row, other=0.0))
    moments = [_decode(plan, which, refs) for which, refs in enumerate(stored)]
    inputs[0] = inputs[0].astype(jnp.float32)
    output, *moments = plan.rule(scalars, [*moments, *inputs], exact)
    plgpu.store(output_ref.at[whole.row * spans.n + column], output, mask=in_row)
    drawn = 0
    for which, (codec, x, refs) in enumerate(zip(plan.codecs, moments, new, strict=True)):
        xi = None
        if codec.needs_key:
            starts_ref, words_ref = draw_refs
            start = plgpu.load(starts_ref.at[whole.row], mask=whole.exists, other=0)
            low, high = words_ref[2 * drawn], words_ref[2 * drawn + 1]
            xi = jnp.where(in_row, uniform(start + column, low, high), 0.0)
            drawn += 1
        _encode(plan, which, jnp.where(in_row, x.astype(jnp.float32), 0.0), xi, refs)


def _offset(
    row: jax.Array, column: jax.Array, shape: tuple[int, ...], whole: tuple[int, ...]
) -> jax.Array:
    """Returns the offsets of an array that broadcasts against one of shape ``whole``."""
    *lead, width = shape
    offset, stride, below = (column if width > 1 else 0), width, 1
    if tuple(lead) == whole[:-1]:
        return offset + row * stride
    for size, length in zip(reversed(lead), reversed(whole[:-1]), strict=False):
        if size > 1:
            offset += row // below % length * stride
        stride, below = stride * size, below * length
    return offset + row * 0


def _decode(plan: Plan, which: int, refs: Sequence[Any]) -> jax.Array:
    """A stored moment."""
    codec, size, (codes_ref, *per_block) = plan.codecs[which], plan.sizes[which], refs
    blocks, count = plan.spans.cut(size), pl.cdiv(plan.spans.n, size)
    block = blocks.row * count + blocks.number
    share = 8 // codec.bits
    byte = block * (size // share) + blocks.position % (size // share)
    codes = plgpu.load(codes_ref.at[byte], mask=blocks.real, other=0).astype(jnp.int32)
    if share == 2:
        codes = jnp.where(blocks.position < size // 2, codes & 15, codes >> 4)
    statistics = [
        _float32(plgpu.load(ref.at[block], mask=blocks.exists, other=0)) for ref in per_block
    ]
    values = evaluate(codec.values_of, gpu_blocks.exact(plan.interpret), codes, statistics)
    return values.reshape(plan.spans.shape)


def _encode(
    plan: Plan, which: int, x: jax.Array, xi: jax.Array | None, refs: Sequence[Any]
) -> None:
    """Stores a moment, which is zero where there are no elements."""
    codec, size, (codes_ref, *per_block) = plan.codecs[which], plan.sizes[which], refs
    blocks, count = plan.spans.cut(size), pl.cdiv(plan.spans.n, size)
    block, exact = blocks.row * count + blocks.number, gpu_blocks.exact(plan.interpret)
    x = x.reshape(blocks.real.shape)
    xi = xi if xi is None else xi.reshape(x.shape)
    statistics = evaluate(codec.measure, exact, x)
    codes = evaluate(codec.codes_of, exact, x, statistics, xi)
    if codec.bits == 4:
        halves = codes.reshape(len(x), 2, x.shape[1] // 2)
        shift = 4 * jax.lax.broadcasted_iota(jnp.int32, halves.shape, 1)
        codes, blocks = jnp.sum(halves << shift, axis=1), plan.spans.cut(size, size // 2)
    byte = block * (size * codec.bits // 8) + blocks.position
    plgpu.store(codes_ref.at[byte], codes.astype(jnp.uint8), mask=blocks.real)
    for ref, number in zip(per_block, statistics, strict=True):
        number = number.astype(jnp.int32) if ref.dtype == jnp.uint8 else number
        plgpu.store(ref.at[block], number.astype(ref.dtype), mask=blocks.exists)


def _float32(x: jax.Array) -> jax.Array:
    return (x.astype(jnp.int32) if x.dtype == jnp.uint8 else x).astype(jnp.float32)
