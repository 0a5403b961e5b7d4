"""Which part of a step's gradient comes in, told to the links that can add it up."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from microadam_jax.trees import KeyPath


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One of several micro-batches, whose mean gradient is that of the step.

    Attributes:
        index: int32 scalar, from 0.
        count: how many make a step.
        completes: whether the step is taken, or the gradient only added up.
        taken: the paths of the leaves whose gradients some link adds up.
    """

    index: ArrayLike
    count: int
    completes: bool
    taken: list[KeyPath] = dataclasses.field(default_factory=list)

    def share(self, gradient: jax.Array) -> jax.Array:
        """Returns what ``gradient`` contributes to the mean, in float32."""
        return gradient.astype(jnp.float32) / self.count

    def key(self, key: jax.Array) -> jax.Array:
        """A random key for adding this one up, from that of the step."""
        return jax.random.fold_in(key, self.index)
