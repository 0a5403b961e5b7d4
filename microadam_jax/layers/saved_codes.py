"""Codes that a forward pass leaves for its backward pass."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

RESIDUALS = "compressed_residuals"  # the name that policies of jax.checkpoint know them by


def with_codes(outputs: Any, codes: Any) -> tuple[Any, Any]:
    """Returns a forward pass's outputs, and codes that are ready when the outputs are.

    Otherwise XLA may compute the codes in the backward pass, and keep what they are codes of.
    """
    outputs, codes = jax.lax.optimization_barrier((outputs, codes))
    return outputs, checkpoint_name(codes, RESIDUALS)


def in_turn(array: Any, codes: Any) -> tuple[Any, Any]:
    """Returns an array that is not encoded before some codes are there, and these codes.

    Otherwise XLA for TPUs encodes arrays of one shape together, and keeps for all of them at once
    a float32 copy and the broadcast scales.
    """
    return jax.lax.optimization_barrier((array, codes))


def when_needed(cotangents: Any, codes: Any) -> tuple[Any, Any]:
    """Returns a backward pass's cotangents, and codes that are not read before these are there.

    Otherwise XLA may decode them early, and keep what it decoded.

    Raises:
        TypeError: if the backward pass is differentiated, and there are codes in it.
    """
    if any(leaf.dtype.itemsize == 1 for leaf in jax.tree.leaves(codes)):
        codes = once_differentiable(codes)
    return jax.lax.optimization_barrier((cotangents, codes))


def once_differentiable(arrays: Any) -> Any:
    """Returns arrays of a backward pass that may not be differentiated.

    Codes have no derivative: that of what they are decoded to would be without them.

    Raises:
        TypeError: if the backward pass is differentiated, so far as it depends on the arrays.
    """
    return jax.tree.map(_itself, arrays)


@jax.custom_jvp
def _itself(x: jax.Array) -> jax.Array:
    return x


@_itself.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "The second derivative of a function that saves codes for its backward pass was asked for, "
        "as a gradient penalty or a Hessian is. It would be wrong: use the function itself there, "
        "not compress_residuals of it or an FP8 layer."
    )
