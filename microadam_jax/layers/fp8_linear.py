"""A linear map whose operands are in 8-bit floating point, forwards and backwards."""

import functools
from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from microadam_jax.arguments import require_floating
from microadam_jax.layers.fp8_activation import Fp8Activation, Fp8ActivationCodes
from microadam_jax.layers.saved_codes import once_differentiable, when_needed, with_codes

FORWARD, BACKWARD = Fp8Activation("e4m3", group=None), Fp8Activation("e5m2", group=None)
DTYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}

Contraction = tuple[tuple[int, ...], tuple[int, ...]]  # axes of the one and of the other operand
Placement = NamedSharding | PartitionSpec | None


@overload
def fp8_linear(x: jax.Array, kernel: jax.Array, *, out_sharding: Placement = ...) -> jax.Array: ...
@overload
def fp8_linear(
    x: jax.Array, kernel: Sequence[jax.Array], *, out_sharding: Placement = ...
) -> tuple[jax.Array, ...]: ...
def fp8_linear(
    x: jax.Array, kernel: jax.Array | Sequence[jax.Array], *, out_sharding: Placement = None
) -> jax.Array | tuple[jax.Array, ...]:
    r"""Multiplies by a matrix in FP8, and saves the input as codes.

    With one scale for a whole tensor, found anew each time, and :math:`Q_4` for E4M3 and
    :math:`Q_5` for E5M2,

    .. math::

        y = Q_4(x)\, Q_4(W), \qquad
        \dot x = Q_5(\dot y)\, Q_4(W)^T, \qquad
        \dot W = Q_4(x)^T\, Q_5(\dot y) .

    Products are of the 8-bit numbers, summed in float32. On NVIDIA GPUs the operands are float8
    arrays, which those with FP8 units multiply directly; elsewhere the same numbers are multiplied
    in bfloat16 (TPU) or float32 (CPU), which hold them exactly.

    One byte for each element of ``x`` is saved; ``kernel`` is read again and quantized again.
    Several kernels share the codes of their input, as the projections of attention do. A NaN or
    an infinity anywhere in a tensor makes all of its product NaN.

    Args:
        x: inputs ``(..., in)``, of any float dtype.
        kernel: weights ``(in, out)``, such as float32 masters, or a sequence of them.
        out_sharding: of the outputs, as for ``jnp.dot``: needed where mesh axes are Explicit and
            the ``in`` axis is sharded.

    Returns:
        The outputs ``(..., out)`` in the dtype of ``x``; for a sequence a tuple of them.

    Raises:
        TypeError: if one is no floating-point array.
        ValueError: if a kernel is no matrix with as many rows as ``x`` has channels.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from microadam_jax.layers import fp8_linear
        >>> x, w = jnp.linspace(-1, 1, 32).reshape(2, 16), jnp.eye(16)
        >>> print(fp8_linear(x, w).shape)
        (2, 16)
        >>> query, key = fp8_linear(x, (w, 2 * w))
        >>> print(key.shape)
        (2, 16)

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5 and Figure 4.
    """
    kernels = tuple(kernel) if isinstance(kernel, Sequence) else (kernel,)
    require_floating("fp8_linear", x=x)
    for each in kernels:
        require_floating("fp8_linear", kernel=each)
        if each.ndim != 2 or x.ndim == 0 or x.shape[-1] != each.shape[0]:
            raise ValueError(
                f"fp8_linear multiplies (..., in) by (in, out); got inputs of shape {x.shape} and "
                f"a kernel of shape {each.shape}. Reshape kernels of more axes to matrices."
            )
    outputs = _linear(out_sharding, x, kernels)
    return outputs if isinstance(kernel, Sequence) else outputs[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    out_sharding: Placement, x: jax.Array, kernels: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    return _products(FORWARD.encode(x), kernels, x.dtype, out_sharding)


def _forward(
    out_sharding: Placement, x: jax.Array, kernels: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], tuple[Any, tuple[jax.Array, ...]]]:
    codes = FORWARD.encode(x)
    outputs, codes = with_codes(_products(codes, kernels, x.dtype, out_sharding), codes)
    return outputs, (codes, kernels)


def _backward(
    out_sharding: Placement,
    saved: tuple[Any, tuple[jax.Array, ...]],
    cotangents: tuple[jax.Array, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    del out_sharding
    x, kernels = saved
    # These are made codes too, through which a second derivative would be lost.
    cotangents, kernels = once_differentiable((cotangents, kernels))
    cotangents, x = when_needed(cotangents, x)
    rows = tuple(range(x.codes.ndim - 1))
    outputs = (x.codes.ndim - 1,)
    slopes = [BACKWARD.encode(dy) for dy in cotangents]
    as_x = jax.typeof(x.codes).sharding
    dx = sum(
        _product(dy, BACKWARD, FORWARD.encode(kernel), FORWARD, (outputs, (1,)), as_x)
        for dy, kernel in zip(slopes, kernels, strict=True)
    )
    dkernels = tuple(
        _product(x, FORWARD, dy, BACKWARD, (rows, rows), jax.typeof(kernel).sharding).astype(
            kernel.dtype
        )
        for dy, kernel in zip(slopes, kernels, strict=True)
    )
    return jnp.asarray(dx, cotangents[0].dtype), dkernels


_linear.defvjp(_forward, _backward)


def _products(
    x: Fp8ActivationCodes, kernels: tuple[jax.Array, ...], dtype: Any, out_sharding: Placement
) -> tuple[jax.Array, ...]:
    axes = ((x.codes.ndim - 1,), (0,))
    return tuple(
        _product(x, FORWARD, FORWARD.encode(kernel), FORWARD, axes, out_sharding).astype(dtype)
        for kernel in kernels
    )


def _product(
    left: Fp8ActivationCodes,
    left_format: Fp8Activation,
    right: Fp8ActivationCodes,
    right_format: Fp8Activation,
    axes: Contraction,
    out_sharding: Placement,
) -> jax.Array:
    """The float32 product of two tensors in codes, contracted along ``axes``."""

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            left,
            right,
            (axes, ((), ())),
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding,
        )

    def in_fp8(left: jax.Array, right: jax.Array) -> jax.Array:
        dtypes = (DTYPES[left_format.format], DTYPES[right_format.format])
        return multiply(*map(jax.lax.bitcast_convert_type, (left, right), dtypes))

    def in_wider(dtype: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        numbers = left_format.number.decode(left), right_format.number.decode(right)
        return multiply(*(each.astype(dtype) for each in numbers))

    product = jax.lax.platform_dependent(
        left.codes,
        right.codes,
        cuda=in_fp8,
        cpu=functools.partial(in_wider, jnp.float32),
        default=functools.partial(in_wider, jnp.bfloat16),
    )
    # One after the other: their product may be too small for float32 where the result is not, and
    # the smaller first, as the larger alone may be too large.
    smaller = jnp.minimum(left.scales, right.scales)
    return product * smaller * jnp.maximum(left.scales, right.scales)
