"""Any transformation in a subspace of each gradient matrix."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.arguments import as_transformation, require_kind
from microadam_jax.engine.transformation import transformation
from microadam_jax.execution import scope, within
from microadam_jax.layout.matrices import Matrices
from microadam_jax.layout.view import ONE, WHOLE, Layout, MatrixView
from microadam_jax.state_arrays import state_zeros, tell_axes
from microadam_jax.subspace.basis import Basis
from microadam_jax.subspace.complement import Complement, Discard, Step
from microadam_jax.subspace.projection import Projected, Projection, float32, folded, unfolded, when
from microadam_jax.subspace.refresh import Refresh, begun_anew, rotate_first, rotate_second
from microadam_jax.subspace.subspace import Arrays, Subspace
from microadam_jax.transforms.micro_batches import MicroBatch
from microadam_jax.transforms.moments import FIRST_MOMENTS, one_minus_power
from microadam_jax.trees import KeyPath, boxed_like, boxed_moments, map_with_path, without_boxes


class ProjectGradientsState(NamedTuple):
    """Holds the bases, what complements need, and the inner transformation's state.

    Of a parameter that is not projected, ``basis`` and ``complement`` hold one number for each
    array, which is not used; with :class:`FeedBack` inside :func:`accumulate_into_residual`,
    ``complement`` holds the float32 sum of its gradients.

    Attributes:
        count: int32 scalar, steps taken.
        basis: a NamedTuple with a tree of the parameters' structure for each array that a
            basis consists of: ``vectors``, or ``indices`` and ``weights``, or none.
        complement: the same for ``residual`` or ``previous_norm``.
        inner_state: made for projected parameters: with the rank in place of the compressed side.
    """

    count: jax.Array
    basis: Any
    complement: Any
    inner_state: Any


def project_gradients(
    inner: optax.GradientTransformation,
    subspace: Subspace,
    refresh: Refresh = Refresh(),
    complement: Complement = Discard(),
    *,
    scale: ArrayLike = 1.0,
    matrices: Matrices = Matrices(),
    b1: ArrayLike | None = None,
    b2: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets a transformation work in a subspace of each gradient matrix.

    For a matrix whose rows are compressed, with the basis :math:`P` of its subspace, the inner
    transformation :math:`f` and its state :math:`s`,

    .. math::

        P_t &= \mathrm{find}(G_t) \text{ every } T \text{ steps, else } P_{t-1} \\
        R_t &= P_t^T G_t, \qquad (N_t, s_t) = f(R_t, s_{t-1}) \\
        U_t &= \alpha P_t N_t + S_t

    where :math:`S_t` is what the complement makes of :math:`G_t - P_t R_t`; zero by default. A new
    basis may change the moments in :math:`s` first, see :class:`Refresh`. By LDAdam's rule
    (``moments="rotate"``), with :math:`Q = P_t^T P_{t-1}` and :math:`c_i = 1 - \beta_i^{t-1}`,

    .. math::

        v &\leftarrow c_2 \left| (Q \circ Q) \left( \frac{v}{c_2} - \frac{m^2}{c_1^2} \right)
            + \frac{(Q m)^2}{c_1^2} \right|, \qquad m \leftarrow Q m .

    Parameters that are no matrices go to the inner transformation as they are, and the memory
    report lists them. Everything is computed in float32.

    Args:
        inner: any transformation that does without the parameters, such as
            ``optax.scale_by_adam()``, ``optax.trace(0.9)`` or ``optax.scale_by_lion()``. It is
            given a tree of projected gradients. To rotate or feed back a momentum, its state needs
            a field ``mu`` (or ``trace``), and to rotate both moments ``mu`` and ``nu``.
        subspace: how a basis is found, such as ``svd(128)`` or ``top_k_rows(128)``.
        refresh: :math:`T`, and what a new basis does to the moments.
        complement: :class:`Discard`, :class:`RawRest`, :class:`SignOfRest`,
            :class:`NormMatchedRest`, :class:`ScaledGradient` or :class:`FeedBack`.
        scale: :math:`\alpha`; of projected parameters only.
        matrices: which parameters are matrices, and which side is compressed.
        b1: the decay rate of the inner first moment, where a rotation of both moments,
            ``momentum_share`` or error feedback of the momentum needs it.
        b2: that of the second moment.

    Returns:
        The transformation. For a matrix of m x n with m >= n and rank r, the inner state has m r
        elements for each field, and a dense basis n r.

    Raises:
        TypeError: if ``inner`` is no transformation, if ``subspace``, ``refresh``, ``complement``
            or ``matrices`` is of another class, or a decay rate is an array in fewer bits than
            float32; in ``init``, if a leaf is not a floating-point array.
        ValueError: if the rest of a gradient is used, or moments are rotated, with a basis that is
            not orthonormal; in ``init``, if ``b1`` or ``b2`` is needed and missing, or the inner
            state has no such moments.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from microadam_jax import Refresh, project_gradients
        >>> from microadam_jax.subspace import top_k_rows
        >>> tx = project_gradients(optax.trace(0.9), top_k_rows(2), Refresh(every=10))
        >>> params = {"kernel": jnp.zeros((3, 4))}
        >>> state = tx.init(params)
        >>> state.inner_state.trace["kernel"].shape
        (2, 4)
        >>> grads = {"kernel": jnp.array([[1.0, 1, 1, 1], [0, 0, 0, 1], [2, 2, 2, 2]])}
        >>> updates, state = tx.update(grads, state)
        >>> print(updates["kernel"])
        [[1. 1. 1. 1.]
         [0. 0. 0. 0.]
         [2. 2. 2. 2.]]

    Reference: Zhao et al., GaLore (arXiv 2403.03507), Algorithm 2; Robert et al., LDAdam (arXiv
        2410.16103).
    """
    inner = as_transformation(inner=inner)
    require_kind(Refresh, refresh=refresh)
    refresh = refresh.completed(Refresh(first=0, moments="keep", momentum_share=0))
    projection = Projection(matrices, subspace, refresh)
    if isinstance(complement, type) or not hasattr(complement, "feeds_back"):
        raise TypeError(f"complement must be one such as Discard(); got {complement!r}.")
    _require_projection(subspace, refresh, complement)
    rules = _Rules(projection, complement, scale, b1, b2)

    def init(params: optax.Params) -> ProjectGradientsState:
        leaves = rules.projection.assign(params)

        def low(path: KeyPath, parameter: jax.Array) -> Arrays:
            view = leaves[path].assigned.view
            if view is None:
                return (state_zeros(parameter, parameter.shape, jnp.float32),)
            return (view.zeros(parameter, rules.low(view), jnp.float32),)

        batch = scope().micro_batch if complement.feeds_back else None

        def rest(path: KeyPath, parameter: jax.Array) -> Arrays:
            leaf = leaves[path]
            if batch is not None:
                batch.taken.append(path)
                if leaf.assigned.view is None:
                    return (state_zeros(parameter, parameter.shape, jnp.float32),)
            return leaf.zeros(parameter, complement.layouts)

        basis = rules.projection.zeros(params)
        kept = map_with_path(rest, len(complement.layouts), params)
        (projected,) = map_with_path(low, 1, params)
        boxed = boxed_moments(projected, params)
        with within(micro_batch=None):
            inner_state = inner.init(boxed)
        tell_axes(inner_state, boxed)
        rules.moments(inner_state)  # refuses a state that lacks them
        return ProjectGradientsState(
            jnp.zeros([], jnp.int32),
            subspace.Kept(*(boxed_moments(tree, params) for tree in basis)),
            complement.Kept(*(boxed_moments(tree, params) for tree in kept)),
            inner_state,
        )

    def update(
        updates: optax.Updates,
        state: ProjectGradientsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProjectGradientsState]:
        leaves = rules.projection.assign(updates)
        targets = updates if params is None else params
        batch = scope().micro_batch
        if batch is not None and complement.feeds_back:
            (residual,) = state.complement
            updates, residual = _with_residual(batch, leaves, updates, residual)
            state = state._replace(complement=complement.Kept(residual))
            if not batch.completes:
                return updates, state
        moments = rules.moments(state.inner_state)
        width, bases = len(moments), len(state.basis)
        entered: list[_Entered | None] = []

        def enter(path: KeyPath, g: jax.Array, *stored: jax.Array) -> Arrays:
            leaf, view = leaves[path], leaves[path].assigned.view
            never = jnp.zeros((1,) * g.ndim, bool)
            if view is None:
                entered.append(None)
                return never, float32(g), *stored[: width + bases]
            one = rules.enter(leaf, view, g, state.count, stored[:width], stored[width:])
            entered.append(one)
            low = view.unfold(one.step.low, rules.low(view), g)
            slots = ((rules.low(view), None),) * width + rules.projection.slots(view)
            kept = zip((*one.moments, *one.basis), slots, stored, strict=False)
            arrays = (view.unfold(x, slot, g).astype(old.dtype) for x, (slot, _), old in kept)
            if one.begins is None:
                return never, low, *arrays
            return view.unfold(one.begins[..., None, None], ONE, g), low, *arrays

        columns = (*moments.values(), *state.basis, *state.complement)
        begins, low, *new = map_with_path(enter, 2 + width + bases, updates, *columns)
        # A gradient's box names axes that its projection has not: inside there are no boxes.
        begins, low, new, inner_state = without_boxes((begins, low, new, state.inner_state))
        if refresh.rotates:
            inner_state = _with_fields(inner_state, dict(zip(moments, new, strict=False)))
        elif refresh.moments == "reset":
            inner_state = begun_anew(inner, inner_state, begins, low)
        with within(micro_batch=None):
            scaled, inner_state = inner.update(low, inner_state, None, **extra_args)
        if refresh.moments == "released":
            later = jax.tree.map(lambda begins: begins & (state.count > 0), begins)
            inner_state = begun_anew(inner, inner_state, later, low)

        leaving = iter(entered)

        def leave(
            path: KeyPath, g: jax.Array, target: jax.Array, scaled: jax.Array, *kept: jax.Array
        ) -> Arrays:
            del path
            one = next(leaving)
            if one is None:
                return scaled.astype(target.dtype), *kept
            step = one.step._replace(scaled=float32(one.view.fold(scaled)))
            moved, rest = complement.combine(step, folded(one.view, kept))
            out = one.view.unfold(moved, WHOLE, g).astype(target.dtype)
            return out, *unfolded(one.view, rest, complement.layouts, g)

        out, *rest = map_with_path(
            leave, 1 + len(state.complement), updates, targets, scaled, *state.complement
        )
        return out, ProjectGradientsState(
            jnp.asarray(optax.safe_increment(state.count)),
            subspace.Kept(*map(boxed_like, new[width:], state.basis)),
            complement.Kept(*map(boxed_like, rest, state.complement)),
            boxed_like(inner_state, state.inner_state),
        )

    return transformation(init, update, warns_as="project_gradients", b1=b1, b2=b2)


def _with_residual(
    batch: MicroBatch, leaves: Mapping[KeyPath, Projected], updates: optax.Updates, residual: Any
) -> tuple[optax.Updates, Any]:
    """Gradients and residual after a micro-batch; where it completes a step, before that step."""

    def take(path: KeyPath, g: jax.Array, kept: jax.Array) -> Arrays:
        batch.taken.append(path)
        share = batch.share(g)
        total = kept + share
        if not batch.completes:
            return g, total.astype(kept.dtype)
        if leaves[path].assigned.view is None:
            return total.astype(g.dtype), jnp.zeros_like(kept)
        return share, kept

    updates, after = map_with_path(take, 2, updates, residual)
    return updates, boxed_like(after, residual)


class _Entered(NamedTuple):
    """A matrix between its projection and its way back; all arrays are folded.

    Attributes:
        view: how the parameter is folded.
        begins: ``(*batch,)``, the matrices whose moments begin anew; None if none ever do.
        step: the step.
        moments: in the new basis.
        basis: the new one.
    """

    view: MatrixView
    begins: jax.Array | None
    step: Step
    moments: Arrays
    basis: Arrays


class _Rules(NamedTuple):
    """Updates one matrix; the attributes are the arguments of the transformation."""

    projection: Projection
    complement: Complement
    scale: ArrayLike
    b1: ArrayLike | None
    b2: ArrayLike | None

    def low(self, view: MatrixView) -> Layout:
        """The layout of a projected gradient."""
        return Layout(rows=self.projection.subspace.size(view), columns=None)

    def moments(self, inner_state: Any) -> dict[str, Any]:
        """The inner moments that a new basis has to know, by their names.

        Raises:
            ValueError: if there are none, or their decay rates are not given.
        """
        refresh, feeds = self.projection.refresh, self.complement
        if (refresh.needs_decay_rates or feeds.needs_b1) and self.b1 is None:
            raise ValueError(
                "Correcting or feeding back the momentum takes its decay rate: give "
                "project_gradients the b1 of the inner transformation."
            )
        if refresh.moments == "rotate" and self.b2 is None:
            raise ValueError(
                "Rotating the second moment takes its decay rate: give project_gradients the b2 "
                "of the inner transformation."
            )
        if not (refresh.rotates or feeds.needs_b1 or refresh.momentum_share):
            return {}
        found = {name: _field(inner_state, name) for name in (*FIRST_MOMENTS, "nu")}
        name = next((name for name in FIRST_MOMENTS if found[name] is not None), None)
        if name is None or (refresh.moments == "rotate" and found["nu"] is None):
            raise ValueError(
                "Moments can follow a new basis only if the state of the inner transformation has "
                "a field 'mu' or 'trace', and 'nu' to rotate both. Choose another inner "
                "transformation, or Refresh(moments='keep') or 'reset'."
            )
        names = (name, "nu") if refresh.moments == "rotate" else (name,)
        return {name: found[name] for name in names}

    def enter(
        self,
        leaf: Projected,
        view: MatrixView,
        g: jax.Array,
        count: jax.Array,
        moments: Arrays,
        stored: Arrays,
    ) -> _Entered:
        """Renews the basis, projects the gradient and lets the moments follow."""
        bases = len(self.projection.slots(view))
        kept, rest = folded(view, stored[:bases]), folded(view, stored[bases:])
        moments = tuple(float32(m) for m in folded(view, moments))
        gradient = float32(view.fold(g))
        if self.complement.feeds_back:
            gradient = gradient + float32(rest[0])
        share = self.projection.refresh.momentum_share

        def target() -> jax.Array:
            if not share or self.b1 is None:
                return gradient
            unbiased = moments[0] / one_minus_power(self.b1, jnp.maximum(count, 1))
            old = leaf.basis(view, kept, count - 1)
            return share * old.back(unbiased) + (1 - share) * gradient

        renewed = leaf.renew(target, kept, count)
        # Of a basis that is drawn from its step, the one before is that of the step before.
        old, new = leaf.basis(view, kept, count - 1), leaf.basis(view, renewed, count)
        due = leaf.due(count)
        begins = None
        if self.projection.refresh.restarts:
            begins = jnp.broadcast_to(due, gradient.shape[:-2])
            if self.projection.refresh.moments == "reset" and kept:
                # The moments of a matrix that had no basis are zeros, and now their age is too.
                begins = begins | leaf.first(kept, count)
        lost = self._lost(due, old, new, moments) if self.complement.needs_b1 else None
        moved = self._moved(due, old, new, moments, count)
        step = Step(gradient, new.project(gradient), gradient, new, self.scale, lost)
        return _Entered(view, begins, step, moved, renewed)

    def _moved(
        self, due: jax.Array | bool, old: Basis, new: Basis, moments: Arrays, count: jax.Array
    ) -> Arrays:
        """The moments in the new basis."""
        refresh = self.projection.refresh
        if not moments or not refresh.rotates:
            return moments

        def rotate() -> Arrays:
            overlap, mu = new.overlap(old), moments[0]
            first = rotate_first(overlap, mu)
            if refresh.moments == "rotate_first" or self.b1 is None or self.b2 is None:
                return (first,)
            # In the first step there is nothing to rotate, and no bias of nothing.
            steps = jnp.maximum(count, 1)
            c1, c2 = one_minus_power(self.b1, steps), one_minus_power(self.b2, steps)
            return first, rotate_second(overlap, mu, moments[1], c1, c2)

        return when(due, rotate, lambda: moments)

    def _lost(self, due: jax.Array | bool, old: Basis, new: Basis, moments: Arrays) -> jax.Array:
        """Returns the residual for the part of the momentum outside the new basis."""
        mu = moments[0]
        weight = jnp.asarray(self.b1, jnp.float32) / (1 - jnp.asarray(self.b1, jnp.float32))

        def missed() -> jax.Array:
            return weight * (old.back(mu) - new.back(rotate_first(new.overlap(old), mu)))

        return when(due, missed, lambda: jnp.zeros_like(old.back(mu)))


def _require_projection(subspace: Subspace, refresh: Refresh, complement: Complement) -> None:
    """Refuses to subtract or to rotate what a basis of other vectors inflates."""
    if subspace.orthonormal or not (complement.uses_rest or refresh.rotates):
        return
    use = f"Refresh(moments={refresh.moments!r})" if refresh.rotates else type(complement).__name__
    raise ValueError(
        f"{use} takes a basis of orthonormal vectors, and those of {subspace} are not: P P^T is "
        "the identity in the mean alone, and several times as long where it is not zero, so that "
        "steps go uphill. Take svd, orthogonal_gaussian or sampled_rows(rank, replacement=False), "
        "or combine it with Discard() or ScaledGradient() and Refresh(moments='keep')."
    )


def _is_field(path: KeyPath, value: Any) -> bool:
    """Returns True if it is a field of a state's NamedTuple; a parameter may have its name."""
    del value
    return isinstance(path[-1], optax.tree_utils.NamedTupleKey)


def _field(state: Any, name: str) -> Any:
    return optax.tree_utils.tree_get(state, name, filtering=_is_field)


def _with_fields(state: Any, fields: dict[str, Any]) -> Any:
    filtering: Callable[[KeyPath, Any], bool] = _is_field
    return optax.tree_utils.tree_set(state, filtering, **fields)
