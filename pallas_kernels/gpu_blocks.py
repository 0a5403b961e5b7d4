"""The blocks in which GPU kernels go through a tensor, and the arithmetic that must be exact."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

ELEMENTS = 2048  # of a program: 16 to each thread of four warps
MAX_SIZE = 4096  # elements in a block; larger ones spill registers


def unsupported(shape: tuple[int, ...], size: int, entries: int) -> str | None:
    """Why a tensor of ``shape`` does not fit the kernels, or None.

    Args:
        shape: of the tensor, whose last axis is cut into blocks.
        size: elements in a block.
        entries: sparse entries that are kept of a block.
    """
    if not 2 <= size <= MAX_SIZE:
        return f"blocks must have 2 to {MAX_SIZE} elements; these have {size}"
    if math.prod(shape) == 0:
        return f"no axis of the tensor may be empty; its shape is {shape}"
    if math.prod(shape[:-1]) * -(-shape[-1] // size) * max(size, entries) >= 2**31:
        return (
            f"offsets are 32 bits, too few for a tensor of shape {shape} with {entries} entries "
            f"for each block of {size}"
        )
    return None


def per_program(size: int) -> int:
    """Counts the blocks of ``size`` that a program has."""
    return max(1, ELEMENTS // padded(size))


def padded(size: int) -> int:
    """``size`` or the next power of two, which arrays in registers have of elements."""
    return 1 << (size - 1).bit_length()


def elements(
    block: jax.Array, position: jax.Array, n: int, count: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Offsets ``(blocks, m)`` in the flat tensor of positions in blocks, and which there are.

    Args:
        block: ``(blocks,)`` int32, counted through all rows.
        position: ``(blocks, m)`` int32, within a block; those from ``size`` on are none.
        n: elements in a row.
        count: blocks in a row.
        size: elements in a block.
    """
    column = ((block % count) * size)[:, None] + position
    return (block // count)[:, None] * n + column, (column < n) & (position < size)


def divide(x: jax.Array, y: jax.Array | float, interpret: bool) -> jax.Array:
    """``x / y``, rounded to nearest, where Triton's own division is an approximation."""
    if interpret:
        return x / y
    return _rounded("div.rn.f32 $0, $1, $2;", x, jnp.broadcast_to(jnp.float32(y), x.shape))


def root(x: jax.Array, interpret: bool) -> jax.Array:
    """The square root, rounded to nearest, where Triton's own is an approximation."""
    return jnp.sqrt(x) if interpret else _rounded("sqrt.rn.f32 $0, $1;", x)


def exact(interpret: bool) -> Mapping[str, Callable[..., jax.Array]]:
    """Maps primitives that Triton approximates or lacks to their replacements, by name."""

    def div(x: jax.Array, y: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jax.lax.div(x, y)
        x, y = jnp.broadcast_arrays(x, y)
        return divide(_float32(x), _float32(y), interpret).astype(x.dtype)

    def sqrt(x: jax.Array) -> jax.Array:
        return root(_float32(x), interpret).astype(x.dtype)

    def same(x: jax.Array) -> jax.Array:
        return x

    return {"div": div, "sqrt": sqrt, "copy": same}


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _rounded(instruction: str, *operands: jax.Array) -> jax.Array:
    (result,) = plgpu.elementwise_inline_asm(
        instruction,
        args=operands,
        constraints=",".join(["=f", *["f"] * len(operands)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)],
    )
    return result
