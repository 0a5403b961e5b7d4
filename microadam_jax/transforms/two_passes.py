"""The step on stored moments as GPUs run XLA's program: a pass for scales, then one for codes.

XLA does not fuse a reduction with what reads its result. So a leaf's moments are computed twice,
for the scales of their blocks and for the codes: that is less to read than moments written before.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.blocks import BlockLayout, as_blocks_of, as_row, merge, split
from microadam_jax.codecs import Codec, Plain
from microadam_jax.codecs.nibbles import pack_nibbles
from microadam_jax.codecs.rounding import dither
from pallas_kernels.blockwise_codec.reference import Step


def takes_two_passes(codecs: Sequence[Codec]) -> bool:
    """True if each moment is stored as it is, or in codes over scales of blocks."""
    return all(isinstance(codec, Plain) or hasattr(codec, "codes_of") for codec in codecs)


def in_two_passes(
    rule: Step,
    codecs: Sequence[Any],
    encoded: Sequence[Any],
    inputs: Sequence[jax.Array],
    keys: Sequence[jax.Array | None],
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Dequantizes moments, takes a step, and quantizes the new moments.

    Args:
        rule: see :func:`pallas_kernels.blockwise_codec.reference.step`.
        codecs: those of the moments, which :func:`takes_two_passes`.
        encoded: what they made.
        inputs: the gradient, and arrays that broadcast against it.
        keys: for each codec a typed random key; not used by those that draw none.

    Returns:
        The output of ``rule``, and the new moments as their codecs store them.
    """
    shape = inputs[0].shape

    def stepped(encoded: Any, inputs: Any) -> tuple[jax.Array, list[jax.Array]]:
        moments = (_decoded(codec, x, shape) for codec, x in zip(codecs, encoded, strict=True))
        output, new = rule(tuple(moments), tuple(inputs))
        return output, [x.astype(jnp.float32) for x in new]

    _, new = stepped(encoded, inputs)
    scales = [
        () if isinstance(codec, Plain) else codec.measure(split(x, codec.blocks.layout_of(x)))
        for codec, x in zip(codecs, new, strict=True)
    ]
    # Behind a barrier the moments are computed again, and not written here to be read there.
    encoded, inputs, scales = jax.lax.optimization_barrier((encoded, inputs, scales))
    arguments = list(zip(codecs, encoded, scales, keys, strict=True))
    halved: dict[int, Any] = {}
    if any(map(_shares_bytes, codecs)):
        # Half as many bytes as elements: what makes them is a kernel of its own. It comes first, as
        # the output may take the gradient's place.
        _, new = stepped(encoded, inputs)
        for i, (codec, before, scale, key) in enumerate(arguments):
            if _shares_bytes(codec):
                halved[i] = _encoded(codec, before, new[i], scale, key)
        encoded, inputs, halved = jax.lax.optimization_barrier((encoded, inputs, halved))
    output, new = stepped(encoded, inputs)
    stored = (
        halved[i] if i in halved else _encoded(codec, before, new[i], scale, key)
        for i, (codec, before, scale, key) in enumerate(arguments)
    )
    return output, tuple(stored)


def _shares_bytes(codec: Any) -> bool:
    return not isinstance(codec, Plain) and codec.bits == 4


def _decoded(codec: Any, encoded: Any, shape: tuple[int, ...]) -> jax.Array:
    """A moment. All arrays have its shape, so that one kernel can write its code and the output."""
    if isinstance(codec, Plain):
        return codec.decode(encoded, shape)
    codes, *scales = encoded
    layout = codec.blocks.layout(shape[-1] if shape else 1)
    blocks = as_blocks_of(codes, layout.count)
    if codec.bits == 4:
        # Not the halves joined: a fusion would write them.
        both = (blocks[..., None, :] >> np.array([[0], [4]], np.uint8)) & 0xF
        blocks = both.reshape(*blocks.shape[:-1], layout.size)
    spread = [_of_elements(scale[..., None], layout, shape) for scale in scales]
    return codec.values_of(merge(blocks, layout, shape), spread)


def _encoded(
    codec: Any, before: Any, x: jax.Array, scales: Sequence[jax.Array], key: jax.Array | None
) -> Any:
    """A moment as its codec stores it, given the scales ``(..., 1)`` of its blocks."""
    if isinstance(codec, Plain):
        return codec.encode(x)
    layout = codec.blocks.layout_of(x)
    xi = None
    if codec.needs_key:
        assert key is not None
        xi = dither(key, x.shape)
    if codec.bits == 8 and not layout.padding:
        spread = [_of_elements(scale, layout, x.shape) for scale in scales]
        codes = split(codec.codes_of(x, spread, xi), layout).astype(jnp.uint8)
    else:
        block, part = split(x, layout), None if xi is None else split(xi, layout)
        if codec.bits == 8:
            codes = codec.codes_of(block, scales, part).astype(jnp.uint8)
        else:
            halves = jnp.split(block, 2, axis=-1)
            parts = (None, None) if part is None else jnp.split(part, 2, axis=-1)
            each = (codec.codes_of(x, scales, xi) for x, xi in zip(halves, parts, strict=True))
            codes = pack_nibbles(*(half.astype(jnp.uint8) for half in each))
    of_blocks = (
        scale[..., 0].astype(old.dtype) for scale, old in zip(scales, before[1:], strict=True)
    )
    return codec.Encoded(as_row(codes), *of_blocks)


def _of_elements(x: jax.Array, layout: BlockLayout, shape: tuple[int, ...]) -> jax.Array:
    """What each element of ``shape`` has from its block, of ``(..., count, 1)``."""
    return merge(jnp.broadcast_to(x, (*x.shape[:-1], layout.size)), layout, shape)
