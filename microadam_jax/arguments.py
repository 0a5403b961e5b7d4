"""Checks of arguments that several parts of the library take."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def require_kind(kind: type, **parts: Any) -> None:
    """Refuses parts of another class.

    Args:
        kind: the class, which can be made without arguments.
        **parts: instances of it by their names.

    Raises:
        TypeError: if one is of another class.
    """
    for name, value in parts.items():
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} must be an instance of {kind.__name__}, such as {kind.__name__}(); got "
                f"{value!r}."
            )


def require_transformation(**parts: Any) -> None:
    """Refuses what is no transformation of Optax.

    Args:
        **parts: transformations by their names.

    Raises:
        TypeError: if one is none, such as a function that makes one.
    """
    for name, value in parts.items():
        if not (hasattr(value, "init") and hasattr(value, "update")):
            hint = f" Call it: {value.__name__}(...)." if hasattr(value, "__name__") else ""
            raise TypeError(
                f"{name} must be a transformation of Optax, such as optax.adamw(1e-3); got "
                f"{value!r}.{hint}"
            )


def as_transformation(**part: Any) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that takes extra arguments.

    Args:
        **part: any transformation by its name.

    Raises:
        TypeError: if it is none, such as a function that makes one.
    """
    require_transformation(**part)
    (inner,) = part.values()
    return optax.with_extra_args_support(inner)


def require_positive(name: str, value: object, *arguments: str) -> None:
    """Refuses a number that is no positive integer.

    Args:
        name: of the number.
        value: the number.
        *arguments: see :func:`if_traced`.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        hint = if_traced(value, *arguments)
        raise ValueError(f"{name} must be a positive integer; got {value!r}.{hint}")


def require_not_negative(name: str, value: object) -> None:
    """Refuses a number that is no integer of at least 0.

    Args:
        name: of the number.
        value: the number.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0; got {value!r}.")


def require_floating(function: str, **arrays: Any) -> None:
    """Refuses what is no array of a floating dtype.

    Args:
        function: that takes the arrays.
        **arrays: by their names.

    Raises:
        TypeError: if one is none.
    """
    for name, value in arrays.items():
        dtype = getattr(value, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            got = type(value).__name__ if dtype is None else f"one of {dtype}"
            raise TypeError(f"{function} takes a floating-point array as {name}; got {got}.")


def if_traced(value: object, *arguments: str) -> str:
    """Returns a sentence that says what to do if ``value`` is a JAX array; else nothing.

    Args:
        value: what should be a number of Python.
        *arguments: the names under which an optimizer takes such numbers.
    """
    if not isinstance(value, jax.Array):
        return ""
    return (
        " It shapes the state and cannot be a traced array: name it in static_args of "
        f"optax.inject_hyperparams, such as static_args={arguments}."
    )
