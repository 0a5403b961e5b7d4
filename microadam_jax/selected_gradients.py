"""A linear map whose weight gradient is computed for selected rows only."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grass_dense(x: jax.Array, kernel: jax.Array, indices: jax.Array, axis: int = 0) -> jax.Array:
    r"""Computes :math:`y = x W` and only the selected part of the gradient of :math:`W`.

    For the selected indices :math:`\sigma` of the inputs (``axis`` 0) or the outputs (1),

    .. math::

        \left. \frac{\partial L}{\partial W} \right|_{\sigma,:} = x_{:,\sigma}^T
            \frac{\partial L}{\partial y} \qquad \text{or} \qquad
        \left. \frac{\partial L}{\partial W} \right|_{:,\sigma} = x^T
            \left. \frac{\partial L}{\partial y} \right|_{:,\sigma}

    and zero elsewhere. The product takes :math:`r / n` of the time of the whole one, for
    :math:`r` of :math:`n` indices. :func:`grass` looks at nothing else between two refreshes; in a
    step that finds new rows, use ``x @ kernel``, whose gradient is whole. Values and the gradient
    of ``x`` are those of ``x @ kernel``.

    A clip by global norm sees a smaller norm, and accumulated gradients must all be of one kind.

    Args:
        x: inputs, of shape ``(..., in)``.
        kernel: :math:`W`, of shape ``(in, out)``.
        indices: integers of any shape, such as ``state[0].basis.indices`` of :func:`grass`.
        axis: which axis of the kernel they select from; the one that is compressed.

    Returns:
        The outputs, of shape ``(..., out)``.

    Raises:
        ValueError: if ``axis`` is neither 0 nor 1.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from microadam_jax.selected_gradients import grass_dense
        >>> x, kernel = jnp.ones((4, 3)), jnp.ones((3, 2))
        >>> loss = lambda kernel: grass_dense(x, kernel, jnp.array([0, 2])).sum()
        >>> print(jax.grad(loss)(kernel))
        [[4. 4.]
         [0. 0.]
         [4. 4.]]

    Reference: Muhamed et al., Grass (EMNLP 2024, arXiv 2406.17660).
    """
    del indices
    _require(axis)
    return x @ kernel


def _forward(
    x: jax.Array, kernel: jax.Array, indices: jax.Array, axis: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    _require(axis)
    # Of the inputs that the weights are not selected by, nothing else is needed.
    return x @ kernel, (x if axis else jnp.take(x, indices.ravel(), axis=-1), kernel, indices)


def _backward(
    axis: int, saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, indices = saved
    chosen = indices.ravel()
    taken = jnp.take(dy, chosen, axis=-1) if axis else dy
    part = jnp.einsum("...i,...o->io", x, taken).astype(kernel.dtype)
    zeros = jnp.zeros_like(kernel)
    weight = zeros.at[:, chosen].set(part) if axis else zeros.at[chosen].set(part)
    return (dy @ kernel.T).astype(x.dtype), weight, None


def _require(axis: int) -> None:
    if axis not in (0, 1):
        raise ValueError(
            f"grass_dense selects inputs (axis 0) or outputs (axis 1) of a kernel; got {axis!r}."
        )


grass_dense.defvjp(_forward, _backward)
