"""Is a transformation element-wise? Its traced program tells."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

SHAPE = (3, 5)
# Primitives whose result at a position depends on their operands at that position only.
POINTWISE = """
abs acos add and asin atan atan2 cbrt ceil clamp convert_element_type copy copy_p cos cosh div
eq erf exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne
neg nextafter not or pow real reduce_precision rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
xor
""".split()  # noqa: SIM905
CALLS = frozenset(["jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2"])


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
            inner = [
                p for p in equation.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")
            ]
            found = next(filter(None, (_mixing(getattr(p, "jaxpr", p)) for p in inner)), None)
            if found is not None:
                return found
        elif name == "broadcast_in_dim":
            if _shape(equation.invars[0]) not in ((), SHAPE):
                return name
        elif name not in POINTWISE or not shapes <= {(), SHAPE}:
            return name
    return None


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
