"""The cross entropy of an output head, without the logits of the whole vocabulary at a time."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from microadam_jax.arguments import require_positive
from microadam_jax.sharding import explicit_sharding


def chunked_cross_entropy(
    x: jax.Array, kernel: jax.Array, labels: jax.Array, *, chunk: int = 4096
) -> jax.Array:
    r"""Computes the cross entropy of a linear head in chunks of its vocabulary.

    Of tokens :math:`x_t`, a head :math:`W` and labels :math:`y_t` it is

    .. math::

        \ell_t = \log \sum_v \exp(x_t^T W_v) - x_t^T W_{y_t}

    The forward pass goes over chunks of columns :math:`W_v` and keeps the logarithm of the sum so
    far. The backward pass computes each chunk of logits again, and writes that chunk's columns of
    the gradient of :math:`W` in place:

    .. math::

        \bar W_v = \sum_t \bar \ell_t \, (p_{tv} - [v = y_t]) \, x_t, \qquad
        \bar x_t = \bar \ell_t \sum_v (p_{tv} - [v = y_t]) \, W_v

    So no more than ``tokens * chunk`` logits are there at a time, and the gradient of the head is
    there once, in its own dtype. It costs one more product with the head.

    Args:
        x: ``(..., width)``, the inputs of the head, in the dtype to compute in. Logits and sums
            are float32.
        kernel: ``(width, vocabulary)``; of a tied embedding its transpose.
        labels: integers ``(...)``, from 0 on and below ``vocabulary``; the loss of others is NaN.
            To leave tokens out, take ``jnp.where(kept, loss, 0)``, which has no gradient there.
        chunk: columns of the head at a time. A vocabulary that it does not divide is read with a
            last chunk that overlaps the one before.

    Returns:
        float32 ``(...)``, the cross entropy of each token in nats.

    Raises:
        TypeError: if labels are no integers.
        ValueError: if the shapes do not fit, or ``chunk`` is not a positive integer.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from microadam_jax.layers import chunked_cross_entropy
        >>> x, kernel = jnp.ones((2, 3, 8)), jnp.linspace(-1, 1, 80).reshape(8, 10)
        >>> labels = jnp.array([[1, 2, 3], [4, 5, 6]])
        >>> loss = chunked_cross_entropy(x, kernel, labels, chunk=4)
        >>> whole = optax.softmax_cross_entropy_with_integer_labels(x @ kernel, labels)
        >>> bool(jnp.allclose(loss, whole, atol=1e-5))
        True

    Reference: Cut Your Losses in Large-Vocabulary Language Models (arXiv 2411.09009).
    """
    require_positive("chunk", chunk)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, columns of kernel; got {labels.dtype}.")
    if (
        kernel.size == 0
        or kernel.ndim != 2
        or x.shape[-1:] != kernel.shape[:1]
        or labels.shape != x.shape[:-1]
    ):
        raise ValueError(
            "x must be (..., width), kernel (width, vocabulary) and labels (...); got "
            f"{x.shape}, {kernel.shape} and {labels.shape}."
        )
    return _cross_entropy(min(chunk, kernel.shape[1]), x, kernel, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(chunk: int, x: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return _forward(chunk, x, kernel, labels)[0]


def _forward(
    chunk: int, x: jax.Array, kernel: jax.Array, labels: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    placement = _Placement.of(x, kernel)

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, picked = carry
        start, columns, fresh = _columns(i, chunk, kernel)
        logits = jnp.where(
            fresh, _product(x, _at(kernel, start, chunk), placement.logits), -jnp.inf
        )
        new = jnp.maximum(largest, jnp.max(logits, axis=-1))
        finite = jnp.where(new == -jnp.inf, 0, new)  # no column so far has any probability
        total = total * jnp.exp(largest - finite)
        total += jnp.sum(jnp.exp(logits - finite[..., None]), axis=-1)
        own = fresh & (columns == labels[..., None])
        return new, total, picked + jnp.sum(jnp.where(own, logits, 0), axis=-1)

    zeros = jnp.zeros(labels.shape, jnp.float32)
    if placement.tokens is not None:
        zeros = jax.sharding.reshard(zeros, placement.tokens)
    carry = (zeros - jnp.inf, zeros, zeros)
    largest, total, picked = jax.lax.fori_loop(0, _count(chunk, kernel), body, carry)
    log_sum = largest + jnp.log(total)
    known = (labels >= 0) & (labels < kernel.shape[1])
    return jnp.where(known, log_sum - picked, jnp.nan), (x, kernel, labels, log_sum)


def _backward(
    chunk: int, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    x, kernel, labels, log_sum = saved
    tokens = tuple(range(labels.ndim))
    placement = _Placement.of(x, kernel)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_x, d_kernel = carry
        start, columns, fresh = _columns(i, chunk, kernel)
        weights = _at(kernel, start, chunk)
        chosen = (columns == labels[..., None]).astype(jnp.float32)
        d_logits = jnp.exp(_product(x, weights, placement.logits) - log_sum[..., None]) - chosen
        d_logits = (d_logits * gradient[..., None]).astype(x.dtype)
        # Columns that overlap are written twice, with the same values, and count once in d_x.
        own = jnp.tensordot(
            x,
            d_logits,
            (tokens, tokens),
            preferred_element_type=jnp.float32,
            out_sharding=placement.kernel,
        )
        d_kernel = jax.lax.dynamic_update_slice_in_dim(
            d_kernel, own.astype(kernel.dtype), start, axis=1
        )
        d_part = jnp.where(fresh, d_logits, 0)
        return d_x + _product(d_part, weights.T, placement.x), d_kernel

    carry = (jnp.zeros_like(x, jnp.float32), jnp.zeros_like(kernel))
    d_x, d_kernel = jax.lax.fori_loop(0, _count(chunk, kernel), body, carry)
    return d_x.astype(x.dtype), d_kernel, None


_cross_entropy.defvjp(_forward, _backward)


def _count(chunk: int, kernel: jax.Array) -> int:
    return -(-kernel.shape[1] // chunk)


def _columns(i: jax.Array, chunk: int, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a chunk's first column, all of them, and whether no chunk before has them."""
    start = jnp.minimum(i * chunk, kernel.shape[1] - chunk)
    columns = start + jnp.arange(chunk)
    return start, columns, columns >= i * chunk


def _at(kernel: jax.Array, start: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(kernel, start, chunk, axis=1)


class _Placement(NamedTuple):
    """Tells how arrays are sharded on Explicit axes; None for each if none is."""

    x: NamedSharding | None = None
    kernel: NamedSharding | None = None
    logits: NamedSharding | None = None
    tokens: NamedSharding | None = None

    @classmethod
    def of(cls, x: jax.Array, kernel: jax.Array) -> "_Placement":
        known = explicit_sharding(x) or explicit_sharding(kernel)
        if known is None:
            return cls()
        spec = jax.typeof(x).sharding.spec
        spec = (*spec, *[None] * (x.ndim - len(spec)))
        specs = (
            PartitionSpec(*spec),
            jax.typeof(kernel).sharding.spec,
            PartitionSpec(*spec[:-1], None),
            PartitionSpec(*spec[:-1]),
        )
        return cls(*(NamedSharding(known.mesh, spec) for spec in specs))


def _product(x: jax.Array, weights: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Returns ``x @ weights`` of the dtype of ``x``, summed up in float32."""
    return jnp.matmul(
        x, weights.astype(x.dtype), preferred_element_type=jnp.float32, out_sharding=out_sharding
    )
