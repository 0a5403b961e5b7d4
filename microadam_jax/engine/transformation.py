"""Checks of leaves, states and hyperparameters, for all transformations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath

from microadam_jax.execution import scope, within
from microadam_jax.memory import warn_of_more_than_adam
from microadam_jax.sharding import cut_as_states
from microadam_jax.trees import Compressed, is_compressed, path_name

DECAY_RATES = ("b1", "b2", "b3", "beta")


def transformation(
    init: Callable[..., Any],
    update: Callable[..., Any],
    *,
    kind: Callable[..., Any] = optax.GradientTransformationExtraArgs,
    warns_as: str | None = None,
    **hyperparameters: Any,
) -> Any:
    """Makes a transformation of functions that need not look at what they are given.

    Parameters are floating-point arrays, or Python floats, which become arrays. Parameters that
    have no gradient (``None``) may be anything in ``update``, such as the functions of an Equinox
    model or what it does not train. States may hold NumPy arrays, as after a restore.

    Args:
        init: from parameters to a state.
        update: from updates, state and parameters, or None, to new updates and state.
        kind: what is returned.
        warns_as: its name, if ``init`` is to warn of parameters whose state takes more bytes than
            AdamW's.
        **hyperparameters: numbers of the rule, as :func:`require_hyperparameters` checks them.

    Returns:
        The transformation.

    Raises:
        TypeError: if a hyperparameter is an array in fewer bits than float32; in ``init`` and
            ``update``, for leaves that are no floating-point arrays.
        ValueError: if a hyperparameter is outside its range; in ``update``, if a gradient has
            another shape than its parameter.

    Examples:
        >>> import jax.numpy as jnp
        >>> from microadam_jax.engine.transformation import transformation
        >>> tx = transformation(lambda params: (), lambda updates, state, params: (updates, state))
        >>> tx.init({"steps": jnp.arange(3)})
        Traceback (most recent call last):
        TypeError: The parameter 'steps' has dtype int32, ... Leave it out: optax.masked, ...
    """
    require_hyperparameters(**hyperparameters)

    def checked_init(params: optax.Params) -> Any:
        shared = scope().zeros
        with within(zeros={} if shared is None else shared):
            state = init(_arrays(params)[0])
        if warns_as is not None:
            warn_of_more_than_adam(warns_as, state, params)
        return state

    def checked_update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> Any:
        updates, gradients = _arrays(updates, is_compressed)
        state = _on_device(state)
        if params is not None:
            params, parameters = _arrays(_where_updated(updates, params))
            _require_shapes(gradients, parameters)
        if any(any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(state)):
            updates, params = cut_as_states(state, updates, params)
        return update(updates, state, params, **extra_args)

    return kind(checked_init, checked_update)


def require_hyperparameters(**hyperparameters: Any) -> None:
    """Refuses hyperparameters in fewer bits than float32, and rates that are none.

    Args:
        **hyperparameters: Python numbers, arrays, or None, by their names. Numbers named ``b1``,
            ``b2``, ``b3`` or ``beta`` lie in [0, 1), and those named ``eps`` are not negative.

    Raises:
        TypeError: if one is an array of a floating dtype that is narrower.
        ValueError: if a Python number is outside its range.
    """
    for name, value in hyperparameters.items():
        dtype = getattr(value, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
            raise TypeError(
                f"{name} is given in {dtype}, which rounds 0.999 to 1 or 1e-8 to 0. Give it in "
                "float32: optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32), which "
                "otherwise takes the dtype of the parameters."
            )
        if not isinstance(value, int | float):
            continue
        if name in DECAY_RATES and not 0 <= value < 1:
            raise ValueError(
                f"{name} is the share of a moving average that stays, and must lie in [0, 1); got "
                f"{value}."
            )
        if name.endswith("eps") and not value >= 0:
            raise ValueError(f"{name} must be 0 or a small positive number; got {value}.")


def _arrays(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[Any, list[tuple[KeyPath, Any]]]:
    """``tree`` with arrays for Python floats and NumPy arrays, and its leaves by their paths.

    Args:
        tree: of parameters or updates.
        is_leaf: True for what is left as it is.

    Raises:
        TypeError: for leaves of other kinds.
    """
    leaves, structure = jax.tree.flatten_with_path(tree, is_leaf=is_leaf)
    for path, leaf in leaves:
        if not isinstance(leaf, Compressed):
            _require_real(path, leaf)
    if any(isinstance(leaf, float | np.ndarray | np.generic) for _, leaf in leaves):
        leaves = [(path, _as_array(leaf)) for path, leaf in leaves]
        tree = structure.unflatten([leaf for _, leaf in leaves])
    return tree, leaves


def _as_array(leaf: Any) -> Any:
    if type(leaf) is float:
        return jnp.asarray(leaf, jnp.result_type(float))  # of a dtype that is not weak
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf


def _require_real(path: KeyPath, leaf: Any) -> None:
    """Refuses a leaf that is no floating-point array and no Python float."""
    dtype = getattr(leaf, "dtype", None)
    if type(leaf) is float or (dtype is not None and jnp.issubdtype(dtype, jnp.floating)):
        return
    name = f"The parameter {path_name(path)!r}"
    if dtype is None and not isinstance(leaf, bool | int | complex):
        raise TypeError(
            f"{name} is no array but {type(leaf).__name__}. Give init and update floating-point "
            "arrays alone, with None for all else: equinox.filter(model, "
            "equinox.is_inexact_array)."
        )
    dtype = jnp.result_type(leaf) if dtype is None else dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} has dtype {dtype}, and its two parts would need moments of their own. Wrap "
            "the optimizer in optax.contrib.split_real_and_imaginary."
        )
    raise TypeError(
        f"{name} has dtype {dtype}, or its gradient has, and an optimizer moves floating-point "
        "parameters only. Leave it out: optax.masked, or optax.partition with set_to_zero."
    )


def _where_updated(updates: Any, params: Any) -> Any:
    """``params``, without what has no update."""
    if all(leaf is not None for leaf in jax.tree.leaves(updates, is_leaf=lambda x: x is None)):
        return params
    return jax.tree.map(
        lambda update, parameter: None if update is None else parameter,
        updates,
        params,
        is_leaf=lambda node: node is None or is_compressed(node),
    )


def _require_shapes(
    gradients: list[tuple[KeyPath, Any]], parameters: list[tuple[KeyPath, Any]]
) -> None:
    """Refuses gradients of other shapes than their parameters', which would be broadcast."""
    if len(gradients) != len(parameters):
        return  # Whoever maps over both says what differs.
    for (path, gradient), (_, parameter) in zip(gradients, parameters, strict=True):
        if not isinstance(gradient, Compressed) and gradient.shape != parameter.shape:
            raise ValueError(
                f"The gradient of {path_name(path)!r} has shape {gradient.shape} where its "
                f"parameter has {parameter.shape}. Give update each gradient in its parameter's "
                "shape."
            )


def _on_device(state: Any) -> Any:
    """``state`` with JAX's arrays for NumPy's, which have no ``at``."""
    if not any(isinstance(x, np.ndarray | np.generic) for x in jax.tree.leaves(state)):
        return state
    return jax.tree.map(_as_array, state)
