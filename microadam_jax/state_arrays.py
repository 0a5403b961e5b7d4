"""Arrays of a state, made where their parameter lies."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from microadam_jax.execution import scope
from microadam_jax.sharding import fitted, only_on, place_like, shards_along
from microadam_jax.trees import KeyPath, owner_of


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


def unused_state(parameter: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """One byte per element of ``parameter``, in place of a state array that it does not need.

    Every state field has an array for every parameter, because trainers copy the parameters'
    tree of specs onto it; an empty array could be neither sharded like the parameter nor saved.
    """
    return state_zeros(parameter, parameter.shape, jnp.uint8)


def unused_factor(parameter: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """One byte of the rank of ``parameter``, in place of a factor that it does not need."""
    return moment_zeros(parameter, (1,) * len(parameter.shape), jnp.uint8)


def place_moment(x: jax.Array, parameter: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """``x`` placed as :func:`moment_zeros` places zeros of its shape."""
    sharding = known_sharding(parameter)
    if isinstance(parameter, jax.core.Tracer):
        return place_like(x, parameter, x.shape)
    if isinstance(sharding, NamedSharding):
        sharding = fitted(sharding, x.shape)
    return x if sharding is None else jax.device_put(x, sharding)


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
