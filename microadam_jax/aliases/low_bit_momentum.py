"""Optimizers that keep a momentum alone, in few bits."""

import jax
import optax
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.codecs import Codec, Storage, dynamic4, linear2
from microadam_jax.engine.descent import descend
from microadam_jax.engine.transformation import require_hyperparameters
from microadam_jax.subspace import OUTPUT_HEAD, Matrices
from microadam_jax.transforms import quantize_state, scale_by_sinkhorn
from microadam_jax.transforms.decay import Mask


def lion4bit(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    weight_decay: float | jax.Array = 1e-3,
    mask: Mask = None,
    *,
    mu_codec: Storage | Codec | str = dynamic4(rounding="stochastic"),
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs Lion with its momentum in 4 bits: 0.53 bytes per parameter.

    With the codec :math:`Q`,

    .. math::

        u_t &= \operatorname{sign}\bigl(\beta_1 Q^{-1}(\tilde m_{t-1}) + (1 - \beta_1)\, g_t\bigr)
            \\
        \theta_{t+1} &= \theta_t - \eta_t (u_t + \lambda \theta_t), \qquad
        \tilde m_t = Q\bigl(\beta_2 Q^{-1}(\tilde m_{t-1}) + (1 - \beta_2)\, g_t\bigr)

    Every element moves by the learning rate, so take a third to a tenth of AdamW's and as much
    more weight decay. Rounding is stochastic: a hundredth of a gradient is less than half a step
    between two levels, and rounded to nearest would be lost.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        mu_codec: stores :math:`m`; a :class:`Storage` excepts leaves by path or size.
        seed: of a codec that rounds stochastically.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a decay rate is an array
            in fewer bits than float32, ``weight_decay`` is a schedule, or ``mu_codec`` is of
            another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1), or ``mu_codec`` is an unknown name or has no
            negative numbers; in ``update`` without ``params``, unless ``weight_decay`` is the
            number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import lion4bit, memory_report
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(lion4bit(1e-4), params).bytes_per_parameter, 3)
        0.531

    Reference: Chen et al., Lion (arXiv 2302.06675); Li et al., 4-bit optimizers (arXiv 2309.01507).
    """
    require_hyperparameters(b1=b1, b2=b2)
    link = quantize_state(
        optax.scale_by_lion(b1, b2), {"mu": mu_codec}, elementwise=True, seed=seed
    )
    return descend(link, learning_rate=learning_rate, weight_decay=weight_decay, mask=mask)


def sinkhorn4bit(
    learning_rate: ScalarOrSchedule,
    beta: ArrayLike = 0.95,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    consistent_rms: ArrayLike = 0.2,
    matrices: Matrices = Matrices(exclude=OUTPUT_HEAD),
    mu_codec: Storage | Codec | str = dynamic4(rounding="stochastic"),
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Balances rows and columns of a momentum in 4 bits, Adam-mini on all else: 0.53 bytes.

    With :math:`u_t` of :func:`scale_by_sinkhorn`, whose momentum is stored through a codec
    :math:`Q`,

    .. math::

        \theta_{t+1} = \theta_t - \eta_t (u_t + \lambda \theta_t), \qquad
        \tilde m_t = Q\bigl(\beta Q^{-1}(\tilde m_{t-1}) + (1 - \beta)\, g_t\bigr)

    Take AdamW's learning rate and decay: ``consistent_rms`` gives updates of matrices the size of
    AdamW's. Rows and columns are scaled and nothing is orthogonalized, so that noise of the small
    singular values stays small, which Muon's polynomial amplifies.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule, for all parameters.
        beta: :math:`\beta`, in [0, 1): the decay of a matrix's momentum.
        b1: the decay of other parameters' first moment, in [0, 1).
        b2: the decay of other parameters' second moment, in [0, 1).
        eps: beside the root mean squares of rows and columns, and in Adam-mini's denominator. A
            matrix of small gradients moves as far as one of large.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        consistent_rms: the root mean square of a matrix's update.
        matrices: which parameters are matrices: by default all linear maps but the output head.
            Yours need ``exclude=OUTPUT_HEAD``, of ``microadam_jax.subspace``, for the same.
        mu_codec: stores :math:`m`; a :class:`Storage` excepts leaves by path or size.
        seed: of a codec that rounds stochastically.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or ``matrices`` or ``mu_codec``
            is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_codec`` is an
            unknown name or has no negative numbers; in ``update`` without ``params``, unless
            ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import memory_report, sinkhorn4bit
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(sinkhorn4bit(1e-3), params).bytes_per_parameter, 3)
        0.531

    Reference: Scetbon et al., Gradient multi-normalization (arXiv 2502.06742), which has no
        momentum; Li et al., 4-bit optimizers (arXiv 2309.01507).
    """
    link = scale_by_sinkhorn(
        beta,
        b1,
        b2,
        eps,
        consistent_rms=consistent_rms,
        matrices=matrices,
        mu_codec=mu_codec,
        seed=seed,
    )
    return descend(link, learning_rate=learning_rate, weight_decay=weight_decay, mask=mask)


def sinkhorn2bit(
    learning_rate: ScalarOrSchedule,
    beta: ArrayLike = 0.9,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    consistent_rms: ArrayLike = 0.2,
    matrices: Matrices = Matrices(exclude=OUTPUT_HEAD),
    mu_codec: Storage | Codec | str = linear2(rounding="stochastic"),
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Balances rows and columns of a momentum in 2 bits, Adam-mini on all else: 0.27 bytes.

    It is :func:`sinkhorn4bit` with another codec :math:`Q` and a shorter memory:

    .. math::

        \theta_{t+1} = \theta_t - \eta_t (u_t + \lambda \theta_t), \qquad
        \tilde m_t = Q\bigl(\beta Q^{-1}(\tilde m_{t-1}) + (1 - \beta)\, g_t\bigr)

    Rounding adds a sixth of the momentum's mean square in each step, which is forgotten as the
    momentum is; above :math:`\beta = 0.926` it would grow without end. A column without gradients
    whose rows have some moves at random, as :func:`linear2` has no zero.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule, for all parameters.
        beta: :math:`\beta`, in [0, 1): the decay of a matrix's momentum.
        b1: the decay of other parameters' first moment, in [0, 1).
        b2: the decay of other parameters' second moment, in [0, 1).
        eps: beside the root mean squares of rows and columns, and in Adam-mini's denominator. A
            matrix of small gradients moves as far as one of large.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        consistent_rms: the root mean square of a matrix's update.
        matrices: which parameters are matrices: by default all linear maps but the output head.
            Yours need ``exclude=OUTPUT_HEAD``, of ``microadam_jax.subspace``, for the same.
        mu_codec: stores :math:`m`; a :class:`Storage` excepts leaves by path or size.
        seed: of a codec that rounds stochastically.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or ``matrices`` or ``mu_codec``
            is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_codec`` is an
            unknown name or has no negative numbers; in ``update`` without ``params``, unless
            ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import memory_report, sinkhorn2bit
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(sinkhorn2bit(1e-3), params).bytes_per_parameter, 3)
        0.266

    Reference: Scetbon et al., Gradient multi-normalization (arXiv 2502.06742), which has no
        momentum.
    """
    return sinkhorn4bit(
        learning_rate,
        beta,
        b1,
        b2,
        eps,
        weight_decay,
        mask,
        consistent_rms=consistent_rms,
        matrices=matrices,
        mu_codec=mu_codec,
        seed=seed,
    )
