"""The window link as one operation: which implementation runs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels import dispatch, gpu_blocks
from pallas_kernels.window_update import mosaic_tpu, reference, triton


@functools.partial(
    jax.jit, static_argnames=("size", "n", "dtype", "implementation", "interpret", "sharding")
)
def window_update(
    values: jax.Array,
    indices: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
    eps: ArrayLike,
    *,
    size: int,
    n: int,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
    interpret: bool = False,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    r"""Computes the dense Adam direction of a window of sparse gradients.

    .. math::

        u = \frac{\sum_i w^\mu_i V_i}{\sqrt{\sum_i w^\nu_i V_i^2} + \epsilon}

    Args:
        values: ``(*lead, blocks, rows, k)`` float32 or bfloat16, :math:`V`.
        indices: ``(*lead, blocks, rows, k)`` integers, where they belong in the block; distinct
            within a row.
        mu_weights: ``(rows,)`` float32, :math:`w^\mu`.
        nu_weights: ``(rows,)`` float32, :math:`w^\nu`.
        eps: added to the root.
        size: elements in a block.
        n: elements in a row of the tensor, which the last block may exceed.
        dtype: of the result.
        implementation: None, ``"xla"``, ``"mosaic_tpu"`` or ``"triton"``.
        interpret: runs the kernel as ordinary operations, on any device.
        sharding: where the tensor lies, on a mesh with Auto axes.

    Returns:
        ``(*lead, n)``; elements absent from the window are zero.

    Raises:
        ValueError: if shapes do not fit, or there is no implementation of that name.
        NotImplementedError: if the named implementation cannot run.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.window_update import window_update
        >>> values, indices = jnp.array([[[[2.0], [2.0]]]]), jnp.array([[[[3], [3]]]])
        >>> half = jnp.array([0.5, 0.5])
        >>> print(window_update(values, indices, half, half, 0.0, size=4, n=4))
        [[0. 0. 0. 1.]]

    Reference: MicroAdam (arXiv 2405.15593), Algorithm 1, AdamStats.
    """
    check_shapes(values, indices, size, n)
    shape = (*values.shape[:-3], n)

    def local(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(*arguments: jax.Array) -> jax.Array:
            blocks = arguments[0].shape[-3]
            # A row that is padded is not sharded.
            here = n if blocks == values.shape[-3] else blocks * size
            return kernel(*arguments, n=here, dtype=dtype, interpret=interpret)

        return run

    entries = values.shape[-2] * values.shape[-1]
    return dispatch.run(
        "window_update",
        implementation,
        functools.partial(reference.window_update, size=size, n=n, dtype=dtype),
        lambda: {
            "mosaic_tpu": (
                local(functools.partial(mosaic_tpu.window_update, size=size)),
                mosaic_tpu.unsupported(shape, size, entries),
            ),
            "triton": (
                local(functools.partial(triton.window_update, size=size)),
                gpu_blocks.unsupported(shape, size, entries),
            ),
        },
        (values, indices),
        (mu_weights, nu_weights, jnp.asarray(eps, jnp.float32)),
        rank=len(shape),
        padded=n % size != 0,
        sharding=sharding,
    )


def check_shapes(values: jax.Array, indices: jax.Array, size: int, n: int) -> None:
    """Refuses a window that is not one of rows of ``n`` in blocks of ``size``.

    Raises:
        ValueError: if shapes do not fit.
    """
    if values.shape != indices.shape or not 0 <= values.shape[-3] * size - n < max(size, 1):
        raise ValueError(
            f"A row of {n} elements has {-(-n // size)} blocks of {size}, each with as many "
            f"indices as values; got values {values.shape} and indices {indices.shape}."
        )
