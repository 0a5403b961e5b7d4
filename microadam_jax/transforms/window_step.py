"""The dense step of a window, on the leaves of a tree."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from microadam_jax.codecs.rounding import Rows
from microadam_jax.leaf_loops import Arrays, Work, each_kind, on_cpu

# From target, values and indices, the implementation and the sharding to the result.
Move = Callable[..., jax.Array]


class WindowStep(NamedTuple):
    """A step on one leaf.

    Attributes:
        move: from the parameter, a window's values and indices, ``implementation`` and
            ``sharding`` to the update or the new parameter. Each row has a result by itself.
            Leaves that have the same function, not an equal one, are compiled together.
        target: the parameter.
        values: ``(*lead, blocks, rows, k)``.
        indices: ``(*lead, blocks, rows, k)``.
        in_place: True if the result takes the parameter's place.
        sharding: how the leaf is sharded, on a mesh with Auto axes.
    """

    move: Move
    target: jax.Array
    values: jax.Array
    indices: jax.Array
    in_place: bool
    sharding: NamedSharding | None

    @property
    def arrays(self) -> Arrays:
        """What is computed with."""
        return self.target, self.values, self.indices

    @property
    def kind(self) -> Hashable:
        """Equal for steps that are compiled together."""
        return self.move, self.in_place, self.sharding, tuple(map(jax.typeof, self.arrays))


def move_all(steps: Sequence[WindowStep], implementation: str | None) -> list[jax.Array]:
    """Takes the steps.

    Args:
        steps: of leaves.
        implementation: ``"xla"``, a kernel's name, or None, which picks by device and shape.

    Returns:
        The result for each leaf.

    Raises:
        NotImplementedError: if the named implementation cannot run.
    """
    if not steps:
        return []
    flat, structure = jax.tree.flatten([step.arrays for step in steps])

    def one_by_one(*arrays: jax.Array) -> list[jax.Array]:
        def run(step: WindowStep, arrays: Arrays) -> jax.Array:
            return step.move(*arrays, implementation=implementation, sharding=step.sharding)

        given = zip(steps, structure.unflatten(arrays), strict=True)
        return each_kind(run, [step.kind for step in steps], list(given))

    def in_loops(*arrays: jax.Array) -> list[jax.Array]:
        dtypes: dict[Hashable, jnp.dtype] = {}
        works = []
        for step, read in zip(steps, structure.unflatten(arrays), strict=True):
            part = _OfRows(step.move)
            if step.kind not in dtypes:
                dtypes[step.kind] = jax.eval_shape(part.move_rows, *read).dtype
            place = 0 if step.in_place else None
            works.append(Work(part, (), tuple(read), dtypes[step.kind], place))
        return [result for (result,) in on_cpu(works)]

    if implementation in (None, "xla"):
        return jax.lax.platform_dependent(*flat, cpu=in_loops, default=one_by_one)
    return one_by_one(*flat)


class _OfRows(NamedTuple):
    """The step on some rows of a leaf."""

    move: Move

    def __call__(self, rows: Rows, carried: Arrays, inputs: Arrays) -> Arrays:
        del rows, carried
        return (self.move_rows(*inputs),)

    def move_rows(self, *arrays: jax.Array) -> jax.Array:
        return self.move(*arrays, implementation="xla", sharding=None)
