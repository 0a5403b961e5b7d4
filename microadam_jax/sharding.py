"""State arrays that are placed as their parameter is."""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jax.typing import DTypeLike

from microadam_jax.execution import scope
from microadam_jax.trees import KeyPath, is_compressed, owner_of


def state_zeros(
    parameter: jax.Array | jax.ShapeDtypeStruct, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """Zeros for a state array of ``parameter``, carrying the parameter's ``PartitionSpec``.

    Args:
        parameter: the array (or its shape, or a tracer of it) that the state belongs to.
        shape: the state array's shape; its leading axes are the parameter's.
        dtype: the state array's dtype.

    Returns:
        Zeros with the parameter's sharding where it is known: committed arrays, abstract
        arrays with a sharding, and tracers whose mesh axes are Explicit.

    Raises:
        ValueError: if the parameter's sharding does not divide the state array.
    """
    require_whole(parameter, shape)
    return _zeros(shape, dtype, known_sharding(parameter))


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None) -> jax.Array:
    """Zeros; while ``init`` is traced, one array for all of a kind.

    The compiler would make one of equal arrays, but takes longer over thousands of them than over
    all else in an ``init``.
    """
    shared = scope().zeros if scope().axes is None else None  # where arrays are told apart
    kind, now = (shape, jnp.dtype(dtype), sharding), get_opaque_trace_state()
    known = [] if shared is None else shared.setdefault(kind, [])
    for trace, zeros in known:
        if trace == now:
            return zeros
    zeros = jax.lax.full(shape, 0, jnp.dtype(dtype), sharding=sharding)
    # Arrays outside of a program are donated one by one, and have to be apart.
    if isinstance(zeros, jax.core.Tracer):
        known.append((now, zeros))
    return zeros


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


def require_whole(
    parameter: jax.Array | jax.ShapeDtypeStruct, blocked_shape: tuple[int, ...]
) -> None:
    """Refuses a sharding that would cut through a block.

    Args:
        parameter: the array (or its shape, or a tracer of it) that the blocks belong to.
        blocked_shape: its shape in blocks.

    Raises:
        ValueError: if the parameter's sharding does not divide its blocks.
    """
    sharding = known_sharding(parameter)
    if not isinstance(sharding, NamedSharding):
        return
    # JAX's own ``shard_shape`` takes no mesh with manual axes.
    pieces = [shards_along(sharding.mesh, entry) for entry in sharding.spec]
    if any(size % count for size, count in zip(blocked_shape, pieces, strict=False)):
        raise ValueError(
            f"A parameter of shape {parameter.shape} is sharded as {sharding.spec} over "
            f"{dict(sharding.mesh.shape)}, which does not divide its state of shape "
            f"{blocked_shape}. Shard another axis, or give the block rule the number of shards "
            "of the last axis: Blocks(shards=...)."
        )


def moment_zeros(
    parameter: jax.Array | jax.ShapeDtypeStruct, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """Zeros for numbers that elements of ``parameter`` share.

    Args:
        parameter: the array (or its shape, or a tracer of it) that the state belongs to.
        shape: the state array's shape, of the parameter's rank.
        dtype: the state array's dtype.

    Returns:
        Zeros, sharded as the parameter on the axes that its sharding divides, and whole on
        the others: those that are averaged and have size 1, and heads that are split between
        devices.
    """
    sharding = known_sharding(parameter)
    if isinstance(sharding, NamedSharding):
        sharding = fitted(sharding, shape)
    return _zeros(shape, dtype, sharding)


def place_moment(x: jax.Array, parameter: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """``x`` placed as :func:`moment_zeros` places zeros of its shape."""
    sharding = known_sharding(parameter)
    if isinstance(parameter, jax.core.Tracer):
        return place_like(x, parameter, x.shape)
    if isinstance(sharding, NamedSharding):
        sharding = fitted(sharding, x.shape)
    return x if sharding is None else jax.device_put(x, sharding)


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


def zeros_sharded_on(
    parameter: jax.Array | jax.ShapeDtypeStruct,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    axes: Collection[int],
) -> jax.Array:
    """Zeros that are sharded as ``parameter`` on ``axes`` and whole on the others.

    Args:
        parameter: the array (or its shape, or a tracer of it) that the state belongs to.
        shape: the state array's shape, of the parameter's rank, and of its size on ``axes``.
        dtype: the state array's dtype.
        axes: those that state and parameter have in common.
    """
    sharding, axes = known_sharding(parameter), tuple(axes)
    if isinstance(sharding, NamedSharding):
        sharding = only_on(sharding, len(shape), axes)
    zeros, collected = _zeros(shape, dtype, sharding), scope().axes
    if collected is not None:
        collected[id(zeros)] = zeros, axes
    return zeros


def tell_axes(state: Any, parameters: Any) -> None:
    """Tells :func:`state_shardings` that arrays of a state have the axes of their parameters.

    Args:
        state: of an optimizer for ``parameters``.
        parameters: some or all from :func:`zeros_sharded_on`.
    """
    collected = scope().axes
    if collected is None:
        return
    axes = told_axes(parameters)
    for path, leaf in jax.tree.leaves_with_path(state):
        if (owner := owner_of(path, axes)) is not None:
            collected[id(leaf)] = leaf, axes[owner]


def told_axes(tree: Any) -> dict[KeyPath, Collection[int]]:
    """Returns the axes of the parameter that arrays have, of those that have only some."""
    told, leaves = scope().axes or {}, jax.tree.leaves_with_path(tree)
    return {path: told[id(leaf)][1] for path, leaf in leaves if id(leaf) in told}


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


def unused_state(parameter: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """One byte per element of ``parameter``, in place of a state array that it does not need.

    Every state field has an array for every parameter, because trainers copy the parameters'
    tree of specs onto it; an empty array could be neither sharded like the parameter nor saved.
    """
    return state_zeros(parameter, parameter.shape, jnp.uint8)


def unused_factor(parameter: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """One byte of the rank of ``parameter``, in place of a factor that it does not need."""
    return moment_zeros(parameter, (1,) * len(parameter.shape), jnp.uint8)


def known_sharding(parameter: jax.Array | jax.ShapeDtypeStruct) -> Sharding | None:
    """Returns the sharding of ``parameter``; None if the compiler or ``jax.shard_map`` has it."""
    if isinstance(parameter, jax.core.Tracer):
        sharding = jax.typeof(parameter).sharding
    else:
        sharding = getattr(parameter, "sharding", None)
        if not getattr(parameter, "committed", True):
            return None
    if isinstance(sharding, NamedSharding):
        # Within jax.shard_map an array is one device's own, and so is its state.
        own = sharding.mesh.manual_axes and not any(sharding.spec)
        return None if own else sharding
    return sharding if isinstance(sharding, SingleDeviceSharding) else None
