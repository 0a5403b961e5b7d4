"""What a state codec is: float32 in, stored arrays out, and back."""

from typing import Any, ClassVar, Protocol

import jax

from microadam_jax.codecs.affine import Affine4
from microadam_jax.codecs.plain import Plain


class Codec(Protocol):
    """A number format for a parameter-shaped quantity that an optimizer keeps.

    ``encode`` returns a NamedTuple of arrays whose leading axes are the tensor's, so that the
    parameter's ``PartitionSpec`` is valid on each; ``zeros`` returns the encoding of zero.
    """

    Encoded: ClassVar[Any]

    @property
    def needs_key(self) -> bool:
        """Whether ``encode`` rounds stochastically and must be given a key."""
        ...

    def zeros(self, parameter: jax.Array) -> tuple[jax.Array, ...]:
        """The encoding of an all-zero tensor of the shape and sharding of ``parameter``."""
        ...

    def encode(self, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, ...]:
        """Encodes the float32 tensor ``x``."""
        ...

    def decode(self, encoded: Any, shape: tuple[int, ...]) -> jax.Array:
        """The float32 tensor of ``shape`` that ``encoded`` stands for."""
        ...


def as_codec(codec: Codec | str) -> Codec:
    """The codec that ``codec`` names, or ``codec`` itself.

    Raises:
        ValueError: if the name is not one of those allowed.
    """
    if not isinstance(codec, str):
        return codec
    named: dict[str, Codec] = {
        "float32": Plain("float32"),
        "bfloat16": Plain("bfloat16"),
        "affine4": Affine4(),
    }
    if codec not in named:
        raise ValueError(f"Unknown codec {codec!r}; choose one of {sorted(named)} or a codec.")
    return named[codec]
