"""An element-wise step as a kernel takes it: what it does to scalars is done before."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.extend import core

# What the compiler of TPU kernels is known to take.
PRIMITIVES = frozenset(
    """
abs add and broadcast_in_dim convert_element_type copy div eq exp ge gt integer_pow le log
lt max min mul ne neg not or select_n sign sqrt square stop_gradient sub tanh
""".split()  # noqa: SIM905
)
Replaced = Mapping[str, Callable[..., jax.Array]]  # by the primitive's name
NOTHING: Replaced = MappingProxyType({})
CALLS = frozenset(["jit", "closed_call", "custom_jvp_call", "custom_vjp_call"])


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
        self._program, self._needed = program, needed
        # Where they were traced there may be a mesh, which there is none of in a kernel.
        before = program.replace(
            constvars=[],
            invars=program.constvars,
            outvars=needed,
            eqns=first,
            debug_info=program.debug_info.with_unknown_names(),
        )
        evaluate = core.jaxpr_as_fun(core.ClosedJaxpr(before, []))
        self.scalars: tuple[jax.Array, ...] = tuple(evaluate(*closed.consts))
        self.results: tuple[Any, ...] = tuple(v.aval for v in program.outvars)

    @property
    def unsupported(self) -> str | None:
        """Why a kernel cannot run the operations, or None."""
        for scalar in self.scalars:
            if scalar.shape:
                return f"the update reads a constant of shape {scalar.shape}"
        found = _foreign(self._equations)
        return None if found is None else f"no kernel was tried with an update that does {found!r}"

    def __call__(
        self, scalars: Sequence[jax.Array], tiles: Sequence[jax.Array], replaced: Replaced = NOTHING
    ) -> list[jax.Array]:
        """Runs the operations, some of them replaced."""
        names = [*self._needed, *self._program.invars]
        known = dict(zip(names, [*scalars, *tiles], strict=True))
        return _results(self._equations, known, self._program.outvars, replaced)


def evaluate(function: Callable[..., Any], replaced: Replaced, *arguments: Any) -> Any:
    """``function(*arguments)`` with some operations replaced; it closes over no arrays."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    program, values = closed.jaxpr, jax.tree.leaves(arguments)
    known = dict(zip(program.invars, values, strict=True))
    known |= zip(program.constvars, closed.consts, strict=True)
    results = _results(program.eqns, known, program.outvars, replaced)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _results(
    equations: Sequence[Any], known: dict[Any, Any], names: Sequence[Any], replaced: Replaced
) -> list[Any]:
    """The values of ``names`` after some equations, without the mesh that these were traced on."""

    def value(v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else known[v]

    for equation in equations:
        values = [value(v) for v in equation.invars]
        called = _called(equation)
        if called is None:
            parameters = equation.params | (
                {"sharding": None} if "sharding" in equation.params else {}
            )
            instead = replaced.get(equation.primitive.name)
            known[equation.outvars[0]] = (
                equation.primitive.bind(*values, **parameters)
                if instead is None
                else instead(*values)
            )
            continue
        inner = dict(zip(called.jaxpr.constvars, called.consts, strict=True))
        inner |= zip(called.jaxpr.invars, values, strict=True)
        results = _results(called.jaxpr.eqns, inner, called.jaxpr.outvars, replaced)
        known |= zip(equation.outvars, results, strict=True)
    return [value(v) for v in names]


def _called(equation: Any) -> core.ClosedJaxpr | None:
    """The program that an equation calls."""
    if equation.primitive.name not in CALLS:
        return None
    return next(p for p in equation.params.values() if isinstance(p, core.ClosedJaxpr))


def _foreign(equations: Sequence[Any]) -> str | None:
    """The first primitive that is not among those known."""
    for equation in equations:
        called = _called(equation)
        found = None if called is None else _foreign(called.jaxpr.eqns)
        if called is None and equation.primitive.name not in PRIMITIVES:
            found = equation.primitive.name
        if found is not None:
            return found
    return None
