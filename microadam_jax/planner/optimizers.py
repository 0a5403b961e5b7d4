"""Optimizers by the names that a command line gives them."""

import ast
import difflib
import inspect
from typing import Any

import optax
import optax.contrib

from microadam_jax import aliases


def optimizer(text: str, shardings: Any = None) -> optax.GradientTransformation:
    """Returns an optimizer from ``"name"`` or ``"name:option=value:..."``.

    A name is looked up in this library, then in ``optax``, then in ``optax.contrib``.

    Args:
        text: such as ``"microadam:layout=pretrain"``, ``"adamw:mu_dtype=bfloat16"`` or ``"muon"``.
        shardings: where the parameters lie, for optimizers that take it.

    Returns:
        The optimizer.

    Raises:
        ValueError: if there is no such optimizer, or it does not take such an option.

    Examples:
        >>> from microadam_jax.planner.optimizers import optimizer
        >>> tx = optimizer("adam_mini:mu_dtype=bfloat16")
    """
    name, *settings = text.split(":")
    known = {name: getattr(aliases, name) for name in aliases.__all__ if name.islower()}
    found = (getattr(module, name, None) for module in (optax, optax.contrib))
    factory = known.get(name) or next(filter(inspect.isfunction, found), None)
    if not inspect.isfunction(factory):
        close = difflib.get_close_matches(name, known)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"There is no optimizer {name!r}.{hint} This library has {', '.join(sorted(known))}; "
            "Those of optax and optax.contrib are known too."
        )
    arguments = inspect.signature(factory).parameters
    if "learning_rate" not in arguments:
        raise ValueError(f"Optax's {name} is no optimizer; name one, such as adamw.")
    pairs = (setting.partition("=") for setting in settings)
    options = {key: _value(value) for key, _, value in pairs}
    if "shardings" in arguments:
        options["shardings"] = shardings
    try:
        made = factory(1e-3, **options)
    except TypeError as error:
        raise ValueError(f"{text}: {error}.") from error
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(f"Optax's {name} is no optimizer; name one, such as adamw.")
    return made


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text  # a bare word is a string: layout=paper
