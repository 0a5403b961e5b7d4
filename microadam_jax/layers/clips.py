"""Clips of gradients that are not all there at a time."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

ClipName = Literal["value", "layer", "global", "last_global"]


class Clip(NamedTuple):
    """Clips some gradients, by themselves or by a norm that is known of all.

    Attributes:
        name: of the clip; None for none.
        max_norm: the largest norm, or magnitude.
        in_float32: whether what is clipped stays in float32 and is not rounded to its own dtype.
    """

    name: ClipName | None
    max_norm: float
    in_float32: bool = False

    @classmethod
    def named(cls, name: ClipName | None, max_norm: float) -> "Clip":
        """Returns the clip of a name.

        Raises:
            ValueError: if there is none, or ``max_norm`` is not a positive number.
        """
        if name is not None and name not in get_args(ClipName):
            names = ", ".join(map(repr, get_args(ClipName)))
            raise ValueError(f"clip must be None or one of {names}; got {name!r}.")
        if name is not None and not (isinstance(max_norm, int | float) and max_norm > 0):
            raise ValueError(f"max_norm must be a positive number; got {max_norm!r}.")
        return cls(name, max_norm)

    def of(self, gradients: Any, norm: jax.Array | None) -> Callable[[jax.Array], jax.Array]:
        """Returns a function that clips one of some gradients.

        Args:
            gradients: of a layer, or of what is outside of the layers.
            norm: of all gradients, where it is needed.
        """
        if self.name is None:
            return lambda g: g
        if self.name == "value":
            return lambda g: self._rounded(
                jnp.clip(g.astype(jnp.float32), -self.max_norm, self.max_norm), g
            )
        if self.name == "layer":
            norm = jnp.sqrt(sum_of_squares(gradients))
        assert norm is not None
        scale = jnp.where(norm < self.max_norm, 1.0, self.max_norm / jnp.where(norm > 0, norm, 1))
        return lambda g: self._rounded(g.astype(jnp.float32) * scale, g)

    def _rounded(self, clipped: jax.Array, g: jax.Array) -> jax.Array:
        return clipped if self.in_float32 else clipped.astype(g.dtype)


def sum_of_squares(gradients: Any) -> jax.Array:
    """Returns the sum of the squares of all arrays of a tree, in float32."""
    leaves = jax.tree.leaves(gradients)
    zero = jnp.zeros([], jnp.float32)
    return sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in leaves), zero)
