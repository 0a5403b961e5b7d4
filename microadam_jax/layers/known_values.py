"""The part of a traced computation that follows from some of its arguments alone."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

# Calls whose bodies are looked into; loops and branches are taken as a whole.
CALLS = ("jit", "closed_call")


class Unknown:
    """Stands for a value that does not follow from the known arguments."""


UNKNOWN = Unknown()


def known_outputs(traced: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates what follows from the known arguments.

    Args:
        traced: a computation, as ``jax.make_jaxpr`` returns it.
        arguments: one value for each of its arguments, or ``UNKNOWN``.

    Returns:
        One value for each output, or ``UNKNOWN``. An output that is a known argument is that very
        object.
    """
    jaxpr = traced.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, traced.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        values |= dict(zip(equation.outvars, _outputs(equation, inputs), strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _outputs(equation: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    unknown = sum(value is UNKNOWN for value in inputs)
    if unknown == 0 and not equation.effects:
        parameters = equation.primitive.get_bind_params(equation.params)
        with equation.ctx.manager:
            outputs = equation.primitive.bind(*inputs, **parameters)
        return list(outputs) if equation.primitive.multiple_results else [outputs]
    if unknown < len(inputs) and equation.primitive.name in CALLS:
        body = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
        if isinstance(body, core.ClosedJaxpr):
            return known_outputs(body, inputs)
    return [UNKNOWN] * len(equation.outvars)
