"""M-FAC: the inverse Fisher matrix of a window of gradients, times the newest."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.compressors import Compressor
from microadam_jax.engine.transformation import require_hyperparameters
from microadam_jax.transforms.gram_window import applied, gram_window, spectrum
from microadam_jax.transforms.window import Window, as_window


def scale_by_mfac(
    window: Window | int = Window(32),
    damping: ArrayLike = 1e-5,
    *,
    compressor: Compressor | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by the inverse of the empirical Fisher matrix of the latest ones.

    With :math:`g_i` the updates of the whole model in the window's :math:`m` rows, of which
    :math:`g_t` is the newest,

    .. math::

        F_t = \lambda I + \frac{1}{m} \sum_i g_i g_i^\top, \qquad u_t = F_t^{-1} g_t .

    Since :math:`g_t = G^\top e` is a row of :math:`G` itself, it is the combination of rows

    .. math::

        u_t = m\, G^\top y, \qquad (m \lambda I + K)\, y = e, \qquad K = G G^\top,

    which takes one :math:`m \times m` system for the whole model and is exact in float32 where
    the difference of two large vectors, the Woodbury identity, is not. Rows that no step has
    filled are zero and divide by :math:`m` nonetheless; ``Window(normalized=True)`` divides by
    the number of filled rows.

    It is solved in the eigenbasis of :math:`K`. Directions with
    :math:`\sigma^2 + m \lambda \le 2^{-22} \sqrt m\, \sigma_{\max}^2`, where float32 knows
    nothing of :math:`\sigma^2`, are left out: gradients that repeat do no harm, and a gradient
    less than :math:`2^{-11} m^{1/4}` times as long as another in the window, 1.2e-3 times for
    :math:`m = 32`, has to wait until that one is gone.

    All leaves share :math:`K`: a non-finite gradient in one spoils all of them until it has left
    the window, so wrap the chain in ``optax.apply_if_finite``.

    Args:
        window: :math:`m`, or a :class:`Window` with its options. Under
            ``optax.inject_hyperparams`` give a :class:`Window`, because a bare number would
            become a traced array.
        damping: :math:`\lambda`, positive. Where :math:`\|g\|^2` falls below
            :math:`m \lambda`, the update becomes :math:`g / \lambda`.
        compressor: the one that made the updates, which determines the shape of the state:
            with :func:`top_k` in :func:`error_feedback` this is Sparse M-FAC, with
            :func:`power_sgd` Low-rank M-FAC. None keeps updates whole: M-FAC.

    Returns:
        The transformation. Its state takes :math:`3 m k / B` bytes per parameter for Top-K of
        :math:`k` elements in blocks of :math:`B \le 256`, and :math:`2 m` for dense updates.

    Raises:
        TypeError: if the window's length is a traced array, a part is of another class, or
            ``damping`` is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if ``damping`` or the window's length is not positive; in ``update``, if an
            update was not made by ``compressor``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import scale_by_mfac
        >>> tx = scale_by_mfac(window=2, damping=0.5)
        >>> updates, _ = tx.update(jnp.array([1.0, 2.0]), tx.init(jnp.zeros(2)))
        >>> print(updates)  # 2 g / (2 * 0.5 + |g|^2)
        [0.3333... 0.6666...]

    Reference: Frantar et al., M-FAC (arXiv 2107.03356), and Modoranu et al., EFCP
    (arXiv 2306.06098).
    """
    window = as_window(window)
    if isinstance(damping, int | float) and damping <= 0:
        raise ValueError(f"damping must be positive, such as 1e-5; got {damping}.")
    require_hyperparameters(damping=damping)

    def coefficients(gram: jax.Array, newest: jax.Array, count: jax.Array) -> jax.Array:
        terms = jnp.minimum(count, window.length) if window.normalized else window.length
        terms = jnp.asarray(terms, jnp.float32)
        squares, vectors, least = spectrum(gram)
        divisors = squares + terms * jnp.float32(damping)
        return terms * applied(vectors, divisors, least, newest)

    return gram_window(coefficients, window, compressor)
