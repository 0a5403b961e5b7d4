"""Optimizers whose second moments many parameters share."""

import jax
import optax
from jax.typing import ArrayLike, DTypeLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.codecs import Codec, Storage
from microadam_jax.engine.descent import descend
from microadam_jax.layout.partition import Partition
from microadam_jax.layout.subsets import Subsets
from microadam_jax.transforms import (
    decay_updated_weights,
    scale_by_adam_mini,
    scale_by_came,
    scale_by_subset_norm,
)
from microadam_jax.transforms.decay import Mask, add_decayed_weights, scale_by_learning_rate


def adam_mini(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    partition: Partition | None = None,
    mu_dtype: DTypeLike = "float32",
    mu_codec: Storage | Codec | str | None = None,
    seed: ArrayLike = 0,
) -> GradientTransformationExtraArgs:
    r"""Runs Adam-mini: AdamW with one second moment for each block of parameters.

    With :math:`B(i)` the block of parameter :math:`i`,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_{t,B} &= \beta_2 v_{t-1,B} + (1 - \beta_2)\,
            \frac{1}{|B|} \sum_{i \in B} g_{t,i}^2 \\
        \theta_{t+1,i} &= \theta_{t,i} - \eta_t \left( \frac{m_{t,i} / (1 - \beta_1^t)}
            {\sqrt{v_{t,B(i)} / (1 - \beta_2^t)} + \epsilon} + \lambda \theta_{t,i} \right)

    It is the chain of :func:`scale_by_adam_mini` and decoupled weight decay. Take AdamW's
    settings. The released code spares biases and norms the decay; ``mask`` does that here.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, outside the root and after the bias correction.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        partition: what the blocks are; None stands for ``Partition()``, the names of
            :func:`transformer_rules`. Look at them with :func:`explain_partition`.
        mu_dtype: the dtype in which :math:`m` is kept; :math:`v` is always float32.
        mu_codec: stores :math:`m / \sqrt v` through a codec instead; see :func:`adam_mini4bit`.
        seed: of a codec that rounds stochastically.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or ``partition`` or
            ``mu_codec`` is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``mu_dtype`` is not a
            floating dtype, or ``mu_codec`` is an unknown name or has no negative numbers; in
            ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> from microadam_jax import Partition, adam_mini, memory_report
        >>> from microadam_jax.models import model_shapes
        >>> from microadam_jax.layout.names import transformer_rules
        >>> tx = adam_mini(1e-3, partition=Partition(transformer_rules(heads=32)))
        >>> round(memory_report(tx, model_shapes("llama2-7b")).total / 1e9, 2)  # gigabytes
        26.96

    Reference: Zhang et al., Adam-mini (ICLR 2025, arXiv 2406.16793), Algorithm 1.
    """
    link = scale_by_adam_mini(
        b1, b2, eps, partition=partition, mu_dtype=mu_dtype, mu_codec=mu_codec, seed=seed
    )
    return descend(link, learning_rate=learning_rate, weight_decay=weight_decay, mask=mask)


def adam_sn(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    subsets: Subsets = Subsets(),
    partition: Partition | None = None,
    mu_dtype: DTypeLike = "float32",
) -> GradientTransformationExtraArgs:
    r"""Runs Adam with subset norms: each gradient element over the norm of its subset.

    With :math:`S(i)` the subset of parameter :math:`i`,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_{t,S} &= \beta_2 v_{t-1,S} + (1 - \beta_2) \sum_{i \in S} g_{t,i}^2 \\
        \theta_{t+1,i} &= (1 - \eta_t \lambda) \left( \theta_{t,i}
            - \eta_t \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \cdot \frac{m_{t,i}}{\sqrt{v_{t,S(i)}} + \epsilon} \right)

    It is the chain of :func:`scale_by_subset_norm` and :func:`decay_updated_weights`. The
    denominator is a sum and about the root of the subset's size larger than Adam's, so its
    authors use ten times Adam's learning rate; scale the weight decay down accordingly.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the uncorrected root.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        subsets: what the subsets are, and whether squares are summed or averaged.
        partition: which parameters are linear maps; None stands for ``Partition()``, the names
            of :func:`transformer_rules`. Others share nothing.
        mu_dtype: the dtype in which :math:`m` is kept; :math:`v` is always float32.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or ``subsets`` or ``partition``
            is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_dtype`` is not
            a floating dtype; in ``update`` without ``params``, unless ``weight_decay`` is the
            number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import adam_sn
        >>> params = {"kernel": jnp.zeros((64, 32))}
        >>> adam_sn(1e-2).init(params)[0].nu["kernel"].shape  # one for each of 64 inputs
        (64, 1)

    Reference: Nguyen and Nguyen, subset-norm (ICML 2025, arXiv 2411.07120), AdamSN.
    """
    return optax.chain(
        scale_by_subset_norm(b1, b2, eps, subsets=subsets, partition=partition, mu_dtype=mu_dtype),
        scale_by_learning_rate(learning_rate),
        decay_updated_weights(learning_rate, weight_decay, mask),
    )


def adagrad_sn(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    eps: ArrayLike = 1e-6,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    subsets: Subsets = Subsets(),
    partition: Partition | None = None,
    mu_dtype: DTypeLike = "float32",
) -> GradientTransformationExtraArgs:
    r"""Runs AdaGrad with subset norms and momentum.

    With :math:`S(i)` the subset of parameter :math:`i`,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_{t,S} &= v_{t-1,S} + \sum_{i \in S} g_{t,i}^2 \\
        \theta_{t+1,i} &= (1 - \eta_t \lambda) \left( \theta_{t,i}
            - \eta_t \frac{m_{t,i}}{\sqrt{v_{t,S(i)}} + \epsilon} \right)

    It is the chain of :func:`scale_by_subset_norm` and :func:`decay_updated_weights`.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule; of the order of 1.
        b1: :math:`\beta_1`, in [0, 1).
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        subsets: what the subsets are, and whether squares are summed or averaged.
        partition: which parameters are linear maps; None stands for ``Partition()``, the names
            of :func:`transformer_rules`. Others share nothing.
        mu_dtype: the dtype in which :math:`m` is kept; :math:`v` is always float32.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a number is an array in
            fewer bits than float32, ``weight_decay`` is a schedule, or ``subsets`` or ``partition``
            is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_dtype`` is not
            a floating dtype; in ``update`` without ``params``, unless ``weight_decay`` is the
            number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import adagrad_sn
        >>> from microadam_jax.layout.subsets import Subsets
        >>> params = {"kernel": jnp.zeros((64, 32)), "scale": jnp.zeros(30)}
        >>> tx = adagrad_sn(1.0, subsets=Subsets("runs", size=8))
        >>> state = tx.init(params)[0]
        >>> state.nu["kernel"].shape, state.nu["scale"].shape  # 6 is the next divisor of 30
        ((64, 4), (5,))

    Reference: Nguyen and Nguyen, subset-norm (ICML 2025, arXiv 2411.07120), AdaGrad-SN.
    """
    return optax.chain(
        scale_by_subset_norm(
            b1, None, eps, subsets=subsets, partition=partition, mu_dtype=mu_dtype
        ),
        scale_by_learning_rate(learning_rate),
        decay_updated_weights(learning_rate, weight_decay, mask),
    )


def came(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    b3: ArrayLike = 0.9999,
    eps: ArrayLike = 1e-30,
    instability_eps: ArrayLike = 1e-16,
    clip_threshold: ArrayLike = 1.0,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    partition: Partition | None = None,
    mu_dtype: DTypeLike = "float32",
) -> GradientTransformationExtraArgs:
    r"""Runs CAME: a momentum divided by factored second moments of gradient and instability.

    With the factored update :math:`m_t / \sqrt{R_t C_t / \bar R_t}` of :func:`scale_by_came`,

    .. math::

        \theta_{t+1} = \theta_t - \eta_t \left(
            \frac{m_t}{\sqrt{R_t C_t / \bar R_t}} + \lambda \theta_t \right)

    Its first updates are 11 times the learning rate per element with the default
    :math:`\beta_3`, and larger where gradients keep their direction: warm up, and take half to
    nine tenths of AdamW's learning rate.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, of the momentum, in (0, 1).
        b2: :math:`\beta_2`, of the squared gradients, in [0, 1).
        b3: :math:`\beta_3`, of the instability, in [0, 1).
        eps: :math:`\epsilon_1`, added to squared gradients.
        instability_eps: :math:`\epsilon_2`, added to squared deviations.
        clip_threshold: the largest root mean square of a parameter's update before its momentum
            and its division by the instability, which may make it larger.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        partition: which parameters are linear maps, and between which axes; see
            :func:`scale_by_came`.
        mu_dtype: the dtype in which the momentum is kept; all else is float32.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, a decay rate or an
            epsilon is an array in fewer bits than float32, or ``partition`` is of another class; in
            ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``b1`` is a number
            outside (0, 1), or ``mu_dtype`` is not a floating dtype; in ``update`` without
            ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import came, memory_report
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> round(memory_report(came(1e-4), params).bytes_per_parameter, 4)
        4.0039

    Reference: Luo et al., CAME (ACL 2023, arXiv 2307.02047), Algorithm 2.
    """
    return optax.chain(
        scale_by_came(
            b1, b2, b3, eps, instability_eps, clip_threshold, partition=partition, mu_dtype=mu_dtype
        ),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
