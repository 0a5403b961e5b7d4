"""An element-wise step on the leaves of a tree: one after another, large ones in chunks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from microadam_jax.trees import KeyPath, leaf_key

CHUNK = 2**17  # elements that chunks have about; the temporaries fit in a CPU's cache
LARGEST = 2**20  # elements of a chunk, unless there are sixteen of them
# A chunk has rows of each of this many shards of the axis: the first that gives small chunks.
SHARDS = (256, 64, 16)

Arrays = tuple[jax.Array, ...]
Step = Callable[[jax.Array, Arrays, Arrays], tuple[jax.Array, Arrays]]


class Turns:
    """Takes leaves in turn, so that the temporaries of one are gone when the next begins.

    The compiler does not fuse decoding, update and encoding into one pass by itself: it writes
    whole decoded moments, and on CPUs those of all leaves at once.

    Args:
        count: the optimizer's step count.
    """

    def __init__(self, count: jax.Array) -> None:
        """Begins with the first leaf."""
        self._turn = count

    def take(
        self, step: Step, carried: Arrays, inputs: Arrays, *, chunkable: bool = True
    ) -> tuple[jax.Array, Arrays]:
        """Runs ``step`` on a leaf, in place and in chunks if it is large.

        Rows are dealt out to the chunks like cards, so that each device holds an equal part of
        every chunk however the axis is sharded, and nothing has to move.

        Args:
            step: from the chunk's number and its part of ``carried`` and ``inputs`` to an output
                of the shape of the first input, and the new ``carried``.
            carried: arrays to update in place, with the leaf's axes before the last.
            inputs: arrays to read, the first of the leaf's shape; axes of size 1 are broadcast.
                The output takes the place of the first, if it has its dtype.
            chunkable: whether a row's results do not depend on other rows.

        Returns:
            The output, and the new ``carried``.
        """
        axis, chunks = _chunking(inputs[0]) if chunkable else (0, 1)
        if chunks == 1:
            (output, state), self._turn = _apart(step, self._turn, (jnp.int32(0), carried, inputs))
            return output, state
        return self._in_chunks(step, carried, inputs, axis, chunks)

    def _in_chunks(
        self, step: Step, carried: Arrays, inputs: Arrays, axis: int, chunks: int
    ) -> tuple[jax.Array, Arrays]:
        leaf, rest = inputs[0], inputs[1:]
        rows = leaf.shape[axis]
        shape, _ = jax.eval_shape(step, jnp.int32(0), carried, inputs)
        # Where the gradient is read for the last time, the update is written.
        in_place = shape.dtype == leaf.dtype

        def deal(x: jax.Array) -> jax.Array:
            if x.shape[axis] != rows:
                return x
            return x.reshape(*x.shape[:axis], rows // chunks, chunks, *x.shape[axis + 1 :])

        def take(x: jax.Array, whole: jax.Array, chunk: jax.Array) -> jax.Array:
            if whole.shape[axis] != rows:
                return x
            return jax.lax.dynamic_index_in_dim(x, chunk, axis + 1, keepdims=False)

        def put(x: jax.Array, whole: jax.Array, part: jax.Array, chunk: jax.Array) -> jax.Array:
            if whole.shape[axis] != rows:
                return x
            return jax.lax.dynamic_update_index_in_dim(x, part, chunk, axis + 1)

        def parts(xs: Arrays, wholes: Arrays, chunk: jax.Array) -> Arrays:
            return tuple(take(x, whole, chunk) for x, whole in zip(xs, wholes, strict=True))

        dealt_leaf, dealt_rest = deal(leaf), tuple(map(deal, rest))

        def body(chunk: jax.Array, before: Any) -> Any:
            output, state, turn = before
            first = take(output if in_place else dealt_leaf, leaf, chunk)
            arguments = (
                chunk,
                parts(state, carried, chunk),
                (first, *parts(dealt_rest, rest, chunk)),
            )
            (new_output, new_state), turn = _apart(step, turn, arguments)
            state = tuple(
                put(x, whole, new, chunk)
                for x, whole, new in zip(state, carried, new_state, strict=True)
            )
            return put(output, leaf, new_output, chunk), state, turn

        output = dealt_leaf if in_place else jnp.zeros_like(dealt_leaf, dtype=shape.dtype)
        before = output, tuple(map(deal, carried)), self._turn
        output, state, self._turn = jax.lax.fori_loop(0, chunks, body, before)
        return output.reshape(leaf.shape), tuple(
            x.reshape(whole.shape) for x, whole in zip(state, carried, strict=True)
        )


def chunk_key(seed: ArrayLike, count: jax.Array, path: KeyPath, chunk: jax.Array) -> jax.Array:
    """A random key for one chunk of the leaf at ``path`` in step ``count``."""
    return jax.random.fold_in(leaf_key(seed, count, path), chunk)


def _apart(step: Step, turn: jax.Array, arguments: Any) -> tuple[Any, jax.Array]:
    """``step``, and on CPUs kept from being mixed with what is before and after it.

    There the compiler would fuse a read of the state with what comes after the write in place,
    and copy the whole state in every round; and it would begin all leaves at once. It cannot
    look through a branch: the one that is never taken keeps them apart, and hands on the turn.
    """
    if any(any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(arguments)):
        return step(*arguments), turn
    shapes = jax.eval_shape(step, *arguments)

    def always(turn: jax.Array, *arguments: Any) -> Any:
        return step(*arguments), turn

    def never(turn: jax.Array, *_: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), jnp.zeros_like(turn)

    return jax.lax.platform_dependent(
        turn,
        *arguments,
        cpu=lambda turn, *arguments: jax.lax.cond(turn >= 0, always, never, turn, *arguments),
        default=always,
    )


def _chunking(leaf: jax.Array) -> tuple[int, int]:
    """The axis to cut, and into how many chunks."""
    wanted = math.ceil(leaf.size / CHUNK)
    best = (0, 1)
    for kept in SHARDS if wanted > 1 else ():
        for axis, rows in enumerate(leaf.shape[:-1]):
            dealt = rows // math.lcm(math.gcd(rows, kept), _shards(leaf, axis))
            chunks = max((c for c in _divisors(dealt) if c <= 2 * wanted), default=1)
            if chunks > best[1]:
                best = (axis, chunks)
        if best[1] >= SHARDS[-1] or leaf.size <= LARGEST * best[1]:
            break
    return best


def _shards(leaf: jax.Array, axis: int) -> int:
    """Over how many devices an axis is cut, where the type tells."""
    sharding = jax.typeof(leaf).sharding
    names = (*sharding.spec, *[None] * leaf.ndim)[axis]
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names if name)


def _divisors(n: int) -> Sequence[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
