"""The bases of all matrices in a tree: made, renewed and kept."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from microadam_jax.arguments import require_kind
from microadam_jax.execution import remark, scope
from microadam_jax.layout.matrices import Assigned, Matrices
from microadam_jax.layout.view import MatrixView
from microadam_jax.sharding import explicit_sharding, replicated
from microadam_jax.state_arrays import known_sharding, moment_zeros
from microadam_jax.subspace.basis import Basis
from microadam_jax.subspace.refresh import Refresh
from microadam_jax.subspace.subspace import (
    Arrays,
    Slots,
    Subspace,
    none_found,
    require_subspace,
    unfound,
)
from microadam_jax.trees import KeyPath, leaf_key, map_with_path


@dataclasses.dataclass(frozen=True)
class Projection:
    """Says which matrices are projected, on what, and when that changes.

    Attributes:
        matrices: which parameters are matrices.
        subspace: how a basis is found.
        refresh: when.

    Raises:
        TypeError: if one of them is of another class.
    """

    matrices: Matrices
    subspace: Subspace
    refresh: Refresh

    def __post_init__(self) -> None:
        require_kind(Matrices, matrices=self.matrices)
        require_kind(Refresh, refresh=self.refresh)
        require_subspace(self.subspace)

    def assign(self, params: Any) -> dict[KeyPath, "Projected"]:
        """Returns for each leaf of a tree, by its path, its part in this projection.

        Raises:
            ValueError: if a stack is updated layer by layer, and bases would be others than those
                of the stack.
        """
        if scope().layer is not None and (hasattr(self.subspace, "seed") or self.refresh.stagger):
            raise ValueError(
                "A subspace drawn at random is drawn for all layers of a stack together, and "
                "staggered refreshes count all parameters, so that layers cannot be updated one "
                "after another. Take a subspace found from the gradient, as GaLore does, and "
                "Refresh without stagger."
            )
        assigned = self.matrices.assign(params)
        projected = [path for path, each in assigned.items() if each.view is not None]
        offsets = {
            path: self.refresh.offset(index, len(projected)) for index, path in enumerate(projected)
        }
        return {
            path: Projected(self, path, each, offsets.get(path, 0))
            for path, each in assigned.items()
        }

    def zeros(self, params: Any) -> tuple[Any, ...]:
        """A tree for each array that is kept of a basis."""
        leaves = self.assign(params)

        def of(path: KeyPath, parameter: Any) -> Arrays:
            leaf = leaves[path]
            leaf.remark(parameter)
            return leaf.zeros(parameter, self.slots(leaf.assigned.view))

        return map_with_path(of, len(self.slots(None)), params)

    def slots(self, view: MatrixView | None) -> Slots:
        """Returns the layouts of what is kept of the basis of a parameter."""
        return self.subspace.layouts(1 if view is None else self.subspace.size(view))


class Projected(NamedTuple):
    """One parameter's part in a projection.

    Attributes:
        projection: the projection.
        path: the parameter's path.
        assigned: how it is seen.
        offset: how many steps earlier it has its turn.
    """

    projection: Projection
    path: KeyPath
    assigned: Assigned
    offset: int

    def zeros(self, parameter: Any, slots: Slots) -> Arrays:
        """State arrays; of what is no matrix, one number each that is not used."""
        view = self.assigned.view
        if view is None:
            shape = (1,) * len(parameter.shape)
            return tuple(moment_zeros(parameter, shape, dtype) for _, dtype in slots)
        return tuple(view.zeros(parameter, layout, dtype) for layout, dtype in slots)

    def due(self, count: jax.Array) -> jax.Array | bool:
        """Returns True if this step has a new basis."""
        refresh = self.projection.refresh
        return refresh.every == 1 or refresh.due(count, self.offset)

    def basis(self, view: MatrixView, kept: Arrays, count: jax.Array) -> Basis:
        """The basis of folded arrays that were kept in the step after ``count`` others."""
        subspace = self.projection.subspace
        shape = (*(view.shape[i] for i in view.batch), view.rows, subspace.size(view))
        return subspace.basis(kept, shape, self._key(count))

    def first(self, kept: Arrays, count: jax.Array) -> jax.Array:
        """Marks the matrices that had no basis before the step after ``count``: ``(*batch,)``."""
        first = jnp.broadcast_to(count == 0, kept[0].shape[:-2])
        return first | replicated(unfound(kept)) if self.projection.subspace.seeks else first

    def renew(self, matrix: Callable[[], jax.Array], kept: Arrays, count: jax.Array) -> Arrays:
        """A new basis if it is due or there is none; else the one that there is.

        A matrix of zeros has no best basis. It keeps what it has, and where that is nothing, the
        state says so: vectors of zeros, or the index -1. Which basis projects zeros does not
        matter.

        Args:
            matrix: computes what the new basis is to approximate.
            kept: folded arrays.
            count: steps taken.
        """
        if not kept:
            return kept

        subspace, scheduled, key = self.projection.subspace, self.due(count), self._key(count)
        first, due = self.first(kept, count), scheduled
        if subspace.seeks and not isinstance(scheduled, bool):
            due = scheduled | jnp.any(first)

        def find() -> Arrays:
            target = matrix()

            def new() -> Arrays:
                found = subspace.find(target, kept, first, key)
                return tuple(_placed_as(x, old) for x, old in zip(found, kept, strict=True))

            if not subspace.seeks:
                return new()
            # Matrices that have a basis keep it while others of their stack are still without one.
            seen = replicated(jnp.any(target != 0, axis=(-2, -1))) & (scheduled | first)
            found = when(due if isinstance(due, bool) else jnp.any(seen), new, lambda: kept)
            columns = zip(found, kept, none_found(kept), strict=True)
            return tuple(_where(seen, new, _where(first, none, old)) for new, old, none in columns)

        return when(due, find, lambda: kept)

    def remark(self, parameter: Any) -> None:
        """Tells the memory report what is not as one might expect."""
        self.assigned.remark(self.path)
        view, subspace = self.assigned.view, self.projection.subspace
        if view is None:
            return
        if subspace.rank >= view.rows:
            remark(self.path, f"rank {subspace.rank} of {view.rows} rows, not compressed")
        sharding = known_sharding(parameter)
        if subspace.gathers and isinstance(sharding, NamedSharding) and any(sharding.spec):
            every = self.projection.refresh.every
            steps = "every step" if every == 1 else f"every {every} steps"
            remark(self.path, f"gradient gathered {steps} for a new basis")

    def _key(self, count: jax.Array) -> jax.Array:
        return leaf_key(0, self.projection.refresh.epoch(count, self.offset), self.path)


def when(due: jax.Array | bool, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """``lax.cond``, without the other branch where it is known."""
    if isinstance(due, bool):
        return then() if due else otherwise()
    return jax.lax.cond(due, then, otherwise)


def folded(view: MatrixView, arrays: Arrays) -> Arrays:
    """The matrices of state arrays."""
    return tuple(view.fold(x) for x in arrays)


def unfolded(
    view: MatrixView, arrays: Arrays, slots: Slots, parameter: jax.Array
) -> Iterator[jax.Array]:
    """State arrays of matrices, in the dtypes they are kept in."""
    for x, (layout, dtype) in zip(arrays, slots, strict=True):
        yield view.unfold(x, layout, parameter).astype(dtype)


def _placed_as(x: jax.Array, old: jax.Array) -> jax.Array:
    sharding = explicit_sharding(old) or explicit_sharding(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, jax.typeof(old).sharding.spec))


def _where(chosen: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The matrices of ``x`` where ``chosen``, else those of ``y``, placed as they are."""
    chosen = jnp.broadcast_to(chosen[..., None, None], x.shape)
    return jnp.where(_placed_as(chosen, x), x, y)


def float32(x: jax.Array) -> jax.Array:
    """``x`` in float32, in which all of it is computed."""
    return x.astype(jnp.float32)
