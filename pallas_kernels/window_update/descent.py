"""Applies what follows an update: decay, the learning rate, and the new parameters."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Descent:
    """Applies decay and the learning rate to an update, or to a part of it.

    Attributes:
        step: scalar, minus the learning rate.
        decay: scalar, or None where the leaf does not decay.
        applies: whether the parameters that result are returned instead of the update.
    """

    step: jax.Array
    decay: jax.Array | None
    applies: bool

    def __call__(self, u: jax.Array, p: jax.Array) -> jax.Array:
        """The update ``u`` of ``p``, decayed and scaled, or ``p`` after it."""
        u = descent(u, p, self.step, self.decay)
        return (p + u).astype(p.dtype) if self.applies else u


def descent(
    u: jax.Array, params: jax.Array, step: jax.Array, decay: jax.Array | None = None
) -> jax.Array:
    r""":math:`s (u + \lambda \theta)`: decoupled weight decay and learning rate, as in Optax."""
    return step * (u if decay is None else u + decay * params)
