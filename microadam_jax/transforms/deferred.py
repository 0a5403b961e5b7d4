"""Error feedback and the link behind it, in one pass over each leaf."""

from typing import Any

import optax
from optax import GradientTransformationExtraArgs

from microadam_jax.engine.window_step import Moved
from microadam_jax.trees import columns_of, rows_of


def compressed_where_read(
    feedback: GradientTransformationExtraArgs, scale: GradientTransformationExtraArgs
) -> GradientTransformationExtraArgs:
    """Chains two links so that what the first sends is written and read leaf by leaf.

    State and numbers are those of ``optax.chain(feedback, scale)``, which compresses all leaves
    before it reads the first: on CPUs in one loop after another.

    Args:
        feedback: :func:`error_feedback`.
        scale: :func:`scale_by_window_adam`, which gives back what is left of a deferred update.

    Returns:
        The transformation.
    """

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        owed, own = state
        deferred: Any = feedback.update(updates, owed, params, defers=True, **extra_args)
        sent, owed = deferred
        moved, own = scale.update(sent, own, params, **extra_args)
        treedef, rows = rows_of(moved, *owed.residual, is_leaf=_is_moved)
        results = [
            (moved.update, *moved.left) if _is_moved(moved) else (moved, *stored)
            for _, moved, *stored in rows
        ]
        updates, *residual = columns_of(treedef, results, 1 + len(owed.residual))
        owed = owed._replace(residual=type(owed.residual)(*residual))
        return updates, (owed, own)

    return GradientTransformationExtraArgs(optax.chain(feedback, scale).init, update)


def _is_moved(node: object) -> bool:
    return isinstance(node, Moved)
