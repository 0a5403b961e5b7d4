"""GaLore, and what scales the rest of the gradient as it scales the subspace: Fira, APOLLO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.subspace import (
    OUTPUT_HEAD,
    Complement,
    Discard,
    Matrices,
    NormMatchedRest,
    Refresh,
    ScaledGradient,
    Subspace,
    gaussian,
    of_rank,
    refresh_every,
    svd,
)
from microadam_jax.transforms import (
    correct_bias,
    decay_updated_weights,
    project_gradients,
    scale_by_uncorrected_adam,
)
from microadam_jax.transforms.decay import Mask, scale_by_learning_rate

HIDDEN = Matrices(exclude=OUTPUT_HEAD)  # all linear maps but the last, as most papers have it


def galore(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    scale: ArrayLike = 0.25,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    rank: int = 128,
    update_interval: int | Refresh = 200,
    subspace: Subspace | None = None,
    complement: Complement = Discard(),
    matrices: Matrices = HIDDEN,
) -> GradientTransformationExtraArgs:
    r"""Runs GaLore: Adam in the leading singular subspace of each gradient matrix.

    With the basis :math:`P`, renewed every :math:`T` steps, and :math:`R_t = P^T G_t`,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) R_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) R_t^2 \\
        \theta_{t+1} &= (1 - \eta_t \lambda) \left( \theta_t - \eta_t \alpha
            \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} P \frac{m_t}{\sqrt{v_t} + \epsilon} \right)

    It is the chain of :func:`project_gradients` around :func:`scale_by_uncorrected_adam`,
    :func:`correct_bias` and decay of the updated weights. Embeddings, norms, biases and the
    output head keep Adam, as published. The moments are kept as they are when the basis changes.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule; 0.01 in the paper's pre-training.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the uncorrected root; the released code's, the paper has 1e-8.
        scale: :math:`\alpha`, of projected matrices.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        rank: :math:`r`, or the smaller side of a matrix if that is less.
        update_interval: :math:`T` in steps; or a :class:`Refresh`, which also says what becomes
            of the moments, which are kept otherwise.
        subspace: finds :math:`P` in another way, with a rank of its own, as
            ``randomized_svd(64)`` does; None for ``svd(rank)``.
        complement: what is done with the rest of the gradient; nothing in GaLore.
        matrices: which parameters are projected; the smaller side is compressed.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``subspace``,
            ``complement`` or ``matrices`` is of another class, ``weight_decay`` is a schedule, or a
            decay rate is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``rank`` or
            ``update_interval`` is not a positive integer (``optax.inject_hyperparams`` needs
            ``static_args=("rank", "update_interval")``), or ``rank`` is not that of ``subspace``;
            in ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import galore, memory_report
        >>> params = {"mlp": {"kernel": jax.ShapeDtypeStruct((1024, 1024), "bfloat16")}}
        >>> report = memory_report(galore(1e-2, rank=256), params)
        >>> round(report.bytes_per_parameter, 2)  # (2 r n + r n) / n^2 float32 numbers
        3.0

    Reference: Zhao et al., GaLore (ICML 2024, arXiv 2403.03507), Algorithm 2.
    """
    return optax.chain(
        project_gradients(
            scale_by_uncorrected_adam(b1, b2, eps),
            of_rank(rank, subspace, svd(128)),
            refresh_every(update_interval, Refresh()),
            complement,
            scale=scale,
            matrices=matrices,
            b1=b1,
            b2=b2,
        ),
        correct_bias(b1, b2),
        scale_by_learning_rate(learning_rate),
        decay_updated_weights(learning_rate, weight_decay, mask),
    )


def fira(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    scale: ArrayLike = 0.25,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    rank: int = 128,
    update_interval: int | Refresh = 200,
    subspace: Subspace | None = None,
    complement: Complement = NormMatchedRest(),
    matrices: Matrices = HIDDEN,
) -> GradientTransformationExtraArgs:
    r"""Runs Fira: GaLore, and what it misses, scaled as Adam scaled the subspace.

    With :math:`N_t = m_t / (\sqrt{v_t} + \epsilon)` in the subspace and, for each column,
    :math:`\phi = \lVert N_t \rVert / (\lVert R_t \rVert + 10^{-8})`,

    .. math::

        S_t &= \mathrm{limit}\bigl(\phi \circ (G_t - \alpha P R_t)\bigr) \\
        \theta_{t+1} &= (1 - \eta_t \lambda) \left( \theta_t - \eta_t
            \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} (\alpha P N_t + S_t) \right)

    where limit shortens a matrix to 1.01 times its last length. It is :func:`galore` with another
    complement, and keeps one more number for each matrix.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule; 0.01 in the paper's pre-training.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the uncorrected root.
        scale: :math:`\alpha`; 0.25, and 0.0625 in the paper's largest models.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        rank: :math:`r`, or the smaller side of a matrix if that is less.
        update_interval: steps between bases; or a :class:`Refresh`, which also says what becomes
            of the moments, which are kept otherwise.
        subspace: finds :math:`P` in another way, with a rank of its own, as
            ``randomized_svd(64)`` does; None for ``svd(rank)``.
        complement: what is done with the rest of the gradient.
        matrices: which parameters are projected; the smaller side is compressed.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``subspace``,
            ``complement`` or ``matrices`` is of another class, ``weight_decay`` is a schedule, or a
            decay rate is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``rank`` or
            ``update_interval`` is not a positive integer (``optax.inject_hyperparams`` needs
            ``static_args=("rank", "update_interval")``), or ``rank`` is not that of ``subspace``;
            in ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import fira
        >>> tx = fira(1e-2, rank=2)
        >>> state = tx.init({"kernel": jnp.zeros((8, 4))})
        >>> state[0].complement.previous_norm["kernel"].shape
        (1, 1)

    Reference: Chen et al., Fira (NeurIPS 2025).
    """
    return galore(
        learning_rate,
        b1,
        b2,
        eps,
        scale,
        weight_decay,
        mask,
        rank=rank,
        update_interval=update_interval,
        subspace=subspace,
        complement=complement,
        matrices=matrices,
    )


def apollo(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    scale: ArrayLike = 1.0,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    rank: int = 256,
    update_interval: int | Refresh = 200,
    subspace: Subspace | None = None,
    complement: Complement = ScaledGradient(),
    matrices: Matrices = HIDDEN,
) -> GradientTransformationExtraArgs:
    r"""Runs APOLLO: each column of a gradient, scaled as Adam would scale a random projection.

    With normal numbers :math:`P` of variance :math:`1/r`, drawn anew every :math:`T` steps,
    :math:`R_t = P^T G_t` and its :math:`N_t = m_t / (\sqrt{v_t} + \epsilon)`,

    .. math::

        \phi &= \lVert N_t \rVert / (\lVert R_t \rVert + 10^{-8}) \text{ of each column} \\
        \theta_{t+1} &= (1 - \eta_t \lambda) \left( \theta_t - \eta_t
            \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \sqrt{s}\; \mathrm{limit}(\phi \circ G_t) \right)

    where limit shortens a matrix to 1.01 times its last length. The basis is drawn from its seed
    in every step and takes no memory. Derived from the paper's formulas alone.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule; 0.01 in the paper's pre-training.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the uncorrected root.
        scale: :math:`s`.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        rank: :math:`r`; a quarter of a model's width in the paper.
        update_interval: :math:`T` in steps; or a :class:`Refresh`, which also says what becomes
            of the moments, which are kept otherwise.
        subspace: draws :math:`P` in another way, with a rank of its own; None for
            ``gaussian(rank)``.
        complement: how the gradient is scaled.
        matrices: which parameters are projected; the smaller side is compressed.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``subspace``,
            ``complement`` or ``matrices`` is of another class, ``weight_decay`` is a schedule, or a
            decay rate is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``rank`` or
            ``update_interval`` is not a positive integer (``optax.inject_hyperparams`` needs
            ``static_args=("rank", "update_interval")``), or ``rank`` is not that of ``subspace``;
            in ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import apollo, memory_report
        >>> params = {"mlp": {"kernel": jax.ShapeDtypeStruct((1024, 1024), "bfloat16")}}
        >>> report = memory_report(apollo(1e-2, rank=256), params)
        >>> round(report.bytes_per_parameter, 2)  # no basis
        2.0

    Reference: Zhu et al., APOLLO (MLSys 2025, arXiv 2412.05270).
    """
    # A number stays one of Python: a JAX array would belong to the mesh or the trace around this.
    root = (
        jnp.sqrt(scale) if isinstance(scale, jax.Array) else np.sqrt(np.asarray(scale, np.float32))
    )
    return galore(
        learning_rate,
        b1,
        b2,
        eps,
        root,
        weight_decay,
        mask,
        update_interval=update_interval,
        subspace=of_rank(rank, subspace, gaussian(256)),
        complement=complement,
        matrices=matrices,
    )


def apollo_mini(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    scale: ArrayLike = 128.0,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    update_interval: int | Refresh = 200,
    subspace: Subspace | None = None,
    matrices: Matrices = HIDDEN,
) -> GradientTransformationExtraArgs:
    r"""Runs APOLLO-Mini: each gradient matrix, scaled as Adam would scale one random projection.

    It is :func:`apollo` with rank 1, one :math:`\phi` for the whole matrix and a larger
    :math:`s`; see there.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule; 0.01 in the paper's pre-training.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the uncorrected root.
        scale: :math:`s`.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        update_interval: :math:`T` in steps; or a :class:`Refresh`, which also says what becomes
            of the moments, which are kept otherwise.
        subspace: draws :math:`P` in another way; None for ``gaussian(1)``.
        matrices: which parameters are projected; the smaller side is compressed.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``subspace`` or
            ``matrices`` is of another class, ``weight_decay`` is a schedule, or a decay rate is an
            array in fewer bits than float32; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``update_interval``
            is not a positive integer (``optax.inject_hyperparams`` needs
            ``static_args=("update_interval",)``); in ``update`` without ``params``, unless
            ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import apollo_mini, memory_report
        >>> params = {"mlp": {"kernel": jax.ShapeDtypeStruct((1024, 1024), "bfloat16")}}
        >>> round(memory_report(apollo_mini(1e-2), params).bytes_per_parameter, 3)
        0.008

    Reference: Zhu et al., APOLLO (MLSys 2025, arXiv 2412.05270).
    """
    return apollo(
        learning_rate,
        b1,
        b2,
        eps,
        scale,
        weight_decay,
        mask,
        update_interval=update_interval,
        subspace=of_rank(1, subspace, gaussian(1)),
        complement=ScaledGradient(whole=True),
        matrices=matrices,
    )
