"""What a state codec is: float32 in, stored arrays out, and back."""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from microadam_jax.codecs.affine import Affine4
from microadam_jax.codecs.float8 import float8
from microadam_jax.codecs.low_bit import dynamic4, dynamic8, int4, linear2, linear4
from microadam_jax.codecs.plain import Plain
from microadam_jax.codecs.rank1 import rank1_dynamic4, rank1_linear4
from microadam_jax.codecs.rounding import Draw


@runtime_checkable
class ResidualCodec(Protocol):
    """Stores an array in a number format; ``encode`` returns a NamedTuple of arrays."""

    @property
    def name(self) -> str:
        """Returns the codec in a word; two codecs of one name read each other's arrays."""
        ...

    @property
    def signed(self) -> bool:
        """Returns True if it holds negative numbers."""
        ...

    @property
    def needs_key(self) -> bool:
        """Returns True if ``encode`` rounds stochastically and must be given a key."""
        ...

    def encode(self, x: jax.Array, key: Any) -> tuple[jax.Array, ...]:
        """Encodes the float32 tensor ``x``."""
        ...

    def decode(self, encoded: Any, shape: tuple[int, ...]) -> jax.Array:
        """Returns the float32 tensor of ``shape`` that ``encoded`` stands for."""
        ...


class Codec(ResidualCodec, Protocol):
    """Stores a parameter-shaped quantity of an optimizer in a number format.

    The leading axes of the encoded arrays are the tensor's, so that the parameter's
    ``PartitionSpec`` is valid on each; ``zeros`` returns the encoding of zero.
    """

    @property
    def Encoded(self) -> Any:
        """Returns the NamedTuple of the stored arrays."""
        ...

    def zeros(self, parameter: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the encoding of an all-zero tensor of the shape and sharding of ``parameter``."""
        ...

    def encode(self, x: jax.Array, key: jax.Array | Draw | None) -> tuple[jax.Array, ...]:
        """Encodes the float32 tensor ``x``."""
        ...


def named_codecs() -> dict[str, Codec]:
    """The codecs that have a name, each as its constructor makes it by default."""
    return {
        "float32": Plain("float32"),
        "bfloat16": Plain("bfloat16"),
        "affine4": Affine4(),
        "dynamic8": dynamic8(),
        "dynamic8_unsigned": dynamic8(signed=False),
        "dynamic4": dynamic4(),
        "dynamic4_unsigned": dynamic4(signed=False),
        "int4": int4(),
        "linear2": linear2(),
        "linear4": linear4(),
        "linear4_unsigned": linear4(signed=False),
        "rank1_linear4": rank1_linear4(),
        "rank1_dynamic4": rank1_dynamic4(),
        "e4m3": float8(),
        "e5m2": float8("e5m2"),
        "e4m3_expanded": float8(expansion=True),
        "e5m2_expanded": float8("e5m2", expansion=True),
    }


def as_codec(codec: Codec | str) -> Codec:
    """Returns the codec that ``codec`` names, or ``codec`` itself.

    Raises:
        TypeError: if ``codec`` is neither a codec nor a name.
        ValueError: if the name is not a known one.
    """
    if not isinstance(codec, str):
        if isinstance(codec, type) or not hasattr(codec, "Encoded"):
            raise TypeError(f"A codec must be one such as dynamic8(), or a name; got {codec!r}.")
        return codec
    named = named_codecs()
    if codec not in named:
        raise ValueError(f"Unknown codec {codec!r}; choose one of {sorted(named)} or a codec.")
    return named[codec]


def encoded_bytes(codec: Codec | str, shape: tuple[int, ...]) -> int:
    """Counts the bytes in which a codec stores a tensor.

    Args:
        codec: the codec or its name.
        shape: the tensor's shape.

    Returns:
        The bytes of all its arrays, exactly.

    Raises:
        TypeError: if ``codec`` is neither a codec nor a name.
        ValueError: if the name is not a known one.

    Examples:
        >>> from microadam_jax.codecs import encoded_bytes
        >>> encoded_bytes("dynamic4", (1024, 1024)) / 1024**2
        0.53125
    """
    parameter = jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays = jax.eval_shape(as_codec(codec).zeros, parameter)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
