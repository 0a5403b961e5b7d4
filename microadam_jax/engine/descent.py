"""Decay, learning rate and the new parameters in the same pass as the link before them."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformationExtraArgs, ScalarOrSchedule

from microadam_jax.transforms.decay import (
    NEEDS_PARAMS,
    Mask,
    add_decayed_weights,
    is_zero,
    require_number,
    scale_by_learning_rate,
)
from microadam_jax.trees import is_compressed
from pallas_kernels.window_update import Descent


class Fusable(GradientTransformationExtraArgs):
    """An optimizer whose ``update(..., apply=True)`` returns new parameters, not updates."""

    __slots__ = ()


def as_it_is(u: jax.Array) -> jax.Array:
    """Returns an update unchanged, behind which no transformation comes."""
    return u


# From the targets of updates to a tree with a function for each, from its update to the result.
Finish = Callable[[Any], Any]


def finishes(finish: Finish | None, targets: Any) -> Any:
    """The functions that ``finish`` makes for the leaves of ``targets``, or :func:`as_it_is`."""
    if finish is not None:
        return finish(targets)
    return jax.tree.map(lambda _: as_it_is, targets, is_leaf=is_compressed)


def read_by(finish: Callable[..., jax.Array], parameter: Any) -> tuple[Any, ...]:
    """Returns what ``finish`` takes besides the update."""
    return () if finish is as_it_is else (parameter,)


def reads_parameter(finish: Callable[..., jax.Array]) -> bool:
    """Returns True if the result depends on more of the parameter than its shape."""
    return isinstance(finish, Descent) and (finish.applies or finish.decay is not None)


def kind_of(finish: Callable[..., jax.Array]) -> Hashable:
    """Equal for functions of one step that compute the same."""
    if isinstance(finish, Descent):
        return finish.applies, finish.decay is None, jax.typeof(finish.step)
    return finish


def applies(finish: Callable[..., jax.Array]) -> TypeGuard[Descent]:
    """Returns True if parameters result, and no update."""
    return isinstance(finish, Descent) and finish.applies


def replaced_by(finish: Callable[..., jax.Array]) -> int:
    """Returns the input that a result replaces: the first, a gradient, or the last, a parameter."""
    return -1 if applies(finish) else 0


def descend(
    *links: GradientTransformationExtraArgs,
    learning_rate: ScalarOrSchedule,
    weight_decay: float | jax.Array,
    mask: Mask,
    together: Callable[..., GradientTransformationExtraArgs] = optax.chain,
) -> Fusable:
    r"""Decays weights and applies the learning rate where the last of ``links`` updates.

    With the links' update :math:`u_t`, parameters gain
    :math:`-\eta_t (u_t + \lambda \theta_t)`. State and numbers are those of ``optax.chain(*links,
    add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))``, which would
    write all of :math:`u_t` before it reads it again.

    Args:
        *links: transformations, of which the update of the last takes the argument ``finish``. It
            makes a tree of functions, one for each parameter, from a part of :math:`u_t` and of
            :math:`\theta_t` to the result.
        learning_rate: :math:`\eta_t`, a number or a schedule.
        weight_decay: :math:`\lambda`.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.
        together: runs the links one after another, as ``optax.chain`` does.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``weight_decay`` is a schedule.
        ValueError: in ``update`` without ``params``, unless ``weight_decay`` is the number 0.
    """
    require_number(weight_decay)
    chained, scale = together(*links), scale_by_learning_rate(learning_rate)
    chain = optax.chain(*links, add_decayed_weights(weight_decay, mask), scale)
    decays_at_all = not is_zero(weight_decay)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        apply: bool = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if params is None and apply:
            raise ValueError(
                "fused_apply updates the parameters: give them as the third argument, "
                "apply(gradients, state, params)."
            )
        if params is None and decays_at_all:
            raise ValueError(NEEDS_PARAMS)
        *link_states, decay_state, scale_state = state
        decays = True if mask is None else mask(updates) if _is_function(mask) else mask

        def finish_of(decays: bool, p: jax.Array) -> Descent:
            # As arrays of the dtypes in which Optax multiplies.
            one = jnp.ones((), p.dtype)
            decay = weight_decay * one if decays and decays_at_all else None
            one = one if decay is None else jnp.ones((), decay.dtype)
            return Descent(jnp.asarray(scale.update(one, scale_state)[0]), decay, apply)

        def finish(targets: Any) -> Any:
            def below(decays: bool, part: Any) -> Any:
                return jax.tree.map(
                    functools.partial(finish_of, decays), part, is_leaf=is_compressed
                )

            return jax.tree.map(below, decays, targets)

        results: Any = chained.update(
            updates, tuple(link_states), params, finish=finish, **extra_args
        )
        updates, link_states = results
        _, scale_state = scale.update(jnp.zeros(0), scale_state)
        return updates, (*link_states, decay_state, scale_state)

    return Fusable(chain.init, update)


def _is_function(mask: Any) -> bool:
    """Returns True if ``mask`` is to be called: an Equinox module may be a tree of booleans."""
    leaves = jax.tree.leaves(mask)
    return callable(mask) and all(map(callable, leaves))
