"""The dense step of a window, on the leaves of a tree."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from microadam_jax.codecs.rounding import Draw, Rows
from microadam_jax.engine.leaf_loops import Arrays, Work, each_kind, on_cpu
from microadam_jax.engine.top_k_feedback import TopKFeedback, Uncompressed
from pallas_kernels.dispatch import names_kernel

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


def move_all(steps: Sequence[WindowStep], implementation: str | None) -> list[tuple[Any, ...]]:
    """Takes the steps.

    Args:
        steps: of leaves.
        implementation: ``"xla"``, a kernel's name, or None, which picks by device and shape.

    Returns:
        For each leaf the result, a :class:`Moved` if it had been deferred, and its window.

    Raises:
        NotImplementedError: if the named implementation cannot run.
    """
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
