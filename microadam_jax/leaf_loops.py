"""How a step on one leaf runs on many: which share a loop, and each in which chunks.

On a CPU, leaves of one kind share a loop, whose body is compiled once for all of them; a round
takes one chunk of one leaf, small enough for the cache. On an accelerator one leaf follows another,
and of those that are larger than a hundredth of the tree one piece: of stacked layers a few.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from microadam_jax.chunks import CACHED, Chunks
from microadam_jax.codecs.rounding import Rows
from microadam_jax.sharding import explicit_sharding

PIECE = 2**19  # elements of a piece at least: fewer take no longer than to launch an operation
PIECES = 128  # of a large tree, about
TOGETHER = 64  # leaves in a loop, each of which is asked in every round whether it is its turn
ALONE = 4096  # elements from which leaves share a loop
SHARE = (
    32  # part of a tree up to which they do: larger leaves are few, and copying them takes memory
)

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
    """

    step: Step
    carried: Arrays
    inputs: Arrays
    output: DTypeLike | None = None
    replaces: int | None = None

    @property
    def kind(self) -> Hashable:
        """Equal for leaves that are compiled together."""
        types = tuple(map(jax.typeof, self.carried)), tuple(map(jax.typeof, self.inputs))
        return self.step, self.output, self.replaces, types

    def whole(self) -> Arrays:
        """The step on all rows at once."""
        results = self.step(Rows(), self.carried, self.inputs)
        outputs = len(results) - len(self.carried)
        new = zip(results[outputs:], self.carried, strict=True)
        return *results[:outputs], *(x.reshape(old.shape) for x, old in new)

    def in_place(self) -> "Work":
        """The same step with the output among what is carried."""
        if self.output is None:
            return self
        at = self.replaces
        if at is None or self.inputs[at].dtype != self.output:
            output = jnp.zeros_like(self.inputs[0 if at is None else at], self.output)
            return Work(_AsCarried(self.step, None), (output, *self.carried), self.inputs)
        at %= len(self.inputs)
        taken = self.inputs[at]
        # Where an input is read for the last time, the output is written.
        inputs = *self.inputs[:at], *self.inputs[at + 1 :]
        return Work(_AsCarried(self.step, at), (taken, *self.carried), inputs)


class _AsCarried(NamedTuple):
    """A step whose output is carried, in the place of input ``at`` if it is one."""

    step: Step
    at: int | None

    def __call__(self, rows: Rows, carried: Arrays, inputs: Arrays) -> Arrays:
        output, *own = carried
        if self.at is not None:
            inputs = *inputs[: self.at], output, *inputs[self.at :]
        return self.step(rows, tuple(own), inputs)


def on_cpu(works: Sequence[Work]) -> list[Arrays]:
    """Runs steps on leaves, those of one kind in a loop.

    Args:
        works: a step on each leaf.

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
            results |= zip(batch, _together([works[i] for i in batch]), strict=True)
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
    if chunks.total == 1:
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
    jitted: dict[Hashable, Any] = {}
    results = []
    for kind, (static, arrays) in zip(kinds, leaves, strict=True):
        if kind not in jitted:
            jitted[kind] = jax.jit(functools.partial(function, static))
        results.append(jitted[kind](arrays))
    return results


def _together(works: Sequence[Work]) -> list[Arrays]:
    like = works[0]
    chunks = Chunks.of_about(like.inputs[0], CACHED, slices=True)
    if like.inputs[0].size >= ALONE and len(works) * chunks.total > 1:
        return _Loop(chunks, [work.in_place() for work in works]).run()
    kinds, leaves = [None] * len(works), [(like, (w.carried, w.inputs)) for w in works]
    return each_kind(_whole, kinds, leaves)


def _whole(like: Work, arrays: tuple[Arrays, Arrays]) -> Arrays:
    carried, inputs = arrays
    return like._replace(carried=carried, inputs=inputs).whole()


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
        zeros = jnp.zeros_like(jax.eval_shape(function, x))
        return once(t >= 0, lambda _: (function(x),), (zeros,))[0]

    return jax.lax.platform_dependent(x, t, cpu=on_cpu, default=lambda x, t: function(x))


def once(condition: jax.Array, update: Callable[[Arrays], Arrays], before: Arrays) -> Arrays:
    """``update(before)`` in place if a condition holds, else ``before``."""
    if not before:
        return before

    def body(state: tuple[jax.Array, Arrays]) -> tuple[jax.Array, Arrays]:
        return jnp.zeros_like(state[0]), update(state[1])

    return jax.lax.while_loop(lambda state: state[0], body, (condition, before))[1]


class _Loop:
    """A loop over leaves of one kind, and in it one over the chunks of a leaf.

    So the compiler sees the step once. What it sees of each leaf are branches that read and loops
    of no round or one that write: those update in place where a branch would copy. Of large
    arrays they read and write a chunk. All others are copied from the state of a leaf, and back
    after its chunks, for which the compiler needs no code.

    Args:
        chunks: of each leaf.
        works: without outputs.
        fuses: False to keep the compiler from fusing what reads a chunk with what writes it, as
            CPUs' compiler would, to copy the whole state in every round.
    """

    def __init__(self, chunks: Chunks, works: Sequence[Work], fuses: bool = False) -> None:
        """Cuts the arrays."""
        self.fuses = fuses
        like = works[0]
        alone = len(works) == 1
        self.chunks, self.step = chunks, like.step
        self.wholes = [x.shape for x in like.carried]
        self.read = [x.shape for x in like.inputs]
        self.large = [alone or _is_large(x, chunks) for x in like.carried]
        self.reads_large = [alone or _is_large(x, chunks) for x in like.inputs]
        self.carried = [tuple(map(chunks.cut, work.carried)) for work in works]
        self.inputs = [tuple(map(chunks.cut, work.inputs)) for work in works]

    def run(self) -> list[Arrays]:
        """The new ``carried`` of each leaf."""
        state = [_parted(own, self.large) for own in self.carried]
        if len(state) == 1:
            ((large, _),) = state
            rounds = functools.partial(self._round, jnp.zeros((), jnp.int32), ())
            (large,), _ = jax.lax.fori_loop(0, self.chunks.total, rounds, ([large], ()))
            state = [(large, ())]
        else:
            larges, smalls = ([*column] for column in zip(*state, strict=True))
            larges, smalls = jax.lax.fori_loop(0, len(state), self._leaf, (larges, smalls))
            state = list(zip(larges, smalls, strict=True))
        carried = (_joined(*own, self.large) for own in state)
        return [tuple(map(jnp.reshape, own, self.wholes)) for own in carried]

    def _leaf(
        self, turn: jax.Array, state: tuple[list[Arrays], list[Arrays]]
    ) -> tuple[list[Arrays], list[Arrays]]:
        """All chunks of the leaf whose turn it is."""
        larges, smalls = state
        read = [_parted(own, self.reads_large)[1] for own in self.inputs]
        branches = [functools.partial(_both, smalls[i], read[i]) for i in range(len(smalls))]
        own, inputs = jax.lax.switch(turn, branches)
        rounds = functools.partial(self._round, turn, inputs)
        larges, own = jax.lax.fori_loop(0, self.chunks.total, rounds, (larges, own))
        return larges, [once(turn == i, lambda _: own, before) for i, before in enumerate(smalls)]

    def _round(
        self,
        turn: jax.Array,
        inputs: Arrays,
        chunk: jax.Array,
        state: tuple[list[Arrays], Arrays],
    ) -> tuple[list[Arrays], Arrays]:
        """A chunk of a leaf, of which ``state`` and ``inputs`` hold all but the large arrays."""
        larges, own = state
        numbers = self.chunks.numbers(chunk)
        take = functools.partial(self.chunks.take, numbers=numbers)
        put = functools.partial(self.chunks.put, numbers=numbers)
        wholes, whole_inputs = (
            _parted(self.wholes, self.large),
            _parted(self.read, self.reads_large),
        )

        def part(i: int) -> tuple[Arrays, Arrays]:
            large, _ = _parted(self.inputs[i], self.reads_large)
            return tuple(map(take, larges[i], wholes[0])), tuple(map(take, large, whole_inputs[0]))

        branches = [functools.partial(part, i) for i in range(len(larges))]
        part_of_larges, part_of_inputs = jax.lax.switch(turn, branches)
        small, small_inputs = map(take, own, wholes[1]), map(take, inputs, whole_inputs[1])
        carried = _joined(part_of_larges, tuple(small), self.large)
        read = _joined(part_of_inputs, tuple(small_inputs), self.reads_large)
        new = _parted(self.step(self.chunks.rows(numbers), carried, read), self.large)

        def put_all(which: int, before: Arrays) -> Arrays:
            return tuple(map(put, before, wholes[which], new[which]))

        if self.fuses:
            return [put_all(0, larges[0])], own
        # Always true, which the compiler cannot know.
        own = once(chunk >= 0, functools.partial(put_all, 1), own)
        turns = [chunk >= 0] if len(larges) == 1 else [turn == i for i in range(len(larges))]
        return [
            once(its, functools.partial(put_all, 0), before)
            for its, before in zip(turns, larges, strict=True)
        ], own


def _is_large(x: jax.Array, chunks: Chunks) -> bool:
    """True of arrays of the leaf's shape, unless they hold bytes."""
    return x.shape == chunks.shape and x.dtype.itemsize > 1


def _both(one: Arrays, other: Arrays) -> tuple[Arrays, Arrays]:
    return one, other


def _parted(
    values: Sequence[Any], first: Sequence[bool]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The values that are ``first``, and the others."""
    pairs = list(zip(values, first, strict=True))
    return tuple(x for x, of in pairs if of), tuple(x for x, of in pairs if not of)


def _joined(some: Sequence[Any], others: Sequence[Any], first: Sequence[bool]) -> tuple[Any, ...]:
    """The inverse of :func:`_parted`."""
    left, right = iter(some), iter(others)
    return tuple(next(left if of else right) for of in first)
