"""A product with frozen weights in NF4 that keeps nothing but their codes for its backward pass."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from microadam_jax.arguments import require_floating
from microadam_jax.codecs.nf4 import Nf4, Nf4Codes, nf4
from microadam_jax.layers.saved_codes import when_needed
from microadam_jax.sharding import explicit_sharding


def nf4_linear(
    x: jax.Array,
    codes: Nf4Codes,
    shape: tuple[int, int],
    codec: Nf4 = nf4(),
    *,
    out_sharding: Any = None,
) -> jax.Array:
    r"""Multiplies by frozen weights that are dequantized when they are needed.

    .. math::

        y = x \hat W, \qquad \nabla_x = \nabla_y \hat W^T, \qquad
        \hat W = Q^{-1}(c) \text{ in the dtype of } x .

    The weights have no gradient. The backward pass keeps their codes, dequantizes again, and keeps
    neither ``x`` nor the weights.

    Args:
        x: ``(..., in)`` of any float dtype, which is also that of the product.
        codes: the weights, from :meth:`microadam_jax.codecs.Nf4.encode`.
        shape: ``(in, out)`` of the weights.
        codec: that encoded them.
        out_sharding: of the product, as of ``jnp.matmul``, where mesh axes are Explicit and do not
            tell it. There codes are to be whole, or cut along the rows of the weights.

    Returns:
        ``(..., out)``.

    Raises:
        TypeError: if ``x`` is no floating-point array, or ``codes`` are no :class:`Nf4Codes`.
        ValueError: if the last axis of ``x`` is not ``in``, or the codes are not of that shape.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from microadam_jax.codecs import nf4
        >>> from microadam_jax.layers import nf4_linear
        >>> w = jax.random.normal(jax.random.key(0), (64, 128)) / 8
        >>> x = jax.random.normal(jax.random.key(1), (16, 64))
        >>> y = nf4_linear(x, nf4().encode(w), w.shape)
        >>> bool(jnp.linalg.norm(y - x @ w) < 0.1 * jnp.linalg.norm(y))
        True

    Reference: Dettmers et al., QLoRA (arXiv 2305.14314), Equation 5.
    """
    require_floating("nf4_linear", x=x)
    if not isinstance(codes, Nf4Codes):
        raise TypeError(f"nf4_linear takes Nf4Codes as codes; got {type(codes).__name__}.")
    expected = jax.eval_shape(codec.zeros, jax.ShapeDtypeStruct(shape, jnp.float32))
    if x.shape[-1:] != shape[:1] or [c.shape for c in codes] != [c.shape for c in expected]:
        raise ValueError(
            f"nf4_linear got x {x.shape} and {[c.shape for c in codes]} for weights {shape}; "
            f"{codec.name} stores such weights in {[c.shape for c in expected]}, and x must end in "
            f"{shape[0]} elements. Stacked layers are taken one at a time, as by a scan."
        )
    product = _Product(codec, tuple(shape), explicit_sharding(x), out_sharding)
    return _multiply(product, x, codes)


class _Product(NamedTuple):
    """Holds what is static of a product.

    Attributes:
        codec: that of the weights.
        shape: of the weights.
        as_x: how the input is sharded on Explicit axes; None if it is not.
        out_sharding: of the product, if it was given.
    """

    codec: Nf4
    shape: tuple[int, int]
    as_x: NamedSharding | None
    out_sharding: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: _Product, x: jax.Array, codes: Nf4Codes) -> jax.Array:
    weights = product.codec.decode(codes, product.shape, x.dtype)
    return jnp.matmul(x, weights, out_sharding=product.out_sharding)


def _forward(product: _Product, x: jax.Array, codes: Nf4Codes) -> tuple[jax.Array, Nf4Codes]:
    return _multiply(product, x, codes), codes


def _backward(product: _Product, codes: Nf4Codes, dy: jax.Array) -> tuple[jax.Array, Any]:
    dy, late = when_needed(dy, codes)
    weights = product.codec.decode(late, product.shape, dy.dtype)
    dx = jnp.matmul(dy, weights.T, out_sharding=product.as_x)
    return dx, jax.tree.map(_no_gradient, codes)


def _no_gradient(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


_multiply.defvjp(_forward, _backward)
