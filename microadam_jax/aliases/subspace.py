"""Subspaces of rows, of cosines, that move in every step, or with subset norms."""

import jax
import optax
from jax.typing import ArrayLike
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.aliases.galore import HIDDEN
from microadam_jax.engine.transformation import require_hyperparameters
from microadam_jax.layout.subsets import Subsets
from microadam_jax.subspace import (
    OUTPUT_HEAD,
    Complement,
    Discard,
    FeedBack,
    Matrices,
    Refresh,
    Subspace,
    dct_columns,
    of_rank,
    power_iteration,
    refresh_every,
    svd,
    top_k_rows,
)
from microadam_jax.transforms import (
    decay_updated_weights,
    project_gradients,
    scale_by_restartable_adam,
    subspace_momentum,
)
from microadam_jax.transforms.decay import Mask, add_decayed_weights, scale_by_learning_rate


def grass(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    scale: ArrayLike = 1.0,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    rank: int = 128,
    update_interval: int | Refresh = 200,
    subspace: Subspace | None = None,
    matrices: Matrices = HIDDEN,
) -> GradientTransformationExtraArgs:
    r"""Runs Grass: Adam on selected rows of each gradient matrix; the others wait.

    With the selected rows :math:`\sigma_j` and their weights :math:`\rho_j`, renewed every
    :math:`T` steps,

    .. math::

        R_{t,j} &= \rho_j G_{t,\sigma_j}, \qquad N_t = \mathrm{Adam}(R_t) \\
        \theta_{t+1,\sigma_j} &= \theta_{t,\sigma_j} - \eta_t \alpha \rho_j N_{t,j}
            - \eta_t \lambda \theta_{t,\sigma_j}

    and Adam starts anew with other rows, its bias correction too; all rows decay. No code of this
    method was ever released: scope, :math:`\epsilon` and the interval are GaLore's and Optax's.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the corrected root.
        scale: :math:`\alpha`, of projected matrices.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        rank: selected rows, or all of them if there are fewer.
        update_interval: :math:`T` in steps; or a :class:`Refresh`, which also says what becomes
            of the moments, which start anew otherwise.
        subspace: selects rows in another way, with a rank of its own: :func:`sampled_rows` or
            :func:`uniform_rows`; None for ``top_k_rows(rank)``.
        matrices: which parameters are projected. Rows are taken from the smaller side; with
            ``Matrices(side="larger")`` the state is smaller still.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``subspace`` or
            ``matrices`` is of another class, or a decay rate is an array in fewer bits than
            float32; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``rank`` or
            ``update_interval`` is not a positive integer (``optax.inject_hyperparams`` needs
            ``static_args=("rank", "update_interval")``), or ``rank`` is not that of ``subspace``;
            in ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import grass
        >>> from microadam_jax.subspace import sampled_rows
        >>> tx = grass(1e-2, subspace=sampled_rows(2))
        >>> state = tx.init({"kernel": jnp.zeros((4, 8))})
        >>> state[0].basis.indices["kernel"].shape, state[0].inner_state.mu["kernel"].shape
        ((2, 1), (2, 8))

    Reference: Muhamed et al., Grass (EMNLP 2024, arXiv 2406.17660).
    """
    return optax.chain(
        project_gradients(
            scale_by_restartable_adam(b1, b2, eps),
            of_rank(rank, subspace, top_k_rows(128)),
            refresh_every(update_interval, Refresh(moments="reset")),
            scale=scale,
            matrices=matrices,
            b1=b1,
            b2=b2,
        ),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def ldadam(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.908,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    rank: int = 16,
    update_interval: int | Refresh = 1,
    subspace: Subspace | None = None,
    complement: Complement = FeedBack(),
    matrices: Matrices = Matrices(square="out", exclude=OUTPUT_HEAD),
) -> GradientTransformationExtraArgs:
    r"""Runs LDAdam: Adam in a subspace that moves in every step, with moments that follow it.

    With the error :math:`E`, :math:`c_i = 1 - \beta_i^{t-1}` and :math:`Q = P_t^T P_{t-1}`,

    .. math::

        a &= G_t + E, \quad
            b = \rho P_{t-1} m / c_1 + (1 - \rho) a, \quad
            P_t = \mathrm{QR}(b\, (b^T P_{t-1})) \\
        E &\leftarrow a - P_t P_t^T a
            + \frac{\beta_1}{1 - \beta_1} (P_{t-1} m - P_t Q m) \\
        v &\leftarrow c_2 \left| (Q \circ Q) \left( \frac{v}{c_2} - \frac{m^2}{c_1^2} \right)
            + \frac{(Q m)^2}{c_1^2} \right|, \quad m \leftarrow Q m \\
        \theta_{t+1} &= \theta_t - \eta_t \bigl( P_t\,\mathrm{Adam}(P_t^T a) + \lambda \theta_t
            \bigr)

    The first basis is the leading singular subspace. Clip gradients before this, not after. The
    error takes as much memory as the parameters in float32: ``FeedBack(dtype="bfloat16")`` halves
    it, and ``complement=Discard()`` does without.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the corrected root.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        rank: :math:`r`, or the smaller side of a matrix if that is less.
        update_interval: steps between bases; or a :class:`Refresh`, which also says what becomes
            of the moments, which rotate otherwise, and :math:`\rho`, otherwise 0.908.
        subspace: finds :math:`P` in another way, with a rank of its own; None for
            ``power_iteration(rank)``.
        complement: what is done with the rest of the gradient.
        matrices: which parameters are projected: all linear maps but the output head.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``subspace``,
            ``complement`` or ``matrices`` is of another class, or a decay rate is an array in fewer
            bits than float32; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``rank`` or
            ``update_interval`` is not a positive integer (``optax.inject_hyperparams`` needs
            ``static_args=("rank", "update_interval")``), or ``rank`` is not that of ``subspace``;
            in ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import ldadam
        >>> tx = ldadam(1e-3, rank=2)
        >>> state = tx.init({"kernel": jnp.zeros((8, 4))})
        >>> state[0].basis.vectors["kernel"].shape, state[0].complement.residual["kernel"].shape
        ((2, 4), (8, 4))

    Reference: Robert et al., LDAdam (ICLR 2025, arXiv 2410.16103).
    """
    require_hyperparameters(eps=eps)
    return optax.chain(
        project_gradients(
            optax.scale_by_adam(b1, b2, eps),
            of_rank(rank, subspace, power_iteration(16)),
            refresh_every(update_interval, Refresh(moments="rotate", momentum_share=0.908)),
            complement,
            matrices=matrices,
            b1=b1,
            b2=b2,
        ),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def dct_adamw(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    rank: int = 128,
    update_interval: int | Refresh = 1,
    subspace: Subspace | None = None,
    complement: Complement = Discard(),
    matrices: Matrices = HIDDEN,
) -> GradientTransformationExtraArgs:
    r"""Runs DCT-AdamW: Adam on the columns of a cosine transform where the gradient is largest.

    With the orthogonal transform :math:`Q` and its columns :math:`P` with the largest
    :math:`\lVert Q_j^T G_t \rVert_1`, chosen in every step,

    .. math::

        \theta_{t+1} = \theta_t - \eta_t \bigl( P\,\mathrm{Adam}(P^T G_t) + \lambda \theta_t \bigr)

    The moments of a column that stays chosen stay, those of a new one start at zero. Only the
    indices of the columns are kept, and no singular vectors are computed.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1).
        eps: :math:`\epsilon`, beside the corrected root.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        rank: chosen columns, or the smaller side of a matrix if that is less.
        update_interval: steps between two choices; or a :class:`Refresh`, which also says what
            becomes of the moments; they follow. In the released code that is an option; without it
            they depend on the order that a sort left.
        subspace: finds :math:`P` in another way, with a rank of its own; None for
            ``dct_columns(rank)``.
        complement: ``FeedBack(momentum=False)`` is the released code's error feedback.
        matrices: which parameters are projected; the smaller side is compressed. The released code
            leaves out those with a side of 32000 or more.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``subspace``,
            ``complement`` or ``matrices`` is of another class, or a decay rate is an array in fewer
            bits than float32; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``rank`` or
            ``update_interval`` is not a positive integer (``optax.inject_hyperparams`` needs
            ``static_args=("rank", "update_interval")``), or ``rank`` is not that of ``subspace``;
            in ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import dct_adamw
        >>> tx = dct_adamw(1e-3, rank=2)
        >>> tx.init({"kernel": jnp.zeros((8, 4))})[0].basis.indices["kernel"].shape
        (1, 2)

    Reference: FFT-based dynamic subspace selection (arXiv 2505.17967).
    """
    require_hyperparameters(eps=eps)
    return optax.chain(
        project_gradients(
            optax.scale_by_adam(b1, b2, eps),
            of_rank(rank, subspace, dct_columns(128)),
            refresh_every(update_interval, Refresh(moments="rotate")),
            complement,
            matrices=matrices,
            b1=b1,
            b2=b2,
        ),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def snsm(
    learning_rate: ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike | None = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: float | jax.Array = 0.0,
    mask: Mask = None,
    *,
    rank: int = 128,
    update_interval: int | Refresh = 200,
    subspace: Subspace | None = None,
    subsets: Subsets = Subsets(),
    matrices: Matrices = Matrices(),
) -> GradientTransformationExtraArgs:
    r"""Runs SNSM: momentum in a subspace, the raw gradient outside, over the norms of subsets.

    With the basis :math:`P` and the subset :math:`S(i)` of element :math:`i`,

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) P^T g_t, \qquad
        n_t = P m_t + (g_t - P P^T g_t) \\
        v_{t,S} &= \beta_2 v_{t-1,S} + (1 - \beta_2) \sum_{i \in S} g_{t,i}^2 \\
        \theta_{t+1,i} &= (1 - \eta_t \lambda) \left( \theta_{t,i}
            - \eta_t \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \cdot \frac{n_{t,i}}{\sqrt{v_{t,S(i)}} + \epsilon} \right)

    It is the chain of :func:`subspace_momentum` and :func:`decay_updated_weights`. All linear maps
    are projected, the output head too; embeddings, norms and biases keep Adam, as published. As
    with :func:`adam_sn`, the learning rate is about ten times Adam's; warm it up.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule.
        b1: :math:`\beta_1`, in [0, 1).
        b2: :math:`\beta_2`, in [0, 1); None for AdaGrad.
        eps: :math:`\epsilon`, beside the uncorrected root.
        weight_decay: :math:`\lambda`, multiplied by the learning rate.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        rank: :math:`r`, or the smaller side of a matrix if that is less.
        update_interval: steps between bases; or a :class:`Refresh`, which also says what becomes
            of the momentum, which starts anew otherwise.
        subspace: finds :math:`P` in another way, with a rank of its own, as ``top_k_rows(64)``
            does; None for ``svd(rank)``.
        subsets: what the subsets are, and whether squares are summed or averaged.
        matrices: which parameters are projected. With ``Matrices(side="larger", square="out")``
            and :func:`top_k_rows` or :func:`uniform_rows`, the state is the smallest.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``learning_rate`` is neither a number nor a schedule, ``subspace``,
            ``subsets`` or ``matrices`` is of another class, ``weight_decay`` is a schedule, or a
            number is an array in fewer bits than float32; in ``init``, if a leaf is not a
            floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, ``rank`` or
            ``update_interval`` is not a positive integer (``optax.inject_hyperparams`` needs
            ``static_args=("rank", "update_interval")``), or ``rank`` is not that of ``subspace``;
            in ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax
        >>> from microadam_jax import memory_report, snsm
        >>> params = {"mlp": {"kernel": jax.ShapeDtypeStruct((1024, 1024), "bfloat16")}}
        >>> report = memory_report(snsm(1e-2, rank=256), params)
        >>> round(report.bytes_per_parameter, 3)
        2.004

    Reference: Nguyen and Nguyen, subset-norm and subspace-momentum (ICML 2025, arXiv 2411.07120).
    """
    return optax.chain(
        subspace_momentum(
            b1,
            b2,
            eps,
            subspace=of_rank(rank, subspace, svd(128)),
            refresh=refresh_every(update_interval, Refresh()),
            subsets=subsets,
            matrices=matrices,
        ),
        scale_by_learning_rate(learning_rate),
        decay_updated_weights(learning_rate, weight_decay, mask),
    )
