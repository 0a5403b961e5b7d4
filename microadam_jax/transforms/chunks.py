"""An element-wise step on the leaves of a tree: one after another, large ones in chunks."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from microadam_jax.codecs.rounding import Rows
from microadam_jax.sharding import state_zeros

CHUNK = 2**17  # elements that chunks have about; the temporaries fit in a CPU's cache
GPU_CHUNKS = 128  # that GPUs take a large tree in, about: they launch each operation of a chunk
TILES = (32, 8)  # rows of bytes, and of float32, that an accelerator moves together

Arrays = tuple[jax.Array, ...]
Step = Callable[[Rows, Arrays, Arrays], tuple[jax.Array, Arrays]]


class Turns:
    """Takes leaves in turn, so that the temporaries of one are gone when the next begins.

    The compiler does not fuse decoding, update and encoding into one pass by itself: it writes
    whole decoded moments, and on CPUs those of all leaves at once.

    Args:
        count: the optimizer's step count.
        elements: of all leaves.
    """

    def __init__(self, count: jax.Array, elements: int = 0) -> None:
        """Begins with the first leaf."""
        self.turn, self.elements = count, elements

    @classmethod
    def over(cls, tree: Any, count: jax.Array) -> "Turns":
        """For the leaves of ``tree``."""
        return cls(count, sum(leaf.size for leaf in jax.tree.leaves(tree)))

    def alone(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, in turn."""
        result, self.turn = _apart(function, self.turn, arguments)
        return result

    def take(
        self, step: Step, carried: Arrays, inputs: Arrays, *, replaces: int = 0
    ) -> tuple[jax.Array, Arrays]:
        """Runs ``step`` on a leaf, in place and in chunks if it is large.

        Each chunk has equally many rows of every device's, so that nothing has to move however an
        axis is sharded. When a step is compiled for more devices than this process has,
        ``jax.set_mesh`` tells.

        Args:
            step: from the rows of a chunk and its part of ``carried`` and ``inputs`` to an output
                of the shape of the first input, and the new ``carried``, reshaped at will. What
                it makes of a row does not depend on other rows.
            carried: arrays to update in place, with the leaf's axes before the last.
            inputs: arrays to read, the first of the leaf's shape; axes of size 1 are broadcast.
            replaces: the input whose place the output takes, if it has its dtype; of the leaf's
                shape, as the first.

        Returns:
            The output, and the new ``carried``.
        """
        run = functools.partial(_take, replaces % len(inputs))

        # Here and not behind the branches: what one device takes whole another takes in chunks.
        def reshaped(rows: Rows, carried: Arrays, inputs: Arrays) -> tuple[jax.Array, Arrays]:
            output, new = step(rows, carried, inputs)
            return output, tuple(map(jnp.reshape, new, (x.shape for x in carried)))

        return self._for_device(run, reshaped, inputs[0], carried, inputs)

    def each(
        self, step: Callable[[Rows, Arrays, Arrays], Arrays], carried: Arrays, inputs: Arrays
    ) -> Arrays:
        """As :meth:`take`, for a step that has no output of the leaf's shape.

        Args:
            step: from the rows of a chunk and its part of ``carried`` and ``inputs`` to the new
                ``carried``. What it makes of a row does not depend on other rows.
            carried: arrays to update in place, with the leaf's axes before the last.
            inputs: arrays to read, the first of the leaf's shape; axes of size 1 are broadcast.

        Returns:
            The new ``carried``.
        """
        return self._for_device(Turns.rounds, step, inputs[0], carried, inputs)

    def largest(self, measure: Callable[[Rows, Arrays], Arrays], inputs: Arrays) -> Arrays:
        """The largest results of ``measure`` over the chunks of a leaf.

        Args:
            measure: from the rows of a chunk and its part of ``inputs`` to arrays of numbers that
                are not negative. Along each axis but the last they have the chunk's size, or one
                number for each of the ``runs`` of its rows: what lies on several devices is not
                compared in the loop.
            inputs: arrays to read, the first of the leaf's shape; axes of size 1 are broadcast.

        Returns:
            The arrays, of the leaf's size where they have the chunk's.
        """
        return self._for_device(_largest, measure, inputs[0], inputs)

    def _for_device(
        self,
        run: Callable[..., Any],
        step: Callable[..., Any],
        leaf: jax.Array,
        *arguments: Arrays,
    ) -> Any:
        """``step`` of a small leaf, ``run`` on chunks of a large one, as the device likes them."""

        def dealt(dealing: "_Dealing") -> Callable[..., tuple[Any, jax.Array]]:
            def in_turn(turn: jax.Array, *arguments: Arrays) -> tuple[Any, jax.Array]:
                turns = Turns(turn)
                if dealing.chunks == 1:
                    result = turns.alone(functools.partial(step, Rows()), *arguments)
                else:
                    result = run(turns, dealing, step, *arguments)
                return result, turns.turn

            return in_turn

        most, few = _deal(leaf, CHUNK), _deal(leaf, max(CHUNK, self.elements // GPU_CHUNKS))
        if most == few:
            result, self.turn = dealt(most)(self.turn, *arguments)
        else:
            result, self.turn = jax.lax.platform_dependent(
                self.turn, *arguments, cuda=dealt(few), rocm=dealt(few), default=dealt(most)
            )
        return result

    def rounds(
        self,
        dealing: "_Dealing",
        step: Callable[[Rows, Arrays, Arrays], Arrays],
        carried: Arrays,
        inputs: Arrays,
    ) -> Arrays:
        """Runs ``step`` on each chunk, to update what is carried."""
        wholes = tuple(x.shape for x in carried)
        dealt = tuple(map(dealing.deal, inputs))

        def step_of(chunk: jax.Array, carried: Arrays, inputs: Arrays) -> Arrays:
            return step(dealing.rows(chunk), carried, inputs)

        def body(chunk: jax.Array, before: tuple[Arrays, jax.Array]) -> tuple[Arrays, jax.Array]:
            state, turn = before
            parts = functools.partial(dealing.take, chunk=chunk)
            arguments = (
                chunk,
                tuple(map(parts, state, wholes)),
                tuple(map(parts, dealt, [x.shape for x in inputs])),
            )
            new, turn = _apart(step_of, turn, arguments)
            return tuple(map(functools.partial(dealing.put, chunk=chunk), state, wholes, new)), turn

        begin = tuple(map(dealing.deal, carried)), self.turn
        state, self.turn = jax.lax.fori_loop(0, dealing.chunks, body, begin)
        return tuple(map(jnp.reshape, state, wholes))


def _take(
    replaces: int, turns: Turns, dealing: "_Dealing", step: Step, carried: Arrays, inputs: Arrays
) -> tuple[jax.Array, Arrays]:
    leaf = inputs[replaces]
    shape, _ = jax.eval_shape(functools.partial(step, Rows()), carried, inputs)
    # Where it is read for the last time, the output is written.
    in_place = shape.dtype == leaf.dtype
    output = leaf if in_place else jnp.zeros_like(leaf, dtype=shape.dtype)
    before, after = inputs[:replaces], inputs[replaces + 1 :]

    def with_output(rows: Rows, carried: Arrays, inputs: Arrays) -> Arrays:
        output, *state = carried
        if in_place:
            inputs = (*inputs[:replaces], output, *inputs[replaces:])
        output, new = step(rows, tuple(state), inputs)
        return output, *new

    output, *state = turns.rounds(
        dealing, with_output, (output, *carried), before + after if in_place else inputs
    )
    return output, tuple(state)


def _largest(
    turns: Turns, dealing: "_Dealing", measure: Callable[[Rows, Arrays], Arrays], inputs: Arrays
) -> Arrays:
    shapes = jax.eval_shape(functools.partial(measure, dealing.all_rows), inputs)

    def compare(rows: Rows, before: Arrays, inputs: Arrays) -> Arrays:
        return tuple(map(jnp.maximum, before, measure(rows, inputs)))

    zeros = tuple(state_zeros(x, x.shape, x.dtype) for x in shapes)
    return turns.rounds(dealing, compare, zeros, inputs)


class _Dealing(NamedTuple):
    """How the rows of a leaf are dealt out to chunks.

    An axis of ``n`` becomes ``(shards, cut, length)``, and a chunk takes a run of ``length`` rows
    from each shard. Rows that lie together stay together, as tiles of an accelerator need it.

    Attributes:
        shape: the leaf's shape.
        shards: for each of its axes but the last, over how many devices it may be sharded.
        cuts: for each of them, into how many chunks it is cut.
    """

    shape: tuple[int, ...]
    shards: tuple[int, ...]
    cuts: tuple[int, ...]

    @property
    def chunks(self) -> int:
        """How many there are."""
        return math.prod(self.cuts)

    @property
    def all_rows(self) -> Rows:
        """The rows of the whole leaf, in one run for each device."""
        whole = self._replace(cuts=(1,) * len(self.cuts))
        return whole.rows(jnp.zeros([], jnp.int32))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The rows of each run, along each axis but the last."""
        return tuple(
            n // shards // cut
            for n, shards, cut in zip(self.shape, self.shards, self.cuts, strict=False)
        )

    def rows(self, chunk: jax.Array) -> Rows:
        """The rows of the leaf that a chunk holds."""
        starts = tuple(
            number * length
            for number, length in zip(self._numbers(chunk), self.lengths, strict=True)
        )
        steps = tuple(cut * length for cut, length in zip(self.cuts, self.lengths, strict=True))
        return Rows(self.shape[:-1], starts, self.lengths, steps)

    def deal(self, x: jax.Array) -> jax.Array:
        """``x``, which has the leaf's axes or size 1 instead, with its cut axes in three."""
        return x.reshape([n for n, _ in self._axes(x.shape)])

    def take(self, x: jax.Array, whole: tuple[int, ...], chunk: jax.Array) -> jax.Array:
        """A chunk of what was dealt from an array of shape ``whole``."""
        cuts = self._cuts_of(whole)
        if math.prod(cuts) == 1:
            return x
        starts, sizes = self._place(whole, chunk)
        part = [n // cut for n, cut in zip(whole, cuts, strict=True)]
        return jax.lax.dynamic_slice(x, starts, sizes).reshape(part)

    def put(
        self, x: jax.Array, whole: tuple[int, ...], part: jax.Array, chunk: jax.Array
    ) -> jax.Array:
        """``x`` with a chunk replaced."""
        cuts = self._cuts_of(whole)
        # Joined first: axes of a sharded array can be joined or parted, not both at once.
        part = part.reshape([n // cut for n, cut in zip(whole, cuts, strict=True)])
        if math.prod(cuts) == 1:
            return part
        starts, sizes = self._place(whole, chunk)
        return jax.lax.dynamic_update_slice(x, part.reshape(sizes), starts)

    def _numbers(self, chunk: jax.Array) -> list[jax.Array]:
        """Which of the cuts of each axis a chunk takes."""
        numbers = []
        for cut in self.cuts:
            numbers.append(chunk % cut)
            chunk = chunk // cut
        return numbers

    def _cuts_of(self, whole: tuple[int, ...]) -> list[int]:
        """Into how many chunks each axis of an array is cut: the leaf's axes, unless of size 1."""
        known = len(self.cuts)
        return [
            self.cuts[axis] if axis < known and n == self.shape[axis] else 1
            for axis, n in enumerate(whole)
        ]

    def _axes(self, whole: tuple[int, ...]) -> list[tuple[int, int | None]]:
        """The sizes of the dealt array's axes, each with the leaf's axis whose cuts it numbers."""
        axes: list[tuple[int, int | None]] = []
        for axis, (n, cut) in enumerate(zip(whole, self._cuts_of(whole), strict=True)):
            if cut == 1:
                axes.append((n, None))
                continue
            # Axes of size 1 are left out: CPUs would order them otherwise, and copy the array.
            shards, length = self.shards[axis], self.lengths[axis]
            axes += [(shards, None)] * (shards > 1)
            axes.append((cut, axis))
            axes += [(length, None)] * (length > 1)
        return axes

    def _place(
        self, whole: tuple[int, ...], chunk: jax.Array
    ) -> tuple[list[jax.Array | int], list[int]]:
        """Where in the dealt array a chunk begins, and its size there."""
        numbers, axes = self._numbers(chunk), self._axes(whole)
        starts = [0 if axis is None else numbers[axis] for _, axis in axes]
        return starts, [n if axis is None else 1 for n, axis in axes]


def _apart(step: Callable[..., Any], turn: jax.Array, arguments: Any) -> tuple[Any, jax.Array]:
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


def _deal(leaf: jax.Array, size: int) -> _Dealing:
    """Into how many chunks of about ``size`` elements each axis but the last is cut."""
    shards = tuple(_shards(leaf, axis) for axis in range(leaf.ndim - 1 if leaf.size else 0))
    budget, cuts = max(1, 2 * math.ceil(leaf.size / size) - 1), []
    for axis, among in enumerate(shards):
        dealt = leaf.shape[axis] // among
        divisors = [cut for cut in range(1, min(dealt, budget) + 1) if dealt % cut == 0]
        choices = [divisors]
        if axis == leaf.ndim - 2:
            enough = [cut for cut in divisors if 4 * cut >= budget]
            choices = [[c for c in enough if dealt // c % tile == 0] for tile in TILES] + choices
        cuts.append(max(next(filter(None, choices))))
        budget //= cuts[-1]
    return _Dealing(leaf.shape, shards, tuple(cuts))


def _shards(leaf: jax.Array, axis: int) -> int:
    """Over how many devices an axis may be cut: over a divisor of that."""
    rows, sharding = leaf.shape[axis], jax.typeof(leaf).sharding
    if sharding.mesh.empty:
        return math.gcd(rows, jax.device_count())
    names = (*sharding.spec, *[None] * leaf.ndim)[axis]
    names = names if isinstance(names, tuple) else (names,)
    known = math.prod(sharding.mesh.shape[name] for name in names if name)
    unknown = math.prod(sharding.mesh.shape[name] for name in sharding.mesh.auto_axes)
    return known * math.gcd(rows // known, unknown)
