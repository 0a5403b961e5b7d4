"""Adam and AdaGrad with the norm of a subset of the gradient below each of its elements."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from microadam_jax.arguments import require_kind
from microadam_jax.codecs import Unstored
from microadam_jax.engine.leafwise import Arrays, Leaf, leafwise
from microadam_jax.layout.axes import require_shape
from microadam_jax.layout.partition import (
    Assignment,
    Partition,
    as_partition,
    remark_assignment,
    warn_unnamed,
)
from microadam_jax.layout.subsets import Subsets
from microadam_jax.state_format import SUBSET_NORMS, setting
from microadam_jax.transforms.moments import correction, moment_dtype, moving_average
from microadam_jax.trees import KeyPath


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
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_dtype`` is not
            a floating dtype; in ``update``, if the state was made for other subsets.

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
    partition = as_partition(partition)
    require_kind(Subsets, subsets=subsets)

    def init(leaf: Leaf) -> tuple[jax.Array]:
        if subsets.rule == "larger":
            remark_assignment(leaf.path, leaf.layout)
        return (leaf.zeros(subsets.of(leaf.layout).moment_shape),)

    def inspect(leaves: list[Leaf]) -> None:
        tell_subset_norms(subsets, b2)
        if subsets.rule == "larger":
            costs = [(leaf.layout, leaf.layout.bytes) for leaf in leaves]
            warn_unnamed("scale_by_subset_norm", costs)

    def reduce(leaf: Leaf, nu: jax.Array) -> tuple[Arrays, Arrays]:
        nu, norm = subset_norms(subsets, leaf.layout, leaf.path, leaf.value, nu, b2)
        return (nu,), (norm + eps,)

    def rule(t: jax.Array, g: jax.Array, mu: jax.Array, norm: jax.Array) -> Arrays:
        mu = moving_average(b1, mu, g)
        return correction(b1, b2, t) * mu / norm, mu

    return leafwise(
        ScaleBySubsetNormState,
        {"mu": Unstored(moment_dtype(mu_dtype))},
        rule,
        init,
        reduce,
        partition.assign_leaves,
        inspect=inspect,
        hyperparams={"b1": b1, "b2": b2, "eps": eps},
    )


def tell_subset_norms(subsets: Subsets, b2: ArrayLike | None) -> None:
    """Tells the state format what the numbers of :math:`v` are."""
    kept = "added up" if b2 is None else "a moving average"
    setting(SUBSET_NORMS, f"the {subsets.reduction} of squares, {kept}")


def subset_norms(
    subsets: Subsets,
    assignment: Assignment,
    path: KeyPath,
    g: jax.Array,
    nu: jax.Array,
    b2: ArrayLike | None,
) -> Arrays:
    r"""Returns the new :math:`v_{t,S}`, and :math:`\sqrt{v_{t,S(i)}}` for each element of ``g``.

    Raises:
        ValueError: if ``nu`` was made for other subsets.
    """
    sharing = subsets.of(assignment)
    require_shape(path, nu, sharing.moment_shape)
    squares = sharing.mean(jnp.square(g.astype(jnp.float32)))
    if subsets.reduction == "sum":
        squares *= math.prod(g.shape) // max(1, math.prod(sharing.moment_shape))
    nu = nu + squares if b2 is None else moving_average(b2, nu, squares)
    return nu, sharing.spread(jnp.sqrt(nu))
