"""Optimizers by the names that a command line gives them."""

import ast
import difflib
import inspect
from typing import Any

import optax

from microadam_jax import aliases


def optimizer(text: str, shardings: Any = None) -> optax.GradientTransformation:
    """An optimizer of this library, or of Optax, from ``"name"`` or ``"name:option=value:..."``.

    Args:
        text: such as ``"microadam:layout=pretrain"`` or ``"adamw:mu_dtype=bfloat16"``.
        shardings: where the parameters lie, for optimizers that take it.

    Raises:
        ValueError: if there is no such optimizer, or it does not take such an option.

    Examples:
        >>> from microadam_jax.planner.optimizers import optimizer
        >>> tx = optimizer("adam_mini:mu_dtype=bfloat16")
    """
    name, *settings = text.split(":")
    known = {name: getattr(aliases, name) for name in aliases.__all__ if name.islower()}
    factory = known.get(name) or getattr(optax, name, None)
    if not inspect.isfunction(factory):
        close = difflib.get_close_matches(name, known)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"There is no optimizer {name!r}.{hint} This library has {', '.join(sorted(known))}; "
            "Optax's are known too."
        )
    pairs = (setting.partition("=") for setting in settings)
    options = {key: _value(value) for key, _, value in pairs}
    if "shardings" in inspect.signature(factory).parameters:
        options["shardings"] = shardings
    try:
        made = factory(1e-3, **options)
    except TypeError as error:
        raise ValueError(f"{text}: {error}.") from error
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"optax.{name} is no optimizer; name one, such as adamw.")
    return made


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text  # a bare word is a string: layout=paper
