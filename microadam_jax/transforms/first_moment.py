"""The first moment of any optimizer: where it is, and how the next updates depend on it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core
from jax.tree_util import GetAttrKey

from microadam_jax.engine.elementwise import POINTWISE, called_programs, zero_outputs
from microadam_jax.transforms.moments import FIRST_MOMENTS
from microadam_jax.trees import KeyPath, path_name

INSTEAD = "Round with 'stochastic' or 'compensated', which need nothing of the optimizer."


class Response(NamedTuple):
    r"""Describes what a change of a first moment does to each element of each parameter.

    Attributes:
        decay: :math:`\partial m_t / \partial m_{t-1}`, which is :math:`\beta_1`.
        update: :math:`\partial u_t / \partial m_{t-1}`, which is :math:`-\eta_t \beta_1 / ((1 -
            \beta_1^t) (\sqrt{\hat v_t} + \epsilon))` for Adam.
    """

    decay: Sequence[jax.Array]
    update: Sequence[jax.Array]


class FirstMoment(NamedTuple):
    """The place of the first moment in the flattened state of an optimizer.

    Attributes:
        places: for each parameter, in their order, the index of its moment.
    """

    places: tuple[int, ...]

    @classmethod
    def find(cls, state: Any, params: optax.Params) -> "FirstMoment":
        """Finds the first moments of ``params``, in fields ``mu`` or ``trace``.

        Raises:
            ValueError: if a parameter has none in float32, or several.
        """
        shapes = dict(jax.tree.leaves_with_path(params))
        found: dict[KeyPath, list[int]] = {path: [] for path in shapes}
        for place, (path, leaf) in enumerate(jax.tree.leaves_with_path(state)):
            for cut in range(len(path)):
                name, owner = path[cut], path[cut + 1 :]
                known = isinstance(name, GetAttrKey) and name.name in FIRST_MOMENTS
                if known and owner in shapes and _holds(leaf, shapes[owner]):
                    found[owner].append(place)
        for path, places in found.items():
            if len(places) != 1:
                _refuse(path, places)
        return cls(tuple(places[0] for places in found.values()))

    def update(
        self,
        inner: optax.GradientTransformationExtraArgs,
        updates: optax.Updates,
        state: Any,
        params: optax.Params,
        extra_args: Mapping[str, Any],
    ) -> tuple[optax.Updates, Any, Response]:
        """Returns ``inner.update(updates, state, params)``, and how it depends on the moment."""
        leaves, structure = jax.tree.flatten(state)
        moments = [leaves[place] for place in self.places]

        def run(moments: list[jax.Array]) -> tuple[Any, Any]:
            given = structure.unflatten(self._replaced(leaves, moments))
            moved, new = inner.update(updates, given, params, **extra_args)
            flat = jax.tree.leaves(new)
            return (jax.tree.leaves(moved), [flat[i] for i in self.places]), (moved, new)

        ones = [jnp.ones_like(moment) for moment in moments]
        _, (update, decay), (moved, new) = jax.jvp(run, (moments,), (ones,), has_aux=True)
        return moved, new, Response(decay, update)

    def with_error(self, state: Any, response: Response, errors: Sequence[jax.Array]) -> Any:
        r"""Returns the state after the first moments took up the rounding errors.

        .. math::

            m_t \leftarrow m_t + (1 - \beta_1)
                \Big(\frac{\partial u_t}{\partial m_{t-1}}\Big)^{-1} e

        The next updates then sum up to :math:`e` more, as :math:`\beta_1^k (1 - \beta_1)` does to
        one. It is ECO's rule, whose factor
        :math:`(1 - \beta_1^t)(1 - 1/\beta_1)(\sqrt{\hat v} + \epsilon) / \eta` is that of Adam.

        Args:
            state: after the step.
            response: of the same step.
            errors: :math:`e`, for each parameter.
        """
        leaves, structure = jax.tree.flatten(state)
        moments = []
        for place, e, decay, update in zip(self.places, errors, *response, strict=True):
            # Where the learning rate is 0 nothing could take up an error, and there is none.
            known = update != 0
            change = jnp.where(known, (1 - decay) * e / jnp.where(known, update, 1), 0)
            moments.append(leaves[place] + change.astype(leaves[place].dtype))
        return structure.unflatten(self._replaced(leaves, moments))

    def require_elementwise(
        self, inner: optax.GradientTransformationExtraArgs, state: Any, params: optax.Params
    ) -> None:
        """Refuses an optimizer whose update is no smooth function of each element's own moment.

        Raises:
            ValueError: if an update does not depend on the moment, as that of Lion, which takes
                its sign, or depends on the moments of other elements, as that of Muon.
        """
        leaves, structure = jax.tree.flatten(state)

        def linear_part(params: optax.Params, leaves: list[Any]) -> list[Any]:
            def run(moments: list[jax.Array]) -> list[jax.Array]:
                given = structure.unflatten(self._replaced(leaves, moments))
                return jax.tree.leaves(inner.update(params, given, params)[0])

            moments = [leaves[place] for place in self.places]
            _, derivative = jax.linearize(run, moments)
            programs.append(jax.make_jaxpr(derivative)(moments))
            return []

        programs: list[core.ClosedJaxpr] = []
        jax.eval_shape(linear_part, params, leaves)
        program = programs[0].jaxpr
        mixing = _mixing(program)
        if mixing is not None:
            raise ValueError(
                f"round_updates(..., 'momentum') gives each rounding error to the same element of "
                f"the first moment, but {mixing!r} in this optimizer mixes elements. {INSTEAD}"
            )
        zeros = zero_outputs(program, [False] * len(program.invars))
        for (path, _), zero in zip(jax.tree.leaves_with_path(params), zeros, strict=True):
            if zero:
                raise ValueError(
                    f"The update of {path_name(path)!r} has no derivative by its first moment, as "
                    "where Lion takes its sign, so that the momentum cannot take up a rounding "
                    f"error. {INSTEAD}"
                )

    def _replaced(self, leaves: Sequence[Any], moments: Sequence[jax.Array]) -> list[Any]:
        """The flattened state with other first moments."""
        given = list(leaves)
        for place, moment in zip(self.places, moments, strict=True):
            given[place] = moment
        return given


def _holds(moment: Any, parameter: Any) -> bool:
    return moment.shape == parameter.shape and moment.dtype in (jnp.float32, jnp.float64)


def _refuse(path: KeyPath, places: Sequence[int]) -> None:
    found = f"{len(places)} of them" if places else "none in float32"
    raise ValueError(
        "round_updates(..., 'momentum') puts the rounding error into the first moment, a field mu "
        f"or trace of the parameter's shape, and the optimizer keeps {found} for "
        f"{path_name(path)!r}. A moment in few bits would round the error away. {INSTEAD}"
    )


def _mixing(program: core.Jaxpr) -> str | None:
    """The first primitive of a linear program that mixes elements, if any does."""
    for equation in program.eqns:
        name = equation.primitive.name
        if inner := called_programs(equation):
            found = next(filter(None, map(_mixing, inner)), None)
            if found is not None:
                return found
        elif name == "broadcast_in_dim":
            # Of constants, such as the zeros of what does not depend on the moment.
            if any(not isinstance(v, core.Literal) and _rank(v) for v in equation.invars):
                return name
        elif name not in (*POINTWISE, "add_any"):
            return name
    return None


def _rank(variable: Any) -> int:
    return len(variable.aval.shape)
