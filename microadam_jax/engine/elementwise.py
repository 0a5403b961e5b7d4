"""What the traced program of a transformation says of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from microadam_jax.sharding import shape_of_type

SHAPE = (3, 5)
# Primitives whose result at a position depends on their operands at that position only.
POINTWISE = """
abs acos add and asin atan atan2 cbrt ceil clamp convert_element_type copy cos cosh div
eq erf exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne
neg nextafter not or pow real reduce_precision rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
xor
""".split()  # noqa: SIM905
CALLS = frozenset(["jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2"])


def require_elementwise(inner: optax.GradientTransformationExtraArgs) -> None:
    """Refuses a transformation that mixes the elements of a leaf.

    Raises:
        ValueError: if an operation in it is none that acts on each element alone.
    """
    leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    state = jax.eval_shape(inner.init, leaf)
    program = jax.make_jaxpr(lambda g, s, p: inner.update(g, s, p))(leaf, state, leaf)
    found = _mixing(program.jaxpr)
    if found is not None:
        raise ValueError(
            f"elementwise=True promises that each element is updated alone, but {found!r} in this "
            "transformation does more. Leave elementwise out: the state is the same, the step "
            "takes more temporary memory."
        )


def _mixing(program: core.Jaxpr) -> str | None:
    """The first primitive that mixes elements, if any does."""
    for equation in program.eqns:
        shapes = {_shape(v) for v in (*equation.invars, *equation.outvars)}
        if shapes == {()}:
            continue
        name = equation.primitive.name
        if name in CALLS:
            found = next(filter(None, map(_mixing, called_programs(equation))), None)
            if found is not None:
                return found
        elif name == "broadcast_in_dim":
            if _shape(equation.invars[0]) not in ((), SHAPE):
                return name
        elif name not in POINTWISE or not shapes <= {(), SHAPE}:
            return name
    return None


def called_programs(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """Returns the programs that an equation calls once; none if it is not one of ``CALLS``."""
    if equation.primitive.name not in CALLS:
        return []
    parameters = equation.params.values()
    return [getattr(p, "jaxpr", p) for p in parameters if hasattr(p, "eqns") or hasattr(p, "jaxpr")]


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def zeros_in(init: Callable[[Any], Any], params: Any) -> tuple[Any, Any]:
    """Tells which arrays of a new state are zero by construction, without computing them.

    Args:
        init: of a transformation.
        params: its argument.

    Returns:
        The state's shapes, and a tree of that structure of booleans; False where the program does
        not say so.
    """
    program, shapes = jax.make_jaxpr(init, return_shape=True)(params)
    zeros = zero_outputs(program.jaxpr, [False] * len(program.jaxpr.invars))
    structure = jax.tree.structure(shapes)
    placed = structure.unflatten(map(shape_of_type, program.out_avals))
    return placed, structure.unflatten(zeros)


KEEPS_ZERO = frozenset(
    [
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "reshape",
        "reshard",
        "sharding_constraint",
        "squeeze",
    ]
)


def zero_outputs(program: core.Jaxpr, arguments: list[bool]) -> list[bool]:
    """For each output of a program whether it is zero, where some arguments are."""
    zero = dict(zip(program.invars, arguments, strict=True))

    def is_zero(variable: Any) -> bool:
        if isinstance(variable, core.Literal):
            return not np.any(variable.val)
        return zero.get(variable, False)

    for equation in program.eqns:
        operands = [is_zero(v) for v in equation.invars]
        if programs := called_programs(equation):
            results = zero_outputs(programs[0], operands)
        else:
            keeps = equation.primitive.name in KEEPS_ZERO and all(operands)
            results = [keeps] * len(equation.outvars)
        zero |= zip(equation.outvars, results, strict=True)
    return [is_zero(v) for v in program.outvars]
