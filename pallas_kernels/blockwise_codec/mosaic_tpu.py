"""Decode, step and encode in one pass on TPUs.

A tile has up to 128 rows of the tensor on sublanes and whole blocks of each on lanes, and is
worked on in pieces that fit in registers: two registers' lanes where blocks fill them, and
otherwise one block. What there is per block or per row lies with the rows on lanes, as the
compiler itself lays it out, and is turned once for 128 rows.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blockwise_codec.piece import Piece, Plan, iota
from pallas_kernels.blockwise_codec.reference import codecs_unsupported, uniform
from pallas_kernels.blockwise_codec.rule import Rule
from pallas_kernels.blockwise_codec.span import Block
from pallas_kernels.blockwise_codec.tiling import PIECE, Tiling, tiling
from pallas_kernels.tpu_tiles import ENOUGH, LANES, ROWS, cost, float32

OPERATIONS = 200  # for each element, about
SPARE = 3 * 2**20  # bytes of ENOUGH for what is not fetched


def unsupported(codecs: Sequence[Any], inputs: Sequence[jax.Array]) -> str | None:
    """Why this kernel cannot run, or None."""
    shape = inputs[0].shape
    if len(shape) < 2 or 0 in shape:
        return f"the tensor needs two axes or more, none of them empty; its shape is {shape}"
    if math.prod(shape[:-2]) > 1 and shape[-2] < PIECE[0]:
        return f"the last axis but one needs {PIECE[0]} elements; the shape is {shape}"
    reason = codecs_unsupported(codecs)
    if reason is not None:
        return reason
    tiles = _tiling(codecs, shape[-1], shape[-1])
    if isinstance(tiles, str):
        return tiles
    if len(inputs) > LANES:
        return f"there is room for {LANES} numbers for each row of a tile, not for {len(inputs)}"
    for index, x in enumerate(inputs):
        half = index == 0 and x.dtype == jnp.float16
        if x.dtype not in (jnp.float32, jnp.bfloat16) and not half:
            return f"it takes float32 and bfloat16, and float16 gradients; got {x.dtype}"
    return None


def tiles(codecs: Sequence[Any], inputs: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    """The arguments of the rule in the kernel: moments and gradient in float32, then others."""
    dtypes = [jnp.dtype(jnp.float32)] * (len(codecs) + 1) + [x.dtype for x in inputs[1:]]
    piece = _tiles(codecs, inputs[0].shape[-1], inputs[0].shape[-1]).piece
    return [jax.ShapeDtypeStruct(piece, dtype) for dtype in dtypes]


def wrapped(number: int) -> np.int32:
    """``number`` modulo 2^32."""
    return np.uint32(number % 2**32).view(np.int32)


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
    """As :func:`pallas_kernels.blockwise_codec.reference.step`.

    Args:
        rule: the step.
        codecs: those of the moments.
        whole: the shape of the leaf, of which the arrays may hold a shard.
        encoded: as the reference's.
        inputs: as the reference's.
        places: the place of each row in the whole leaf, and that of each column; if they matter.
        words: for each codec that draws random numbers the two words of its key.
        scalars: of the rule.
        replaces: the input whose place the output takes.
        interpret: runs the kernel as ordinary operations, on any device.
    """
    shape = inputs[0].shape
    outer, rows = _folded(shape, whole)
    n = shape[-1]
    tiles = _tiles(codecs, whole[-1], n)
    width, parts = tiles.width, min(ROWS // tiles.rows, -(-rows // tiles.rows))
    last = pl.cdiv(rows, tiles.rows) - 1
    sizes = tuple(codec.blocks.layout(whole[-1]).size for codec in codecs)
    calls = _Operands()
    if places:
        row, column = places
        starts = jnp.broadcast_to(row, (*shape[:-1], 1)).reshape(outer, rows)[:, 0]
        calls.scalars(starts, jnp.concatenate([column.reshape(-1)[:1], *words]))
    for scalar in scalars:
        calls.scalars(_in_memory(scalar).reshape(1))

    def elements(width: int) -> pl.BlockSpec:
        # A part behind the last row is the last one again, which moves nothing.
        def place(o: Any, r: Any, b: Any, part: Any) -> tuple[Any, ...]:
            return o, jnp.minimum(r * parts + part, last), b

        return pl.BlockSpec((None, tiles.rows, width), place)

    result = jax.ShapeDtypeStruct((outer, rows, n), rule.results[0].dtype)
    calls.result(result, elements(width))
    kinds = []
    for index, x in enumerate(inputs):
        if x.dtype == jnp.float16:
            x = jax.lax.bitcast_convert_type(x, jnp.int16)
        x, kind = _spread(x, shape, outer, rows)
        each = 1 if x.shape[0] > 1 else 0
        kinds.append(kind)
        if kind == "all":
            taken = index == replaces and x.dtype == result.dtype
            x = x if interpret else _in_main_memory(x)
            calls.add(x, elements(width), 0 if taken else None)
        elif kind == "row":
            calls.add(x, pl.BlockSpec((None, 1, width), lambda o, r, b, p, e=each: (o * e, 0, b)))
        else:
            spec = pl.BlockSpec((None, 1, ROWS), lambda o, r, b, p, e=each: (o * e, 0, r))
            calls.add(x.swapaxes(1, 2), spec)
    blocks = []
    for codec, size, (codes, *statistics) in zip(codecs, sizes, encoded, strict=True):
        blocks.append(min(statistics[0].shape[-1], width // size))
        spec = pl.BlockSpec((None, blocks[-1], ROWS), lambda o, r, b, p: (o, b, r))
        codes = codes.reshape(outer, rows, codes.shape[-1])
        codes = codes if interpret else _in_main_memory(codes)
        calls.in_place(codes, elements(width * codec.bits // 8))
        for x in statistics:
            calls.in_place(x.reshape(outer, rows, x.shape[-1]).swapaxes(1, 2), spec)

    plan = Plan(rule, codecs, sizes, tuple(blocks), tuple(kinds), n, tiles, wrapped(whole[-1]))
    output, *new = pl.pallas_call(
        functools.partial(_kernel, plan=plan, draws=bool(places), rows=rows),
        grid=(outer, pl.cdiv(rows, ROWS), pl.cdiv(n, width), parts),
        in_specs=calls.specs,
        out_specs=calls.result_specs,
        out_shape=calls.results,
        input_output_aliases=calls.aliases,
        scratch_shapes=[pltpu.VMEM((plan.per_row + 1, ROWS, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            # Parts of 128 rows share what there is per block.
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=calls.memory,
        ),
        cost_estimate=cost(OPERATIONS * outer * rows * n, (*calls.arrays, *calls.results)),
        interpret=interpret,
        name="blockwise_codec",
    )(*calls.arrays)
    news = iter(new)
    stored = []
    for before in encoded:
        codes, *statistics = before
        codes = next(news).reshape(codes.shape)
        statistics = [next(news).swapaxes(1, 2).reshape(x.shape) for x in statistics]
        stored.append(type(before)(codes, *statistics))
    return output.reshape(shape), tuple(stored)


def _in_main_memory(x: jax.Array) -> jax.Array:
    """``x``, not to be fetched ahead of time by the compiler: the kernel fetches it by itself.

    Where the compiler fetches operands of many leaves, and writes results back, it has temporaries.
    """
    *_, rows, width = x.shape
    if width % LANES and rows % LANES == 0:
        return x  # The compiler has rows on lanes, and had better turn them on the chip.
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


class _Operands:
    """Arguments and results of a kernel, in order."""

    def __init__(self) -> None:
        """None yet."""
        self.arrays: list[jax.Array] = []
        self.specs: list[pl.BlockSpec] = []
        self.results: list[jax.ShapeDtypeStruct] = []
        self.result_specs: list[pl.BlockSpec] = []
        self.aliases: dict[int, int] = {}

    def scalars(self, *vectors: jax.Array) -> None:
        """Adds vectors of numbers that are read one by one."""
        for vector in vectors:
            self.add(vector, pl.BlockSpec(memory_space=pltpu.SMEM))

    def add(self, x: jax.Array, spec: pl.BlockSpec, result: int | None = None) -> None:
        """Adds an array, in whose place a result may be written."""
        if result is not None:
            self.aliases[len(self.arrays)] = result
        self.arrays.append(x)
        self.specs.append(spec)

    @property
    def memory(self) -> int | None:
        """Bytes on the chip to ask for, or None if what the compiler gives by itself will do."""
        arrays = zip((*self.arrays, *self.results), (*self.specs, *self.result_specs), strict=True)
        tiles = (
            math.prod(n for n in spec.block_shape if isinstance(n, int)) * x.dtype.itemsize
            for x, spec in arrays
            if spec.block_shape is not None
        )
        # Each tile twice, as the next one is fetched meanwhile.
        bytes_needed = 2 * sum(tiles)
        return bytes_needed + SPARE if bytes_needed + SPARE > ENOUGH else None

    def result(self, result: jax.ShapeDtypeStruct, spec: pl.BlockSpec) -> None:
        """Adds a result."""
        self.results.append(result)
        self.result_specs.append(spec)

    def in_place(self, x: jax.Array, spec: pl.BlockSpec) -> None:
        """Adds an array that is updated."""
        self.add(x, spec, len(self.results))
        self.result(jax.ShapeDtypeStruct(x.shape, x.dtype), spec)


def _folded(shape: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, int]:
    """The leading axes and the rows, which many short axes are made into one of."""
    *lead, rows, _ = shape
    # Rows of whole registers, and places that are at equal distances.
    if rows < ROWS and rows % PIECE[0] == 0 and shape[1:] == whole[1:]:
        return 1, math.prod(lead) * rows
    return math.prod(lead), rows


def _spread(x: jax.Array, shape: tuple[int, ...], outer: int, rows: int) -> tuple[jax.Array, str]:
    """An input with three axes, the first and one of the others of size 1 if they can be."""
    *lead, height, width = x.shape
    folded = outer != math.prod(shape[:-2])
    if width == 1:
        if folded or math.prod(lead) > 1:
            x = jnp.broadcast_to(x, (*shape[:-1], 1))
            return x.reshape(outer, rows, 1), "column"
        return jnp.broadcast_to(x, (*lead, rows, 1)).reshape(1, rows, 1), "column"
    if height == 1 and shape[-2] > 1 and (math.prod(lead) == 1 or not folded):
        if math.prod(lead) > 1:
            x = jnp.broadcast_to(x, (*shape[:-2], 1, width))
        return x.reshape(-1, 1, width), "row"
    return jnp.broadcast_to(x, shape).reshape(outer, rows, width), "all"


def _in_memory(scalar: jax.Array) -> jax.Array:
    """A scalar in a dtype in which it can be read."""
    return scalar if scalar.dtype == jnp.int32 else scalar.astype(jnp.float32)


def _tiling(codecs: Sequence[Any], whole: int, n: int) -> Tiling | str:
    """The tiles for ``n`` elements of rows of ``whole``, or why there are none."""
    sizes = [codec.blocks.layout(whole).size for codec in codecs]
    bits, statistics = [c.bits for c in codecs], [c.statistics for c in codecs]
    return tiling(sizes, bits, statistics, n)


def _tiles(codecs: Sequence[Any], whole: int, n: int) -> Tiling:
    tiles = _tiling(codecs, whole, n)
    assert isinstance(tiles, Tiling)
    return tiles


def _kernel(*refs, plan: Plan, draws: bool, rows: int) -> None:
    remaining = iter(refs)

    def take(count: int) -> list[Any]:
        return [next(remaining) for _ in range(count)]

    def take_moments() -> list[list[Any]]:
        return [take(1 + codec.statistics) for codec in plan.codecs]

    tiles = plan.tiling
    draw_refs = take(2) if draws else []
    scalar_refs, input_refs = take(len(plan.rule.scalars)), take(len(plan.kinds))
    stored = take_moments()
    (output_ref,) = take(1)
    new = take_moments()
    (columns_ref,) = take(1)
    leading, part = pl.program_id(0), pl.program_id(3)
    part_row = part * tiles.rows
    first_row, first_column = pl.program_id(1) * ROWS + part_row, pl.program_id(2) * tiles.width

    @pl.when(part == 0)
    def _() -> None:
        statistics = [ref for refs in stored for ref in refs[1:]]
        for index, ref in enumerate(statistics):
            columns_ref[index] = _turned([ref[...]])
        kinds = zip(input_refs, plan.kinds, strict=True)
        per_row = [ref[...] for ref, kind in kinds if kind == "column"]
        if per_row:
            columns_ref[plan.per_row] = _turned(per_row)

    def stored_from(
        number: Any, row: jax.Array, moments: Sequence[jax.Array]
    ) -> Iterator[tuple[int, jax.Array, jax.Array | None, Any]]:
        """New moments, zero behind the end of the row, the random numbers, and the codes."""
        column = number * tiles.unit + iota(tiles.piece, 1)
        place, drawn = first_column + column, 0
        for which, (codec, x, refs) in enumerate(zip(plan.codecs, moments, new, strict=True)):
            xi = None
            if codec.needs_key:
                xi = _random(row * plan.stride + place, leading, drawn, *draw_refs)
                drawn += 1
            if plan.n % plan.sizes[which]:
                x = jnp.where(place < plan.n, x, 0.0)
            if tiles.piece[1] != tiles.unit:
                x = jnp.where(iota(tiles.piece, 1) < tiles.unit, x, 0.0)
            yield which, x, xi, refs[0]

    def group(i: jax.Array, _: None) -> None:
        here = pl.ds(pl.multiple_of(i * PIECE[0], PIECE[0]), PIECE[0])
        numbers = pl.ds(pl.multiple_of(part_row + i * PIECE[0], PIECE[0]), PIECE[0])
        row = first_row + i * PIECE[0] + iota(tiles.piece, 0)
        scalars = [
            _as_before(ref[0], x.dtype, tiles.piece)
            for ref, x in zip(scalar_refs, plan.rule.scalars, strict=True)
        ]

        def step(piece: Piece | Block, number: Any, columns: Any) -> None:
            moments = [piece.decode(which, refs[0], columns) for which, refs in enumerate(stored)]
            output, *moments = plan.rule(scalars, [*moments, *piece.inputs(input_refs, columns)])
            piece.write(output_ref, output)
            for which, x, xi, codes_ref in stored_from(number, row, moments):
                piece.encode(which, x, xi, codes_ref, columns)

        if tiles.by_block:

            def block(number: jax.Array, _: None) -> None:
                step(Block(plan, here, numbers, number), number, columns_ref)

            jax.lax.fori_loop(0, plan.blocks[0], block, None)
            return
        columns = [columns_ref[index, numbers, :] for index in range(plan.per_row + 1)]
        # What one piece stores no other reads.
        for number in range(tiles.width // PIECE[1]):
            step(Piece(plan, here, number), number, columns)
        for index in range(plan.per_row):
            columns_ref[index, numbers, :] = columns[index]

    @pl.when(first_row < rows)
    def _() -> None:
        jax.lax.fori_loop(0, -(-min(rows, tiles.rows) // PIECE[0]), group, None)

    @pl.when(part == pl.num_programs(3) - 1)
    def _() -> None:
        index = 0
        for refs, blocks in zip(new, plan.blocks, strict=True):
            for ref in refs[1:]:
                x = columns_ref[index].T[:blocks]
                ref[...] = x.astype(jnp.int32).astype(ref.dtype) if ref.dtype == jnp.uint8 else x
                index += 1


def _random(
    place: jax.Array, leading: jax.Array, drawn: int, starts_ref: Any, words_ref: Any
) -> jax.Array:
    """Random numbers for places in an outer slice, with one of the keys."""
    place = place + (starts_ref[leading] + words_ref[0])
    return uniform(place, words_ref[1 + 2 * drawn], words_ref[2 + 2 * drawn])


def _turned(numbers: Sequence[jax.Array]) -> jax.Array:
    """Arrays ``(m, 128)``, one below the other, as columns of 128 rows."""
    numbers = [float32(x.astype(jnp.int32) if x.dtype == jnp.uint8 else x) for x in numbers]
    filled = sum(x.shape[0] for x in numbers)
    padding = [jnp.zeros((LANES - filled, ROWS))] if filled < LANES else []
    return jnp.concatenate([*numbers, *padding], axis=0).T


def _as_before(scalar: jax.Array, dtype: Any, piece: tuple[int, int]) -> jax.Array:
    """A scalar, or all of a piece where the processor has no scalars of its dtype."""
    return scalar if scalar.dtype == dtype else jnp.full(piece, scalar).astype(dtype)
