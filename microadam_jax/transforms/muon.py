"""Muon: matrices move along their orthogonalized momentum, all else as Adam-mini moves it."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.codecs import Codec, Storage
from microadam_jax.layout.matrices import OUTPUT_HEAD, Matrices
from microadam_jax.transforms.matrix_momentum import Direction, matrix_momentum

NS_STEPS = 5
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def scale_by_muon(
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
    r"""Rescales updates of matrices as Muon does, and all others as Adam-mini does.

    With a matrix :math:`X` of :math:`R` inputs and :math:`C` outputs,

    .. math::

        m_t &= \beta m_{t-1} + (1 - \beta)\, g_t \\
        n_t &= \beta \frac{m_t}{1 - \beta^{t+1}} + (1 - \beta) \frac{g_t}{1 - \beta^t} \\
        u_t &= c \sqrt{\max(R, C)}\; p^5\!\left( \frac{n_t}{\|n_t\|_F + \epsilon} \right),
        \qquad p(X) = a_0 X + a_1 (X X^T) X + a_2 (X X^T)^2 X

    where :math:`p^5`, five steps of Newton and Schulz with the coefficients 3.4445, -4.7750 and
    2.0315, brings all singular values near 1. The layers of a stack are matrices of their own and
    are orthogonalized one after another, so that only one of them has temporaries. For parameters
    that are no matrices see :func:`scale_by_adam_mini`. A matrix with a norm above 1e19, whose
    square is not in float32, does not move.

    Args:
        beta: :math:`\beta`, in [0, 1): the decay of a matrix's momentum.
        b1: the decay of other parameters' first moment, in [0, 1).
        b2: the decay of other parameters' second moment, in [0, 1).
        eps: :math:`\epsilon`, and Adam-mini's.
        consistent_rms: :math:`c`, the root mean square of a matrix's update. AdamW's is about 0.2,
            so that its learning rate and decay suit all parameters.
        matrices: which parameters are matrices: by default all linear maps but the output head.
            Yours need ``exclude=OUTPUT_HEAD``, of ``microadam_jax.subspace``, for the same.
        mu_codec: stores :math:`m` in few bits; None keeps it in float32. See
            :func:`quantize_state`.
        seed: of a codec that rounds stochastically.

    Returns:
        The transformation. On a mesh with Explicit axes each device orthogonalizes whole matrices,
        gathered from the others.

    Raises:
        TypeError: if a number is an array in fewer bits than float32, or ``matrices`` or
            ``mu_codec`` is of another class; in ``init``, if a leaf is not a floating-point array.
        ValueError: if a decay rate is outside [0, 1) or ``eps`` is negative, or ``mu_codec`` is an
            unknown name or has no negative numbers; in ``update``, if the state was made for other
            matrices or stored otherwise.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.transforms import scale_by_muon
        >>> tx = scale_by_muon()
        >>> params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
        >>> grads = {"kernel": jnp.array([[3.0, 0, 0], [0, 4, 0]]), "bias": jnp.ones(3)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> with jnp.printoptions(precision=2, suppress=True):
        ...     print(updates["kernel"])
        [[0.25 0.   0.  ]
         [0.   0.39 0.  ]]

    Reference: Jordan et al., Muon (2024); Liu et al., Muon is scalable for LLM training (arXiv
        2502.16982), Section 2.2.
    """
    return matrix_momentum(
        Direction(orthogonal, lambda rows, columns: max(rows, columns) ** 0.5, gathered=True),
        name="scale_by_muon",
        beta=beta,
        b1=b1,
        b2=b2,
        eps=eps,
        consistent_rms=consistent_rms,
        matrices=matrices,
        mu_codec=mu_codec,
        seed=seed,
    )


def orthogonal(x: jax.Array, eps: ArrayLike) -> jax.Array:
    """Brings singular values near 1, by five steps of Newton and Schulz.

    Args:
        x: float32 matrices ``(..., rows, columns)``.
        eps: beside their norm.

    Returns:
        Matrices of that shape with the singular vectors of ``x``.
    """
    rows, columns = x.shape[-2:]
    x = jnp.matrix_transpose(x) if rows > columns else x
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True)) + eps)
    first, third, fifth = NS_COEFFICIENTS

    def step(_: int, x: jax.Array) -> jax.Array:
        gram = x @ jnp.matrix_transpose(x)
        return first * x + (third * gram + fifth * gram @ gram) @ x

    x = jax.lax.fori_loop(0, NS_STEPS, step, x)
    return jnp.matrix_transpose(x) if rows > columns else x
