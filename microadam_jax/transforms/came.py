"""CAME: factored second moments, and a factored measure of how far to trust an update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from microadam_jax.engine.transformation import transformation
from microadam_jax.layout.axes import Shape, require_shape
from microadam_jax.layout.partition import Assignment, Partition, as_partition
from microadam_jax.state_arrays import moment_zeros, state_zeros
from microadam_jax.transforms.factors import factor_shapes, inverse_root, mean, sides
from microadam_jax.transforms.moments import moment_dtype, moving_average
from microadam_jax.trees import KeyPath, boxed_like, boxed_moments, map_with_path


class ScaleByCameState(NamedTuple):
    """Holds a momentum, and two factors each of two second moments.

    For a parameter that is not factored ``nu_row`` is its whole second moment, and the other
    three hold one number that is not used.

    Attributes:
        mu: momenta of the updates, of the parameters' shapes, in ``mu_dtype``.
        nu_row: float32 squared gradients, averaged over the columns.
        nu_col: float32 squared gradients, averaged over the rows.
        instability_row: float32 squared deviations of the updates, averaged over the columns.
        instability_col: float32 squared deviations of the updates, averaged over the rows.
    """

    mu: Any
    nu_row: Any
    nu_col: Any
    instability_row: Any
    instability_col: Any


def scale_by_came(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    b3: ArrayLike = 0.9999,
    eps: ArrayLike = 1e-30,
    instability_eps: ArrayLike = 1e-16,
    clip_threshold: ArrayLike = 1.0,
    *,
    partition: Partition | None = None,
    mu_dtype: DTypeLike = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by factored second moments and by their factored instability.

    With :math:`\langle\cdot\rangle_r` the mean over the columns, which leaves one number for
    each row, and :math:`\langle\cdot\rangle_c` the mean over the rows,

    .. math::

        r_t &= \beta_2 r_{t-1} + (1 - \beta_2) \langle g_t^2 + \epsilon_1 \rangle_r, \quad
        c_t = \beta_2 c_{t-1} + (1 - \beta_2) \langle g_t^2 + \epsilon_1 \rangle_c \\
        \hat u_t &= g_t \Big/ \sqrt{r_t c_t / \bar r_t}, \quad
        u_t = \hat u_t / \max(1, \mathrm{RMS}(\hat u_t) / d) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, u_t \\
        R_t &= \beta_3 R_{t-1} + (1 - \beta_3) \langle (u_t - m_t)^2 + \epsilon_2 \rangle_r, \quad
        C_t = \beta_3 C_{t-1} + (1 - \beta_3) \langle (u_t - m_t)^2 + \epsilon_2 \rangle_c \\
        \text{update} &= m_t \Big/ \sqrt{R_t C_t / \bar R_t}

    Vectors keep :math:`v_t` for each element and :math:`m_t` is their update. Nothing is
    corrected for its start at zero: with the default decay rates the first update is 11 per
    element. Of gradients without a direction it falls to 1 over about :math:`1 / (1 - \beta_3)`
    steps, so warm the learning rate up or choose a smaller :math:`\beta_3`; of one that stays the
    same, :math:`u_t - m_t` vanishes and it rises, to 49 after 300 steps.

    Args:
        b1: :math:`\beta_1`, of the momentum, in (0, 1): with 0, :math:`u_t - m_t` would be zero.
        b2: :math:`\beta_2`, of the squared gradients, in [0, 1).
        b3: :math:`\beta_3`, of the instability, in [0, 1).
        eps: :math:`\epsilon_1`.
        instability_eps: :math:`\epsilon_2`.
        clip_threshold: :math:`d`, the largest root mean square of a parameter's :math:`u`.
        partition: which parameters are linear maps, and between which axes; None stands for
            ``Partition()``, the names of :func:`transformer_rules`. Others of two and more axes
            are factored along the last two, as published.
        mu_dtype: the dtype in which :math:`m` is kept; all else is float32.

    Returns:
        The transformation. Its state takes 4 bytes per parameter and 8 for each row and column.

    Raises:
        TypeError: if a decay rate or an epsilon is an array in fewer bits than float32, or
            ``partition`` is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``b1`` is a number
            outside (0, 1), or ``mu_dtype`` is not a floating dtype; in ``update``, if the state was
            made for another partition.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.transforms import scale_by_came
        >>> params = {"mlp": {"kernel": jnp.zeros((3, 2))}}
        >>> tx = scale_by_came(b3=0.99)
        >>> state = tx.init(params)
        >>> state.nu_row["mlp"]["kernel"].shape, state.nu_col["mlp"]["kernel"].shape
        ((3, 1), (1, 2))
        >>> grads = {"mlp": {"kernel": jnp.array([[1.0, 2.0], [-2.0, 4.0], [3.0, -6.0]])}}
        >>> updates, state = tx.update(grads, state)
        >>> with jnp.printoptions(precision=2):
        ...     print(updates["mlp"]["kernel"])
        [[ 1.11  1.11]
         [-1.11  1.11]
         [ 1.11 -1.11]]

    Reference: Luo et al., CAME (arXiv 2307.02047), Algorithm 2.
    """
    partition = as_partition(partition)
    mu_dtype = moment_dtype(mu_dtype)
    if isinstance(b1, int | float) and not 0 < b1 < 1:
        raise ValueError(
            "CAME divides by how far its momentum is from the update, so b1 must lie in (0, 1); "
            f"got {b1}. Without a momentum take optax.adafactor."
        )

    def init(params: optax.Params) -> ScaleByCameState:
        assignments = partition.assign(params)

        def zeros(path: KeyPath, parameter: jax.Array) -> tuple[jax.Array, ...]:
            assignment = assignments[path]
            return (
                state_zeros(parameter, parameter.shape, mu_dtype),
                *(moment_zeros(parameter, s, jnp.float32) for s in _state_shapes(assignment)),
            )

        mu, *factors = map_with_path(zeros, 5, params)
        return ScaleByCameState(mu, *(boxed_moments(factor, params) for factor in factors))

    def update(
        updates: optax.Updates,
        state: ScaleByCameState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByCameState]:
        del extra_args
        assignments = partition.assign(updates)

        def scale(
            path: KeyPath, g: jax.Array, target: jax.Array, mu: jax.Array, *stored: jax.Array
        ) -> tuple[jax.Array, ...]:
            assignment = assignments[path]
            for moment, shape in zip(stored, _state_shapes(assignment), strict=True):
                require_shape(path, moment, shape)
            nu_row, nu_col, instability_row, instability_col = stored
            matrix, every = sides(assignment), assignment.axes_of_a_layer
            rows, cols = matrix or ((), ())
            g = g.astype(jnp.float32)
            squares = jnp.square(g) + eps

            if matrix is None:
                nu_row = moving_average(b2, nu_row, squares)
                u = g * jax.lax.rsqrt(nu_row)
            else:
                nu_row = moving_average(b2, nu_row, mean(squares, cols))
                nu_col = moving_average(b2, nu_col, mean(squares, rows))
                u = g * inverse_root(nu_row, nu_col, rows)
            rms = jnp.sqrt(mean(jnp.square(u), every))
            u = u / jnp.maximum(1, rms / clip_threshold)
            mu = moving_average(b1, mu, u)

            scaled = mu
            if matrix is not None:
                deviation = jnp.square(u - mu) + instability_eps
                instability_row = moving_average(b3, instability_row, mean(deviation, cols))
                instability_col = moving_average(b3, instability_col, mean(deviation, rows))
                scaled = mu * inverse_root(instability_row, instability_col, rows)
            return (
                scaled.astype(target.dtype),
                mu.astype(mu_dtype),
                nu_row,
                nu_col,
                instability_row,
                instability_col,
            )

        targets = updates if params is None else params
        scaled, *moments = map_with_path(scale, 6, updates, targets, *state)
        return scaled, ScaleByCameState(*map(boxed_like, moments, state))

    numbers = {"b1": b1, "b2": b2, "b3": b3, "eps": eps, "instability_eps": instability_eps}
    return transformation(init, update, warns_as="scale_by_came", **numbers)


def _state_shapes(assignment: Assignment) -> tuple[Shape, ...]:
    rows, cols = factor_shapes(assignment)
    if sides(assignment) is None:
        return rows, cols, cols, cols
    return rows, cols, rows, cols
