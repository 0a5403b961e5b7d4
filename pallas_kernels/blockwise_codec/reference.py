"""Decode, step and encode: the specification."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# From float32 moments and the inputs to an output and the new moments.
Step = Callable[[tuple[jax.Array, ...], tuple[jax.Array, ...]], tuple[jax.Array, Sequence[Any]]]


def step(
    rule: Step,
    codecs: Sequence[Any],
    encoded: Sequence[Any],
    inputs: Sequence[jax.Array],
    keys: Sequence[Any],
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The output of ``rule``, and the new moments as their codecs store them.

    Args:
        rule: the step.
        codecs: those of the moments.
        encoded: what they made.
        inputs: the gradient, and arrays that broadcast against it.
        keys: what each codec draws random numbers from; None for those that draw none.
    """
    output, *new = moved(rule, codecs, encoded, inputs)
    return output, stored(codecs, new, keys)


def moved(
    rule: Step, codecs: Sequence[Any], encoded: Sequence[Any], inputs: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """The output of ``rule``, and the new moments in float32."""
    shape = inputs[0].shape
    moments = (codec.decode(x, shape) for codec, x in zip(codecs, encoded, strict=True))
    output, new = rule(tuple(moments), tuple(inputs))
    return output, *(x.astype(jnp.float32) for x in new)


def stored(
    codecs: Sequence[Any], moments: Sequence[jax.Array], keys: Sequence[Any]
) -> tuple[Any, ...]:
    """Moments as their codecs store them."""
    return tuple(codec.encode(x, key) for codec, x, key in zip(codecs, moments, keys, strict=True))


def codecs_unsupported(codecs: Sequence[Any]) -> str | None:
    """Says why no kernel takes these codecs; None if one may."""
    for codec in codecs:
        if not hasattr(codec, "codes_of"):
            return f"{codec.name} is not stored in blocks of codes"
        if codec.bits < 4:
            return f"codes have 4 or 8 bits; those of {codec.name} have {codec.bits}"
    return None


@jax.jit
def uniform(position: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Uniform random numbers in [0, 1), each a hash of a position and a key.

    Args:
        position: int32, of any shape.
        low: int32, half of the key.
        high: int32, the other half.

    Returns:
        float32 multiples of 2^-24, of the shape of ``position``.
    """
    bits = _mix(_mix(position ^ low) + high)
    return _shifted(bits, 8).astype(jnp.float32) * np.float32(2**-24)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which each bit of ``x`` flips about half of the bits.

    Two multiplications between three shifts, with the constants that Chris Wellons found to be
    the least biased of this form.
    """
    x = (x ^ _shifted(x, 16)) * np.uint32(0x7FEB352D).view(np.int32)
    x = (x ^ _shifted(x, 15)) * np.uint32(0x846CA68B).view(np.int32)
    return x ^ _shifted(x, 16)


def _shifted(x: jax.Array, bits: int) -> jax.Array:
    """``x >> bits``, zeros coming in."""
    return jax.lax.shift_right_logical(x, np.int32(bits))
