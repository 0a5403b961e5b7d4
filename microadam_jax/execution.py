"""Runs an optimizer in a scope, in which its transformations are told, and tell, what it takes."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Collection, Generator, Hashable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.tree_util import KeyPath

from microadam_jax.arguments import as_transformation
from microadam_jax.trees import LeafShape, leaf_shapes, path_name, without_boxes
from pallas_kernels.dispatch import check_implementation, names_kernel


@dataclasses.dataclass(frozen=True)
class Scope:
    """Holds what all transformations that are initialized or updated inside share.

    An argument of ``update`` might be dropped by a wrapper on the way to them.

    Attributes:
        implementation: of operations that have kernels; see :func:`run_with`.
        shardings: of the parameters; see :func:`run_with`.
        asked: where the transformations that ask for ``implementation`` leave their names, or None.
        layer: the index of the layer that each leaf is, where a stack is updated layer by layer:
            stochastic rounding then draws what it would for the stack. None for whole leaves.
        parameters: the shapes of all parameters, where they are updated one at a time; see
            :func:`all_leaves`.
        micro_batch: the part of a step's gradient that comes in; None if it is all of it.
        observed: where :func:`with_diagnostics` collects what error feedback did, or None.
        notes: where :func:`memory_report` collects notes about leaves, or None.
        settings: where :func:`state_format` collects what states depend on, or None.
        zeros: the arrays of zeros of the program that ``init`` is traced into; None outside of it.
        axes: where :func:`state_shardings` collects arrays that have only some of the parameter's
            axes, and which, by the identity of the array; None elsewhere.
    """

    implementation: str | None = None
    shardings: Any = None
    asked: list[str] | None = None
    layer: Any = None
    parameters: Any = None
    micro_batch: Any = None
    observed: Any = None
    notes: dict[str, list[str]] | None = None
    settings: dict[str, str] | None = None
    zeros: dict[Hashable, list[tuple[Any, jax.Array]]] | None = None
    axes: dict[int, tuple[jax.Array, Collection[int]]] | None = None

    @property
    def names_kernel(self) -> bool:
        """Returns True if kernels are insisted on, and the choice is not left to the device."""
        return names_kernel(self.implementation)

    def implementation_for(self, transformation: str) -> str | None:
        """Returns the implementation for a transformation whose operations have kernels.

        Args:
            transformation: its name.
        """
        if self.asked is not None:
            self.asked.append(transformation)
        return self.implementation

    def shardings_by_path(
        self, tree: Any, is_leaf: Callable[[Any], bool] | None = None
    ) -> dict[KeyPath, NamedSharding]:
        """Maps the path of each leaf of ``tree`` to its sharding; empty if none were given.

        Args:
            tree: parameters, or their updates.
            is_leaf: what to treat as a leaf of ``tree``.
        """
        return (
            {} if self.shardings is None else _by_path("shardings", self.shardings, tree, is_leaf)
        )


_NONE = Scope()
_scope: contextvars.ContextVar[Scope] = contextvars.ContextVar("scope")


def scope() -> Scope:
    """Returns the innermost scope."""
    return _scope.get(_NONE)


def all_leaves(leaves: Mapping[KeyPath, LeafShape]) -> tuple[LeafShape, ...]:
    """Returns the leaves to ask whether one stacks layers, and how its kernels are stored.

    Args:
        leaves: of parameters or updates. Where these are updated one at a time, it is one of them
            and does not tell; the scope then has all.
    """
    parameters = scope().parameters
    return tuple((leaves if parameters is None else leaf_shapes(parameters)).values())


def remark(path: KeyPath, text: str) -> None:
    """Tells the memory report being made, if any, something about the leaf at ``path``."""
    notes = scope().notes
    if notes is not None:
        notes[text].append(path_name(path))


def is_reporting() -> bool:
    """Returns True while a memory report is being made, which remarks are for and warnings not."""
    return scope().notes is not None


@contextlib.contextmanager
def within(**changes: Any) -> Generator[Scope]:
    """Opens a scope that differs from the one around it in ``changes``."""
    token = _scope.set(dataclasses.replace(scope(), **changes))
    try:
        yield scope()
    finally:
        _scope.reset(token)


def run_with(
    tx: optax.GradientTransformation, *, implementation: str | None = None, shardings: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Chooses how an optimizer runs: which kernels, and on which shards.

    Updates and states are those of ``tx``, but for last bits: kernels compute the same formulas as
    XLA's program.

    Args:
        tx: any transformation, such as :func:`microadam` or a chain with it.
        implementation: None takes the TPU kernel where the program is compiled for a TPU, for each
            parameter whose shape it supports, and XLA's program elsewhere.
            ``"xla"`` takes XLA's program everywhere. ``"mosaic_tpu"`` insists on the TPU kernels,
            ``"triton"`` and ``"jax_triton"`` on those for GPUs, which have not run on one yet, for
            every parameter that is compressed or stored in few bits.
        shardings: of the parameters: a tree of ``NamedSharding``, or a prefix of one, as for
            :func:`state_shardings`. Kernels need it on a mesh with Auto axes, where the types of
            arrays do not have it; without it XLA compiles the step there. On Explicit axes, and
            on one device, leave it out.

    Returns:
        The transformation, with the state of ``tx``; what :func:`fused_apply` takes, it still
        takes.

    Raises:
        NotImplementedError: if the implementation was tried and left out; in ``update``, if it
            cannot run with a parameter. It says why.
        TypeError: if ``tx`` is no transformation, or ``shardings`` holds anything but
            ``NamedSharding``.
        ValueError: if there is no such implementation; in ``init`` and ``update``, if no
            transformation in ``tx`` has a kernel, or one that stores its state in few bits is not
            elementwise, or if ``shardings`` are those of another tree.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> from microadam_jax import microadam, run_with
        >>> mesh = jax.make_mesh((1,), ("fsdp",))
        >>> tx = run_with(microadam(1e-3), shardings=NamedSharding(mesh, PartitionSpec("fsdp")))
        >>> params = {"w": jnp.zeros((64, 256))}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    inner = as_transformation(tx=tx)
    check_implementation("run_with", implementation)
    _require_named(shardings)
    changes: dict[str, Any] = {"implementation": implementation, "shardings": shardings}

    def init(params: optax.Params) -> optax.OptState:
        if shardings is not None:
            shardings_by_path("shardings", shardings, params)
        with within(asked=[], **changes):
            return inner.init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        with within(asked=[], **changes) as here:
            results = inner.update(updates, state, params, **extra_args)
        if here.names_kernel and not here.asked:
            raise ValueError(
                f"implementation={implementation!r} names kernels, and no transformation in this "
                "optimizer has any. Leave it at None."
            )
        return results

    return type(inner)(init, update)


def _require_named(shardings: Any) -> None:
    """Raises TypeError unless the leaves of the tree ``shardings`` are ``NamedSharding``."""
    for path, sharding in jax.tree.leaves_with_path(without_boxes(shardings)):
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"shardings must be a tree of NamedSharding, or a prefix of one, that says where "
                f"the parameters lie; at {jax.tree_util.keystr(path) or 'its root'} it has "
                f"{sharding!r}. Give NamedSharding(mesh, spec)."
            )


def shardings_by_path(
    name: str, shardings: Any, params: optax.Params
) -> dict[KeyPath, NamedSharding]:
    """Maps the path of each parameter to its sharding.

    Args:
        name: of the argument, for errors.
        shardings: a tree of ``NamedSharding`` for the parameters, or a prefix of one.
        params: the parameters, or shapes of them.

    Raises:
        ValueError: if a parameter has no sharding, or one of more axes than it has, or if there is
            one for no parameter.
    """
    placed = _by_path(name, shardings, params)
    for path, leaf in jax.tree.leaves_with_path(params):
        spec = getattr(placed[path], "spec", ())
        if any(spec[len(leaf.shape) :]):
            raise ValueError(
                f"{name} would cut {path_name(path)!r} of shape {leaf.shape} as {spec}, which has "
                "more axes. Give it a sharding of its own."
            )
    return placed


def _by_path(
    name: str, shardings: Any, tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[KeyPath, NamedSharding]:
    """Maps the path of each leaf of ``tree`` to its sharding.

    Args:
        name: of the argument, for errors.
        shardings: a tree of ``NamedSharding`` for ``tree``, or a prefix of one.
        tree: parameters, or their updates.
        is_leaf: what to treat as a leaf of ``tree``.

    Raises:
        ValueError: if it is no prefix.
    """
    try:
        each = jax.tree.map(
            lambda sharding, part: jax.tree.map(lambda _: sharding, part, is_leaf=is_leaf),
            without_boxes(shardings),
            tree,
        )
    except ValueError as error:
        raise ValueError(f"{name} {_difference(shardings, tree)}") from error
    return dict(jax.tree.leaves_with_path(each))


def _difference(shardings: Any, params: optax.Params) -> str:
    """Says in which leaves a tree is no prefix of that of the parameters."""

    def covers(start: KeyPath, path: KeyPath) -> bool:
        return path[: len(start)] == start

    given = [path for path, _ in jax.tree.leaves_with_path(without_boxes(shardings))]
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    missing = [path for path in paths if not any(covers(start, path) for start in given)]
    surplus = [start for start in given if not any(covers(start, path) for path in paths)]
    parts = [
        f"{what} {', '.join(repr(path_name(path)) for path in found[:3])}"
        + f" and {len(found) - 3} more" * (len(found) > 3)
        for what, found in (("have none for", missing), ("have one for no parameter at", surplus))
        if found
    ]
    told = " and ".join(parts) or "have another structure than the parameters"
    return f"{told}. Give one NamedSharding for each parameter, or one for all below a node."
