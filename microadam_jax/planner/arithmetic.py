"""Parameters, gradients and optimizer state on each device, from shapes alone."""

import dataclasses

import jax
import optax

from microadam_jax.planner.llama import Model
from microadam_jax.planner.meshes import abstract_mesh, bytes_per_device, parameter_shardings
from microadam_jax.state_shardings import state_shardings


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on each device.

    Attributes:
        parameters: of the parameters.
        gradients: of one gradient for each parameter, in its dtype.
        state: of the optimizer's state.
    """

    parameters: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        """All of it; activations come on top."""
        return self.parameters + self.gradients + self.state


def arithmetic_plan(model: Model, tx: optax.GradientTransformation, mesh: dict[str, int]) -> Plan:
    """Counts the bytes of a model and an optimizer's state on each device of a mesh.

    Args:
        model: of :func:`stacked_model`.
        tx: the optimizer.
        mesh: sizes of the axes data, fsdp and tp.

    Raises:
        ValueError: if the mesh has several devices and the model is no Llama, of which alone
            it is known how it is cut.

    Examples:
        >>> import optax
        >>> from microadam_jax.planner import arithmetic_plan, parse_mesh, stacked_model
        >>> plan = arithmetic_plan(stacked_model("llama-60m"), optax.adam(1e-3), parse_mesh(""))
        >>> plan.parameters, plan.state
        (232294400, 464588804)
    """
    if not model.llama and any(size > 1 for size in mesh.values()):
        raise ValueError(
            f"How {model.name} is cut over a mesh is not known; leave out --mesh, or take a Llama."
        )
    where = parameter_shardings(model.params, abstract_mesh(mesh))
    parameters = bytes_per_device(model.params, where)
    shapes = jax.eval_shape(lambda params: tx.init(params), model.params)
    state = bytes_per_device(shapes, state_shardings(tx, model.params, where))
    return Plan(parameters, gradients=parameters, state=state)
