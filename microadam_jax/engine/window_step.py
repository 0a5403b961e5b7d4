"""The dense step of a window, on the leaves of a tree."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from microadam_jax.blocks import merge
from microadam_jax.codecs.rounding import Draw, Rows
from microadam_jax.compressors import BlockSparse, is_compressed
from microadam_jax.compressors.rows import overwrite_each
from microadam_jax.engine.descent import applies, kind_of, read_by, reads_parameter
from microadam_jax.engine.leaf_loops import Arrays, Work, each_kind, on_cpu
from microadam_jax.engine.top_k_feedback import TopKFeedback, Uncompressed
from pallas_kernels.dispatch import names_kernel
from pallas_kernels.window_update import window_adam, window_apply, window_update

# From target, values and indices, the implementation and the sharding to the result.
Move = Callable[..., jax.Array]
# From the values and indices of a window, and those that are sent, to the new window.
Write = Callable[[Arrays, Arrays], Arrays]


class Moved(NamedTuple):
    """A deferred update after its step.

    Attributes:
        update: of the parameter, or the new parameter.
        left: the residual's new arrays.
    """

    update: jax.Array
    left: Arrays


class WindowStep(NamedTuple):
    """A step on one leaf.

    Attributes:
        move: from the parameter, a window's values and indices, ``implementation`` and
            ``sharding`` to the update or the new parameter. Each row has a result by itself.
            Leaves that have the same function, not an equal one, are compiled together.
        dtype: of the result.
        target: the parameter; None for a deferred update that depends on its shape alone.
        values: ``(*lead, blocks, rows, k)``.
        indices: ``(*lead, blocks, rows, k)``.
        write: puts what is sent into a window; likewise.
        in_place: True if the result takes the parameter's place.
        sharding: how the leaf is sharded, on a mesh with Auto axes.
        waiting: what is to be compressed and written first; None if it is in the window.
    """

    move: Move
    dtype: jnp.dtype
    target: jax.Array | None
    values: jax.Array
    indices: jax.Array
    write: Write
    in_place: bool
    sharding: NamedSharding | None
    waiting: Uncompressed | None = None

    @property
    def arrays(self) -> Any:
        """Returns the arrays of the computation."""
        waiting = None if self.waiting is None else self.waiting.arrays
        return self.target, (self.values, self.indices), waiting

    def kind(self, arrays: Any) -> Hashable:
        """Equal for steps that are compiled together."""
        leaves, structure = jax.tree.flatten(arrays)
        feedback = None if self.waiting is None else self.waiting.feedback
        types = structure, tuple(map(jax.typeof, leaves))
        return self.move, self.in_place, self.sharding, feedback, types

    def whole(self, arrays: Any, implementation: str | None) -> Arrays:
        """The result, and of a deferred update the window and what is left."""
        target, window, waiting = arrays
        how = {"implementation": implementation, "sharding": self.sharding}
        if self.waiting is None:
            return (self.move(target, *window, **how),)
        gradient, stored, key = waiting
        feedback = self.waiting.feedback
        sent = feedback.of_rows(gradient, stored, key, implementation, self.sharding)
        window = self.write(window, sent[:2])
        target = gradient if target is None else target
        return self.move(target, *window, **how), *window, *sent[2:]

    def work(self, arrays: Any) -> Work:
        """The step of a loop."""
        target, window, waiting = arrays
        if self.waiting is None:
            place = 0 if self.in_place else None
            return Work(_Dense(self.move), (), (target, *window), self.dtype, place)
        gradient, stored, key = waiting
        step = _Compressed(self.waiting.feedback, self.move, self.write, target is not None)
        read = tuple(array for array in (gradient, target, key) if array is not None)
        return Work(step, (*window, *stored), read, self.dtype, 1 if self.in_place else 0)

    def result(self, found: Arrays) -> tuple[Any, ...]:
        """The update and the window."""
        if self.waiting is None:
            return *found, self.values, self.indices
        update, values, indices, *left = found
        return Moved(update, tuple(left)), values, indices


@dataclasses.dataclass(frozen=True)
class WindowSteps:
    """Takes the steps of the leaves of a tree, which weight the rows of their windows alike.

    Attributes:
        weights: of the rows in both sums, and the epsilon of the quotient.
        newest: the row of this step.
        implementation: ``"xla"``, a kernel's name, or None, which picks by device and shape.
        moves: the functions of leaves, and the dtypes of their results, that there are so far.
    """

    weights: tuple[jax.Array, jax.Array, ArrayLike]
    newest: jax.Array
    implementation: str | None
    moves: dict[Hashable, tuple[Move, jnp.dtype]] = dataclasses.field(default_factory=dict)

    def of(
        self,
        sent: BlockSparse | Uncompressed,
        target: Any,
        finish: Callable[..., jax.Array],
        window: tuple[jax.Array, jax.Array],
        sharding: NamedSharding | None,
    ) -> WindowStep | tuple[Any, ...]:
        """Returns the step of a leaf, or what comes of it where no kernel and no loop takes it.

        Args:
            sent: the update, which fits ``window``.
            target: the parameter, or the update in its place.
            finish: from what the window gives to the result.
            window: values and indices.
            sharding: how the leaf is sharded, on a mesh with Auto axes.
        """
        step = functools.partial(
            WindowStep, write=self._write, in_place=applies(finish), sharding=sharding
        )
        if isinstance(sent, Uncompressed):
            target = sent.gradient if is_compressed(target) else target
            how = self._move_of(sent, target, finish)
            target = target if reads_parameter(finish) else None
            return step(*how, target, *window, waiting=sent)
        window = sent.write(window, self.newest)
        if sent.shape and sent.bypass is None and not is_compressed(target):
            return step(*self._move_of(sent, target, finish), target, *window)
        if not sent.shape:
            blocks = window_adam(*window, *self.weights, sent.layout.size)
            scaled = merge(blocks, sent.layout, sent.shape)
        else:
            scaled = window_update(
                *window,
                *self.weights,
                size=sent.layout.size,
                n=sent.shape[-1],
                dtype=sent.dtype if sent.bypass is None else jnp.float32,
                implementation=self.implementation,
                sharding=sharding,
            )
        scaled = sent.with_bypass(scaled).astype(sent.dtype)
        return finish(scaled, *read_by(finish, target)), *window

    def taken(self, steps: Sequence[WindowStep | tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Takes the steps.

        Args:
            steps: of leaves, or their results.

        Returns:
            For each leaf the result, a :class:`Moved` if it had been deferred, and its window.

        Raises:
            NotImplementedError: if the named implementation cannot run.
        """
        left = [step for step in steps if isinstance(step, WindowStep)]
        moved = iter(_moved(left, self.implementation))
        return [next(moved) if isinstance(step, WindowStep) else step for step in steps]

    def _write(self, window: Arrays, sent: Arrays) -> Arrays:
        return overwrite_each(window, sent, self.newest)

    def _move_of(
        self, sent: BlockSparse | Uncompressed, target: jax.Array, finish: Callable[..., jax.Array]
    ) -> tuple[Move, jnp.dtype]:
        """One function for all leaves on which it does the same, and its result's dtype."""

        def move(p: jax.Array, values: jax.Array, indices: jax.Array, **how: Any) -> jax.Array:
            window = values, indices
            if applies(finish):
                step = finish.step, finish.decay
                return window_apply(*window, p, *self.weights, *step, size=size, **how)
            n = p.shape[-1]
            u = window_update(*window, *self.weights, size=size, n=n, dtype=dtype, **how)
            return finish(u, *read_by(finish, p))

        size, dtype = sent.layout.size, sent.dtype
        kind = kind_of(finish), size, dtype, target.dtype
        if kind not in self.moves:
            p = jax.ShapeDtypeStruct((), target.dtype)
            u = jax.ShapeDtypeStruct((), dtype)
            self.moves[kind] = move, jax.eval_shape(finish, u, *read_by(finish, p)).dtype
        return self.moves[kind]


def _moved(steps: Sequence[WindowStep], implementation: str | None) -> list[tuple[Any, ...]]:
    if not steps:
        return []
    of_steps = [step.arrays for step in steps]
    kinds = [step.kind(arrays) for step, arrays in zip(steps, of_steps, strict=True)]
    flat, structure = jax.tree.flatten(of_steps)

    def one_by_one(*arrays: jax.Array) -> list[Arrays]:
        def run(step: WindowStep, arrays: Any) -> Arrays:
            return step.whole(arrays, implementation)

        return each_kind(run, kinds, list(zip(steps, structure.unflatten(arrays), strict=True)))

    def in_loops(*arrays: jax.Array) -> list[Arrays]:
        given = zip(steps, structure.unflatten(arrays), strict=True)
        return on_cpu([step.work(own) for step, own in given])

    if names_kernel(implementation):
        results = one_by_one(*flat)
    else:
        results = jax.lax.platform_dependent(*flat, cpu=in_loops, default=one_by_one)
    return [step.result(found) for step, found in zip(steps, results, strict=True)]


class _Dense(NamedTuple):
    """The step on some rows of a leaf."""

    move: Move

    def __call__(self, rows: Rows, carried: Arrays, inputs: Arrays) -> Arrays:
        del rows, carried
        return (self.move(*inputs, implementation="xla", sharding=None),)


class _Compressed(NamedTuple):
    """The step on some rows of a leaf, whose gradient is compressed first."""

    feedback: TopKFeedback
    move: Move
    write: Write
    reads_target: bool

    def __call__(self, rows: Rows, carried: Arrays, inputs: Arrays) -> Arrays:
        gradient, *others = inputs
        target = others.pop(0) if self.reads_target else gradient
        draw = Draw(others[0], rows) if others else None
        layout = self.feedback.layout
        alone = jax.device_count() == 1 and not any(jax.typeof(gradient).sharding.spec)
        if self.feedback.is_one_operation and not layout.padding and alone:
            # No axis is sharded, so that any may be joined. Each block is a row: leaves of other
            # widths then have equal operations, which the compiler compiles once.
            carried = tuple(x.reshape(-1, 1, *x.shape[gradient.ndim :]) for x in carried)
            gradient, target = (x.reshape(-1, layout.size) for x in (gradient, target))
        values, indices, *stored = carried
        sent = self.feedback.of_rows(gradient, tuple(stored), draw, "xla")
        window = self.write((values, indices), sent[:2])
        result = self.move(target, *window, implementation="xla", sharding=None)
        return result, *window, *sent[2:]
