"""Adam with an age for each parameter's moments, so that those of one can start anew."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.engine.transformation import transformation
from microadam_jax.layout.stacks import layer_axes
from microadam_jax.state_arrays import moment_zeros
from microadam_jax.transforms.moments import adam_moments, one_minus_power, zero_moments
from microadam_jax.trees import KeyPath, box_path, leaf_shapes, map_with_path, path_name


class ScaleByRestartableAdamState(NamedTuple):
    """Holds Adam's moments, and how old they are.

    Attributes:
        age: int32 of each parameter's rank, steps since its moments were zero: one number, or one
            for each of stacked layers and of what the two last axes leave, such as experts.
        mu: float32 first moments, of the parameters' shapes.
        nu: float32 second moments, of the parameters' shapes.
    """

    age: Any
    mu: Any
    nu: Any


def scale_by_restartable_adam(
    b1: ArrayLike = 0.9, b2: ArrayLike = 0.999, eps: ArrayLike = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates as Adam does, and counts the steps of each parameter by itself.

    With the age :math:`a` of a parameter's moments,

    .. math::

        a_t &= a_{t-1} + 1, \quad m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^{a_t})}{\sqrt{v_t / (1 - \beta_2^{a_t})} + \epsilon}

    These are the numbers of ``optax.scale_by_adam``, until something sets a parameter's age and
    moments to zero, as :func:`project_gradients` does with ``Refresh(moments="reset")``. With a
    count that all parameters share, moments that start late would be taken for unbiased ones, and
    the steps after it were up to :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` and more.

    Args:
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the corrected root.

    Returns:
        The transformation.

    Raises:
        TypeError: if a number is an array in fewer bits than float32; in ``init``, if a leaf is not
            a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.transforms import scale_by_restartable_adam
        >>> tx = scale_by_restartable_adam()
        >>> updates, state = tx.update(jnp.array([2.0, -3.0]), tx.init(jnp.zeros(2)))
        >>> print(updates.round(4), state.age)
        [ 1. -1.] [1]

    Reference: Kingma and Ba, Adam (arXiv 1412.6980), Algorithm 1.
    """

    def init(params: optax.Params) -> ScaleByRestartableAdamState:
        axes = layer_axes(list(leaf_shapes(params).values()))

        def newborn(path: KeyPath, x: jax.Array) -> tuple[jax.Array]:
            layers = axes[path_name(box_path(path))]
            matrices = {layers, *range(x.ndim - 2)}
            shape = tuple(n if axis in matrices else 1 for axis, n in enumerate(x.shape))
            return (moment_zeros(x, shape, jnp.int32),)

        (age,) = map_with_path(newborn, 1, params)
        return ScaleByRestartableAdamState(age, *zero_moments(params))

    def update(
        updates: optax.Updates,
        state: ScaleByRestartableAdamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByRestartableAdamState]:
        del params, extra_args
        age = jax.tree.map(optax.safe_increment, state.age)
        mu, nu = adam_moments(b1, b2, updates, state.mu, state.nu)

        def scaled(g: jax.Array, a: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            root = jnp.sqrt(v / one_minus_power(b2, a))
            return (m / one_minus_power(b1, a) / (root + eps)).astype(g.dtype)

        return jax.tree.map(scaled, updates, age, mu, nu), ScaleByRestartableAdamState(age, mu, nu)

    return transformation(init, update, b1=b1, b2=b2, eps=eps)
