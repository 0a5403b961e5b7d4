"""Adam and AdaGrad with the norm of a subset of the gradient below each of its elements."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from microadam_jax.layout.partition import (
    Assignment,
    Partition,
    remark_assignment,
    require_shape,
    warn_unnamed,
)
from microadam_jax.layout.subsets import Subsets
from microadam_jax.sharding import moment_zeros, state_zeros
from microadam_jax.transforms.moments import moment_dtype, moving_average, one_minus_power
from microadam_jax.transforms.transformation import require_kind, transformation
from microadam_jax.trees import KeyPath, boxed_like, boxed_moments, map_with_path


class ScaleBySubsetNormState(NamedTuple):
    """Holds a first moment for each parameter and a second one for each subset.

    Attributes:
        count: int32 scalar, steps taken.
        mu: first moments, of the parameters' shapes, in ``mu_dtype``.
        nu: float32 sums or means of squares of the subsets, of the parameters' ranks.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_subset_norm(
    b1: ArrayLike = 0.9,
    b2: ArrayLike | None = 0.999,
    eps: ArrayLike = 1e-6,
    *,
    subsets: Subsets = Subsets(),
    partition: Partition | None = None,
    mu_dtype: DTypeLike = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides a momentum by the norm that a subset of the gradient has had.

    With :math:`S(i)` the subset of parameter :math:`i`,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_{t,S} &= \beta_2 v_{t-1,S} + (1 - \beta_2) \sum_{i \in S} g_{t,i}^2 \\
        u_{t,i} &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \cdot \frac{m_{t,i}}{\sqrt{v_{t,S(i)}} + \epsilon}

    Without :math:`\beta_2` it is AdaGrad: :math:`v_{t,S} = v_{t-1,S} + \sum g_{t,i}^2` and
    :math:`u_{t,i} = m_{t,i} / (\sqrt{v_{t,S(i)}} + \epsilon)`. Note that :math:`\epsilon` stands
    beside the uncorrected root.

    Args:
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1); None for AdaGrad.
        eps: :math:`\epsilon`.
        subsets: what the subsets are, and whether squares are summed or averaged.
        partition: which parameters are linear maps, and between which axes; None stands for
            ``Partition()``, the names of :func:`transformer_rules`.
        mu_dtype: the dtype in which :math:`m` is kept; :math:`v` is always float32.

    Returns:
        The transformation. Its state takes 4 bytes for each element of a linear map and 8 for
        each other one; 4 for all with runs as subsets.

    Raises:
        TypeError: if a number is an array in fewer bits than float32, or ``subsets`` or
            ``partition`` is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if ``mu_dtype`` is not a floating dtype; in ``update``, if the state was made
            for other subsets.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import scale_by_subset_norm
        >>> params = {"mlp": {"kernel": jnp.zeros((2, 3))}}
        >>> tx = scale_by_subset_norm(b1=0.0)
        >>> grads = {"mlp": {"kernel": jnp.array([[3.0, 1.0, 0.0], [4.0, 0.0, 1.0]])}}
        >>> updates, state = tx.update(grads, tx.init(params))
        >>> print(updates["mlp"]["kernel"].round(3))  # columns of norm 1
        [[0.6 1.  0. ]
         [0.8 0.  1. ]]

    Reference: Nguyen and Nguyen, subset-norm and subspace-momentum (arXiv 2411.07120).
    """
    partition = Partition() if partition is None else partition
    require_kind(Partition, partition=partition)
    require_kind(Subsets, subsets=subsets)
    mu_dtype = moment_dtype(mu_dtype)

    def init(params: optax.Params) -> ScaleBySubsetNormState:
        assignments = partition.assign(params)
        costs: list[tuple[Assignment, int]] = []

        def zeros(path: KeyPath, parameter: jax.Array) -> tuple[jax.Array, jax.Array]:
            assignment = assignments[path]
            if subsets.rule == "larger":
                remark_assignment(path, assignment)
                costs.append((assignment, assignment.bytes))
            return (
                state_zeros(parameter, parameter.shape, mu_dtype),
                moment_zeros(parameter, subsets.of(assignment).moment_shape, jnp.float32),
            )

        mu, nu = map_with_path(zeros, 2, params)
        warn_unnamed("scale_by_subset_norm", costs)
        return ScaleBySubsetNormState(jnp.zeros([], jnp.int32), mu, boxed_moments(nu, params))

    def update(
        updates: optax.Updates,
        state: ScaleBySubsetNormState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySubsetNormState]:
        del extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        assignments = partition.assign(updates)
        correction = jnp.float32(1)
        if b2 is not None:
            correction = jnp.sqrt(one_minus_power(b2, count)) / one_minus_power(b1, count)

        def scale(
            path: KeyPath, g: jax.Array, target: jax.Array, mu: jax.Array, nu: jax.Array
        ) -> tuple[jax.Array, ...]:
            sharing = subsets.of(assignments[path])
            require_shape(path, nu, sharing.moment_shape)
            g = g.astype(jnp.float32)
            squares = sharing.mean(jnp.square(g))
            if subsets.reduction == "sum":
                squares *= math.prod(g.shape) // max(1, math.prod(sharing.moment_shape))
            mu = moving_average(b1, mu, g)
            nu = nu + squares if b2 is None else moving_average(b2, nu, squares)
            scaled = correction * mu / (sharing.spread(jnp.sqrt(nu)) + eps)
            return scaled.astype(target.dtype), mu.astype(mu_dtype), nu

        targets = updates if params is None else params
        scaled, mu, nu = map_with_path(scale, 3, updates, targets, state.mu, state.nu)
        return scaled, ScaleBySubsetNormState(count, mu, boxed_like(nu, state.nu))

    return transformation(init, update, b1=b1, b2=b2, eps=eps)
