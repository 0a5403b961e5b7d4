"""Codes of a few bits, scaled by the largest or the typical magnitude of each block."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from microadam_jax.blocks import Blocks, as_blocks_of, as_row, blocked_shape, merge, split
from microadam_jax.codecs.maps import Map
from microadam_jax.codecs.packing import pack_codes, unpack_codes
from microadam_jax.codecs.rounding import Draw, dither
from microadam_jax.codecs.row_by_row import RowByRow
from microadam_jax.state_arrays import require_whole, state_zeros

ROUNDINGS = ("nearest", "stochastic")


class ScaledCodes(NamedTuple):
    """A tensor ``(*lead, n)`` of ``blocks`` blocks of ``size`` elements.

    Attributes:
        codes: ``(*lead, blocks * size)`` uint8 for 8 bits, half of that for 4: element ``j`` of a
            block in the low half of its byte ``j``, element ``j + size / 2`` in the high half;
            and likewise quarters of a block for 2 bits. An axis for the blocks would be padded by
            TPUs, which like rows of many times 128.
        scales: ``(*lead, blocks)`` float32, the largest number that each block can hold.
    """

    codes: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class Scaled(RowByRow):
    r"""Quantizes the elements of a block over the block's largest magnitude.

    With the numbers :math:`v_c` of a map and :math:`s = \max_i |x_i|` over a block,

    .. math::

        Q(x_i) = \arg\min_c |x_i / s - v_c|, \qquad Q^{-1}(c) = s\,v_c ,

    where halves go to the lower code. Stochastic rounding takes the neighbour above with the
    probability that makes the expectation exact. A block of zeros is all zero bytes and stays
    exactly zero, whatever the map. A block that holds an infinity or a NaN becomes NaN.

    Args:
        map: the numbers.
        blocks: the rule that cuts rows into blocks.
        rounding: ``"nearest"`` or ``"stochastic"``.
        keep_sign: whether a number that would be rounded to zero takes the code beside it: a
            negative one the code below, as in bitsandbytes, and a positive one, if there are no
            negative, the code above.
        deviations: if a number :math:`a`, then :math:`s = a \sqrt{\mathrm{mean}\, x_i^2}` over
            the elements of the block that are not zero, unless the largest magnitude is smaller;
            what is larger than :math:`s` becomes :math:`s`.

    Raises:
        ValueError: if ``rounding`` is neither, if the codes of a block do not fill whole bytes,
            ``keep_sign`` does not fit the map, or ``deviations`` is not positive.

    Reference: Dettmers et al. (arXiv 2110.02861), Li et al. (arXiv 2309.01507).
    """

    Encoded = ScaledCodes
    statistics = 1
    map: Map
    blocks: Blocks
    rounding: str = "nearest"
    keep_sign: bool = False
    deviations: float | None = None

    def __post_init__(self) -> None:
        require_rounding(self.rounding)
        if self.deviations is not None and not self.deviations > 0:
            raise ValueError(
                "deviations must be a positive number of root mean squares, or None for the "
                f"largest magnitude of a block; got {self.deviations!r}."
            )
        if self.blocks.multiple * self.bits % 8:
            raise ValueError(
                f"Codes of {self.bits} bits fill whole bytes of blocks that are multiples of "
                f"{8 // self.bits} elements; give Blocks(..., multiple={8 // self.bits})."
            )
        if self.keep_sign and self.map.zero is None:
            raise ValueError(
                f"keep_sign=True moves numbers off the code of zero; {self.map.name} has none. "
                "Leave it out."
            )

    @property
    def name(self) -> str:
        """Returns the codec in a word, as it stands in a checkpoint."""
        return codec_name(self.map.name, self.blocks)

    @property
    def signed(self) -> bool:
        """Returns True if it holds negative numbers."""
        return self.map.signed

    @property
    def needs_key(self) -> bool:
        """Returns True if ``encode`` must be given a key."""
        return self.rounding == "stochastic"

    def zeros(self, parameter: jax.Array) -> ScaledCodes:
        """Returns the encoding of zeros: all bytes zero.

        Raises:
            ValueError: if the sharding of ``parameter`` does not divide its blocks.
        """
        return ScaledCodes(
            codes=code_zeros(parameter, self.map, self.blocks),
            scales=state_zeros(
                parameter,
                blocked_shape(parameter.shape, self.blocks.layout_of(parameter)),
                jnp.float32,
            ),
        )

    def encode(self, x: jax.Array, key: jax.Array | Draw | None = None) -> ScaledCodes:
        """Encodes the float32 tensor ``x``; ``key`` is used by stochastic rounding only."""
        codes, scales = self.encode_rows(x, key)
        return ScaledCodes(as_row(codes), scales)

    def encode_rows(self, x: jax.Array, key: jax.Array | Draw | None) -> ScaledCodes:
        """Encodes some rows of a tensor; codes keep the axis of blocks."""
        layout = self.blocks.layout_of(x)
        block = split(x, layout)
        (scale,) = self.measure(block)
        xi = None if key is None else split(dither(key, x.shape), layout)
        codes = packed(self.map, self._codes_of, block, scale, xi)
        return ScaledCodes(codes, scale[..., 0])

    def decode(self, encoded: ScaledCodes, shape: tuple[int, ...]) -> jax.Array:
        """Returns the float32 tensor of ``shape`` that ``encoded`` stands for."""
        layout = self.blocks.of_shape(shape)
        count = encoded.scales.shape[-1]
        if self.bits == 8:
            # Cut last: XLA moves a reshape behind each operation in a round of all its passes.
            numbers = as_blocks_of(decode_numbers(self.map, encoded.codes), count)
        else:
            numbers = decode_numbers(self.map, as_blocks_of(encoded.codes, count))
        return merge(numbers * encoded.scales[..., None], layout, shape)

    @functools.cached_property
    def bits(self) -> int:
        """Counts the bits of a code."""
        return self.map.bits

    @functools.partial(jax.jit, static_argnums=0)
    def measure(self, block: jax.Array) -> tuple[jax.Array]:
        """Returns the scales ``(..., 1)`` of blocks ``(..., size)``; NaN if not finite."""
        largest = largest_magnitudes(block)
        return self.scales_of(largest if self.deviations is None else self.cut(block, largest))

    def cut(self, block: jax.Array, largest: jax.Array) -> jax.Array:
        """Returns the root mean squares to cut at, or the largest magnitudes if those are less."""
        assert self.deviations is not None
        return jnp.minimum(self.deviations * root_mean_square(block, largest), largest)

    def scales_of(self, largest: jax.Array) -> tuple[jax.Array]:
        """Returns the scales of blocks, from their largest magnitudes."""
        return (jnp.where(jnp.isfinite(largest), largest, jnp.nan),)

    def _codes_of(self, block: jax.Array, scale: jax.Array, xi: jax.Array | None) -> jax.Array:
        return self.codes_of(block, (scale,), xi)

    @functools.partial(jax.jit, static_argnums=0)
    def codes_of(
        self, block: jax.Array, statistics: Sequence[jax.Array], xi: jax.Array | None
    ) -> jax.Array:
        """Returns the codes ``(..., size)`` of blocks with their scales, as integers."""
        return scaled_codes(self.map, block, statistics[0], xi, self.keep_sign)

    @functools.partial(jax.jit, static_argnums=0)
    def values_of(self, codes: jax.Array, statistics: Sequence[jax.Array]) -> jax.Array:
        """Returns the float32 numbers ``(..., size)`` that codes of blocks stand for."""
        return self.map.decode(codes) * statistics[0]


def as_blocks(block: int | Blocks) -> Blocks:
    """Returns the rule for blocks of at most ``block`` elements, or ``block`` itself.

    Raises:
        TypeError: if ``block`` is neither an integer nor a :class:`Blocks`, as if it is traced.
    """
    return block if isinstance(block, Blocks) else Blocks(block)


def require_rounding(rounding: str) -> None:
    """Refuses a rounding that does not exist.

    Raises:
        ValueError: if it is neither ``"nearest"`` nor ``"stochastic"``.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be 'nearest' or 'stochastic'; got {rounding!r}.")


def codec_name(base: str, blocks: Blocks) -> str:
    """Returns the name of a format: all that stored arrays depend on, so not their rounding."""
    shards = "" if blocks.shards == Blocks().shards else f"x{blocks.shards}"
    multiple = "" if blocks.multiple == Blocks().multiple else f"m{blocks.multiple}"
    return f"{base}_b{blocks.size}{shards}{multiple}"


def code_zeros(parameter: jax.Array, numbers: Map, blocks: Blocks) -> jax.Array:
    """Zero bytes for the codes of ``parameter``."""
    layout = blocks.layout_of(parameter)
    require_whole(parameter, blocked_shape(parameter.shape, layout))
    row = layout.count * layout.size * numbers.bits // 8
    return state_zeros(parameter, (*parameter.shape[:-1], row), jnp.uint8)


def magnitudes(x: jax.Array) -> jax.Array:
    """Absolute values to find the largest of, infinite for a NaN.

    Whether a maximum passes a NaN on depends on the device.
    """
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))


def largest_magnitudes(block: jax.Array) -> jax.Array:
    """Returns the largest magnitudes ``(..., 1)`` of blocks, infinite where one holds a NaN."""
    return jnp.max(magnitudes(block), axis=-1, keepdims=True)


def root_mean_square(block: jax.Array, largest: jax.Array) -> jax.Array:
    """The root mean square ``(..., 1)`` of the elements that are not zero, nor padding."""
    relative = block / jnp.where(largest > 0, largest, 1)  # squares of small numbers are zero
    count = jnp.sum((block != 0).astype(jnp.float32), axis=-1, keepdims=True)
    mean = jnp.sum(jnp.square(relative), axis=-1, keepdims=True) / jnp.maximum(count, 1)
    return largest * jnp.sqrt(mean)


def scaled_codes(
    numbers: Map, block: jax.Array, scale: jax.Array, xi: jax.Array | None, keep_sign: bool = False
) -> jax.Array:
    """The codes of blocks over a scale that broadcasts against them, as integers."""
    usable = scale > np.finfo(np.float32).tiny
    y = block / jnp.where(usable, scale, 1)
    codes = numbers.encode(y, 0.5 if xi is None else xi)
    if keep_sign:
        zero = numbers.zero
        assert zero is not None
        # Not of the block: a second reader would make XLA write it, where GPUs go in two passes.
        off, beside = (y < 0, zero - 1) if numbers.signed else (y > 0, zero + 1)
        codes = jnp.where(off & (codes == zero), beside, codes)
    return jnp.where(usable, codes, 0)


def packed(
    numbers: Map,
    codes_of: Callable[..., jax.Array],
    block: jax.Array,
    scale: jax.Array,
    xi: jax.Array | None,
) -> jax.Array:
    """The integer codes ``codes_of(block, scale, xi)`` of blocks ``(..., size)`` as bytes.

    Parts of a block that will share bytes are coded each by itself: CPUs take three times as
    long to code the whole and take the codes apart.
    """
    if numbers.bits == 8:
        return codes_of(block, scale, xi).astype(jnp.uint8)
    count = 8 // numbers.bits
    of_parts = zip(
        _parts(block, count),
        _parts(scale, count),
        [None] * count if xi is None else _parts(xi, count),
        strict=True,
    )
    return pack_codes([codes_of(*part).astype(jnp.uint8) for part in of_parts])


def _parts(x: jax.Array, count: int) -> Sequence[jax.Array]:
    """Equal parts of the last axis, or as many times what broadcasts along it."""
    return [x] * count if x.shape[-1] == 1 else jnp.split(x, count, axis=-1)


def unpacked(numbers: Map, codes: jax.Array) -> jax.Array:
    """Integer codes ``(..., size)`` from their bytes."""
    return codes if numbers.bits == 8 else unpack_codes(codes, numbers.bits)


@functools.partial(jax.jit, static_argnums=0)
def encode_scaled(
    numbers: Map, block: jax.Array, scale: jax.Array, xi: jax.Array | None
) -> jax.Array:
    """The packed codes of blocks over a scale that broadcasts against them."""
    return packed(numbers, functools.partial(scaled_codes, numbers), block, scale, xi)


@functools.partial(jax.jit, static_argnums=0)
def decode_numbers(numbers: Map, codes: jax.Array) -> jax.Array:
    """The numbers of packed codes."""
    return numbers.decode(unpacked(numbers, codes))
