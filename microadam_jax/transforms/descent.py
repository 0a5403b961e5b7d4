"""Decay and learning rate in the same pass as the link before them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformationExtraArgs, ScalarOrSchedule


def as_it_is(u: jax.Array) -> jax.Array:
    """What finishes an update behind which nothing comes."""
    return u


def finishes(finish: Any, updates: optax.Updates) -> Any:
    """A tree with a function for each leaf of ``updates``: ``finish``, or :func:`as_it_is`."""
    return jax.tree.map(lambda _: as_it_is, updates) if finish is None else finish


def read_by(finish: Callable[..., jax.Array], parameter: jax.Array) -> tuple[jax.Array, ...]:
    """What ``finish`` takes besides the update."""
    return () if finish is as_it_is else (parameter,)


def descend(
    link: optax.GradientTransformationExtraArgs,
    learning_rate: ScalarOrSchedule,
    weight_decay: float | jax.Array,
    mask: Any | Callable[[optax.Params], Any] | None,
) -> GradientTransformationExtraArgs:
    r"""Decays weights and applies the learning rate in the chunks in which ``link`` updates.

    With the link's update :math:`u_t`, parameters gain
    :math:`-\eta_t (u_t + \lambda \theta_t)`. State and numbers are those of ``optax.chain(link,
    add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))``, which would
    write all of :math:`u_t` before it reads it again.

    Args:
        link: a transformation whose update takes the argument ``finish``: a tree of functions,
            one for each leaf, from a part of :math:`u_t` and of :math:`\theta_t` to the result.
        learning_rate: :math:`\eta_t`, a number or a schedule.
        weight_decay: :math:`\lambda`.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.

    Returns:
        The transformation.
    """
    decay = optax.add_decayed_weights(weight_decay)
    scale = optax.scale_by_learning_rate(learning_rate)
    chain = optax.chain(link, optax.add_decayed_weights(weight_decay, mask), scale)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError("Weight decay needs the parameters: update(grads, state, params).")
        link_state, decay_state, scale_state = state

        def finish(decays: bool, u: jax.Array, p: jax.Array) -> jax.Array:
            if decays:
                u = jnp.asarray(decay.update(u, optax.EmptyState(), p)[0])
            return jnp.asarray(scale.update(u, scale_state)[0])

        decays = True if mask is None else mask(updates) if callable(mask) else mask
        each = jax.tree.map(
            lambda decays, part: jax.tree.map(lambda _: functools.partial(finish, decays), part),
            decays,
            updates,
        )
        updates, link_state = link.update(updates, link_state, params, finish=each, **extra_args)
        _, scale_state = scale.update(jnp.zeros(0), scale_state)
        return updates, (link_state, decay_state, scale_state)

    return GradientTransformationExtraArgs(chain.init, update)
