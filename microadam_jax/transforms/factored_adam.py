"""Adam with a second moment that is a product of rows and columns."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.codecs import Codec, Storage, dynamic4
from microadam_jax.engine.leafwise import Arrays, Leaf, leafwise
from microadam_jax.layout.axes import require_shape
from microadam_jax.layout.partition import Partition, as_partition, warn_unnamed
from microadam_jax.transforms.factors import factor_shapes, mean, sides
from microadam_jax.transforms.moments import moving_average, one_minus_power, over_root, root_of


class ScaleByFactoredAdamState(NamedTuple):
    """Holds a first moment, and two factors of a second moment.

    Attributes:
        count: int32 scalar, steps taken.
        mu: what the codec makes of the first moments over the roots of the second ones.
        nu_row: float32 squared gradients, averaged over the columns; the whole second moment of a
            parameter that is not factored.
        nu_col: float32 squared gradients, averaged over the rows.
    """

    count: jax.Array
    mu: Any
    nu_row: Any
    nu_col: Any


def scale_by_factored_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    partition: Partition | None = None,
    mu_codec: Storage | Codec | str = dynamic4(rounding="stochastic"),
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, with a factored second moment and a stored first one.

    With :math:`\langle\cdot\rangle_r` the mean over the columns, which leaves one number for
    each row, and :math:`\langle\cdot\rangle_c` the mean over the rows,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        r_t &= \beta_2 r_{t-1} + (1 - \beta_2) \langle g_t^2 \rangle_r, \quad
        c_t = \beta_2 c_{t-1} + (1 - \beta_2) \langle g_t^2 \rangle_c \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{r_t c_t / (\bar r_t (1 - \beta_2^t))} + \epsilon}

    Unlike in Adafactor, :math:`\beta_2` is constant, nothing is clipped, and nothing is added to
    the squares. Vectors keep a float32 second moment for each element. The codec stores
    :math:`m_t` over the root of the factor that varies within a row, so that neighbours are of one
    size.

    Args:
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        partition: which parameters are linear maps, and between which axes; None stands for
            ``Partition()``, the names of :func:`transformer_rules`. Others of two and more axes
            are factored along the last two.
        mu_codec: how :math:`m` is stored.
        seed: of a codec that rounds stochastically.

    Returns:
        The transformation. Its state takes 0.53 bytes per parameter and 4 for each row and column.

    Raises:
        TypeError: if a number is an array in fewer bits than float32, or ``partition`` or
            ``mu_codec`` is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_codec`` is an
            unknown name or has no negative numbers; in ``update``, if the state was made for
            another partition or through another codec.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import scale_by_factored_adam
        >>> tx = scale_by_factored_adam()
        >>> state = tx.init({"kernel": jnp.zeros((512, 256))})
        >>> state.nu_row["kernel"].shape, state.nu_col["kernel"].shape
        ((512, 1), (1, 256))

    Reference: Li et al., 4-bit optimizers (arXiv 2309.01507), "4-bit Factor".
    """
    partition = as_partition(partition)
    storage = over_root(mu_codec)

    def init(leaf: Leaf) -> Arrays:
        return tuple(map(leaf.zeros, factor_shapes(leaf.layout)))

    def inspect(leaves: list[Leaf]) -> None:
        unfactored = ((leaf.layout, sides(leaf.layout) is None) for leaf in leaves)
        costs = [(assignment, assignment.bytes if alone else 0) for assignment, alone in unfactored]
        warn_unnamed("scale_by_factored_adam", costs)

    def reduce(leaf: Leaf, *nu: jax.Array) -> tuple[Arrays, Arrays]:
        for moment, shape in zip(nu, factor_shapes(leaf.layout), strict=True):
            require_shape(leaf.path, moment, shape)
        matrix = sides(leaf.layout)
        rows, cols = matrix or ((), ())
        nu_row = moving_average(b2, nu[0], mean(leaf.squares, cols))
        corrected = one_minus_power(b2, leaf.t)
        if matrix is None:
            others = jnp.ones_like(nu[1]) / jnp.sqrt(corrected)
            return (nu_row, nu[1]), (nu[0], nu_row, others)
        of_rows = leaf.mean_square(functools.partial(mean, axes=rows))
        nu_col = moving_average(b2, nu[1], of_rows)
        # Rows without any gradient have no mean to be divided by.
        whole = mean(nu_row, rows)
        divisor = jnp.where(whole > 0, whole, 1) * corrected
        new = nu_row, nu_col
        # Elements that share a scale lie along the last axis, where one of the factors is constant.
        varies = 0 if leaf.value.ndim - 1 in rows else 1
        other = jnp.sqrt(new[1 - varies] / divisor)
        return new, (nu[varies], new[varies], other)

    def rule(
        t: jax.Array,
        g: jax.Array,
        mu: jax.Array,
        before: jax.Array,
        after: jax.Array,
        other: jax.Array,
    ) -> Arrays:
        # Here and not in `reduce`, where each leaf's would be a kernel to compile.
        before, after = root_of(before, 0), root_of(after, 1)
        mu = moving_average(b1, mu * before, g)
        return mu / one_minus_power(b1, t) / (after * other + eps), mu / after

    return leafwise(
        ScaleByFactoredAdamState,
        {"mu": storage},
        rule,
        init,
        reduce,
        partition.assign_leaves,
        inspect=inspect,
        hyperparams={"b1": b1, "b2": b2, "eps": eps},
        seed=seed,
    )
