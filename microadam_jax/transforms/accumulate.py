"""Gradient accumulation in the residual that error feedback keeps anyway."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from microadam_jax.arguments import as_transformation
from microadam_jax.engine.descent import Fusable
from microadam_jax.engine.transformation import transformation
from microadam_jax.execution import within
from microadam_jax.transforms.error_feedback import ErrorFeedbackState
from microadam_jax.transforms.micro_batches import MicroBatch
from microadam_jax.transforms.project_gradients import ProjectGradientsState
from microadam_jax.trees import path_name


class AccumulateIntoResidualState(NamedTuple):
    """Counts the micro-batches of a step, whose gradient is added up in the inner state.

    Attributes:
        micro_step: int32 scalar, how many micro-batches of the step are in the residual.
        inner_state: of the transformation.
    """

    micro_step: jax.Array
    inner_state: Any


def accumulate_into_residual(
    inner: optax.GradientTransformation, every_k: int
) -> optax.GradientTransformationExtraArgs:
    r"""Takes one step for every :math:`k` micro-batches, and keeps no accumulator for them.

    With the residual :math:`e` of :func:`error_feedback`, its codec :math:`Q`, its compressor
    :math:`C` and the gradients :math:`g_1, \dots, g_k`,

    .. math::

        e &\leftarrow Q(Q^{-1}(e) + g_i / k) \quad \text{for } i < k,
            \text{ with zero updates} \\
        a &= g_k / k + Q^{-1}(e), \qquad c = C(a), \qquad e \leftarrow Q(a - c)

    and :math:`c` goes on as ever. With a float32 residual, as that of :class:`FeedBack` in
    :func:`ldadam`, this is the step of the mean gradient. One in fewer bits is rounded :math:`k`
    times in a step instead of once, and each rounding loses up to half a level of its bucket:
    the more micro-batches, the more is lost.

    Links before the error feedback, such as ``optax.clip_by_global_norm``, see the gradient of
    each micro-batch instead of the mean; one that keeps arrays, such as ``optax.trace``, would
    remember the last micro-batch alone and is refused. All other links, their counts and schedules
    see only steps. Put ``optax.apply_if_finite`` around it: it then skips single micro-batches. In
    :func:`fused_apply` no update is written, which the compiler otherwise keeps for all leaves at
    once.

    Args:
        inner: a transformation in which each parameter passes one :func:`error_feedback`, or
            :func:`project_gradients` with :class:`FeedBack`: :func:`microadam`,
            :func:`sparse_mfac`, :func:`lowrank_mfac`, :func:`sparse_ggt`, :func:`ldadam`,
            :func:`dct_adamw`, or a chain with such a link.
        every_k: :math:`k`. Another one may continue a state, if it does so between two steps.

    Returns:
        The transformation. Its state is that of ``inner`` and a counter. Only leaves that
        are not compressed, and so have no residual, take more: a float32 sum, in place of one byte
        per element in :func:`error_feedback`, and of nothing in :func:`project_gradients`.

    Raises:
        TypeError: if ``inner`` is no transformation, or ``every_k`` no integer.
        ValueError: if ``every_k`` is below 1; in ``init``, if a parameter has no residual, or a
            link before it keeps arrays.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from microadam_jax import accumulate_into_residual, error_feedback, to_dense, top_k
        >>> one_of_two = top_k(count=1, min_size=0, min_row=0)
        >>> sent = optax.chain(error_feedback(one_of_two, residual="float32"), to_dense())
        >>> tx = accumulate_into_residual(sent, every_k=2)
        >>> state = tx.init(jnp.zeros(2))
        >>> for gradient in ([2.0, 4.0], [0.0, 4.0]):
        ...     updates, state = tx.update(jnp.array(gradient), state)
        ...     print(updates)
        [0. 0.]
        [0. 4.]
        >>> print(optax.tree_utils.tree_get(state, "residual").codes)
        [1. 0.]

    Reference: MicroAdam (arXiv 2405.15593), Algorithm 1, lines 5 to 9.
    """
    if not isinstance(every_k, int) or isinstance(every_k, bool):
        raise TypeError(f"every_k must be an int, the same for all steps; got {every_k!r}.")
    if every_k < 1:
        raise ValueError(f"every_k must be at least 1; got {every_k}.")
    inner = as_transformation(inner=inner)

    def init(params: optax.Params) -> AccumulateIntoResidualState:
        batch = MicroBatch(0, every_k, completes=False)
        with within(micro_batch=batch):
            inner_state = inner.init(params)
        _require_residuals(params, batch)
        _require_nothing_before_residuals(inner_state)
        return AccumulateIntoResidualState(jnp.zeros([], jnp.int32), inner_state)

    def update(
        updates: optax.Updates,
        state: AccumulateIntoResidualState,
        params: optax.Params | None = None,
        *,
        apply: bool = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateIntoResidualState]:
        def take(completes: bool, **options: bool) -> tuple[optax.Updates, Any]:
            batch = MicroBatch(state.micro_step, every_k, completes)
            with within(micro_batch=batch):
                results = inner.update(updates, state.inner_state, params, **options, **extra_args)
            _require_residuals(updates, batch)
            return results

        def add() -> tuple[optax.Updates, AccumulateIntoResidualState]:
            dropped, after = take(completes=False)
            inner_state = jax.tree.map(
                lambda new, old: new if _holds_residual(new) else old,
                after,
                state.inner_state,
                is_leaf=_holds_residual,
            )
            count = state.micro_step + 1
            if apply:
                moved = jax.tree.map(lambda u, p: jnp.asarray(p, u.dtype), dropped, params)
            else:
                moved = jax.tree.map(jnp.zeros_like, dropped)
            return moved, AccumulateIntoResidualState(count, inner_state)

        def step() -> tuple[optax.Updates, AccumulateIntoResidualState]:
            moved, inner_state = take(completes=True, **({"apply": True} if apply else {}))
            count = jnp.zeros_like(state.micro_step)
            return moved, AccumulateIntoResidualState(count, inner_state)

        return jax.lax.cond(state.micro_step + 1 >= every_k, step, add)

    # Only where inner can apply its update itself can this.
    kind = Fusable if isinstance(inner, Fusable) else optax.GradientTransformationExtraArgs
    return transformation(init, update, kind=kind)


def _holds_residual(node: Any) -> bool:
    return isinstance(node, ErrorFeedbackState | ProjectGradientsState)


def _require_nothing_before_residuals(state: Any) -> None:
    """Refuses links whose state would forget all micro-batches but the last."""
    if isinstance(state, dict):
        state = tuple(state.values())
    elif _holds_residual(state) or not isinstance(state, tuple):
        return
    elif not hasattr(state, "_fields"):
        holding = [any(map(_holds_residual, _nodes(link))) for link in state]
        before = state[: holding.index(True)] if any(holding) else ()
        if any(jnp.ndim(x) for x in jax.tree.leaves(before)):
            names = ", ".join(type(link).__name__ for link in before if jax.tree.leaves(link))
            raise ValueError(
                f"{names} before the error feedback keeps arrays, and would remember the last of "
                "every_k micro-batches alone. Put it behind, or around accumulate_into_residual; "
                "or take optax.MultiSteps, which keeps a sum of gradients."
            )
    for link in state:
        _require_nothing_before_residuals(link)


def _nodes(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=_holds_residual)


def _require_residuals(tree: Any, batch: MicroBatch) -> None:
    """Refuses parameters whose gradients would not be added up."""
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    missing = [path_name(path) or "the parameter" for path in set(paths) - set(batch.taken)]
    if missing:
        shown = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"accumulate_into_residual finds no error feedback, and so no residual, for "
            f"{len(missing)} of {len(paths)} parameters ({shown}). microadam, sparse_mfac, "
            "lowrank_mfac, sparse_ggt and ldadam have one, and dct_adamw with "
            "complement=FeedBack(). In optax.partition or "
            "optax.masked wrap the part that has one, inside; for other methods sum the gradients "
            "within the step, or use optax.MultiSteps. A jitted update is to be wrapped before it "
            "is jitted."
        )
