"""Tracks the dependence of a traced program's outputs on its inputs."""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from jax.extend import core

from microadam_jax.trees import Shape


def dependences(program: core.ClosedJaxpr) -> list[int]:
    """Finds for each output of a program the inputs that it depends on.

    What a platform's branch computes is what all others do, so that of ``platform_dependent`` the
    default counts.

    Args:
        program: that ``jax.make_jaxpr`` made of a function.

    Returns:
        For each output the set of inputs, as bits of an integer: bit 0 is the first. It may hold
        more than there are, and never fewer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from microadam_jax.layers.dependence import dependences
        >>> x = jnp.ones(3)
        >>> dependences(jax.make_jaxpr(lambda x, y: (x + 1, x * y, 2.0))(x, x))
        [1, 3, 0]
    """
    inputs = [1 << i for i in range(len(program.jaxpr.invars))]
    return _outputs(program.jaxpr, inputs)


def mixed_first_axis(program: core.Jaxpr, shapes: Container[Shape]) -> Shape | None:
    """Finds a reduction over the first axis, and not over all that have several elements.

    Args:
        program: the program.
        shapes: of the arrays that count.

    Returns:
        The shape of what is reduced; None if there is no such reduction.
    """
    for equation in program.eqns:
        if equation.primitive.name.startswith("reduce_"):
            shape: Shape = getattr(equation.invars[0].aval, "shape", ())
            axes = equation.params.get("axes", ())
            kept = [n for axis, n in enumerate(shape) if axis not in axes]
            if shape in shapes and 0 in axes and math.prod(kept) > 1:
                return shape
        for inner in _programs(equation.params):
            found = mixed_first_axis(inner, shapes)
            if found is not None:
                return found
    return None


def _outputs(program: core.Jaxpr, inputs: Sequence[int]) -> list[int]:
    known: dict[Any, int] = dict(zip(program.invars, inputs, strict=True))

    def of(variable: Any) -> int:
        return 0 if isinstance(variable, core.Literal) else known.get(variable, 0)

    platforms = {
        equation.outvars[0]
        for equation in program.eqns
        if equation.primitive.name == "platform_index"
    }
    for equation in program.eqns:
        operands = [of(variable) for variable in equation.invars]
        parameters = equation.params
        name = equation.primitive.name
        if name == "cond":
            branches = parameters["branches"]
            if equation.invars[0] in platforms:
                branches = branches[-1:]
            each = [_outputs(branch.jaxpr, operands[1:]) for branch in branches]
            results = [_union(column) | operands[0] for column in zip(*each, strict=True)]
        elif name == "while":
            results = _while(parameters, operands)
        elif name == "scan":
            results = _scan(equation, operands)
        elif (inner := _called(parameters)) is not None and len(inner.invars) == len(operands):
            results = _outputs(inner, operands)
        else:
            results = [_union(operands)] * len(equation.outvars)
        known |= zip(equation.outvars, results, strict=True)
    return [of(variable) for variable in program.outvars]


def _programs(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """All programs that an equation may run."""
    for parameter in parameters.values():
        for one in parameter if isinstance(parameter, tuple | list) else (parameter,):
            inner = getattr(one, "jaxpr", one)
            if isinstance(inner, core.Jaxpr):
                yield inner


def _called(parameters: dict[str, Any]) -> core.Jaxpr | None:
    """The program that a call runs once, if the equation is one."""
    for name in ("jaxpr", "call_jaxpr"):
        inner = parameters.get(name)
        if inner is not None:
            return getattr(inner, "jaxpr", inner)
    return None


def _while(parameters: dict[str, Any], operands: Sequence[int]) -> list[int]:
    conditions, constants = parameters["cond_nconsts"], parameters["body_nconsts"]
    cond_consts = list(operands[:conditions])
    body_consts = list(operands[conditions : conditions + constants])
    carry = list(operands[conditions + constants :])

    def once(carry: list[int]) -> list[int]:
        (ends,) = _outputs(parameters["cond_jaxpr"].jaxpr, [*cond_consts, *carry])
        new = _outputs(parameters["body_jaxpr"].jaxpr, [*body_consts, *carry])
        return [old | value | ends for old, value in zip(carry, new, strict=True)]

    return _settled(once, carry)


def _scan(equation: core.JaxprEqn, operands: Sequence[int]) -> list[int]:
    # JAX's releases name the numbers of constants and carries differently. What is scanned, and
    # what is stacked, has an axis more outside than inside.
    body = equation.params["jaxpr"].jaxpr
    scanned = _with_an_axis_more(equation.invars, body.invars)
    carried = len(equation.outvars) - _with_an_axis_more(equation.outvars, body.outvars)
    constants = len(operands) - scanned - carried
    consts, rest = list(operands[:constants]), list(operands[constants + carried :])
    outputs: list[int] = []

    def once(carry: list[int]) -> list[int]:
        results = _outputs(body, [*consts, *carry, *rest])
        outputs[:] = results[carried:]
        return [old | new for old, new in zip(carry, results[:carried], strict=True)]

    return [*_settled(once, list(operands[constants : constants + carried])), *outputs]


def _with_an_axis_more(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(x.aval.ndim > y.aval.ndim for x, y in zip(outside, inside, strict=True))


def _settled(once: Callable[[list[int]], list[int]], carry: list[int]) -> list[int]:
    while (new := once(carry)) != carry:
        carry = new
    return carry


def _union(sets: Sequence[int]) -> int:
    union = 0
    for one in sets:
        union |= one
    return union
