"""The window link and the step down as one operation: which implementation runs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from pallas_kernels import dispatch, gpu_blocks
from pallas_kernels.window_update import mosaic_tpu, reference, triton
from pallas_kernels.window_update.api import check_shapes


@functools.partial(jax.jit, static_argnames=("size", "implementation", "interpret", "sharding"))
def window_apply(
    values: jax.Array,
    indices: jax.Array,
    params: jax.Array,
    mu_weights: jax.Array,
    nu_weights: jax.Array,
    eps: ArrayLike,
    step: jax.Array,
    decay: jax.Array | None = None,
    *,
    size: int,
    implementation: str | None = None,
    interpret: bool = False,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    r"""Moves parameters along the Adam direction of a window, which is written nowhere.

    With the direction :math:`u` of :func:`pallas_kernels.window_update.window_update`,

    .. math::

        \theta \leftarrow \theta + s \, (u + \lambda \theta)

    The reference rounds after each operation as Optax does, in the dtypes of ``params``, ``step``
    and ``decay``. A kernel computes in float32 and rounds the new parameter alone.

    Args:
        values: ``(*lead, blocks, rows, k)`` float32 or bfloat16.
        indices: ``(*lead, blocks, rows, k)`` integers, where they belong in the block; distinct
            within a row.
        params: ``(*lead, n)``, :math:`\theta`; updated in place if donated.
        mu_weights: ``(rows,)`` float32.
        nu_weights: ``(rows,)`` float32.
        eps: added to the root.
        step: scalar :math:`s`, minus the learning rate.
        decay: scalar :math:`\lambda`; None for no decay.
        size: elements in a block.
        implementation: None, ``"xla"``, ``"mosaic_tpu"`` or ``"triton"``.
        interpret: runs the kernel as ordinary operations, on any device.
        sharding: where the tensor lies, on a mesh with Auto axes.

    Returns:
        The new parameters, in the shape and dtype of ``params``.

    Raises:
        ValueError: if shapes do not fit.
        NotImplementedError: if the named implementation cannot run.

    Examples:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.window_update import window_apply
        >>> values, indices = jnp.array([[[[2.0], [2.0]]]]), jnp.array([[[[3], [3]]]])
        >>> half, step = jnp.array([0.5, 0.5]), jnp.float32(-0.25)
        >>> print(window_apply(values, indices, jnp.ones((1, 4)), half, half, 0.0, step, size=4))
        [[1.   1.   1.   0.75]]

    Reference: MicroAdam (arXiv 2405.15593), Algorithm 1, AdamStats and line 12.
    """
    n = params.shape[-1]
    check_shapes(values, indices, size, n)
    entries = values.shape[-2] * values.shape[-1]
    return dispatch.run(
        "window_apply",
        implementation,
        functools.partial(reference.window_apply, size=size),
        lambda: {
            "mosaic_tpu": (
                functools.partial(mosaic_tpu.window_apply, size=size, interpret=interpret),
                mosaic_tpu.unsupported(params.shape, size, entries)
                or _untaken(params.dtype, "float32", "bfloat16"),
            ),
            "triton": (
                functools.partial(triton.window_apply, size=size, interpret=interpret),
                gpu_blocks.unsupported(params.shape, size, entries)
                or _untaken(params.dtype, "float32", "bfloat16", "float16"),
            ),
        },
        (values, indices, params),
        (
            mu_weights,
            nu_weights,
            jnp.asarray(eps, jnp.float32),
            step,
            *(() if decay is None else (decay,)),
        ),
        rank=params.ndim,
        padded=n % size != 0,
        sharding=sharding,
    )


def _untaken(dtype: jnp.dtype, *taken: str) -> str | None:
    """Why a kernel that takes parameters of some dtypes takes none of ``dtype``, or None."""
    return None if dtype in taken else f"parameters must be {' or '.join(taken)}; these are {dtype}"
