"""What compression does to each group of parameters, recorded in the state."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from microadam_jax.arguments import as_transformation
from microadam_jax.execution import scope, within
from microadam_jax.layout.path_rules import PathRules
from microadam_jax.trees import KeyPath, box_path, path_name, rows_of

BRANCHING = ("MultiSteps", "ApplyIfFinite", "AccumulateIntoResidual")

Squares = dict[str, jax.Array]


@dataclasses.dataclass
class _Observed:
    """Collects from one call if a transformation feeds back, and the squares of its leaves."""

    feeds_back: bool = False
    leaves: list[tuple[KeyPath, Squares]] = dataclasses.field(default_factory=list)
    rounded: list[tuple[KeyPath, Squares]] = dataclasses.field(default_factory=list)


class DiagnosticsState(NamedTuple):
    """Holds the latest step in numbers, and the state of what was measured.

    Each field but the last is a dictionary with one float32 scalar for each group. The three
    about the residual are empty where no link is :func:`error_feedback`. What its compressor
    keeps dense is left out of them; of a group that is all dense everything is sent and nothing
    is left, so its numbers are 1, 0 and 0.

    Attributes:
        update_norm: the norm of the update.
        kept_mass: which part of the squared norm of gradient and old residual was sent on.
        residual_norm: the norm of the residual as it is stored.
        quantization_error: the norm of what storing changed in the residual, over the norm of
            the residual before.
        lost_share: of the updates other than zero, the share that rounding to nearest loses: they
            are below half a unit in the last place of their parameters. NaN in a step without
            parameters. Behind :func:`round_updates` they are not lost.
        inner_state: of the transformation.
    """

    update_norm: dict[str, jax.Array]
    kept_mass: dict[str, jax.Array]
    residual_norm: dict[str, jax.Array]
    quantization_error: dict[str, jax.Array]
    lost_share: dict[str, jax.Array]
    inner_state: Any


def observing() -> bool:
    """Returns True if links should tell what they do."""
    return scope().observed is not None


def announce_feedback() -> None:
    """Tells the diagnostics, while a state is made, that there will be something to observe."""
    observed: _Observed | None = scope().observed
    if observed is not None:
        observed.feeds_back = True


def observe_feedback(
    path: KeyPath, accumulated: jax.Array, rest: jax.Array, stored: jax.Array
) -> None:
    """Tells the diagnostics what error feedback did with the leaf at ``path``.

    Args:
        path: of the leaf.
        accumulated: the gradient and the old residual, float32.
        rest: the part of it that was not sent.
        stored: what the codec made of the rest.
    """
    observed: _Observed | None = scope().observed
    if observed is not None:
        arrays = {"accumulated": accumulated, "rest": rest, "stored": stored}
        arrays["error"] = rest - stored
        squares = {name: jnp.sum(jnp.square(x)) for name, x in arrays.items()}
        observed.leaves.append((path, squares))


def observe_rounding(path: KeyPath, update: jax.Array, parameter: jax.Array) -> None:
    """Tells the diagnostics the update of the leaf at ``path`` before it is rounded."""
    observed: _Observed | None = scope().observed
    if observed is not None:
        observed.rounded.append((path, _lost(update, parameter)))


def _lost(update: jax.Array, parameter: jax.Array) -> Squares:
    """Counts the elements that move, and those of them that do not after rounding to nearest."""
    moves = update != 0
    new = optax.apply_updates(parameter, update)
    lost = moves & (new == parameter)
    return {"moves": jnp.sum(moves, dtype=jnp.float32), "lost": jnp.sum(lost, dtype=jnp.float32)}


def with_diagnostics(
    inner: optax.GradientTransformation, groups: Mapping[str, str] = MappingProxyType({})
) -> optax.GradientTransformationExtraArgs:
    """Records what each step of ``inner`` does, without changing it.

    Read the fields of :class:`DiagnosticsState` with ``optax.tree_utils.tree_get``. Measuring
    decodes the residual once more, so leave it out of a run that has to be fast or small. Put
    ``optax.apply_if_finite``, ``optax.MultiSteps`` and :func:`accumulate_into_residual` around it
    and not inside.

    Args:
        inner: any transformation.
        groups: for each name of a group a path pattern; the first match counts. A pattern is a
            regular expression for the end of a path, as for :class:`Partition`, so that
            ``"attention/.*"`` is for all below an ``attention``. All other leaves are the group
            ``"other"``.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``inner`` is no transformation.
        ValueError: if a pattern is not a regular expression, or a group is named ``"other"``; in
            ``init``, if one of those is inside.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from microadam_jax import microadam, with_diagnostics
        >>> tx = with_diagnostics(microadam(1e-3), {"attention": "query|key|value"})
        >>> params = {"query": jnp.ones((16, 256)), "norm": jnp.ones(256)}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> kept = optax.tree_utils.tree_get(state, "kept_mass")
        >>> print({group: round(float(mass), 4) for group, mass in kept.items()})
        {'attention': 0.0156, 'other': 1.0}
        >>> tx = with_diagnostics(optax.adam(1e-3))
        >>> optax.tree_utils.tree_get(tx.init(params), "kept_mass")
        {}
    """
    inner = as_transformation(inner=inner)
    if "other" in groups:
        raise ValueError(
            "groups may not name one 'other', which is that of all leaves in no group; got "
            f"{dict(groups)}."
        )
    rules = PathRules((pattern, name) for name, pattern in groups.items())
    names = (*groups, "other")

    def group_of(path: KeyPath) -> str:
        return next(rules.matching(path_name(box_path(path))), "other")

    def total(entries: list[tuple[KeyPath, Squares]], quantity: str) -> dict[str, jax.Array]:
        sums = dict.fromkeys(names, jnp.zeros([], jnp.float32))
        for path, squares in entries:
            sums[group_of(path)] += squares[quantity]
        return sums

    def unrounded(
        updates: optax.Updates, params: optax.Params | None
    ) -> list[tuple[KeyPath, Squares]]:
        if params is None:
            return []
        _, rows = rows_of(updates, params)
        return [(path, _lost(u, p)) for path, u, p in rows]

    def shares(counted: list[tuple[KeyPath, Squares]]) -> dict[str, jax.Array]:
        if not counted:
            return dict.fromkeys(names, jnp.full([], jnp.nan, jnp.float32))
        lost, moves = total(counted, "lost"), total(counted, "moves")
        return jax.tree.map(lambda part, of: part / jnp.maximum(of, 1), lost, moves)

    def init(params: optax.Params) -> DiagnosticsState:
        observed = _Observed()
        with within(observed=observed):
            inner_state = inner.init(params)
        _require_in_every_step(inner_state)

        def zeros(defined: bool = observed.feeds_back) -> dict[str, jax.Array]:
            return {name: jnp.zeros([], jnp.float32) for name in names if defined}

        return DiagnosticsState(zeros(True), zeros(), zeros(), zeros(), zeros(True), inner_state)

    def update(
        updates: optax.Updates,
        state: DiagnosticsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DiagnosticsState]:
        observed = _Observed()
        with within(observed=observed):
            updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        leaves = jax.tree.leaves_with_path(updates)
        squares = [(p, {"update": jnp.sum(jnp.square(u.astype(jnp.float32)))}) for p, u in leaves]
        norm = jax.tree.map(jnp.sqrt, total(squares, "update"))
        lost_share = shares(observed.rounded or unrounded(updates, params))
        if not state.kept_mass:
            return updates, DiagnosticsState(norm, {}, {}, {}, lost_share, inner_state)
        quantities = ("accumulated", "rest", "stored", "error")
        accumulated, rest, stored, error = (total(observed.leaves, name) for name in quantities)
        return updates, DiagnosticsState(
            norm,
            jax.tree.map(_part_sent, rest, accumulated),
            jax.tree.map(jnp.sqrt, stored),
            jax.tree.map(_relative, error, rest),
            lost_share,
            inner_state,
        )

    # The state's type is narrower than any state, which is all that Optax promises to pass.
    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore


def _part_sent(rest: jax.Array, accumulated: jax.Array) -> jax.Array:
    # Where there was nothing to send, all of it was.
    return 1 - rest / jnp.where(accumulated == 0, 1, accumulated)


def _relative(error: jax.Array, rest: jax.Array) -> jax.Array:
    return jnp.sqrt(error / jnp.where(rest == 0, 1, rest))


def _require_in_every_step(state: Any) -> None:
    """Refuses what takes a step in a branch, out of which nothing can be observed."""

    def name(node: Any) -> str:
        return type(node).__name__.removesuffix("State")

    for node in jax.tree.leaves(state, is_leaf=lambda node: name(node) in BRANCHING):
        if name(node) in BRANCHING:
            raise ValueError(
                f"with_diagnostics cannot look into {name(node)}, which takes a step in some "
                "updates only. Put it around with_diagnostics."
            )
