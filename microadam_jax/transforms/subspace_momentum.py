"""Momentum in a subspace, the raw gradient outside, over the norm of subsets of all of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.arguments import require_kind
from microadam_jax.engine.transformation import transformation
from microadam_jax.layout.matrices import Matrices
from microadam_jax.layout.subsets import Subsets
from microadam_jax.state_arrays import moment_zeros
from microadam_jax.subspace.complement import RawRest
from microadam_jax.subspace.projection import float32
from microadam_jax.subspace.refresh import Refresh
from microadam_jax.subspace.subspace import Arrays, Subspace
from microadam_jax.transforms.moments import correction, moving_average
from microadam_jax.transforms.project_gradients import ProjectGradientsState, project_gradients
from microadam_jax.transforms.subset_norm import subset_norms, tell_subset_norms
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
    refresh: Refresh = Refresh(),
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
        refresh: when it is found anew, by default as counted with ``first=1``, and what becomes of
            :math:`m`: ``"reset"``, the default, ``"keep"``, ``"rotate_first"`` or ``"released"``.
            :math:`v` does not depend on it.
        subsets: what the subsets are, and whether squares are summed or averaged.
        matrices: which parameters are matrices, and which side is compressed.

    Returns:
        The transformation. For a matrix of m x n with m >= n and rank r it keeps m r + m elements,
        and n r for a dense basis.

    Raises:
        TypeError: if ``subspace``, ``refresh``, ``subsets`` or ``matrices`` is of another class, or
            a number is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``refresh`` rotates
            both moments or has a ``momentum_share``.

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
    require_kind(Subsets, subsets=subsets)
    require_kind(Refresh, refresh=refresh)
    refresh = refresh.completed(Refresh(first=1, moments="reset"))
    if refresh.needs_decay_rates:
        raise ValueError(
            "subspace_momentum has no second moment in its subspace: choose Refresh(moments=...) "
            "'reset', 'keep' or 'rotate_first', and no momentum_share."
        )
    momentum = project_gradients(_average(b1), subspace, refresh, RawRest(), matrices=matrices)

    def init(params: optax.Params) -> SubspaceMomentumState:
        assigned = matrices.assign(params)
        tell_subset_norms(subsets, b2)

        def zeros(path: KeyPath, parameter: jax.Array) -> Arrays:
            shape = subsets.of(assigned[path].assignment).moment_shape
            return (moment_zeros(parameter, shape, jnp.float32),)

        projected: Any = momentum.init(params)
        (nu,) = map_with_path(zeros, 1, params)
        nu = boxed_moments(nu, params)
        return SubspaceMomentumState(projected.count, projected.basis, projected.inner_state.mu, nu)

    def update(
        updates: optax.Updates,
        state: SubspaceMomentumState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SubspaceMomentumState]:
        del extra_args
        count, basis, mu, nu = state
        found: Any = momentum.update(
            jax.tree.map(float32, updates),
            ProjectGradientsState(count, basis, RawRest.Kept(), _AverageState(mu)),
        )
        numerators, projected = found
        bias = correction(b1, b2, projected.count)
        assigned = matrices.assign(updates)

        def scale(
            path: KeyPath, g: jax.Array, target: jax.Array, n: jax.Array, nu: jax.Array
        ) -> Arrays:
            assignment = assigned[path].assignment
            nu, norm = subset_norms(subsets, assignment, path, g, nu, b2)
            return (bias * n / (norm + eps)).astype(target.dtype), nu

        targets = updates if params is None else params
        scaled, new_nu = map_with_path(scale, 2, updates, targets, numerators, nu)
        return scaled, SubspaceMomentumState(
            projected.count, projected.basis, projected.inner_state.mu, boxed_like(new_nu, nu)
        )

    return transformation(init, update, b1=b1, b2=b2, eps=eps)


class _AverageState(NamedTuple):
    mu: Any


def _average(b1: ArrayLike) -> optax.GradientTransformation:
    """A moving average that starts at zero, without correction of its bias."""

    def init(params: optax.Params) -> _AverageState:
        return _AverageState(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, _AverageState)
        (mu,) = map_with_path(lambda _, g, m: (moving_average(b1, m, g),), 1, updates, state.mu)
        return mu, _AverageState(boxed_like(mu, state.mu))

    return optax.GradientTransformation(init, update)
