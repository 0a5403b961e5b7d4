"""Sinkhorn: a momentum whose rows and columns are brought to one size, in turn."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.codecs import Codec, Storage
from microadam_jax.layout.matrices import OUTPUT_HEAD, Matrices
from microadam_jax.transforms.matrix_momentum import Direction, matrix_momentum

ROUNDS = 5


def scale_by_sinkhorn(
    beta: ArrayLike = 0.95,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    consistent_rms: ArrayLike = 0.2,
    matrices: Matrices = Matrices(exclude=OUTPUT_HEAD),
    mu_codec: Storage | Codec | str | None = None,
    seed: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Brings the rows and the columns of a matrix's momentum to one size.

    With a matrix of :math:`R` inputs and :math:`C` outputs, :math:`\bar r_0 = \bar c_0 = 1` and
    five rounds,

    .. math::

        m_t &= \beta m_{t-1} + (1 - \beta)\, g_t \\
        n_t &= \beta \frac{m_t}{1 - \beta^{t+1}} + (1 - \beta) \frac{g_t}{1 - \beta^t} \\
        r_i &= \Bigl(\tfrac1C \textstyle\sum_j n_{ij}^2 c_j^2\Bigr)^{-1/2}, \qquad
        c_j = \Bigl(\tfrac1R \textstyle\sum_i n_{ij}^2 r_i^2\Bigr)^{-1/2} \\
        u_{ij} &= a\, r_i\, n_{ij}\, c_j

    so that the root mean square of each row and of each column is :math:`a`: Sinkhorn's iteration
    on the squares. No number of a state is divided by another, and an update depends on rounding
    errors of the momentum as far as on the momentum: it can be stored in 4 bits. For parameters
    that are no matrices see :func:`scale_by_adam_mini`.

    Args:
        beta: :math:`\beta`, in [0, 1): the decay of a matrix's momentum.
        b1: the decay of other parameters' first moment, in [0, 1).
        b2: the decay of other parameters' second moment, in [0, 1).
        eps: beside the largest entry of a matrix, beside the root mean squares of rows and
            columns after division by it, and Adam-mini's.
        consistent_rms: :math:`a`, the root mean square of a matrix's update. AdamW's is about 0.2,
            so that its learning rate and decay suit all parameters.
        matrices: which parameters are matrices: by default all linear maps but the output head.
            Yours need ``exclude=OUTPUT_HEAD``, of ``microadam_jax.subspace``, for the same.
        mu_codec: stores :math:`m` in few bits; None keeps it in float32. See
            :func:`quantize_state`.
        seed: of a codec that rounds stochastically.

    Returns:
        The transformation. Where rows or columns are sharded, the sums of the others are reduced
        in each round.

    Raises:
        TypeError: if a number is an array in fewer bits than float32, or ``matrices`` or
            ``mu_codec`` is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_codec`` is an
            unknown name or has no negative numbers; in ``update``, if the state was made for other
            matrices or stored otherwise.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.transforms import scale_by_sinkhorn
        >>> tx = scale_by_sinkhorn()
        >>> params = {"kernel": jnp.zeros((2, 2))}
        >>> grads = {"kernel": jnp.array([[1.0, 10], [100, 1000]])}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> with jnp.printoptions(precision=2):
        ...     print(updates["kernel"])
        [[0.2 0.2]
         [0.2 0.2]]

    Reference: Scetbon et al., Gradient multi-normalization (arXiv 2502.06742), which has no
        momentum.
    """
    return matrix_momentum(
        Direction(balanced, lambda rows, columns: 1.0, gathered=False),
        name="scale_by_sinkhorn",
        beta=beta,
        b1=b1,
        b2=b2,
        eps=eps,
        consistent_rms=consistent_rms,
        matrices=matrices,
        mu_codec=mu_codec,
        seed=seed,
    )


def balanced(x: jax.Array, eps: ArrayLike) -> jax.Array:
    """Brings rows and columns to a root mean square of 1, rows first.

    Args:
        x: float32 matrices ``(..., rows, columns)``.
        eps: beside their largest entry, and beside the root mean squares.

    Returns:
        Matrices of that shape, of the same signs.
    """
    # Squares of what is far from 1 are not in float32.
    x = x / (jnp.max(jnp.abs(x), (-2, -1), keepdims=True) + eps)
    squares = jnp.square(x)

    def inverse(weights: jax.Array, axis: int) -> jax.Array:
        mean = jnp.mean(squares * jnp.square(weights), axis, keepdims=True)
        return 1 / (jnp.sqrt(mean) + eps)

    def step(_: int, scales: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = inverse(scales[1], -1)
        return rows, inverse(rows, -2)

    rows = inverse(jnp.float32(1), -1)
    rows, columns = jax.lax.fori_loop(1, ROUNDS, step, (rows, inverse(rows, -2)))
    return x * rows * columns
