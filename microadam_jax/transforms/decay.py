"""Weight decay of the weights that an update has already been applied to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from microadam_jax.engine.transformation import transformation

Mask = Any | Callable[[optax.Params], Any] | None  # which leaves decay; all if None
NEEDS_PARAMS = (
    "Weight decay needs the parameters: call tx.update(updates, state, params). With "
    "weight_decay=0, a Python number and not an array, they may be left out."
)


class DecayUpdatedWeightsState(NamedTuple):
    """Counts the steps of a learning rate schedule.

    Attributes:
        count: int32 scalar, steps taken.
    """

    count: jax.Array


def is_zero(weight_decay: Any) -> bool:
    """True if nothing decays, in any step."""
    return isinstance(weight_decay, int | float) and weight_decay == 0


def require_number(weight_decay: Any) -> None:
    """Refuses a schedule of the decay, and what is no number.

    Raises:
        TypeError: if ``weight_decay`` is a function, or a text.
    """
    if callable(weight_decay) or isinstance(weight_decay, str):
        raise TypeError(
            f"weight_decay must be a number; got {weight_decay!r}. It is multiplied by the "
            "learning rate, which may be a schedule; to change it by itself use "
            "optax.inject_hyperparams."
        )


def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Returns ``optax.scale_by_learning_rate``, which fails in the first step without a rate.

    Args:
        learning_rate: a number or a schedule.

    Raises:
        TypeError: if it is neither.
    """
    number = jnp.isscalar(learning_rate) and not isinstance(learning_rate, bool | str)
    if not (number or callable(learning_rate)):
        raise TypeError(
            "learning_rate must be a number, or a schedule: a function from the step to a number; "
            f"got {learning_rate!r}."
        )
    return optax.scale_by_learning_rate(learning_rate)


def add_decayed_weights(weight_decay: Any, mask: Mask) -> optax.GradientTransformation:
    """Returns ``optax.add_decayed_weights``, which needs no parameters if nothing decays.

    Args:
        weight_decay: a number or a schedule.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.

    Returns:
        The transformation, with the state that Optax gives it.
    """
    decay = optax.add_decayed_weights(weight_decay, mask)
    if not is_zero(weight_decay):
        return decay
    return optax.GradientTransformation(
        decay.init, lambda updates, state, params=None: (updates, state)
    )


def decay_updated_weights(
    learning_rate: optax.ScalarOrSchedule, weight_decay: ArrayLike, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    r"""Lets weights decay after their update: the last link of a chain.

    With the update :math:`u_t` that comes in, the learning rate :math:`\eta_t` and the decay
    :math:`\lambda`,

    .. math::

        \theta_{t+1} = (1 - \eta_t \lambda) (\theta_t + u_t)

    ``optax.add_decayed_weights`` decays the weights before their update, which differs by
    :math:`\eta_t \lambda u_t`.

    Args:
        learning_rate: :math:`\eta_t`, a number or a schedule; that of the link before this one.
        weight_decay: :math:`\lambda`.
        mask: which leaves decay: a tree of booleans, or a function from the parameters to one.

    Returns:
        The transformation.

    Raises:
        TypeError: if ``weight_decay`` is a schedule.
        ValueError: in ``update`` without ``params``, unless ``weight_decay`` is the number 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax import decay_updated_weights
        >>> tx = decay_updated_weights(learning_rate=0.1, weight_decay=1.0)
        >>> params = jnp.array([1.0])
        >>> updates, _ = tx.update(jnp.array([-0.5]), tx.init(params), params)
        >>> print(params + updates)  # (1 - 0.1) (1 - 0.5)
        [0.45]
    """
    require_number(weight_decay)

    def init(params: optax.Params) -> DecayUpdatedWeightsState:
        del params
        return DecayUpdatedWeightsState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: DecayUpdatedWeightsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecayUpdatedWeightsState]:
        del extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        if params is None and is_zero(weight_decay):
            return updates, DecayUpdatedWeightsState(count)
        if params is None:
            raise ValueError(NEEDS_PARAMS)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        share = jnp.float32(rate) * weight_decay

        def decay(u: jax.Array, parameter: jax.Array) -> jax.Array:
            new = parameter.astype(jnp.float32) + u.astype(jnp.float32)
            return (u.astype(jnp.float32) - share * new).astype(u.dtype)

        return jax.tree.map(decay, updates, params), DecayUpdatedWeightsState(count)

    tx = transformation(init, update)
    return tx if mask is None else optax.masked(tx, mask)
