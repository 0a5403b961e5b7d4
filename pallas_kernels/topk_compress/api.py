"""The error-feedback link as one operation: shapes, checks, and which implementation runs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pallas_kernels import dispatch
from pallas_kernels.topk_compress import jax_triton, mosaic_tpu, one_reduction, reference, triton


@functools.partial(jax.jit, static_argnames=("k", "implementation", "interpret", "sharding"))
def topk_compress(
    gradient: jax.Array,
    codes: jax.Array,
    low: jax.Array,
    high: jax.Array,
    k: int,
    *,
    implementation: str | None = None,
    interpret: bool = False,
    sharding: NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Sends the Top-K of gradient plus residual, and keeps the rest in four bits.

    .. math::

        a &= g + Q^{-1}(e) \\
        c &= \mathrm{TopK}(a) \\
        e &\leftarrow Q(a - c)

    In interpret mode kernels agree with ``"xla"`` on the same CPU to the last bit. A GPU may give
    other last bits than a CPU, and another code of an element halfway between two levels: XLA
    divides by a block's step on GPUs and multiplies by its inverse on CPUs.

    Args:
        gradient: ``(*lead, n)`` float32, bfloat16 or float16.
        codes: ``(*lead, blocks, size / 2)`` uint8, two to a byte; updated in place if donated.
        low: ``(*lead, blocks)`` float32, the value of level 0; likewise.
        high: ``(*lead, blocks)`` float32, the value of level 15; likewise.
        k: survivors per block, at most ``size``.
        implementation: None, ``"xla"``, ``"mosaic_tpu"``, ``"triton"`` (Pallas on Triton) or
            ``"jax_triton"``.
        interpret: runs the kernel as ordinary operations, on any device.
        sharding: where ``gradient`` lies, on a mesh with Auto axes.

    Returns:
        ``(*lead, blocks, k)`` float32 values and int32 indices of :math:`c`, and the new
        ``codes``, ``low`` and ``high``.

    Raises:
        TypeError: if an array has another dtype.
        ValueError: if shapes do not fit, ``k`` is not from 1 to ``size``, or there is no
            implementation of that name.
        NotImplementedError: if the named implementation cannot run.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.topk_compress import topk_compress
        >>> gradient = jnp.array([[1.0, -4.0, 2.0, 0.5]])
        >>> empty = jnp.zeros((1, 1, 2), jnp.uint8), jnp.zeros((1, 1)), jnp.zeros((1, 1))
        >>> values, indices, codes, low, high = topk_compress(gradient, *empty, k=1)
        >>> print(values, indices, low, high)
        [[[-4.]]] [[[1]]] [[0.]] [[2.]]

    Reference: MicroAdam (arXiv 2405.15593), Algorithm 1, lines 5 to 9.
    """
    size = 2 * codes.shape[-1]
    _check(gradient, codes, low, high, k)
    return dispatch.run(
        "topk_compress",
        implementation,
        functools.partial(_xla, k=k),
        lambda: {
            name: (
                functools.partial(kernel.compress, k=k, interpret=interpret),
                kernel.unsupported(gradient.shape, size, k),
            )
            for name, kernel in (
                ("mosaic_tpu", mosaic_tpu),
                ("triton", triton),
                ("jax_triton", jax_triton),
            )
        },
        (gradient, codes, low, high),
        rank=gradient.ndim,
        padded=gradient.shape[-1] % size != 0,
        sharding=sharding,
    )


def _xla(*arrays: jax.Array, k: int) -> tuple[jax.Array, ...]:
    """The reference, and for GPUs the same numbers as a program that reads the gradient twice."""
    compress = functools.partial(reference.compress, k=k)
    if k > one_reduction.MAX_K or not dispatch.compiles_for_gpus(arrays[0]):
        return compress(*arrays)
    on_gpu = functools.partial(one_reduction.compress, k=k)
    return jax.lax.platform_dependent(*arrays, cuda=on_gpu, rocm=on_gpu, default=compress)


def _check(gradient: jax.Array, codes: jax.Array, low: jax.Array, high: jax.Array, k: int) -> None:
    if gradient.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(
            f"The gradient must be float32, bfloat16 or float16; got {gradient.dtype}. Cast it."
        )
    dtypes = codes.dtype, low.dtype, high.dtype
    if dtypes != (jnp.uint8, jnp.float32, jnp.float32):
        raise TypeError(f"codes, low and high must be uint8, float32, float32; got {dtypes}.")
    n, size, count = gradient.shape[-1], 2 * codes.shape[-1], low.shape[-1]
    lead = gradient.shape[:-1]
    if (codes.shape, low.shape, high.shape) != (
        (*lead, count, size // 2),
        (*lead, count),
        (*lead, count),
    ) or not count * size - size < n <= count * size:
        raise ValueError(
            f"A gradient of shape {gradient.shape} in blocks of {size} needs {-(-n // size)} "
            f"blocks in each row; got codes {codes.shape}, low {low.shape}, high {high.shape}."
        )
    if not 1 <= k <= size:
        raise ValueError(f"k must lie between 1 and the block size {size}; got {k}.")
