"""A transformation of trees from what a method does to one parameter.

A method says what it keeps, how it reduces a gradient to few values, and what it does to each
element alone. How that runs is asked of :mod:`microadam_jax.engine.stored_step`.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.codecs import Storage, Unstored
from microadam_jax.engine.descent import finishes, kind_of, read_by, replaced_by
from microadam_jax.engine.leaf_loops import apart
from microadam_jax.engine.stored_step import Arrays, Rule, StoredStep, stored_steps
from microadam_jax.engine.transformation import transformation
from microadam_jax.execution import scope
from microadam_jax.state_arrays import moment_zeros
from microadam_jax.trees import (
    KeyPath,
    LeafShape,
    boxed_like,
    boxed_moments,
    columns_of,
    leaf_keys,
    leaf_shapes,
    rows_of,
    turned,
    unstored_arrays,
)

# From the leaves of a tree to what is known of the axes of each, by its path.
Layout = Callable[[Mapping[KeyPath, LeafShape]], Mapping[KeyPath, Any]]


class Leaf(NamedTuple):
    """One parameter.

    Attributes:
        path: its path.
        value: the parameter in ``init``, its gradient in ``reduce``.
        layout: what the method's ``layout`` says of it.
        t: int32 scalar, steps taken including this one; None in ``init``.
    """

    path: KeyPath
    value: jax.Array
    layout: Any
    t: Any = None

    @property
    def squares(self) -> jax.Array:
        """The squared gradient in float32."""
        return jnp.square(self.value.astype(jnp.float32))

    def mean_square(self, mean: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """A mean of the squared gradient, one of several."""
        return apart(lambda g: mean(jnp.square(g.astype(jnp.float32))), self.value, self.t)

    def zeros(self, shape: tuple[int, ...]) -> jax.Array:
        """Float32 zeros of the parameter's rank, sharded as it is where that is possible."""
        return moment_zeros(self.value, shape, jnp.float32)


def leafwise(
    State: Any,
    moments: Mapping[str, Storage | Unstored],
    rule: Callable[..., tuple[jax.Array, ...]],
    init: Callable[[Leaf], Arrays],
    reduce: Callable[..., tuple[Arrays, Arrays]],
    layout: Layout,
    *,
    inspect: Callable[[list[Leaf]], None],
    hyperparams: Mapping[str, Any],
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation from what a method does to one parameter.

    Args:
        State: a NamedTuple of ``count``, the moments, and the small arrays, in this order.
        moments: for each moment how it is stored.
        rule: from the steps taken, the gradient and the moments in float32, and the inputs that
            ``reduce`` made, to the update and the new moments; it acts on each element alone.
        init: from a parameter to its small arrays.
        reduce: from a gradient and the small arrays to new small arrays and inputs of the rule,
            which broadcast against the gradient.
        layout: gives ``Leaf.layout``.
        inspect: called in ``init`` with all parameters, to warn of some or to refuse them.
        hyperparams: by name what the rule needs in float32.
        seed: of codecs that round stochastically.

    Returns:
        The transformation.

    Raises:
        TypeError: if a hyperparameter is an array in fewer bits than float32.
        ValueError: in ``update``, if moments were stored otherwise.
    """
    storages = tuple(moments.values())
    stores = any(isinstance(storage, Storage) for storage in storages)
    small = len(State._fields) - 1 - len(storages)

    def init_fn(params: optax.Params) -> Any:
        layouts = layout(leaf_shapes(params))
        treedef, rows = rows_of(params)
        leaves = [Leaf(path, p, layouts.get(path)) for path, p in rows]
        arrays = columns_of(treedef, list(map(init, leaves)), small)
        inspect(leaves)
        kept = (storage.zeros(params) for storage in storages)
        boxed = (boxed_moments(tree, params) for tree in arrays)
        return State(jnp.zeros([], jnp.int32), *kept, *boxed)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        finish: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        count, kept, arrays = state[0], state[1 : 1 + len(storages)], state[1 + len(storages) :]
        t = jnp.asarray(optax.safe_increment(count))
        targets = updates if params is None else params
        ends = finishes(finish, targets)
        leaves = leaf_shapes(updates)
        layouts = layout(leaves)
        fields = zip(moments.items(), kept, strict=True)
        placed: Mapping[KeyPath, Any] = {}
        if stores:
            placed = scope().shardings_by_path(updates)
            keys = functools.cache(lambda: leaf_keys(seed, count, updates).values())
            of_fields = [s.take(name, field, leaves, keys) for (name, s), field in fields]
        else:
            of_fields = [unstored_arrays(name, field, leaves) for (name, _), field in fields]
        treedef, rows = rows_of(updates, targets, ends, *arrays)
        rules: dict[Hashable, Rule] = {}

        def rule_for(finish: Callable[..., jax.Array], target: jax.Array, inputs: int) -> Rule:
            """One function for all leaves on which it does the same."""

            def run(moments: Arrays, read: Arrays) -> tuple[jax.Array, Arrays]:
                g, others = read[0], read[1:]
                u, *new = rule(t, g.astype(jnp.float32), *moments, *others[:inputs])
                return finish(u.astype(dtype), *others[inputs:]), tuple(new)

            dtype = jnp.dtype(target.dtype)
            return rules.setdefault((kind_of(finish), dtype, inputs), run)

        steps, reduced = [], []
        for (path, g, target, end, *own), *of_leaf in zip(rows, *of_fields, strict=True):
            new, inputs = reduce(Leaf(path, g, layouts.get(path), t), *own)
            reduced.append(new)
            run, read = rule_for(end, target, len(inputs)), (g, *inputs, *read_by(end, target))
            steps.append((run, of_leaf, read, replaced_by(end), placed.get(path)))
        if stores:
            implementation = scope().implementation_for(State.__name__.removesuffix("State"))
            stepped = stored_steps([StoredStep.of(*step) for step in steps], implementation)
        else:
            stepped = [_unstored_step(run, of_leaf, read) for run, of_leaf, read, *_ in steps]
        results = [(u, *new) for (u, _), new in zip(stepped, reduced, strict=True)]
        moved = [own for _, own in stepped]
        scaled, *new = columns_of(treedef, results, 1 + small)
        columns = turned(moved, len(storages))
        if stores:
            parts = zip(storages, kept, columns, strict=True)
            stored = [storage.put(field, own) for storage, field, own in parts]
        else:
            stored = map(boxed_like, columns, kept)
        return scaled, State(t, *stored, *map(boxed_like, new, arrays))

    return transformation(init_fn, update_fn, **hyperparams)


def _unstored_step(rule: Rule, moments: Sequence[jax.Array], inputs: Arrays) -> Any:
    """The output of a rule, and the new moments in the dtypes of those before."""
    output, new = rule(tuple(x.astype(jnp.float32) for x in moments), inputs)
    pairs = zip(new, moments, strict=True)
    return output, tuple(x.astype(jnp.float32).astype(before.dtype) for x, before in pairs)
