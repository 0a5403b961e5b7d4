"""Adam-minis whose first moment takes few bits."""

import jax
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.aliases.shared_moments import adam_mini
from microadam_jax.codecs import Codec, Storage, dynamic4, dynamic8
from microadam_jax.layout.partition import Partition
from microadam_jax.transforms.decay import Mask


def adam_mini8bit(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    partition: Partition | None = None,
    mu_codec: Storage | Codec | str = dynamic8(rounding="stochastic"),
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs Adam-mini with its first moment in 8 bits: 1.02 bytes per parameter.

    It is :func:`adam_mini` with its first moment stored through a codec :math:`Q`:

    .. math::

        m_t = \beta_1 \sqrt{v_{t-1}}\, Q^{-1}(\tilde m_{t-1}) + (1 - \beta_1)\, g_t, \qquad
        \tilde m_t = Q(m_t / \sqrt{v_t})

    Over the roots of the second moments, neighbours that share a scale are of one size. The outputs
    of a head for rare tokens would else get the rounding noise of frequent ones, over roots of
    their own.

    Rounded to nearest, a small moment beside large ones never decays, and the step of an element
    without any more gradient grows as its second moment vanishes; so it is rounded
    stochastically.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        partition: what the blocks of the second moment are; see :func:`adam_mini`.
        mu_codec: how :math:`m` is stored; a :class:`Storage` excepts leaves by path or size.
        seed: of a codec that rounds stochastically.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or ``partition`` or
            ``mu_codec`` is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_codec`` is an
            unknown name or has no negative numbers; in ``update`` without ``params``, unless
            ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import adam_mini8bit, memory_report
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(adam_mini8bit(1e-3), params).bytes_per_parameter, 3)
        1.017

    Reference: Zhang et al., Adam-mini (arXiv 2406.16793); Dettmers et al. (arXiv 2110.02861).
    """
    return adam_mini(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        mask,
        partition=partition,
        mu_codec=mu_codec,
        seed=seed,
    )


def adam_mini4bit(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    partition: Partition | None = None,
    mu_codec: Storage | Codec | str = dynamic4(rounding="stochastic"),
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs Adam-mini with its first moment in 4 bits: 0.53 bytes per parameter.

    It is :func:`adam_mini` with its first moment stored through a codec :math:`Q`:

    .. math::

        m_t = \beta_1 \sqrt{v_{t-1}}\, Q^{-1}(\tilde m_{t-1}) + (1 - \beta_1)\, g_t, \qquad
        \tilde m_t = Q(m_t / \sqrt{v_t})

    Over the roots of the second moments, neighbours that share a scale are of one size. The outputs
    of a head for rare tokens would else get the rounding noise of frequent ones, over roots of
    their own.

    Rounding is stochastic: rounded to nearest, changes smaller than half a step are lost.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        partition: what the blocks of the second moment are; see :func:`adam_mini`.
        mu_codec: how :math:`m` is stored; a :class:`Storage` excepts leaves by path or size.
        seed: of a codec that rounds stochastically.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or ``partition`` or
            ``mu_codec`` is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_codec`` is an
            unknown name or has no negative numbers; in ``update`` without ``params``, unless
            ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import adam_mini4bit, memory_report
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(adam_mini4bit(1e-3), params).bytes_per_parameter, 3)
        0.532

    Reference: Zhang et al., Adam-mini (arXiv 2406.16793); Li et al. (arXiv 2309.01507).
    """
    return adam_mini(
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        mask,
        partition=partition,
        mu_codec=mu_codec,
        seed=seed,
    )
