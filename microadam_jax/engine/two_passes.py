"""A step on quantized moments as GPUs run XLA's program: one pass for scales, one for codes.

XLA has no kernel in which what a reduction gives is read by elements of the same array: it writes
the moments, and reads them again. Here the second pass computes them again from their codes, and
so does each array in it: XLA fuses what has one reader, however long it takes, and then joins the
kernels that read the same arrays. Scales of root mean squares take a pass between the two.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.blocks import as_blocks_of, as_row, merge, split
from microadam_jax.codecs import Codec, Plain
from microadam_jax.codecs.float8 import TINY, Float8
from microadam_jax.codecs.packing import pack_codes
from microadam_jax.codecs.rounding import dither
from microadam_jax.codecs.scaled import Scaled, largest_magnitudes
from pallas_kernels.blockwise_codec import moved
from pallas_kernels.blockwise_codec.reference import Step
from pallas_kernels.topk_compress.one_reduction import unpacked

Arrays = tuple[jax.Array, ...]
ComputeMoment = Callable[[], jax.Array]


def takes(codecs: Sequence[Codec]) -> bool:
    """True if moments are stored in blocks of codes, or as they are."""
    return all(isinstance(codec, Plain) or hasattr(codec, "codes_of") for codec in codecs)


def step(
    rule: Step,
    codecs: Sequence[Any],
    encoded: Sequence[Any],
    inputs: Sequence[jax.Array],
    keys: Sequence[jax.Array | None],
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Returns the output of a rule, and the new moments as their codecs store them.

    Numbers are those of :func:`pallas_kernels.blockwise_codec.step`.

    Args:
        rule: the step.
        codecs: of the moments, which :func:`takes` takes.
        encoded: the moments, as their codecs made them.
        inputs: the gradient, and arrays that broadcast against it.
        keys: for each codec a typed random key, or None if it draws no random numbers.
    """
    again = _Again(rule, codecs, encoded, inputs)
    found = again.read(_extremes)
    if any(map(_cuts, codecs)):
        again, found = again.after(found)
        found = again.read(_cut, found)
    again, found = again.after(found)
    return again()[0], again.read(_stored, found, again.encoded, keys)


class _Again:
    """Computes the output and the new moments, each time in a program of its own to the compiler.

    Codes are changed by a zero that the compiler does not know, another one each time.
    """

    def __init__(
        self, rule: Step, codecs: Sequence[Any], encoded: Sequence[Any], inputs: Sequence[jax.Array]
    ) -> None:
        self.rule, self.codecs, self.encoded, self.inputs = rule, codecs, encoded, inputs
        readers = 1 + 2 * len(codecs)
        self.zeros = iter(jax.lax.optimization_barrier((jnp.zeros((), jnp.uint8),) * readers))

    def __call__(self) -> Arrays:
        zero = next(self.zeros)
        codecs = [_Decoder(codec, zero) for codec in self.codecs]
        return moved(self.rule, codecs, self.encoded, self.inputs)

    def read(self, function: Callable[..., Any], *each: Sequence[Any]) -> tuple[Any, ...]:
        """Calls a function with each codec, its moment's computation, and one of ``each``."""
        moments = [lambda i=i: self()[1 + i] for i in range(len(self.codecs))]
        return tuple(map(function, self.codecs, moments, *each))

    def after(self, found: Any) -> tuple["_Again", Any]:
        """The next pass, which shall not read what this one wrote, and what this one found."""
        found, encoded, inputs = jax.lax.optimization_barrier(
            (found, tuple(self.encoded), tuple(self.inputs))
        )
        return _Again(self.rule, self.codecs, encoded, inputs), found


class _Decoder(NamedTuple):
    """A codec's values as one kernel computes them, from codes that are changed by ``zero``."""

    codec: Any
    zero: jax.Array

    def decode(self, encoded: Any, shape: tuple[int, ...]) -> jax.Array:
        codec = self.codec
        if isinstance(codec, Plain):
            return codec.decode(encoded, shape)
        if codec.bits == 8:
            return codec.decode(encoded._replace(codes=encoded.codes ^ self.zero), shape)
        codes, *scales = encoded
        layout = codec.blocks.of_shape(shape)
        codes = unpacked(as_blocks_of(codes, layout.count), codec.bits) ^ self.zero
        return merge(codec.values_of(codes, [x[..., None] for x in scales]), layout, shape)


def _extremes(codec: Any, moment: ComputeMoment) -> Arrays:
    """Returns the extreme magnitudes of each block, of which its scales are made."""
    if isinstance(codec, Plain):
        return ()

    def block() -> jax.Array:
        x = moment()
        return split(x, codec.blocks.layout_of(x))

    largest = largest_magnitudes(block())
    expands = isinstance(codec, Float8) and codec.expansion
    return (largest, _smallest(block())) if expands else (largest,)


def _cuts(codec: Any) -> bool:
    """True if the scale of a block is a number of root mean squares."""
    return isinstance(codec, Scaled) and codec.deviations is not None


def _cut(codec: Any, moment: ComputeMoment, extremes: Arrays) -> Arrays:
    """Returns scales in place of the largest magnitudes, where they may be smaller."""
    if not _cuts(codec):
        return extremes
    x = moment()
    return (codec.cut(split(x, codec.blocks.layout_of(x)), *extremes),)


def _smallest(block: jax.Array) -> jax.Array:
    """As :meth:`Float8.smallest`, with one reader for each array on the way."""
    bits = jax.lax.bitcast_convert_type(block, jnp.uint32) & np.uint32(0x7FFFFFFF)
    # What does not count is below zero, which of unsigned integers is above all else.
    first = TINY.view(np.uint32) + np.uint32(1)
    least = jnp.min(bits - first, axis=-1, keepdims=True)
    infinite = np.float32(np.inf).view(np.uint32) - first
    return jax.lax.bitcast_convert_type(jnp.minimum(least, infinite) + first, jnp.float32)


def _stored(
    codec: Any, moment: ComputeMoment, extremes: Arrays, before: Any, key: jax.Array | None
) -> Any:
    """Returns a moment as it is stored, given its extremes and how it was stored before."""
    x = moment()
    if isinstance(codec, Plain):
        return codec.encode(x, key)
    layout, scales = codec.blocks.layout_of(x), codec.scales_of(*extremes)
    block, xi = split(x, layout), None if key is None else split(dither(key, x.shape), layout)
    if isinstance(codec, Float8):
        # One reader each: decoding takes so long that else the moment would be written.
        sign = jnp.sign(split(moment(), layout))
        codes = codec.codes_of_parts(jnp.abs(block), sign, scales, xi)
    else:
        codes = codec.codes_of(block, scales, xi)
    codes = codes.astype(jnp.uint8)
    if codec.bits < 8:
        # A kernel of XLA writes arrays of one size, and bytes are fewer.
        codes = jax.lax.optimization_barrier(codes)
        codes = pack_codes(jnp.split(codes, 8 // codec.bits, axis=-1))
    new = zip(scales, before[1:], strict=True)
    return type(before)(as_row(codes), *(s[..., 0].astype(old.dtype) for s, old in new))
