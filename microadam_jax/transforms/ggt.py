"""GGT: full-matrix AdaGrad on a window of gradients."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.compressors import Compressor
from microadam_jax.engine.transformation import require_hyperparameters
from microadam_jax.transforms.gram_window import applied, gram_window, spectrum
from microadam_jax.transforms.window import Window, as_window


def scale_by_ggt(
    window: Window | int = Window(32),
    eps: ArrayLike = 1e-5,
    *,
    compressor: Compressor | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by the inverse square root of the latest ones' second moments.

    With the updates of the whole model as the rows of :math:`G`, of which :math:`g_t` is the
    newest,

    .. math::

        u_t = \left[ (G^\top G)^{1/2} + \epsilon I \right]^{-1} g_t .

    Since :math:`g_t = G^\top e` is a row of :math:`G` itself, it is the combination of rows

    .. math::

        u_t = G^\top (K^{1/2} + \epsilon I)^{-1} e, \qquad K = G G^\top,

    for which the :math:`m \times m` matrix :math:`K` is diagonalized in float32. Directions with
    :math:`\sigma + \epsilon \le 2^{-11} m^{1/4} \sigma_{\max}`, where float32 knows nothing of
    :math:`\sigma`, are left out, as in :func:`scale_by_mfac`.

    All leaves share :math:`K`: a non-finite gradient in one spoils all of them until it has left
    the window, so wrap the chain in ``optax.apply_if_finite``.

    Args:
        window: the number of rows, or a :class:`Window` with its options. Under
            ``optax.inject_hyperparams`` give a :class:`Window`, because a bare number would
            become a traced array.
        eps: :math:`\epsilon`, positive.
        compressor: the one that made the updates, which determines the shape of the state:
            with :func:`top_k` in :func:`error_feedback` this is Sparse GGT. None keeps updates
            whole: GGT.

    Returns:
        The transformation. Its state is that of :func:`scale_by_mfac`.

    Raises:
        TypeError: if the window's length is a traced array, a part is of another class, or ``eps``
            is an array in fewer bits than float32; in ``init``, if a leaf is not a floating-point
            array.
        ValueError: if ``eps`` or the window's length is not positive, or the window is normalized;
            in ``update``, if an update was not made by ``compressor``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import scale_by_ggt
        >>> tx = scale_by_ggt(window=2)
        >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
        >>> print(updates.round(3))  # g / (|g| + eps)
        [0.6 0.8]

    Reference: Agarwal et al., GGT (arXiv 1806.02958), and Modoranu et al., EFCP
    (arXiv 2306.06098).
    """
    window = as_window(window)
    if isinstance(eps, int | float) and eps <= 0:
        raise ValueError(f"eps must be positive, such as 1e-5; got {eps}.")
    if window.normalized:
        raise ValueError(
            "scale_by_ggt sums over the window and divides by nothing, so there is nothing to "
            "normalize; leave normalized out of Window."
        )
    require_hyperparameters(eps=eps)

    def coefficients(gram: jax.Array, newest: jax.Array, count: jax.Array) -> jax.Array:
        del count
        squares, vectors, least = spectrum(gram)
        divisors = jnp.sqrt(squares) + jnp.float32(eps)
        return applied(vectors, divisors, jnp.sqrt(least), newest)

    return gram_window(coefficients, window, compressor)
