"""An element-wise step on a large leaf, some rows at a time, in place."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from microadam_jax.trees import KeyPath, leaf_key

CHUNK = 2**20  # elements; the temporaries of one chunk fit in a CPU's cache
SHARDS = 256  # a chunk has rows of each of this many shards of the axis, where they divide it

Arrays = tuple[jax.Array, ...]
Step = Callable[[jax.Array, Arrays, Arrays], tuple[jax.Array, Arrays]]


def in_chunks(step: Step, count: jax.Array, carried: Arrays, inputs: Arrays) -> tuple[Any, Arrays]:
    """Runs ``step`` on chunks of a leaf's rows, so that its temporaries are those of a chunk.

    The compiler does not fuse decoding, update and encoding into one pass by itself: it writes
    whole decoded moments. Rows are dealt out to the chunks like cards, so that each device holds
    an equal part of every chunk however the axis is sharded, and nothing has to move.

    Args:
        step: from the chunk's number and its part of ``carried`` and ``inputs`` to an output of the
            shape of the first input, and the new ``carried``; a row's results must not depend on
            other rows.
        count: the step count of the optimizer.
        carried: arrays to update in place, with the leaf's axes before the last.
        inputs: arrays to read, the first of the leaf's shape; their axes of size 1 are broadcast.

    Returns:
        The output, and the new ``carried``.
    """
    leaf = inputs[0]
    axis, chunks = _chunking(leaf)
    if chunks == 1:
        return in_one(step, count, carried, inputs)
    rows = leaf.shape[axis]
    carried_parts = tuple(_deal(x, axis, chunks, rows) for x in carried)
    input_parts = tuple(_deal(x, axis, chunks, rows) for x in inputs)

    def take(x: jax.Array, chunk: jax.Array, whole: jax.Array) -> jax.Array:
        if whole.shape[axis] != rows:
            return x
        return jax.lax.dynamic_index_in_dim(x, chunk, axis + 1, keepdims=False)

    def put(x: jax.Array, part: jax.Array, chunk: jax.Array, whole: jax.Array) -> jax.Array:
        if whole.shape[axis] != rows:
            return x
        return jax.lax.dynamic_update_index_in_dim(x, part, chunk, axis + 1)

    def body(chunk: jax.Array, parts: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
        output, state = parts
        arguments = (
            chunk,
            tuple(take(x, chunk, whole) for x, whole in zip(state, carried, strict=True)),
            tuple(take(x, chunk, whole) for x, whole in zip(input_parts, inputs, strict=True)),
        )
        new_output, new_state = _apart(step, count, arguments)
        state = tuple(
            put(x, new, chunk, whole)
            for x, new, whole in zip(state, new_state, carried, strict=True)
        )
        return put(output, new_output, chunk, leaf), state

    shape, _ = jax.eval_shape(step, jnp.int32(0), carried, inputs)
    output = jnp.zeros_like(input_parts[0], dtype=shape.dtype)
    output, state = jax.lax.fori_loop(0, chunks, body, (output, carried_parts))
    return output.reshape(leaf.shape), tuple(
        x.reshape(whole.shape) for x, whole in zip(state, carried, strict=True)
    )


def in_one(step: Step, count: jax.Array, carried: Arrays, inputs: Arrays) -> tuple[Any, Arrays]:
    """As :func:`in_chunks`, for what cannot be cut: all at once."""
    del count
    return step(jnp.int32(0), carried, inputs)


def chunk_key(seed: ArrayLike, count: jax.Array, path: KeyPath, chunk: jax.Array) -> jax.Array:
    """A random key for one chunk of the leaf at ``path`` in step ``count``."""
    return jax.random.fold_in(leaf_key(seed, count, path), chunk)


def _apart(step: Step, count: jax.Array, arguments: Any) -> Any:
    """``step``, and on CPUs kept from being fused with the reads and writes around it.

    There a fused read of the state would come after its write in place, so that the compiler
    copies the whole state in every round. The branch that is never taken keeps them apart.
    """
    shapes = jax.eval_shape(step, *arguments)

    def never(*_: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    if any(any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(arguments)):
        return step(*arguments)
    return jax.lax.platform_dependent(
        *arguments,
        cpu=lambda *arguments: jax.lax.cond(count >= 0, step, never, *arguments),
        default=step,
    )


def _chunking(leaf: jax.Array) -> tuple[int, int]:
    """The axis to cut, and into how many chunks."""
    wanted = math.ceil(leaf.size / CHUNK)
    spec = (*jax.typeof(leaf).sharding.spec, *[None] * leaf.ndim)
    mesh = jax.typeof(leaf).sharding.mesh
    best = (0, 1)
    for axis, rows in enumerate(leaf.shape[:-1]):
        names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
        shards = math.prod(mesh.shape[name] for name in names if name)
        dealt = rows // math.lcm(math.gcd(rows, SHARDS), shards)
        chunks = max((c for c in _divisors(dealt) if c <= 2 * wanted), default=1)
        if wanted > 1 and chunks > best[1]:
            best = (axis, chunks)
    return best


def _divisors(n: int) -> Sequence[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _deal(x: jax.Array, axis: int, chunks: int, rows: int) -> jax.Array:
    """Cuts an axis so that its rows lie in turn in each of the chunks."""
    if x.shape[axis] != rows:
        return x
    shape = (*x.shape[:axis], rows // chunks, chunks, *x.shape[axis + 1 :])
    return x.reshape(shape)
