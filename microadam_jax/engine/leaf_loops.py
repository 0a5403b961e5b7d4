"""How a step on one leaf runs on many: which share a loop, and each in which chunks.

On a CPU, leaves of one kind share a loop, whose body is compiled once for all of them; a round
takes one chunk of one leaf, small enough for the cache. On an accelerator one leaf follows another,
and of those that are larger than a part of the tree one piece: of stacked layers a few.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from microadam_jax.codecs.rounding import Rows
from microadam_jax.engine.chunks import CACHED, Chunks
from microadam_jax.sharding import explicit_sharding, shapes_of

PIECE = 2**18  # elements of a piece at least: fewer take no longer than to launch an operation
PIECES = 256  # of a large tree, about
TOGETHER = 128  # leaves in a loop, each of which is asked at each turn whether it is its own
ALONE = 4096  # elements from which leaves share a loop, where a step is a few operations
COPIED = 64  # part of a leaf up to which its inputs are stacked with others': little to copy
SHARE = (
    32  # part of a tree up to which they do: larger leaves are few, and copying them takes memory
)

T = TypeVar("T", bound=tuple[Any, ...])
Arrays = tuple[jax.Array, ...]
Step = Callable[[Rows, Arrays, Arrays], Arrays]


class Work(NamedTuple):
    """A step on one leaf.

    Attributes:
        step: from the rows of a chunk and its part of ``carried`` and ``inputs`` to the new
            ``carried``, reshaped at will, and before it an output of the shape of the first input
            if there is an ``output``. What it makes of a row does not depend on other rows.
            Leaves are of one kind, and compiled together, where steps are equal and arrays alike.
        carried: arrays to update in place, with the leaf's axes before the last.
        inputs: arrays to read, the first of the leaf's shape; axes of size 1 are broadcast, and
            scalars are read whole.
        output: the output's dtype; None if there is none.
        replaces: the input whose place the output takes, if it has its dtype; None for a place
            of its own.
        shared: arrays of which leaves have the same; the step reads them whole, after its inputs.
    """

    step: Step
    carried: Arrays
    inputs: Arrays
    output: DTypeLike | None = None
    replaces: int | None = None
    shared: Arrays = ()

    @property
    def arrays(self) -> tuple[Arrays, ...]:
        """Returns all that the step may read."""
        return self.carried, self.inputs, self.shared

    @property
    def kind(self) -> Hashable:
        """Equal for leaves that are compiled together."""
        types = tuple(tuple(map(jax.typeof, arrays)) for arrays in self.arrays)
        return self.step, self.output, self.replaces, types

    def whole(self) -> Arrays:
        """The step on all rows at once."""
        results = self.step(Rows(), self.carried, (*self.inputs, *self.shared))
        outputs = len(results) - len(self.carried)
        like = *self.inputs[:outputs], *self.carried
        return tuple(x.reshape(old.shape) for x, old in zip(results, like, strict=True))

    def in_place(self) -> "Work":
        """The same step with the output among what is carried."""
        if self.output is None:
            return self
        at = self.replaces
        if at is None or self.inputs[at].dtype != self.output:
            output = jnp.zeros_like(self.inputs[0 if at is None else at], self.output)
            step, carried = _AsCarried(self.step, None), (output, *self.carried)
            return Work(step, carried, self.inputs, shared=self.shared)
        at %= len(self.inputs)
        taken = self.inputs[at]
        # Where an input is read for the last time, the output is written.
        inputs = *self.inputs[:at], *self.inputs[at + 1 :]
        step, carried = _AsCarried(self.step, at), (taken, *self.carried)
        return Work(step, carried, inputs, shared=self.shared)


class _AsCarried(NamedTuple):
    """A step whose output is carried, in the place of input ``at`` if it is one."""

    step: Step
    at: int | None

    def __call__(self, rows: Rows, carried: Arrays, inputs: Arrays) -> Arrays:
        output, *own = carried
        if self.at is not None:
            inputs = *inputs[: self.at], output, *inputs[self.at :]
        return self.step(rows, tuple(own), inputs)


def on_cpu(works: Sequence[Work], alone: int = ALONE) -> list[Arrays]:
    """Runs steps on leaves, those of one kind in a loop.

    Args:
        works: a step on each leaf.
        alone: the elements below which a leaf shares no loop, as there is less to compile of the
            step than of a loop.

    Returns:
        For each leaf the new ``carried``, and before it the output if there is one.
    """
    kinds: dict[Hashable, list[int]] = {}
    for i, work in enumerate(works):
        kinds.setdefault(work.kind, []).append(i)
    results: dict[int, Arrays] = {}
    elements = sum(work.inputs[0].size for work in works)
    for members in kinds.values():
        together = TOGETHER if works[members[0]].inputs[0].size <= elements / SHARE else 1
        for start in range(0, len(members), together):
            batch = members[start : start + together]
            results |= zip(batch, _together([works[i] for i in batch], alone), strict=True)
    return [results[i] for i in range(len(works))]


def on_accelerator(work: Work, piece: int) -> Arrays:
    """Runs a step on a leaf, in a loop over pieces of it if it is larger than one.

    When a step is compiled for more devices than this process has, ``jax.set_mesh`` tells how
    arrays may be sharded.

    Args:
        work: the step.
        piece: elements that a piece has about.

    Returns:
        The new ``carried``, and before it the output if there is one.
    """
    chunks = Chunks.of_about(work.inputs[0], piece)
    # To cut a leaf in two would launch all twice, for temporaries that are no burden.
    if chunks.total == 1 or work.inputs[0].size <= 2 * piece:
        return work.whole()
    return _Loop(chunks, [work.in_place()], fuses=True).run()[0]


def piece_of(elements: int) -> int:
    """The elements of a piece, in a tree of so many.

    A piece has temporaries, of which a hundredth of the tree is no burden, and launches all
    operations anew, which more than a few hundred times would be.
    """
    return max(PIECE, elements // PIECES)


def each_kind(
    function: Callable[[Any, Any], Any], kinds: Sequence[Hashable], leaves: Sequence[Any]
) -> list[Any]:
    """Maps a function over leaves, and traces it once for those of a kind.

    Args:
        function: from what is static of a leaf, the same for all of a kind, and its arrays.
        kinds: of the leaves.
        leaves: pairs of these arguments.

    Returns:
        The results.
    """
    call = by_kind(function)
    return [call(kind, *leaf) for kind, leaf in zip(kinds, leaves, strict=True)]


def by_kind(function: Callable[[Any, Any], Any]) -> Callable[[Hashable, Any, Any], Any]:
    """Returns a function of a kind and the arguments of :func:`each_kind`'s, traced likewise."""
    jitted: dict[Hashable, Any] = {}

    def call(kind: Hashable, static: Any, arrays: Any) -> Any:
        if kind not in jitted:
            jitted[kind] = jax.jit(functools.partial(function, static))
        return jitted[kind](arrays)

    return call


def layer_by_layer(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int | None
) -> jax.Array:
    """Maps a function over the layers of a stack, so that one of them has temporaries.

    Args:
        function: from layers to others of their shape, in which it takes each by itself.
        x: the stack, in whose place the results go.
        axis: the axis of its layers; None if it is none.
    """
    sharding = explicit_sharding(x)
    if axis is None or (sharding is not None and sharding.spec[axis]):
        return function(x)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        one = function(jax.lax.dynamic_slice_in_dim(x, i, 1, axis))
        return jax.lax.dynamic_update_slice_in_dim(x, one, i, axis)

    return jax.lax.fori_loop(0, x.shape[axis], step, x)


def _together(works: Sequence[Work], alone: int) -> list[Arrays]:
    like = works[0]
    chunks = Chunks.of_about(like.inputs[0], CACHED, slices=True)
    if like.inputs[0].size >= alone and len(works) * chunks.total > 1:
        return _Loop(chunks, [work.in_place() for work in works]).run()
    return each_kind(_whole, [None] * len(works), [(like, work.arrays) for work in works])


def _whole(like: Work, arrays: tuple[Arrays, ...]) -> Arrays:
    carried, inputs, shared = arrays
    return like._replace(carried=carried, inputs=inputs, shared=shared).whole()


def apart(function: Callable[[jax.Array], jax.Array], x: jax.Array, t: jax.Array) -> jax.Array:
    """Computes ``function(x)``, and on CPUs not in one pass with what else reads ``x``.

    There the compiler would write what the passes have in common, to read it in each.

    Args:
        function: of an array.
        x: the array.
        t: int32 scalar, not negative, which the compiler cannot know.
    """
    if explicit_sharding(x) is not None:
        return function(x)

    def on_cpu(x: jax.Array, t: jax.Array) -> jax.Array:
        return _in_a_pass(t >= 0, lambda: (function(x),))[0]

    return jax.lax.platform_dependent(x, t, cpu=on_cpu, default=lambda x, t: function(x))


def written(rows: Rows, compute: Callable[[], Arrays]) -> Arrays:
    """Computes arrays of a chunk, on CPUs in one pass, apart from those that read them.

    There the compiler would compute them again in each of these: moments, dequantized and moved,
    once for their scales and twice for codes of four bits.

    Args:
        rows: the chunk's.
        compute: the computation.

    Returns:
        What ``compute`` returns.
    """
    return compute() if rows.holds is None else _in_a_pass(rows.holds, compute)


def in_place(update: Callable[[T], T], before: T, position: jax.Array) -> T:
    """Computes ``update(before)``, on CPUs apart from what reads the result.

    There the compiler would compute it again in each of these, and copy ``before`` for that.

    Args:
        update: from arrays to new ones of their types.
        before: the arrays.
        position: int32 scalar, not negative, which the compiler cannot know.
    """

    def on_cpu(position: jax.Array, before: T) -> T:
        return once(position >= 0, update, before)

    def at_once(position: jax.Array, before: T) -> T:
        return update(before)

    return jax.lax.platform_dependent(position, before, cpu=on_cpu, default=at_once)


def _in_a_pass(condition: jax.Array, compute: Callable[[], Arrays]) -> Arrays:
    """``compute()`` in a branch, which is always taken."""
    shapes = shapes_of(compute)

    def nothing() -> Arrays:
        return tuple(jax.lax.full(x.shape, 0, x.dtype, sharding=x.sharding) for x in shapes)

    return jax.lax.cond(condition, compute, nothing)


def once(condition: jax.Array, update: Callable[[T], T], before: T) -> T:
    """``update(before)`` in place if a condition holds, else ``before``."""
    if not before:
        return before

    def body(state: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
        return jnp.zeros_like(state[0]), update(state[1])

    return jax.lax.while_loop(lambda state: state[0], body, (condition, before))[1]


class _Loop:
    """A loop over leaves of one kind, and in it one over the chunks of a leaf.

    So the compiler sees the step once. What it sees of each leaf is a branch that copies the leaf
    from the state and a loop of no round or one that copies it back, in place where a branch would
    copy all leaves: for copies of whole arrays no code is generated, as it is for those of chunks.
    One leaf alone is not copied.

    Args:
        chunks: of each leaf.
        works: without outputs.
        fuses: False to keep the compiler from fusing what reads a chunk with what writes it, as
            CPUs' compiler would, to copy the whole state in every round.
    """

    def __init__(self, chunks: Chunks, works: Sequence[Work], fuses: bool = False) -> None:
        """Cuts the arrays."""
        like = works[0]
        self.fuses = fuses
        self.chunks, self.step, self.shared = chunks, like.step, like.shared
        self.carried_types = list(map(jax.typeof, like.carried))
        self.input_types = list(map(jax.typeof, like.inputs))
        self.carried = [tuple(map(chunks.cut, work.carried)) for work in works]
        self.inputs = [tuple(map(chunks.cut, work.inputs)) for work in works]

    def run(self) -> list[Arrays]:
        """The new ``carried`` of each leaf."""
        if len(self.carried) == 1:
            state = [self._all_chunks(self.carried[0], self.inputs[0])]
        else:
            few = ([x for x in own if self._is_small(x)] for own in self.inputs)
            stacked = [jnp.stack(own) for own in zip(*few, strict=True)]
            leaf = functools.partial(self._leaf, stacked)
            state = jax.lax.fori_loop(0, len(self.carried), leaf, self.carried)
        return [tuple(map(self.chunks.joined, own, self.carried_types)) for own in state]

    def _leaf(self, stacked: list[jax.Array], turn: jax.Array, state: list[Arrays]) -> list[Arrays]:
        """All chunks of the leaf whose turn it is; ``stacked`` has the small inputs of all."""
        arrays = ([x for x in own if not self._is_small(x)] for own in self.inputs)
        leaves = zip(state, arrays, strict=True)
        carried, read = jax.lax.switch(turn, [lambda leaf=leaf: leaf for leaf in leaves])
        few = (jax.lax.dynamic_index_in_dim(x, turn, keepdims=False) for x in stacked)
        arrays = iter(read)
        inputs = tuple(next(few if self._is_small(x) else arrays) for x in self.input_types)
        new = self._all_chunks(carried, inputs)
        return [once(turn == i, lambda _: new, before) for i, before in enumerate(state)]

    def _is_small(self, x: Any) -> bool:
        """Returns True if an input is stacked with those of other leaves."""
        return x.size <= math.prod(self.chunks.shape) / COPIED

    def _all_chunks(self, carried: Arrays, inputs: Arrays) -> Arrays:
        chunk = functools.partial(self._chunk, inputs)
        return jax.lax.fori_loop(0, self.chunks.total, chunk, carried)

    def _chunk(self, inputs: Arrays, chunk: jax.Array, carried: Arrays) -> Arrays:
        """``carried`` after the step on a chunk."""
        numbers = self.chunks.numbers(chunk)
        take = functools.partial(self.chunks.take, numbers=numbers)
        put = functools.partial(self.chunks.put, numbers=numbers)
        own, read = map(take, carried, self.carried_types), map(take, inputs, self.input_types)
        # Always true, which the compiler cannot know.
        holds = None if self.fuses else chunk >= 0
        rows = self.chunks.rows(numbers)._replace(holds=holds)
        new = self.step(rows, tuple(own), (*read, *self.shared))

        def put_all(before: Arrays) -> Arrays:
            return tuple(map(put, before, self.carried_types, new))

        return put_all(carried) if holds is None else once(holds, put_all, carried)
