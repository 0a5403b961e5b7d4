"""An element-wise step as a kernel takes it: what it does to scalars is done before."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

# What the compiler of TPU kernels is known to take.
PRIMITIVES = frozenset(
    """
abs add and broadcast_in_dim convert_element_type copy copy_p div eq exp ge gt integer_pow le log
lt max min mul ne neg not or select_n sign sqrt square stop_gradient sub tanh
""".split()  # noqa: SIM905
)
CALLS = frozenset(["jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"])


class Rule:
    """The operations of a function of tiles, and the scalars that they need.

    A kernel can neither close over values nor raise a decay to the power of a step count. So the
    operations in which no tile takes part run when the rule is made, and their results are
    arguments of the kernel.

    Args:
        function: from arrays of one shape to a list of arrays of that shape; it may close over
            scalars.
        tiles: the shapes and dtypes of its arguments.

    Attributes:
        scalars: what the other operations need.
        results: the shapes and dtypes of what the function returns.
    """

    def __init__(self, function: Callable[..., Any], tiles: Sequence[jax.ShapeDtypeStruct]) -> None:
        """Runs what needs no tile."""
        closed = jax.make_jaxpr(function)(*tiles)
        program = closed.jaxpr
        known = dict.fromkeys(program.constvars)
        first, self._equations = [], []
        for equation in program.eqns:
            if all(isinstance(v, core.Literal) or v in known for v in equation.invars):
                first.append(equation)
                known |= dict.fromkeys(equation.outvars)
            else:
                self._equations.append(equation)
        read = [v for equation in self._equations for v in equation.invars] + program.outvars
        needed = [*dict.fromkeys(v for v in read if not isinstance(v, core.Literal) and v in known)]
        before = _part(program, first, program.constvars, needed)
        self._step = _part(program, self._equations, [*needed, *program.invars], program.outvars)
        self.scalars: tuple[jax.Array, ...] = tuple(before(*closed.consts))
        self.results: tuple[Any, ...] = tuple(v.aval for v in program.outvars)

    @property
    def unsupported(self) -> str | None:
        """Why a kernel cannot run the operations, or None."""
        for scalar in self.scalars:
            if scalar.shape:
                return f"the update reads a constant of shape {scalar.shape}"
        found = _foreign(self._equations)
        return None if found is None else f"no kernel was tried with an update that does {found!r}"

    def __call__(self, scalars: Sequence[jax.Array], tiles: Sequence[jax.Array]) -> list[jax.Array]:
        """Runs the operations."""
        return self._step(*scalars, *tiles)


def _part(
    program: core.Jaxpr, equations: Sequence[Any], arguments: Sequence[Any], results: Sequence[Any]
) -> Callable[..., list[jax.Array]]:
    """Some equations of a program as a function."""
    part = program.replace(
        constvars=[], invars=[*arguments], outvars=[*results], eqns=[*equations], debug_info=program.debug_info.with_unknown_names()
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, []))


def _foreign(equations: Sequence[Any]) -> str | None:
    """The first primitive that is not among those known."""
    for equation in equations:
        name = equation.primitive.name
        if name in CALLS:
            inner = (
                p for p in equation.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")
            )
            found = next(filter(None, (_foreign(getattr(p, "jaxpr", p).eqns) for p in inner)), None)
            if found is not None:
                return found
        elif name not in PRIMITIVES:
            return name
    return None
