"""AdamWs whose state takes few bits."""

import jax
import optax
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.codecs import Codec, Storage, dynamic4, dynamic8
from microadam_jax.engine.descent import descend
from microadam_jax.engine.transformation import require_hyperparameters
from microadam_jax.layout.partition import Partition
from microadam_jax.transforms import quantize_state, scale_by_factored_adam
from microadam_jax.transforms.decay import Mask


def adamw8bit(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 1e-2,
    mask: Mask = None,
    *,
    mu_codec: Storage | Codec | str = dynamic8(keep_sign=True),
    nu_codec: Storage | Codec | str = dynamic8(signed=False, keep_sign=True),
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs AdamW with both moments in 8 bits on the dynamic exponent map.

    With the codecs :math:`Q_m` and :math:`Q_v`,

    .. math::

        m_t &= \beta_1 Q_m^{-1}(\tilde m_{t-1}) + (1 - \beta_1)\, g_t, \quad
        v_t = \beta_2 Q_v^{-1}(\tilde v_{t-1}) + (1 - \beta_2)\, g_t^2 \\
        \theta_{t+1} &= \theta_t - \eta_t \left( \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda \theta_t \right), \quad
        \tilde m_t = Q_m(m_t), \quad \tilde v_t = Q_v(v_t)

    As published, a second moment far below the largest of its block becomes zero, and the next
    step :math:`m_t / \epsilon`, as for embeddings of rare words. Here it becomes the smallest
    number above zero; ``nu_codec="dynamic8_unsigned"`` rounds as published.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        mu_codec: how :math:`m` is stored; a :class:`Storage` excepts leaves by path or size.
        nu_codec: how :math:`v` is stored.
        seed: of a codec that rounds stochastically.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or a codec is neither a codec
            nor a name; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, a codec's name is
            unknown, or ``mu_codec`` has no negative numbers; in ``update`` without ``params``,
            unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import adamw8bit, memory_report
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(adamw8bit(1e-3), params).bytes_per_parameter, 3)
        2.031

    Reference: Dettmers et al., 8-bit optimizers (arXiv 2110.02861).
    """
    return _adamw(learning_rate, b1, b2, eps, weight_decay, mask, mu_codec, nu_codec, seed)


def adamw4bit(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 1e-2,
    mask: Mask = None,
    *,
    mu_codec: Storage | Codec | str = dynamic4(rounding="stochastic"),
    nu_codec: Storage | Codec | str = "rank1_linear4",
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs AdamW with both moments in 4 bits, the second scaled by rows and columns.

    With the codecs :math:`Q_m` and :math:`Q_v`,

    .. math::

        m_t &= \beta_1 Q_m^{-1}(\tilde m_{t-1}) + (1 - \beta_1)\, g_t, \quad
        v_t = \beta_2 Q_v^{-1}(\tilde v_{t-1}) + (1 - \beta_2)\, g_t^2 \\
        \theta_{t+1} &= \theta_t - \eta_t \left( \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda \theta_t \right), \quad
        \tilde m_t = Q_m(m_t), \quad \tilde v_t = Q_v(v_t)

    The second moment of a sharded parameter needs its rows' and columns' maxima over devices;
    ``nu_codec="linear4_unsigned"``, the published variant with blocks, does not.

    Columns with gradients far below their neighbours', as a head has for rare tokens, get the
    rounding noise of those, and rows and columns give them a small second moment: with a 10,000th
    of the gradient they move 20 times as far as AdamW's. With a large vocabulary that is not tied
    to the embedding take ``nu_codec="linear4_unsigned"``, which moves them less, or
    :func:`adam_mini4bit`.

    The first moment is rounded stochastically. As published, it is rounded to nearest
    (``mu_codec="dynamic4"``): where gradients stay below a fortieth of the largest of their block
    it is then held at zero, and where they end, as those of a dead unit, it never decays, while the
    second moment does, so that the element runs away.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        mu_codec: how :math:`m` is stored; a :class:`Storage` excepts leaves by path or size.
        nu_codec: how :math:`v` is stored.
        seed: of a codec that rounds stochastically.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or a codec is neither a codec
            nor a name; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, a codec's name is
            unknown, or ``mu_codec`` has no negative numbers; in ``update`` without ``params``,
            unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import adamw4bit, memory_report
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(adamw4bit(1e-3), params).bytes_per_parameter, 3)
        1.033

    Reference: Li et al., 4-bit optimizers (arXiv 2309.01507).
    """
    return _adamw(learning_rate, b1, b2, eps, weight_decay, mask, mu_codec, nu_codec, seed)


def adamw_fp8(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 1e-2,
    mask: Mask = None,
    *,
    mu_codec: Storage | Codec | str = "e4m3_expanded",
    nu_codec: Storage | Codec | str = "e4m3_expanded",
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs AdamW with both moments in 8-bit floating point, each block's range expanded.

    With the codecs :math:`Q_m` and :math:`Q_v`,

    .. math::

        m_t &= \beta_1 Q_m^{-1}(\tilde m_{t-1}) + (1 - \beta_1)\, g_t, \quad
        v_t = \beta_2 Q_v^{-1}(\tilde v_{t-1}) + (1 - \beta_2)\, g_t^2 \\
        \theta_{t+1} &= \theta_t - \eta_t \left( \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda \theta_t \right), \quad
        \tilde m_t = Q_m(m_t), \quad \tilde v_t = Q_v(v_t)


    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        mu_codec: how :math:`m` is stored; a :class:`Storage` excepts leaves by path or size.
        nu_codec: how :math:`v` is stored.
        seed: of a codec that rounds stochastically.

    Returns:
        The optimizer.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or a codec is neither a codec
            nor a name; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, a codec's name is
            unknown, or ``mu_codec`` has no negative numbers; in ``update`` without ``params``,
            unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import adamw_fp8, memory_report
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(adamw_fp8(1e-3), params).bytes_per_parameter, 3)
        2.078

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 4.
    """
    return _adamw(learning_rate, b1, b2, eps, weight_decay, mask, mu_codec, nu_codec, seed)


def adamw4bit_factored(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 1e-2,
    mask: Mask = None,
    *,
    partition: Partition | None = None,
    mu_codec: Storage | Codec | str = dynamic4(rounding="stochastic"),
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs AdamW with a first moment in 4 bits and a factored second one.

    With the factors of :func:`scale_by_factored_adam`,

    .. math::

        \theta_{t+1} = \theta_t - \eta_t \left( \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{r_t c_t / (\bar r_t (1 - \beta_2^t))} + \epsilon} + \lambda \theta_t \right)

    The first moment is rounded stochastically, and not to nearest as published; see
    :func:`adamw4bit`.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        partition: which parameters are linear maps, and between which axes.
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
        >>> from microadam_jax import adamw4bit_factored, memory_report
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(adamw4bit_factored(1e-3), params).bytes_per_parameter, 3)
        0.533

    Reference: Li et al., 4-bit optimizers (arXiv 2309.01507), "4-bit Factor".
    """
    link = scale_by_factored_adam(b1, b2, eps, partition=partition, mu_codec=mu_codec, seed=seed)
    return descend(link, learning_rate=learning_rate, weight_decay=weight_decay, mask=mask)


def _adamw(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    weight_decay: float | jax.Array,
    mask: Mask,
    mu_codec: Storage | Codec | str,
    nu_codec: Storage | Codec | str,
    seed: ArrayLike,
) -> GradientTransformationExtraArgs:
    """AdamW with its moments stored through codecs."""
    require_hyperparameters(b1=b1, b2=b2, eps=eps)
    adam = optax.scale_by_adam(b1, b2, eps)  # pyrefly: ignore[bad-argument-type]
    codecs = {"mu": mu_codec, "nu": nu_codec}
    link = quantize_state(adam, codecs, elementwise=True, seed=seed)
    return descend(link, learning_rate=learning_rate, weight_decay=weight_decay, mask=mask)
