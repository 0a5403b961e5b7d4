"""Momentum in a subspace, the raw gradient outside, over the norm of subsets of all of it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.layout.matrices import Matrices
from microadam_jax.layout.partition import require_shape
from microadam_jax.layout.subsets import Subsets
from microadam_jax.layout.view import WHOLE, Layout, MatrixView
from microadam_jax.memory import warn_of_more_than_adam
from microadam_jax.sharding import moment_zeros, state_zeros
from microadam_jax.subspace.basis import Basis
from microadam_jax.subspace.projection import (
    Projected,
    Projection,
    float32,
    folded,
    unfolded,
    when,
)
from microadam_jax.subspace.refresh import Refresh, rotate_first
from microadam_jax.subspace.subspace import Arrays, Subspace
from microadam_jax.transforms.moments import moving_average, one_minus_power
from microadam_jax.transforms.transformation import require_kind, transformation
from microadam_jax.trees import KeyPath, boxed_like, boxed_moments, map_with_path


class SubspaceMomentumState(NamedTuple):
    """Holds the bases, a momentum in each subspace, and a second moment for each subset.

    Attributes:
        count: int32 scalar, steps taken.
        basis: a NamedTuple with a tree of the parameters' structure for each array that a
            basis consists of. Of what is no matrix they hold one number that is not used.
        mu: float32 momenta, with the rank in place of the compressed side of a matrix.
        nu: float32 sums or means of squares of the subsets, of the parameters' ranks.
    """

    count: jax.Array
    basis: Any
    mu: Any
    nu: Any


def subspace_momentum(
    b1: ArrayLike = 0.9,
    b2: ArrayLike | None = 0.999,
    eps: ArrayLike = 1e-6,
    *,
    subspace: Subspace,
    refresh: Refresh = Refresh(first=1, moments="reset"),
    subsets: Subsets = Subsets(),
    matrices: Matrices = Matrices(),
) -> optax.GradientTransformationExtraArgs:
    r"""Averages gradients in a subspace only, and divides by the norms of subsets.

    For a matrix whose rows are compressed, with the basis :math:`P` of its subspace and the subset
    :math:`S(i)` of element :math:`i`,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) P^T g_t \\
        n_t &= P m_t + (g_t - P P^T g_t) \\
        v_{t,S} &= \beta_2 v_{t-1,S} + (1 - \beta_2) \sum_{i \in S} g_{t,i}^2 \\
        u_{t,i} &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \cdot \frac{n_{t,i}}{\sqrt{v_{t,S(i)}} + \epsilon}

    The rest of the gradient has weight 1 and no momentum; the bias correction multiplies it too,
    by 10 in the first step, so warm the learning rate up. Without :math:`\beta_2`,
    :math:`v_{t,S} = v_{t-1,S} + \sum g_{t,i}^2` and nothing is corrected, as in AdaGrad.

    Parameters that are no matrices have a momentum of their own and subsets as without a subspace:
    of one element each by default, which is Adam.

    Args:
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1); None for AdaGrad.
        eps: :math:`\epsilon`, beside the uncorrected root.
        subspace: how :math:`P` is found, such as ``svd(128)``.
        refresh: when it is found anew, and what becomes of :math:`m`: ``"reset"``, ``"keep"``,
            ``"rotate_first"`` or ``"released"``. :math:`v` does not depend on it.
        subsets: what the subsets are, and whether squares are summed or averaged.
        matrices: which parameters are matrices, and which side is compressed.

    Returns:
        The transformation. For a matrix of m x n with m >= n and rank r it keeps m r + m elements,
        and n r for a dense basis.

    Raises:
        TypeError: if ``subspace``, ``refresh``, ``subsets`` or ``matrices`` is of another class, or
            a number is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if ``refresh`` rotates both moments or has a ``momentum_share``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import subspace_momentum
        >>> from microadam_jax.subspace import svd
        >>> tx = subspace_momentum(subspace=svd(2))
        >>> state = tx.init({"kernel": jnp.zeros((8, 3))})
        >>> state.mu["kernel"].shape, state.nu["kernel"].shape
        ((8, 2), (8, 1))

    Reference: Nguyen and Nguyen, subset-norm and subspace-momentum (ICML 2025, arXiv 2411.07120).
    """
    projection = Projection(matrices, subspace, refresh)
    require_kind(Subsets, subsets=subsets)
    if refresh.needs_decay_rates:
        raise ValueError(
            "subspace_momentum has no second moment in its subspace: choose Refresh(moments=...) "
            "'reset', 'keep' or 'rotate_first', and no momentum_share."
        )

    def low(view: MatrixView) -> Layout:
        return Layout(rows=subspace.size(view), columns=None)

    def init(params: optax.Params) -> SubspaceMomentumState:
        leaves = projection.assign(params)

        def zeros(path: KeyPath, parameter: jax.Array) -> Arrays:
            assigned = leaves[path].assigned
            view = assigned.view
            if view is None:
                mu = state_zeros(parameter, parameter.shape, jnp.float32)
            else:
                mu = view.zeros(parameter, low(view), jnp.float32)
            shape = subsets.of(assigned.assignment).moment_shape
            return mu, moment_zeros(parameter, shape, jnp.float32)

        basis = projection.zeros(params)
        mu, nu = map_with_path(zeros, 2, params)
        state = SubspaceMomentumState(
            jnp.zeros([], jnp.int32),
            subspace.Kept(*(boxed_moments(tree, params) for tree in basis)),
            boxed_moments(mu, params),
            boxed_moments(nu, params),
        )
        warn_of_more_than_adam("subspace_momentum", state, params)
        return state

    def update(
        updates: optax.Updates,
        state: SubspaceMomentumState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SubspaceMomentumState]:
        del extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        leaves = projection.assign(updates)
        if b2 is None:
            correction: ArrayLike = 1.0
        else:
            correction = jnp.sqrt(one_minus_power(b2, count)) / one_minus_power(b1, count)

        def scale(
            path: KeyPath,
            g: jax.Array,
            target: jax.Array,
            mu: jax.Array,
            nu: jax.Array,
            *stored: jax.Array,
        ) -> Arrays:
            leaf = leaves[path]
            view, sharing = leaf.assigned.view, subsets.of(leaf.assigned.assignment)
            require_shape(path, nu, sharing.moment_shape)
            g = float32(g)
            squares = sharing.mean(jnp.square(g))
            if subsets.reduction == "sum":
                squares *= math.prod(g.shape) // max(1, math.prod(sharing.moment_shape))
            nu = nu + squares if b2 is None else moving_average(b2, nu, squares)
            if view is None:
                mu = numerator = moving_average(b1, mu, g)
            else:
                matrix, old_mu = view.fold(g), view.fold(mu)
                kept = folded(view, stored)
                renewed = leaf.renew(lambda: matrix, kept, state.count)
                basis = leaf.basis(view, renewed, state.count)
                old = leaf.basis(view, kept, state.count - 1)
                followed = _followed(leaf, basis, old, old_mu, state.count)
                projected = basis.project(matrix)
                momentum = moving_average(b1, followed, projected)
                numerator = view.unfold(matrix + basis.back(momentum - projected), WHOLE, g)
                if refresh.moments == "released":
                    due = leaf.due(state.count) & (state.count > 0)
                    momentum = jnp.where(due, 0, momentum)
                mu = view.unfold(momentum, low(view), g)
                stored = tuple(unfolded(view, renewed, projection.slots(view), g))
            scaled = jnp.float32(correction) * numerator / (sharing.spread(jnp.sqrt(nu)) + eps)
            return scaled.astype(target.dtype), mu, nu, *stored

        def _followed(
            leaf: Projected, new: Basis, old: Basis, mu: jax.Array, count: jax.Array
        ) -> jax.Array:
            """The momentum in the new basis."""
            if refresh.moments in ("keep", "released"):
                return mu
            if refresh.moments == "reset":
                return jnp.where(leaf.due(count), 0, mu)
            return when(leaf.due(count), lambda: rotate_first(new.overlap(old), mu), lambda: mu)

        targets = updates if params is None else params
        columns = (state.mu, state.nu, *state.basis)
        scaled, *new = map_with_path(scale, 1 + len(columns), updates, targets, *columns)
        mu, nu, *basis = map(boxed_like, new, columns)
        return scaled, SubspaceMomentumState(count, subspace.Kept(*basis), mu, nu)

    return transformation(init, update, b1=b1, b2=b2, eps=eps)
