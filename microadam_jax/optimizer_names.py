"""Optimizers by the names that a command line gives them."""

import ast
import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import optax
import optax.contrib

from microadam_jax.methods import METHODS, Factory


def factories() -> dict[str, Factory]:
    """Returns everything that makes an optimizer from a learning rate, by name.

    Of equal names that of this library counts, then that of ``optax``, then that of
    ``optax.contrib``. What wraps another optimizer is none of them.
    """
    theirs = {
        name: member
        for module in (optax.contrib, optax)
        for name, member in vars(module).items()
        if inspect.isfunction(member)
        and not name.startswith(("_", "scale_by_", "decay_"))
        and [*inspect.signature(member).parameters][:1] == ["learning_rate"]
    }
    return theirs | {name: method.factory for name, method in METHODS.items()}


def factory_named(name: str, options: Mapping[str, Any]) -> Factory:
    """Returns what makes an optimizer from a learning rate.

    Args:
        name: of the optimizer, such as ``"microadam"``, ``"adamw"`` or ``"muon"``.
        options: its other arguments.

    Returns:
        The factory with these options.

    Raises:
        ValueError: if there is no such optimizer, it does not take such an option, or one that is
            a number or a bool by default is given a word.

    Examples:
        >>> from microadam_jax.optimizer_names import factory_named
        >>> factory_named("adam_mini", {"b3": 0.9})
        Traceback (most recent call last):
        ValueError: adam_mini has no option 'b3'; it has b1, b2, ...
    """
    known = factories()
    if not name:
        raise ValueError("An optimizer has no name: there is a comma too many, or no name at all.")
    if name not in known:
        close = difflib.get_close_matches(name, known)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else f"there are {', '.join(sorted(known))}."
        )
        raise ValueError(f"There is no optimizer {name!r}; {hint}")
    parameters = inspect.signature(known[name]).parameters
    allowed = [option for option in parameters if option != "learning_rate"]
    for option, value in options.items():
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(allowed)}.")
        default = parameters[option].default
        if isinstance(default, int | float) and isinstance(value, str):
            kind = "True or False" if isinstance(default, bool) else f"a number such as {default!r}"
            raise ValueError(f"{name}:{option} must be {kind}; got {value!r}.")
    return functools.partial(known[name], **options)


def option_value(text: str) -> Any:
    """Returns the value that a command line gives an option: a literal of Python, or a word.

    Args:
        text: such as ``"0.9"``, ``"True"`` or ``"bfloat16"``.
    """
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text  # a bare word is a string: layout=paper


def optimizer(text: str) -> optax.GradientTransformation:
    """Returns an optimizer from ``"name"`` or ``"name:option=value:..."``.

    Args:
        text: such as ``"microadam:layout=pretrain"``, ``"adamw:mu_dtype=bfloat16"`` or ``"muon"``.

    Returns:
        The optimizer, at a learning rate of 0.001.

    Raises:
        ValueError: if there is no such optimizer, or it does not take such an option.

    Examples:
        >>> from microadam_jax.optimizer_names import optimizer
        >>> tx = optimizer("adam_mini:mu_dtype=bfloat16")
    """
    name, *settings = text.strip().split(":")
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key in options:
            raise ValueError(f"{text} must be NAME:OPTION=VALUE:..., with each option once.")
        options[key] = option_value(value)
    factory = factory_named(name, options)
    try:
        tx = factory(1e-3)
    except TypeError as error:
        raise ValueError(f"{text}: {str(error).removesuffix('.')}.") from error
    if not hasattr(tx, "init"):
        raise ValueError(f"{name} makes no optimizer of a rate alone, as it returns {tx!r}.")
    return tx
