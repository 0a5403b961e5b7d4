"""Where each array of an optimizer's state lies, before there is one."""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from microadam_jax.arguments import require_transformation
from microadam_jax.execution import shardings_by_path, within
from microadam_jax.sharding import fitted, only_on, shards_along
from microadam_jax.state_arrays import told_axes
from microadam_jax.trees import KeyPath, owner_of, path_name

# What arrays may take on a device beyond their share before anything is said: few can act on less.
UNNOTICED_BYTES = 2**20


def state_shardings(
    tx: optax.GradientTransformation,
    params: optax.Params,
    param_shardings: Any,
    *,
    zero_axis: str | None = None,
    memory_kind: str | None = None,
) -> Any:
    """Returns a sharding for every array of an optimizer's state.

    Use it as the ``out_shardings`` of ``jax.jit(tx.init)`` and of the training step, and as the
    target of a restore. A state array lies as its parameter does, and whole on the axes that the
    parameter's sharding does not divide: the averaged axes of a shared second moment, or the rows
    and columns of ``optax.adafactor``. A rank in place of an axis is whole too. What belongs to no
    parameter is on every device.

    Args:
        tx: any Optax transformation, in whatever wrappers.
        params: the parameters, or ``jax.ShapeDtypeStruct`` of them; nothing is allocated.
        param_shardings: a tree of ``NamedSharding`` for them, or a prefix of one. Flax's boxes
            may be there or not.
        zero_axis: a mesh axis along which parameters are replicated, such as ``"data"``, and over
            which states are to be cut (ZeRO-1). It goes to the first axis of a parameter that
            leaves all its state arrays whole blocks; where there is none, they stay as the
            parameter.
        memory_kind: ``"pinned_host"`` keeps what belongs to parameters in the host's memory. The
            step must then fetch it with ``jax.device_put`` and the shardings of this function
            without ``memory_kind``.

    Returns:
        Shardings in the structure of ``tx.init(params)``.

    Warns:
        UserWarning: once, if arrays stay whole along axes of more than one number because a
            sharding, or ``zero_axis``, does not divide them, and take over 1 MiB more of each
            device than if they were cut. It names them.

    Raises:
        TypeError: if ``tx`` is no transformation.
        ValueError: if there is no sharding to take the mesh from, or one has more axes than its
            parameter, if ``zero_axis`` is no axis of the mesh, or if its devices do not have such
            a memory.

    Examples:
        >>> import jax, optax
        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> from microadam_jax import adamw8bit, state_shardings
        >>> mesh = jax.make_mesh((1, 1), ("data", "fsdp"))
        >>> params = {"w": jax.ShapeDtypeStruct((512, 1024), "float32")}
        >>> along_rows = {"w": NamedSharding(mesh, P("fsdp"))}
        >>> state = state_shardings(adamw8bit(1e-3), params, along_rows)
        >>> optax.tree_utils.tree_get(state, "mu")["dynamic8_b256"]["codes"]["w"].spec[0]
        'fsdp'
    """
    require_transformation(tx=tx)
    leaves = jax.tree.leaves_with_path(params)
    shardings = shardings_by_path("param_shardings", param_shardings, params)
    mesh = _mesh_of([*shardings.values()])
    _require_memory(mesh, memory_kind)
    state, axes = _state_of(tx, params)

    def asked(path: KeyPath, leaf: Any, of_owner: NamedSharding) -> NamedSharding:
        return only_on(of_owner, leaf.ndim, axes[path]) if path in axes else of_owner

    given = shardings
    if zero_axis is not None:
        if zero_axis not in mesh.shape:
            raise ValueError(
                f"zero_axis {zero_axis!r} is no axis of the mesh, which has "
                f"{', '.join(mesh.shape)}."
            )
        shapes: dict[KeyPath, list[tuple[int, ...]]] = {path: [leaf.shape] for path, leaf in leaves}
        for path, leaf in jax.tree.leaves_with_path(state):
            if (owner := owner_of(path, shardings)) is not None:
                kept = axes.get(path, range(leaf.ndim))
                shapes[owner].append(tuple(n if i in kept else 1 for i, n in enumerate(leaf.shape)))
        shardings = {path: _cut(shardings[path], zero_axis, own) for path, own in shapes.items()}

    def place(path: KeyPath, leaf: Any) -> NamedSharding:
        owner = owner_of(path, shardings)
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        sharding = fitted(asked(path, leaf, shardings[owner]), leaf.shape)
        return sharding if memory_kind is None else sharding.with_memory_kind(memory_kind)

    placed = jax.tree.map_with_path(place, state)
    extra: dict[str, float] = {}
    for (path, leaf), sharding in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(placed), strict=True
    ):
        if (owner := owner_of(path, given)) is not None:
            wish = asked(path, leaf, given[owner])
            extra[path_name(path)] = _extra_bytes(leaf, wish, sharding, zero_axis)
    _warn_of(extra)
    return placed


def _state_of(
    tx: optax.GradientTransformation, params: Any
) -> tuple[Any, dict[KeyPath, Collection[int]]]:
    """The state as shapes, and the axes of the parameter that an array has, if not all, by path.

    What has a rank in place of an axis cannot be told by its shape from what has blocks there.
    """
    axes: dict[KeyPath, Collection[int]] = {}

    def init(params: Any) -> Any:
        with within(axes={}):
            state = tx.init(params)
            axes.update(told_axes(state))
        return state

    return jax.eval_shape(init, params), axes


def _extra_bytes(
    leaf: jax.ShapeDtypeStruct, asked: NamedSharding, found: NamedSharding, zero_axis: str | None
) -> float:
    """Returns the bytes of a device that ``leaf`` takes beyond those of its shard as asked for."""
    wish = _pieces(leaf.shape, asked)
    if zero_axis is not None and zero_axis not in jax.tree.leaves([*asked.spec]):
        wish *= asked.mesh.shape[zero_axis]
    size = leaf.size * leaf.dtype.itemsize
    # A number that all the devices share cannot be cut.
    return size / _pieces(leaf.shape, found) - size / min(wish, max(1, leaf.size))


def _pieces(shape: tuple[int, ...], sharding: NamedSharding) -> int:
    """Into how many pieces the axes of more than one number are cut."""
    axes = zip(shape, sharding.spec, strict=False)
    return math.prod(shards_along(sharding.mesh, entry) for size, entry in axes if size > 1)


def _warn_of(extra: Mapping[str, float]) -> None:
    whole = sorted((name for name, size in extra.items() if size > 0), key=lambda n: -extra[n])
    total = sum(extra[name] for name in whole)
    if total > UNNOTICED_BYTES:
        shown = ", ".join(f"{name} ({extra[name] / 2**20:.1f} MiB)" for name in whole[:3])
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        warnings.warn(
            f"{len(whole)} arrays of the state stay whole along an axis that should be cut, and "
            f"take {total / 2**20:.1f} MiB more of each device than if they were: {shown}{more}. "
            "The number of blocks, or of elements, along it is no multiple of the devices: cut "
            "another axis of these parameters, or this one over fewer devices.",
            stacklevel=3,
        )


def _cut(sharding: NamedSharding, name: str, shapes: Sequence[tuple[int, ...]]) -> NamedSharding:
    """``sharding`` with ``name`` on the first axis along which it divides all ``shapes``."""
    mesh = sharding.mesh
    spec = [*sharding.spec, *[None] * (len(shapes[0]) - len(sharding.spec))]
    if name in jax.tree.leaves(spec):
        return sharding
    for axis, entry in enumerate(spec):
        pieces = shards_along(mesh, entry) * mesh.shape[name]
        sizes = [shape[axis] for shape in shapes if axis < len(shape)]
        if sizes[0] > 1 and all(size == 1 or size % pieces == 0 for size in sizes):
            names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            spec[axis] = (*names, name) if names else name
            return NamedSharding(mesh, PartitionSpec(*spec))
    return sharding


def _mesh_of(shardings: Sequence[Any]) -> Mesh:
    wrong = [sharding for sharding in shardings if not isinstance(sharding, NamedSharding)]
    if wrong or not shardings:
        given = f"a {type(wrong[0]).__name__}" if wrong else "none, because there are no parameters"
        raise ValueError(
            f"param_shardings must be of NamedSharding, which know their mesh; got {given}."
        )
    return shardings[0].mesh


def _require_memory(mesh: Mesh, kind: str | None) -> None:
    try:
        NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
    except ValueError as error:
        raise ValueError(
            f"memory_kind {kind!r} is none of these devices: {error} Leave memory_kind out to keep "
            "the state in their own memory."
        ) from error
