"""Tells where arrays lie on a mesh, and places others accordingly."""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from microadam_jax.trees import KeyPath, is_compressed, owner_of


def shapes_of(function: Callable[..., Any], *arguments: Any) -> list[jax.ShapeDtypeStruct]:
    """Traces a function for its results' shapes and shardings.

    ``jax.eval_shape`` drops the shardings where an Auto axis is beside an Explicit one.

    Args:
        function: from arrays to some.
        *arguments: of it.
    """
    return [shape_of_type(x) for x in jax.make_jaxpr(function)(*arguments).out_avals]


def shape_of_type(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array's type, and its sharding if it is part of that."""
    sharding = x.sharding if any(x.sharding.spec) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def contract(subscripts: str, *operands: jax.Array) -> jax.Array:
    """``jnp.einsum`` in full float32, whose result keeps the shardings of the axes that remain.

    Where mesh axes are Explicit, JAX asks for the result's sharding if a sum crosses devices.

    Args:
        subscripts: with one letter for each axis and an explicit result.
        *operands: float32 arrays.
    """
    axes, remaining = subscripts.split("->")
    names: dict[str, Any] = {}
    mesh = None
    for letters, operand in zip(axes.split(","), operands, strict=True):
        sharding = jax.typeof(operand).sharding
        for letter, name in zip(letters, sharding.spec, strict=False):
            if name is not None:
                names[letter], mesh = name, sharding.mesh
    spec = PartitionSpec(*(names.get(letter) for letter in remaining))
    return jnp.einsum(
        subscripts,
        *operands,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=None if mesh is None else NamedSharding(mesh, spec),
    )


def place_on(x: jax.Array, parameter: jax.Array, axes: Collection[int]) -> jax.Array:
    """``x`` placed as :func:`zeros_sharded_on` places it, where mesh axes are Explicit."""
    sharding = explicit_sharding(x) or explicit_sharding(parameter)
    if sharding is None:
        return x
    target = jax.typeof(parameter).sharding
    return jax.sharding.reshard(x, only_on(target, x.ndim, axes))


def replicated(x: jax.Array) -> jax.Array:
    """``x`` whole on every device, where mesh axes are Explicit."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """The sharding that is part of the type of ``x``, with a name for each axis; None if none."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return None
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def whole_where_uneven(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``x``, whole on the axes whose sharding would not divide an array of ``shape``.

    It matters where mesh axes are Explicit; elsewhere the compiler finds its own way.
    """
    return place_like(x, x, shape)


def place_like(x: jax.Array, parameter: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``x`` placed as :func:`moment_zeros` places a moment of ``shape``, on Explicit axes."""
    sharding = jax.typeof(parameter).sharding
    if not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, fitted(sharding, shape))


def only_on(sharding: NamedSharding, rank: int, axes: Collection[int]) -> NamedSharding:
    """A parameter's sharding for an array of ``rank`` axes, whole on all but ``axes``."""
    spec = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    kept = [name if axis in axes else None for axis, name in enumerate(spec[:rank])]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def fitted(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """A parameter's sharding for an array of ``shape``, whole on the axes it does not divide.

    An axis of size 1 is whole too: its number belongs to all the devices along it.
    """
    spec = [*sharding.spec][: len(shape)]
    for axis, size in enumerate(shape[: len(spec)]):
        if size % shards_along(sharding.mesh, spec[axis]) or size == 1:
            spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def shards_along(mesh: Mesh | AbstractMesh, entry: Any) -> int:
    """Into how many pieces an entry of a ``PartitionSpec`` cuts its axis."""
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[name] for name in names if name)


def cut_as_states(state: Any, updates: Any, params: Any) -> tuple[Any, Any]:
    """Updates and parameters, cut where mesh axes are Explicit as the state arrays are.

    With ZeRO-1 a gradient is on each device what the state is a part of. To cut it first costs
    nothing, and no step has to mix the two.
    """
    paths = {path for path, _ in jax.tree.leaves_with_path(updates, is_leaf=is_compressed)}
    found: dict[KeyPath, list[NamedSharding]] = {}
    for path, x in jax.tree.leaves_with_path(state):
        owner, sharding = owner_of(path, paths), explicit_sharding(x)
        if owner is not None and sharding is not None:
            found.setdefault(owner, []).append(sharding)

    def placed(path: KeyPath, leaf: Any) -> Any:
        of_state = found.get(path, ())
        return jax.tree.map(lambda x: _cut_further(x, of_state), leaf)

    place = functools.partial(jax.tree.map_with_path, placed, is_leaf=is_compressed)
    return place(updates), place(params)


def _cut_further(x: Any, shardings: Sequence[NamedSharding]) -> Any:
    """An array cut as others that have its axes, and perhaps more after them."""
    if not isinstance(x, jax.Array):
        return x
    own = explicit_sharding(x)
    before = [None] * x.ndim if own is None else [*own.spec]
    spec = before
    for sharding in shardings:
        spec = [
            _finer(spec, *entries)
            for entries in itertools.zip_longest(spec, sharding.spec[: x.ndim])
        ]
    if spec == before:
        return x
    mesh = shardings[0].mesh
    return jax.sharding.reshard(x, fitted(NamedSharding(mesh, PartitionSpec(*spec)), x.shape))


def _finer(spec: Sequence[Any], own: Any, entry: Any) -> Any:
    """The entry of an axis that cuts it further, unless another axis is cut along that."""
    own_names, names = (x if isinstance(x, tuple) else (x,) * (x is not None) for x in (own, entry))
    added = names[len(own_names) :]
    taken = {name for x in spec for name in (x if isinstance(x, tuple) else (x,))}
    finer = names[: len(own_names)] == own_names and added and not taken & {*added}
    return entry if finer else own
