"""Norm, activation and product whose inputs are in 8-bit floating point, and saved so."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from microadam_jax.arguments import require_floating
from microadam_jax.layers.fp8_activation import Fp8Activation, Fp8ActivationCodes
from microadam_jax.layers.saved_codes import when_needed, with_codes
from microadam_jax.sharding import place_on

GROUPS = Fp8Activation("e4m3", group=16)


def fp8_rms_norm(x: jax.Array, scale: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    r"""Divides by the root mean square over the last axis, of inputs in E4M3.

    With :math:`\hat x = Q(x)` in groups of 16 (:func:`fp8_activation`),

    .. math::

        y = \gamma\, \hat x\, r, \qquad r = \left(\mathrm{mean}(\hat x^2) + \epsilon\right)^{-1/2} .

    Saved are the codes of :math:`\hat x` and :math:`r`: 1.125 bytes for each element, and 4 for
    each row. The arithmetic is float32, backwards too.

    Args:
        x: inputs ``(..., n)``, of any float dtype.
        scale: :math:`\gamma`, ``(n,)``.
        epsilon: :math:`\epsilon`.

    Returns:
        The outputs, in the shape and dtype of ``x``.

    Raises:
        TypeError: if one is no floating-point array.
        ValueError: if ``scale`` is no vector as long as the last axis.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.layers import fp8_rms_norm
        >>> y = fp8_rms_norm(jnp.array([7.0, -1.0]), jnp.ones(2))
        >>> print(f"{y[0]:.2f} {y[1]:.2f}")
        1.40 -0.20

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5.
    """
    require_floating("fp8_rms_norm", x=x, scale=scale)
    if x.ndim == 0 or scale.shape != x.shape[-1:]:
        raise ValueError(
            "fp8_rms_norm takes inputs (..., n) and a scale of shape (n,); got shapes "
            f"{x.shape} and {scale.shape}."
        )
    return _rms_norm(epsilon, x, scale)


def fp8_silu(x: jax.Array) -> jax.Array:
    r"""Computes :math:`\hat x\, \sigma(\hat x)` of inputs in E4M3, :math:`\hat x = Q(x)`.

    Saved are the codes of :math:`\hat x`, in groups of 16 (:func:`fp8_activation`).

    Args:
        x: of any shape and float dtype.

    Returns:
        The outputs, in the shape and dtype of ``x``.

    Raises:
        TypeError: if ``x`` is no floating-point array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.layers import fp8_silu
        >>> print(fp8_silu(jnp.array([-7.0, 0.0, 3.5])).round(3))
        [-0.006  0.     3.397]

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5.
    """
    require_floating("fp8_silu", x=x)
    return _silu(x)


def fp8_multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    r"""Multiplies element by element, of inputs in E4M3: :math:`Q(a)\, Q(b)`.

    Saved are the codes of both, in groups of 16 (:func:`fp8_activation`).

    Args:
        a: of any shape and float dtype.
        b: of the same shape and dtype.

    Returns:
        The product, in that shape and dtype.

    Raises:
        TypeError: if one is no floating-point array.
        ValueError: if shapes or dtypes differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.layers import fp8_multiply
        >>> print(fp8_multiply(jnp.array([7.0, 3.5]), jnp.array([1.75, -1.75])))
        [12.25  -6.125]

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5.
    """
    _require_alike("fp8_multiply", a=a, b=b)
    return _multiply(a, b)


def fp8_silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    r"""Computes the product of SwiGLU, :math:`Q(\mathrm{silu}(Q(g)))\, Q(u)`.

    Values and gradients are those of ``fp8_multiply(fp8_silu(gate), up)``, to the last bit where
    the compiler rounds alike. COAT saves three arrays, :math:`Q(g)`, :math:`Q(u)` and the codes of
    the SiLU; the third follows from the first and is computed again here.

    Args:
        gate: :math:`g`, of any shape and float dtype.
        up: :math:`u`, of the same shape and dtype.

    Returns:
        The product, in that shape and dtype.

    Raises:
        TypeError: if one is no floating-point array.
        ValueError: if shapes or dtypes differ.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.layers import fp8_silu_gate
        >>> y = fp8_silu_gate(jnp.array([7.0, -7.0]), jnp.array([1.75, 1.75]))
        >>> print(f"{y[0]:.2f} {y[1]:.2f}")
        12.25 -0.01

    Reference: Xi et al., COAT (arXiv 2410.19313), Section 5.
    """
    _require_alike("fp8_silu_gate", gate=gate, up=up)
    return _silu_gate(gate, up)


def _require_alike(name: str, **arrays: jax.Array) -> None:
    require_floating(name, **arrays)
    a, b = arrays.values()
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"{name} takes two arrays of one shape and dtype; got {a.dtype}{list(a.shape)} and "
            f"{b.dtype}{list(b.shape)}. Broadcast or cast one of them first."
        )


def _decoded(codes: Fp8ActivationCodes) -> jax.Array:
    return GROUPS.decode(codes, codes.codes.shape)


def _rounded(x: jax.Array) -> jax.Array:
    return _decoded(GROUPS.encode(x))


# Each function: its forward pass from codes, then its two rules.


def _norm_of(
    codes: Fp8ActivationCodes, scale: jax.Array, epsilon: float, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    x = _decoded(codes)
    r = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return (x * r * scale.astype(jnp.float32)).astype(dtype), r


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(epsilon: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    return _norm_of(GROUPS.encode(x), scale, epsilon, x.dtype)[0]


def _rms_norm_forward(epsilon: float, x: jax.Array, scale: jax.Array) -> tuple[jax.Array, Any]:
    codes = GROUPS.encode(x)
    y, r = _norm_of(codes, scale, epsilon, x.dtype)
    y, saved = with_codes(y, (codes, r))
    return y, (saved, scale)


def _rms_norm_backward(epsilon: float, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    del epsilon
    (codes, r), scale = saved
    dy, (codes, r) = when_needed(dy, (codes, r))
    normed, dy32 = _decoded(codes) * r, dy.astype(jnp.float32)
    dscale = jnp.sum(dy32 * normed, axis=tuple(range(dy.ndim - 1)))
    slope = dy32 * scale.astype(jnp.float32)
    dx = r * (slope - normed * jnp.mean(slope * normed, axis=-1, keepdims=True))
    dscale = place_on(dscale, scale, (0,))
    return dx.astype(dy.dtype), dscale.astype(scale.dtype)


def _silu_of(x: jax.Array, dtype: Any) -> jax.Array:
    return (x * jax.nn.sigmoid(x)).astype(dtype)


def _silu_slope(x: jax.Array) -> jax.Array:
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


@jax.custom_vjp
def _silu(x: jax.Array) -> jax.Array:
    return _silu_of(_rounded(x), x.dtype)


def _silu_forward(x: jax.Array) -> tuple[jax.Array, Any]:
    codes = GROUPS.encode(x)
    return with_codes(_silu_of(_decoded(codes), x.dtype), codes)


def _silu_backward(codes: Fp8ActivationCodes, dy: jax.Array) -> tuple[jax.Array]:
    dy, codes = when_needed(dy, codes)
    return ((dy.astype(jnp.float32) * _silu_slope(_decoded(codes))).astype(dy.dtype),)


@jax.custom_vjp
def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    return (_rounded(a) * _rounded(b)).astype(a.dtype)


def _multiply_forward(a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    codes = GROUPS.encode(a), GROUPS.encode(b)
    return with_codes((_decoded(codes[0]) * _decoded(codes[1])).astype(a.dtype), codes)


def _multiply_backward(codes: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    dy, (a, b) = when_needed(dy, codes)
    da, db = (dy.astype(jnp.float32) * _decoded(other) for other in (b, a))
    return da.astype(dy.dtype), db.astype(dy.dtype)


@jax.custom_vjp
def _silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    return _gated(GROUPS.encode(gate), GROUPS.encode(up), gate.dtype)


def _gated(gate: Fp8ActivationCodes, up: Fp8ActivationCodes, dtype: Any) -> jax.Array:
    silu = _rounded(_silu_of(_decoded(gate), dtype))
    return (silu * _decoded(up)).astype(dtype)


def _silu_gate_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Any]:
    codes = GROUPS.encode(gate), GROUPS.encode(up)
    return with_codes(_gated(*codes, gate.dtype), codes)


def _silu_gate_backward(codes: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    dy, codes = when_needed(dy, codes)
    gate, up = map(_decoded, codes)
    dy32 = dy.astype(jnp.float32)
    dsilu = (dy32 * up).astype(dy.dtype)
    dup = dy32 * _rounded(_silu_of(gate, dy.dtype))
    dgate = dsilu.astype(jnp.float32) * _silu_slope(gate)
    return dgate.astype(dy.dtype), dup.astype(dy.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
_silu.defvjp(_silu_forward, _silu_backward)
_multiply.defvjp(_multiply_forward, _multiply_backward)
_silu_gate.defvjp(_silu_gate_forward, _silu_gate_backward)
