"""Which part of a step's gradient comes in, told to the links that can add it up."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Generator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from microadam_jax.trees import KeyPath

_current: contextvars.ContextVar["MicroBatch | None"] = contextvars.ContextVar(
    "current", default=None
)


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
        """What ``gradient`` contributes to the mean, float32."""
        return gradient.astype(jnp.float32) / self.count

    def key(self, key: jax.Array) -> jax.Array:
        """A random key for adding this one up, from that of the step."""
        return jax.random.fold_in(key, self.index)


@contextlib.contextmanager
def of_micro_batch(batch: MicroBatch | None) -> Generator[None]:
    """Links that are initialized or updated inside are told of ``batch``.

    An argument of the update might be dropped by a wrapper on the way to them.

    Args:
        batch: the micro-batch, or None to hide it from links that see something else.
    """
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def told_micro_batch() -> MicroBatch | None:
    """The micro-batch that comes in; None where each gradient is that of a step."""
    return _current.get()
