"""Any optimizer with its state in few bits."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey
from jax.typing import ArrayLike

from microadam_jax.arguments import as_transformation
from microadam_jax.codecs import Codec, Storage, StoredLeaf, Unstored, as_storage
from microadam_jax.engine.descent import finishes, kind_of, read_by, replaced_by
from microadam_jax.engine.elementwise import require_elementwise, zeros_in
from microadam_jax.engine.stored_step import Arrays, Rule, StoredStep, stored_steps, typed_keys
from microadam_jax.engine.transformation import transformation
from microadam_jax.execution import scope
from microadam_jax.state_arrays import state_zeros
from microadam_jax.trees import (
    KeyPath,
    LeafKey,
    columns_of,
    leaf_keys,
    leaf_shapes,
    map_with_path,
    rows_of,
    turned,
    without_boxes,
)

SIGNED_FIELDS = ("mu", "m", "m1", "m2", "trace", "ema", "momentum")
# Other names may stand for anything, such as weights.
NONNEGATIVE_FIELDS = (
    *("nu", "nu_max", "n", "v", "v_row", "v_col", "e_g", "e_x", "exp_avg_sq"),
    *("sum_of_squares", "grad_sum_sq", "grad_sum_of_squares"),
)
# Where a name means something else: Adan's difference of gradients, SM3's momentum, a Hessian.
SIGNED_IN = {"v": ("ScaleByAdanState",), "nu": ("ScaleBySM3State", "SophiaState")}


class QuantizedState(NamedTuple):
    """Holds the state of another transformation, some of its fields quantized.

    Attributes:
        count: int32 scalar, steps taken.
        inner_state: the other transformation's state. A stored field is a dictionary with one
            key, the names of its codecs, and below it a tree of the parameters' structure for each
            of their arrays.
    """

    count: jax.Array
    inner_state: Any


def quantize_state(
    inner: optax.GradientTransformation,
    codecs: Mapping[str, Storage | Codec | str | Sequence[tuple[str, Codec | str]]],
    *,
    elementwise: bool = False,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps named fields of a transformation's state in few bits.

    With the transformation :math:`(u_t, s_t) = f(g_t, s_{t-1})` and a codec :math:`Q` for each
    stored field,

    .. math::

        (u_t, s_t) = f\bigl(g_t, Q^{-1}(q_{t-1})\bigr), \qquad q_t = Q(s_t) .

    The update :math:`u_t` comes from the new state before it is rounded. Arithmetic is float32.

    Args:
        inner: any transformation, such as ``optax.adamw(1e-3)`` or ``scale_by_adam_mini()``.
        codecs: for each field name, such as ``"mu"``, ``"nu"`` or ``"trace"``, a codec, its name,
            a list of (path pattern, codec) whose last pattern is ``".*"``, or a :class:`Storage`.
        elementwise: whether ``inner`` treats every element alone and all leaves alike, as
            ``optax.scale_by_adam``, ``scale_by_lion`` and ``trace`` do. Large leaves are then
            updated a few rows at a time, which is faster on CPUs, and no full-size float32 copy
            of the state exists during the step. Otherwise it can exist.
        seed: of stochastic rounding, which draws from the seed, the step and the leaf's path.

    Returns:
        The transformation. ``init`` makes the inner state in full before it is stored, unless it
        is compiled, as ``jax.jit(tx.init)(params)``.

    Raises:
        TypeError: if ``inner`` is no transformation, ``codecs`` no mapping, or one of its values no
            codec.
        ValueError: if a codec does not exist or cannot hold a field, if ``elementwise`` is not true
            of ``inner``; in ``init``, if there is no field of a name, or one holds integers, may
            have signs that its codec has not, or is a part of a difference that rounding makes
            negative; in ``update``, if the state was stored through other codecs.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from microadam_jax import memory_report, quantize_state
        >>> tx = quantize_state(optax.lion(1e-4), {"mu": "dynamic8"})
        >>> params = {"w": jnp.zeros((256, 2048))}
        >>> round(memory_report(tx, params).bytes_per_parameter, 3)
        1.016
        >>> updates, state = tx.update({"w": jnp.ones((256, 2048))}, tx.init(params), params)

    Reference: Dettmers et al., 8-bit optimizers (arXiv 2110.02861).
    """
    inner = as_transformation(inner=inner)
    if not isinstance(codecs, Mapping):
        raise TypeError(
            f"codecs must name the fields to store, as {{'mu': 'dynamic8'}} does; got {codecs!r}."
        )
    storages = {name: as_storage(storage) for name, storage in codecs.items()}
    for name in SIGNED_FIELDS:
        if name in storages:
            storages[name].signed(name)
    if elementwise:
        require_elementwise(inner)

    def init(params: optax.Params) -> QuantizedState:
        found: list[str] = []

        def store(name: str, value: Any, zeros: Any) -> Any:
            if name not in storages:
                return _map_fields(store, value, zeros, leaf=kept)
            found.append(name)
            _require_numbers(name, value)
            # To quantize zeros takes the compiler as long as there are elements: it folds them.
            known = all(jax.tree.leaves(zeros))
            return (storages[name].zeros if known else storages[name].encode_tree)(value)

        def kept(value: Any, zeros: Any) -> Any:
            del zeros
            if not shapes_suffice:
                return value
            return jax.tree.map(lambda x: state_zeros(x, x.shape, x.dtype), value)

        shapes, zeros = zeros_in(inner.init, params)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params))
        # To trace the inner init once more takes longer than all else that init does.
        shapes_suffice = traced and all(jax.tree.leaves(zeros))
        state = shapes if shapes_suffice else inner.init(params)
        for kind, name in _fields(state):
            if name in storages:
                _require_fit(storages[name], kind, name)
        stored = _map_fields(store, state, zeros, leaf=kept)
        missing = [name for name in storages if name not in found]
        if missing:
            raise ValueError(
                f"The state has no field {missing[0]!r} to store; it has "
                f"{', '.join(dict.fromkeys(name for _, name in _fields(state)))}."
            )
        return QuantizedState(jnp.zeros([], jnp.int32), stored)

    def update(
        updates: optax.Updates,
        state: QuantizedState,
        params: optax.Params | None = None,
        *,
        finish: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizedState]:
        targets = updates if params is None else params
        finish = finishes(finish, targets)
        step = _Step(inner, storages, state, targets, finish, seed, extra_args)
        if not elementwise:
            _require_unnamed()
        run = step.leaf_by_leaf if elementwise else step.at_once
        scaled, inner_state = run(updates, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        return scaled, QuantizedState(count, inner_state)

    return transformation(init, update)


class _Step(NamedTuple):
    """One update; the attributes are the arguments it was called with."""

    inner: optax.GradientTransformationExtraArgs
    storages: dict[str, Storage]
    state: QuantizedState
    targets: Any
    finish: Any
    seed: ArrayLike
    extra_args: dict[str, Any]

    @property
    def shapes(self) -> Any:
        """The shapes of the inner state."""
        return jax.eval_shape(self.inner.init, self.targets)

    def taken(
        self, name: str, storage: Storage | Unstored, shapes: Any, stored: Any
    ) -> list[StoredLeaf]:
        """The leaves of a field that has ``shapes``."""

        def keys() -> Iterable[LeafKey]:
            return leaf_keys(self.seed, self.state.count, shapes, (GetAttrKey(name),)).values()

        return storage.take(name, stored, leaf_shapes(shapes), keys)

    def at_once(self, gradients: Any, params: Any) -> tuple[Any, Any]:
        """Decodes the whole state, updates, and encodes it."""
        fields: list[list[StoredLeaf]] = []

        def decode(name: str, shapes: Any, stored: Any) -> Any:
            storage = self.storages.get(name)
            if storage is None:
                return _map_fields(decode, shapes, stored)
            fields.append(self.taken(name, storage, shapes, stored))
            like, structure = jax.tree.flatten(shapes)
            return structure.unflatten(
                one.codec.decode(one.encoded, leaf.shape)
                for one, leaf in zip(fields[-1], like, strict=True)
            )

        def encode(name: str, shapes: Any, stored: Any, new: Any) -> Any:
            storage = self.storages.get(name)
            if storage is None:
                return _map_fields(encode, shapes, stored, new, leaf=_cast)
            leaves = next(taken)
            keys = typed_keys([one.key for one in leaves])
            encoded = [
                one.codec.encode(x.astype(jnp.float32), key)
                for one, key, x in zip(leaves, keys, jax.tree.leaves(new), strict=True)
            ]
            return storage.put(stored, encoded)

        shapes, stored = self.shapes, self.state.inner_state
        inner_state = _map_fields(decode, shapes, stored)
        taken = iter(fields)
        # Branches that keep a field, or take the parameters, match those that compute in float32.
        if any(_is_narrow(leaf) for leaf in jax.tree.leaves(inner_state)):
            inner_state, params = jax.tree.map(_at_least_float32, (inner_state, params))
        gradients = jax.tree.map(_at_least_float32, gradients)
        scaled, new = self.inner.update(gradients, inner_state, params, **self.extra_args)

        def cast_and_finish(
            path: KeyPath, u: jax.Array, target: jax.Array, finish: Callable[..., jax.Array]
        ) -> tuple[jax.Array]:
            return (finish(u.astype(target.dtype), *read_by(finish, target)),)

        (scaled,) = map_with_path(cast_and_finish, 1, scaled, self.targets, self.finish)
        return scaled, _map_fields(encode, shapes, stored, new, leaf=_cast)

    def leaf_by_leaf(self, gradients: Any, params: Any) -> tuple[Any, Any]:
        """Updates each leaf by itself, in chunks."""
        shapes, stored = self.shapes, self.state.inner_state
        structure = jax.tree.structure(without_boxes(gradients))
        expected = [leaf.shape for leaf in jax.tree.leaves(gradients)]

        def per_leaf(name: str, value: Any) -> bool:
            if name in self.storages:
                return True
            leaves = jax.tree.leaves(value)
            return (
                leaves != []
                and jax.tree.structure(without_boxes(value)) == structure
                and [leaf.shape for leaf in leaves] == expected
                and all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
            )

        def leaves_of(state: Any) -> list[tuple[str, Any, Any]]:
            """Name, shapes and value of each field that is kept for each leaf."""
            found: list[tuple[str, Any, Any]] = []

            def take(name: str, shapes: Any, value: Any) -> None:
                if per_leaf(name, shapes):
                    found.append((name, shapes, value))
                else:
                    _map_fields(take, shapes, value)

            _map_fields(take, shapes, state)
            return found

        def with_leaves(values: Iterator[Any], state: Any) -> Any:
            """``state`` with other values in these fields."""

            def place(name: str, shapes: Any, old: Any) -> Any:
                return next(values) if per_leaf(name, shapes) else _map_fields(place, shapes, old)

            return _map_fields(place, shapes, state)

        fields: list[tuple[Storage | Unstored, Any, list[StoredLeaf]]] = []
        for name, of_field, value in leaves_of(stored):
            storage = self.storages.get(name, Unstored())
            fields.append((storage, value, self.taken(name, storage, of_field, value)))
        rules: dict[Hashable, Rule] = {}

        def rule_for(finish: Callable[..., jax.Array], target: jax.Array) -> Rule:
            """One function for all leaves on which it does the same."""

            def run(moments: Arrays, inputs: Arrays) -> tuple[Any, list[jax.Array]]:
                g, p = inputs
                state = with_leaves(iter(moments), stored)
                scaled, new = self.inner.update(_at_least_float32(g), state, p, **self.extra_args)
                scaled, kept = jnp.asarray(scaled, p.dtype), leaves_of(new)
                return finish(scaled, *read_by(finish, p)), [value for *_, value in kept]

            return rules.setdefault((kind_of(finish), jnp.dtype(target.dtype)), run)

        others = gradients if params is None else params
        treedef, rows = rows_of(gradients, others, self.finish)
        placed = scope().shardings_by_path(gradients)
        moments = zip(*(leaves for *_, leaves in fields), strict=True)
        steps = [
            StoredStep.of(
                rule_for(finish, p), of_leaf, (g, p), replaced_by(finish), placed.get(path)
            )
            for (path, g, p, finish), of_leaf in zip(rows, moments, strict=True)
        ]
        stepped = stored_steps(steps, scope().implementation_for("quantize_state"))
        (scaled,) = columns_of(treedef, [(u,) for u, _ in stepped], 1)
        encoded = turned([own for _, own in stepped], len(fields))
        # What is not kept for each leaf, such as the step count, follows from any leaf.
        nothing = jnp.zeros(0)
        _, shared = self.inner.update(
            nothing, with_leaves(iter([nothing] * len(fields)), stored), nothing, **self.extra_args
        )
        values = (
            storage.put(stored, own)
            for (storage, stored, _), own in zip(fields, encoded, strict=True)
        )
        return scaled, with_leaves(values, shared)


def _require_unnamed() -> None:
    """Refuses the name of a kernel where none can run."""
    if scope().names_kernel:
        raise ValueError(
            f"implementation={scope().implementation!r} needs quantize_state(..., "
            "elementwise=True): kernels update every element alone."
        )


def _map_fields(
    function: Callable[..., Any], node: Any, *rest: Any, leaf: Callable[..., Any] | None = None
) -> Any:
    """Rebuilds a state with ``function(name, value, *rest)`` for each field of its NamedTuples.

    What is no field of a NamedTuple becomes ``leaf(node, *rest)``, or the last of them.
    """
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        values = zip(node._fields, node, *rest, strict=True)
        return type(node)(*(function(*value) for value in values))
    if isinstance(node, list | tuple):
        rows = zip(node, *rest, strict=True)
        return type(node)(_map_fields(function, *row, leaf=leaf) for row in rows)
    if isinstance(node, dict):
        return {
            key: _map_fields(function, node[key], *(other[key] for other in rest), leaf=leaf)
            for key in node
        }
    return (node, *rest)[-1] if leaf is None else leaf(node, *rest)


def _fields(node: Any) -> Iterator[tuple[str, str]]:
    """The names of a state's NamedTuples, each with those of its fields."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        yield from ((type(node).__name__, name) for name in node._fields)
    if isinstance(node, dict | list | tuple):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _fields(child)


def _require_numbers(name: str, value: Any) -> None:
    for leaf in jax.tree.leaves(value):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"The field {name!r} holds {leaf.dtype}, and codecs store floating-point numbers. "
                "Leave it out."
            )


def _require_fit(storage: Storage, kind: str, name: str) -> None:
    """Refuses a field that would lose its signs, or whose rounding gives NaN."""
    if kind.startswith("ScaleByRStdDev"):
        raise ValueError(
            f"{kind} takes the root of nu - mu**2, which rounding of {name!r} makes negative. Take "
            "rmsprop without centered=True."
        )
    if all(codec.signed for codec in storage.codecs):
        return
    if kind in SIGNED_IN.get(name, ()) or name not in NONNEGATIVE_FIELDS:
        raise ValueError(
            f"The field {name!r} of {kind} may have both signs, which a codec without negative "
            "numbers cannot hold: take a signed one. Known to have none are "
            f"{', '.join(NONNEGATIVE_FIELDS)}."
        )


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if _is_narrow(x) else x


def _is_narrow(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def _cast(shapes: Any, stored: Any, new: Any) -> Any:
    """``new`` in the dtypes that the state had."""
    del stored
    return jax.tree.map(lambda shape, x: jnp.asarray(x, shape.dtype), shapes, new)
