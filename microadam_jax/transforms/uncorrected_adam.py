"""Adam in two links, so that something can stand between its moments and their bias correction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.engine.transformation import transformation
from microadam_jax.transforms.moments import adam_moments, correction, zero_moments


class ScaleByUncorrectedAdamState(NamedTuple):
    """Holds Adam's moments.

    Attributes:
        mu: float32 first moments, of the parameters' shapes.
        nu: float32 second moments, of the parameters' shapes.
    """

    mu: Any
    nu: Any


class CorrectBiasState(NamedTuple):
    """Counts the age of the moments.

    Attributes:
        count: int32 scalar, steps taken.
    """

    count: jax.Array


def scale_by_uncorrected_adam(
    b1: ArrayLike = 0.9, b2: ArrayLike = 0.999, eps: ArrayLike = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by Adam's moments as they are, without correcting their bias.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
        u_t &= m_t / (\sqrt{v_t} + \epsilon)

    With :func:`correct_bias` after it, it is Adam with an :math:`\epsilon` that is divided by
    :math:`\sqrt{1 - \beta_2^t}`.

    Args:
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the uncorrected root.

    Returns:
        The transformation.

    Raises:
        TypeError: if a number is an array in fewer bits than float32; in ``init``, if a leaf is not
            a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> from microadam_jax.transforms import correct_bias, scale_by_uncorrected_adam
        >>> tx = optax.chain(scale_by_uncorrected_adam(), correct_bias())
        >>> updates, _ = tx.update(jnp.array([2.0, -3.0]), tx.init(jnp.zeros(2)))
        >>> print(updates.round(4))
        [ 1. -1.]
    """

    def init(params: optax.Params) -> ScaleByUncorrectedAdamState:
        return ScaleByUncorrectedAdamState(*zero_moments(params))

    def update(
        updates: optax.Updates,
        state: ScaleByUncorrectedAdamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByUncorrectedAdamState]:
        del params, extra_args
        mu, nu = adam_moments(b1, b2, updates, state.mu, state.nu)
        scaled = jax.tree.map(
            lambda g, m, v: (m / (jnp.sqrt(v) + eps)).astype(g.dtype), updates, mu, nu
        )
        return scaled, ScaleByUncorrectedAdamState(mu, nu)

    return transformation(init, update, b1=b1, b2=b2, eps=eps)


def correct_bias(
    b1: ArrayLike = 0.9, b2: ArrayLike = 0.999
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by Adam's bias correction, :math:`\sqrt{1 - \beta_2^t}/(1 - \beta_1^t)`.

    Args:
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).

    Returns:
        The transformation.

    Raises:
        TypeError: if a decay rate is an array in fewer bits than float32; in ``init``, if a leaf is
            not a floating-point array.
        ValueError: if a decay rate is outside [0, 1).
    """

    def init(params: optax.Params) -> CorrectBiasState:
        del params
        return CorrectBiasState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: CorrectBiasState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CorrectBiasState]:
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        factor = correction(b1, b2, count)
        corrected = jax.tree.map(
            lambda u: (factor * u.astype(jnp.float32)).astype(u.dtype), updates
        )
        return corrected, CorrectBiasState(count)

    return transformation(init, update, b1=b1, b2=b2)
