"""EFCP: full-matrix preconditioners of compressed gradients, and M-FAC whole."""

import jax
import optax
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.codecs import Codec
from microadam_jax.compressors import PowerSGD, TopK, power_sgd, top_k
from microadam_jax.transforms import Window, error_feedback, scale_by_ggt, scale_by_mfac
from microadam_jax.transforms.decay import Mask, add_decayed_weights, scale_by_learning_rate

# A leaf kept dense costs 2 m bytes per parameter here, not Adam's 8: none is too small to compress.
EVERY_LEAF = top_k(min_size=0, min_row=0)


def sparse_mfac(
    learning_rate: ScalarOrSchedule,
    damping: ArrayLike = 1e-5,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    compressor: TopK = EVERY_LEAF,
    residual: Codec | str = "affine4",
    window: Window = Window(32),
) -> GradientTransformationExtraArgs:
    r"""Runs sparse M-FAC: the inverse Fisher matrix of a window of Top-K gradients, with feedback.

    .. math::

        a_t &= g_t + Q^{-1}(e_t), \qquad c_t = \mathrm{TopK}(a_t), \qquad
            e_{t+1} = Q(a_t - c_t) \\
        u_t &= \left[ \lambda I + \frac{1}{m} \sum_{r < \min(t, m)} c_{t-r} c_{t-r}^\top
            \right]^{-1} c_t \\
        \theta_{t+1} &= \theta_t - \eta_t (u_t + w\, \theta_t)

    Weight decay is decoupled and multiplied by the learning rate, as everywhere in Optax and in
    the authors' later package; their first code multiplied it by nothing.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        damping: :math:`\lambda`; the authors use 1e-7 to 1e-4.
        weight_decay: :math:`w`.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        compressor: :math:`\mathrm{TopK}`; by default 3 of each 256 elements.
        residual: :math:`Q`, the format of what is not sent; a codec or its name. The authors
            keep it in ``"float32"`` or ``"bfloat16"``.
        window: how many rows are kept, and how. The authors' is ``Window(1024, "float32")``,
            which takes 60 bytes per parameter with the default compressor; the default takes
            1.1, and 0.5 for the residual.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``window`` is traced
            (``optax.inject_hyperparams`` needs ``static_args``) or a part is of another class, or
            ``damping`` is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if ``damping`` is not positive, or ``residual`` is an unknown name or has no
            negative numbers; in ``update`` without ``params``, unless ``weight_decay`` is the
            number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import sparse_mfac
        >>> params = {"w": jnp.zeros((64, 256))}
        >>> tx = sparse_mfac(learning_rate=1e-3)
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones((64, 256))}, state, params)

    Reference: Modoranu et al., EFCP (arXiv 2306.06098), Sparse M-FAC.
    """
    return optax.chain(
        error_feedback(compressor, residual),
        scale_by_mfac(window, damping, compressor=compressor),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def lowrank_mfac(
    learning_rate: ScalarOrSchedule,
    damping: ArrayLike = 1e-5,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    compressor: PowerSGD = power_sgd(),
    residual: Codec | str = "affine4",
    window: Window = Window(32),
) -> GradientTransformationExtraArgs:
    r"""Runs low-rank M-FAC: the inverse Fisher matrix of a window of PowerSGD's gradients.

    .. math::

        a_t &= g_t + w\, \theta_t + Q^{-1}(e_t), \qquad
            c_t = P_t Q_t^\top \approx a_t, \qquad e_{t+1} = Q(a_t - c_t) \\
        u_t &= \left[ \lambda I + \frac{1}{m} \sum_{r < \min(t, m)} c_{t-r} c_{t-r}^\top
            \right]^{-1} c_t \\
        \theta_{t+1} &= \theta_t - \eta_t u_t

    The window keeps factors, and inner products are taken between factors. Vectors, and matrices
    of which the factors would be no smaller, stay whole. The Fisher matrix is that of all layers
    together.

    Weight decay is coupled, as published: it is added to the gradient, so that it is compressed
    and preconditioned too.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        damping: :math:`\lambda`; the authors use 1e-5 and 1e-4.
        weight_decay: :math:`w`.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        compressor: PowerSGD with its rank; by default 4.
        residual: :math:`Q`, the format of what is not sent; a codec or its name. The authors
            keep it in ``"float32"``.
        window: how many rows are kept, and how. The authors' is ``Window(1024, "float32")``.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``window`` is traced
            (``optax.inject_hyperparams`` needs ``static_args``) or a part is of another class, or
            ``damping`` is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if ``damping`` is not positive, or ``residual`` is an unknown name or has no
            negative numbers; in ``update`` without ``params``, unless ``weight_decay`` is the
            number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import lowrank_mfac
        >>> from microadam_jax.compressors import power_sgd
        >>> params = {"w": jnp.zeros((64, 256))}
        >>> tx = lowrank_mfac(learning_rate=1e-3, compressor=power_sgd(rank=2))
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones((64, 256))}, state, params)

    Reference: Modoranu et al., EFCP (arXiv 2306.06098), Low-rank M-FAC.
    """
    return optax.chain(
        add_decayed_weights(weight_decay, mask),
        error_feedback(compressor, residual),
        scale_by_mfac(window, damping, compressor=compressor),
        scale_by_learning_rate(learning_rate),
    )


def sparse_ggt(
    learning_rate: ScalarOrSchedule,
    eps: ArrayLike = 1e-5,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    compressor: TopK = EVERY_LEAF,
    residual: Codec | str = "affine4",
    window: Window = Window(32),
) -> GradientTransformationExtraArgs:
    r"""Runs sparse GGT: full-matrix AdaGrad on a window of Top-K gradients, the rest fed back.

    With :math:`G_t` the window of the latest :math:`c`, a row each,

    .. math::

        a_t &= g_t + w\, \theta_t + Q^{-1}(e_t), \qquad c_t = \mathrm{TopK}(a_t), \qquad
            e_{t+1} = Q(a_t - c_t) \\
        u_t &= \left[ (G_t^\top G_t)^{1/2} + \epsilon I \right]^{-1} c_t \\
        \theta_{t+1} &= \theta_t - \eta_t u_t

    Weight decay is coupled, as in the authors' code: it is added to the gradient.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        eps: :math:`\epsilon`.
        weight_decay: :math:`w`.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        compressor: :math:`\mathrm{TopK}`; by default 3 of each 256 elements.
        residual: :math:`Q`, the format of what is not sent; a codec or its name.
        window: how many rows are kept, and how. The authors keep 100.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``window`` is traced
            (``optax.inject_hyperparams`` needs ``static_args``) or a part is of another class, or
            ``eps`` is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if ``eps`` is not positive, ``residual`` is an unknown name or has no negative
            numbers, or the window is normalized; in ``update`` without ``params``, unless
            ``weight_decay`` is the number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import sparse_ggt
        >>> params = {"w": jnp.zeros((64, 256))}
        >>> tx = sparse_ggt(learning_rate=1e-2)
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones((64, 256))}, state, params)

    Reference: Modoranu et al., EFCP (arXiv 2306.06098), Sparse GGT.
    """
    return optax.chain(
        add_decayed_weights(weight_decay, mask),
        error_feedback(compressor, residual),
        scale_by_ggt(window, eps, compressor=compressor),
        scale_by_learning_rate(learning_rate),
    )


def mfac(
    learning_rate: ScalarOrSchedule,
    damping: ArrayLike = 1e-5,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    window: Window = Window(32, dtype="float32"),
) -> GradientTransformationExtraArgs:
    r"""Runs M-FAC: the inverse Fisher matrix of a window of whole gradients. For small models.

    .. math::

        a_t &= g_t + w\, \theta_t \\
        u_t &= \left[ \lambda I + \frac{1}{m} \sum_{r < \min(t, m)} a_{t-r} a_{t-r}^\top
            \right]^{-1} a_t \\
        \theta_{t+1} &= \theta_t - \eta_t u_t

    It keeps :math:`4 m` bytes per parameter, 128 by default and 4096 for the published window.
    :func:`sparse_mfac` and :func:`lowrank_mfac` compress it.

    Weight decay is coupled, as published: it is added to the gradient, enters the window and is
    preconditioned too.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        damping: :math:`\lambda`.
        weight_decay: :math:`w`.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        window: how many rows are kept, and how. The authors keep 1024.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``window`` is traced
            (``optax.inject_hyperparams`` needs ``static_args``) or of another class, or ``damping``
            is an array in fewer bits than float32; in ``init``, if a leaf is not a floating-point
            array.
        ValueError: if ``damping`` is not positive; in ``update`` without ``params``, unless
            ``weight_decay`` is the number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import mfac
        >>> params = {"w": jnp.zeros((8, 4))}
        >>> tx = mfac(learning_rate=1e-3)
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones((8, 4))}, state, params)

    Reference: Frantar et al., M-FAC (arXiv 2107.03356).
    """
    return optax.chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_mfac(window, damping),
        scale_by_learning_rate(learning_rate),
    )
