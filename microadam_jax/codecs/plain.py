"""A quantity kept as it is, in a float format that the hardware has."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from microadam_jax.codecs.rounding import Draw
from microadam_jax.codecs.row_by_row import RowByRow
from microadam_jax.state_arrays import state_zeros


class PlainValues(NamedTuple):
    """Holds ``codes``: the parameter's shape, in the codec's dtype."""

    codes: jax.Array


@dataclasses.dataclass(frozen=True)
class Plain(RowByRow):
    """Keeps a tensor in ``dtype``, rounded to nearest.

    Args:
        dtype: a floating dtype such as ``"float32"`` or ``"bfloat16"``.

    Raises:
        TypeError: if ``dtype`` is not a dtype.
        ValueError: if ``dtype`` is not a floating dtype.
    """

    Encoded = PlainValues
    signed = True
    needs_key = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                "Plain.dtype must be a floating dtype such as 'float32' or 'bfloat16'; got "
                f"{self.dtype!r}."
            )

    @property
    def name(self) -> str:
        """Returns the dtype."""
        return self.dtype

    def zeros(self, parameter: jax.Array) -> PlainValues:
        """Returns zeros like ``parameter``."""
        return PlainValues(state_zeros(parameter, parameter.shape, self.dtype))

    def encode(self, x: jax.Array, key: jax.Array | Draw | None = None) -> PlainValues:
        """Rounds the float32 tensor ``x`` to ``dtype``."""
        del key
        return PlainValues(x.astype(self.dtype))

    def decode(self, encoded: PlainValues, shape: tuple[int, ...]) -> jax.Array:
        """Returns the stored tensor in float32."""
        return encoded.codes.reshape(shape).astype(jnp.float32)
