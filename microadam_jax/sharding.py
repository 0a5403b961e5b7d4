"""State arrays that are placed as their parameter is."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jax.typing import DTypeLike


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
    sharding = _known_sharding(parameter)
    if isinstance(sharding, NamedSharding):
        _check_divides(sharding, parameter.shape, shape)
    return jax.lax.full(shape, 0, jnp.dtype(dtype), sharding=sharding)


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
    sharding = _known_sharding(parameter)
    if isinstance(sharding, NamedSharding):
        sharding = fitted(sharding, shape)
    return jax.lax.full(shape, 0, jnp.dtype(dtype), sharding=sharding)


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


def unused_state(parameter: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """One byte per element of ``parameter``, in place of a state array that it does not need.

    Every state field has an array for every parameter, because trainers copy the parameters'
    tree of specs onto it; an empty array could be neither sharded like the parameter nor saved.
    """
    return state_zeros(parameter, parameter.shape, jnp.uint8)


def _known_sharding(parameter: jax.Array | jax.ShapeDtypeStruct) -> Sharding | None:
    if isinstance(parameter, jax.core.Tracer):
        return jax.typeof(parameter).sharding
    sharding = getattr(parameter, "sharding", None)
    if not getattr(parameter, "committed", True):
        return None
    return sharding if isinstance(sharding, NamedSharding | SingleDeviceSharding) else None


def _check_divides(
    sharding: NamedSharding, parameter_shape: tuple[int, ...], state_shape: tuple[int, ...]
) -> None:
    try:
        sharding.shard_shape(state_shape)
    except ValueError as error:
        raise ValueError(
            f"A parameter of shape {parameter_shape} is sharded as {sharding.spec} over "
            f"{dict(sharding.mesh.shape)}, which does not divide its state of shape "
            f"{state_shape}. Shard another axis, or give the block rule the number of shards "
            "of the last axis: Blocks(shards=...)."
        ) from error
