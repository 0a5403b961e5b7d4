"""Muon with its momentum in few bits."""

import jax
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.codecs import Codec, Storage, dynamic8, int4, linear2
from microadam_jax.engine.descent import descend
from microadam_jax.subspace import OUTPUT_HEAD, Matrices
from microadam_jax.transforms import scale_by_muon
from microadam_jax.transforms.decay import Mask


def muon8bit(
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
    mu_codec: Storage | Codec | str = dynamic8(rounding="stochastic"),
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs Muon on matrices and Adam-mini on all else, momentum in 8 bits: 1.02 bytes.

    With :math:`u_t` of :func:`scale_by_muon`, whose momentum is stored through a codec :math:`Q`,

    .. math::

        \theta_{t+1} = \theta_t - \eta_t (u_t + \lambda \theta_t), \qquad
        \tilde m_t = Q\bigl(\beta Q^{-1}(\tilde m_{t-1}) + (1 - \beta)\, g_t\bigr)

    Updates of matrices have the size of AdamW's, by ``consistent_rms``: its learning rate and decay
    are safe, and two to four times the rate ends lower in ``benchmarks/frontier.py``.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule, for all parameters.
        beta: :math:`\beta`, in [0, 1): the decay of a matrix's momentum.
        b1: the decay of other parameters' first moment, in [0, 1).
        b2: the decay of other parameters' second moment, in [0, 1).
        eps: beside the norm of a matrix, and in Adam-mini's denominator.
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
        >>> from microadam_jax import memory_report, muon8bit
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(muon8bit(1e-3), params).bytes_per_parameter, 3)
        1.016

    Reference: Jordan et al., Muon (2024); Liu et al., Muon is scalable for LLM training (arXiv
        2502.16982); in 8 bits: arXiv 2509.23106.
    """
    link = scale_by_muon(
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


def muon4bit(
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
    mu_codec: Storage | Codec | str = int4(rounding="stochastic"),
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs Muon on matrices and Adam-mini on all else, momentum in 4 bits: 0.53 bytes.

    It is :func:`muon8bit` with another codec :math:`Q` and a shorter memory:

    .. math::

        \theta_{t+1} = \theta_t - \eta_t (u_t + \lambda \theta_t), \qquad
        \tilde m_t = Q\bigl(\beta Q^{-1}(\tilde m_{t-1}) + (1 - \beta)\, g_t\bigr)

    The polynomial brings small singular values of a momentum near 1, and with them the noise of
    rounding. So the codec is one of little noise, evenly spaced and cut at two and a half root mean
    squares: a large number in a block does not coarsen all others.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule, for all parameters.
        beta: :math:`\beta`, in [0, 1): the decay of a matrix's momentum.
        b1: the decay of other parameters' first moment, in [0, 1).
        b2: the decay of other parameters' second moment, in [0, 1).
        eps: beside the norm of a matrix, and in Adam-mini's denominator.
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
        >>> from microadam_jax import memory_report, muon4bit
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(muon4bit(1e-3), params).bytes_per_parameter, 3)
        0.531

    Reference: Jordan et al., Muon (2024); Liu et al., Muon is scalable for LLM training (arXiv
        2502.16982). The codec is of this library; published ones split the momentum (MuonQ, arXiv
        2605.11396).
    """
    return muon8bit(
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


def muon2bit(
    learning_rate: ScalarOrSchedule,
    beta: ArrayLike = 0.8,
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
    r"""Runs Muon on matrices and Adam-mini on all else, momentum in 2 bits: 0.27 bytes.

    It is :func:`muon8bit` with another codec :math:`Q` and a shorter memory:

    .. math::

        \theta_{t+1} = \theta_t - \eta_t (u_t + \lambda \theta_t), \qquad
        \tilde m_t = Q\bigl(\beta Q^{-1}(\tilde m_{t-1}) + (1 - \beta)\, g_t\bigr)

    Rounding adds a sixth of the momentum's mean square in each step, which is forgotten as the
    momentum is, and above :math:`\beta = 0.926` would grow without end. A column without gradients
    whose rows have some moves at random, as :func:`linear2` has no zero.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule, for all parameters.
        beta: :math:`\beta`, in [0, 1): the decay of a matrix's momentum.
        b1: the decay of other parameters' first moment, in [0, 1).
        b2: the decay of other parameters' second moment, in [0, 1).
        eps: beside the norm of a matrix, and in Adam-mini's denominator.
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
        >>> from microadam_jax import memory_report, muon2bit
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(muon2bit(1e-3), params).bytes_per_parameter, 3)
        0.266

    Reference: Jordan et al., Muon (2024); Liu et al., Muon is scalable for LLM training (arXiv
        2502.16982). The codec is of this library.
    """
    return muon8bit(
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
