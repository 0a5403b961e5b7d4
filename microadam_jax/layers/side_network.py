"""The formulas of Quantized Side Tuning, as functions of arrays for any library of modules."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

MIXES = ("paper", "released", "residual")


def max_pool(hidden: jax.Array, reduction: int) -> jax.Array:
    """Returns the largest of each ``reduction`` neighbouring channels: no weights.

    Args:
        hidden: ``(..., d)``.
        reduction: :math:`r`, a divisor of ``d``.

    Returns:
        ``(..., d / r)``.

    Raises:
        ValueError: if ``reduction`` does not divide ``d``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.layers import average_pool, max_pool
        >>> h = jnp.array([1.0, 3.0, -2.0, 0.0])
        >>> print(max_pool(h, 2), average_pool(h, 2))
        [3. 0.] [ 2. -1.]

    Reference: Zhang et al., QST (arXiv 2401.07159), Section 3.2.
    """
    return jnp.max(_channel_groups(hidden, reduction), axis=-1)


def average_pool(hidden: jax.Array, reduction: int) -> jax.Array:
    """Returns the mean of each ``reduction`` neighbouring channels: no weights.

    Args, Returns and Raises are those of :func:`max_pool`.

    Raises:
        ValueError: if ``reduction`` does not divide ``d``.

    Reference: Zhang et al., QST (arXiv 2401.07159), Section 3.2.
    """
    return jnp.mean(_channel_groups(hidden, reduction), axis=-1)


def low_rank(hidden: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``hidden @ a @ b``, the downsampling that QST names after LoRA.

    Args:
        hidden: ``(..., d)``.
        a: ``(d, rank)``.
        b: ``(rank, d / r)``.

    Reference: Zhang et al., QST (arXiv 2401.07159), Section 3.2.
    """
    return hidden @ a @ b


def adapter(hidden: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``silu(hidden @ a) @ b``, the downsampling with a nonlinear bottleneck.

    Args:
        hidden: ``(..., d)``.
        a: ``(d, rank)``.
        b: ``(rank, d / r)``.

    Reference: Zhang et al., QST (arXiv 2401.07159), Section 3.2; the nonlinearity is that of the
    released code.
    """
    return jax.nn.silu(hidden @ a) @ b


def fuse(down: jax.Array, side: jax.Array, gamma: jax.Array) -> jax.Array:
    r"""Returns the input of a side layer.

    .. math::

        (1 - \beta) D(h_f) + \beta h_g, \qquad \beta = \sigma(\gamma) .

    Args:
        down: :math:`D(h_f)`, ``(..., d / r)``, the downsampled output of the backbone's layer.
        side: :math:`h_g`, of that shape, the output of the side layer before.
        gamma: :math:`\gamma`, a scalar as in the paper, or ``(d / r,)`` as in the released code.

    Reference: Zhang et al., QST (arXiv 2401.07159), Section 3.2.
    """
    beta = jax.nn.sigmoid(gamma).astype(down.dtype)
    return (1 - beta) * down + beta * side


def mix_hidden_states(
    backbone: jax.Array, up: jax.Array, alpha: ArrayLike | None, mix: str = "paper"
) -> jax.Array:
    r"""Returns the hidden state that the backbone's head reads.

    .. math::

        h = \begin{cases}
            \alpha h_f + (1 - \alpha) U(h_g) & \text{paper, from } \alpha = 1 \\
            \sigma(\alpha) h_f + (1 - \sigma(\alpha)) U(h_g) & \text{released, from } \alpha = 1 \\
            h_f + U(h_g) & \text{residual, from } U = 0
        \end{cases}

    The first and the last start from the backbone's own output; with the first, no gradient
    reaches the side network until :math:`\alpha` has moved. The second starts at 0.731 of it.

    Args:
        backbone: :math:`h_f`, ``(..., d)``.
        up: :math:`U(h_g)`, of that shape.
        alpha: a scalar, or ``(d,)`` as in the released code; None for ``"residual"``.
        mix: ``"paper"``, ``"released"`` or ``"residual"``.

    Raises:
        ValueError: if ``mix`` is none of these, or ``alpha`` does not belong to it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.layers import mix_hidden_states
        >>> h, up = jnp.array([1.0, 2.0]), jnp.array([5.0, 5.0])
        >>> print(mix_hidden_states(h, up, jnp.float32(1.0)))
        [1. 2.]

    Reference: Zhang et al., QST (arXiv 2401.07159), Section 3.3, and its released code.
    """
    require_mix(mix)
    if (alpha is None) != (mix == "residual"):
        raise ValueError(
            f"alpha belongs to the mixes 'paper' and 'released', and 'residual' has none; got "
            f"mix={mix!r} with {'no alpha' if alpha is None else 'an alpha'}."
        )
    if alpha is None:
        return backbone + up
    alpha = jnp.asarray(jax.nn.sigmoid(alpha) if mix == "released" else alpha, up.dtype)
    return alpha * backbone + (1 - alpha) * up


def require_mix(mix: str) -> None:
    """Refuses an unknown mix.

    Raises:
        ValueError: if it is none of ``"paper"``, ``"released"`` and ``"residual"``.
    """
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(map(repr, MIXES))}; got {mix!r}.")


def _channel_groups(hidden: jax.Array, reduction: int) -> jax.Array:
    if reduction < 1 or hidden.shape[-1] % reduction:
        raise ValueError(
            f"reduction {reduction} does not divide the {hidden.shape[-1]} channels of the hidden "
            "states; choose a divisor."
        )
    return hidden.reshape(*hidden.shape[:-1], hidden.shape[-1] // reduction, reduction)
