"""Parameters, gradients and optimizer state on each device, from shapes alone."""

import dataclasses
from typing import Any

import jax
import optax

from microadam_jax.layers.backward_updates import require_layerwise
from microadam_jax.planner.llama import Model
from microadam_jax.planner.meshes import abstract_mesh, bytes_per_device, parameter_shardings
from microadam_jax.state_shardings import state_shardings


@dataclasses.dataclass(frozen=True)
class Plan:
    """Counts the bytes on each device.

    Attributes:
        parameters: of the parameters.
        gradients: of the gradients that are there at one time, in the dtypes of the parameters.
        state: of the optimizer's state.
    """

    parameters: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        """Counts all of it; activations come on top."""
        return self.parameters + self.gradients + self.state


def arithmetic_plan(
    model: Model,
    tx: optax.GradientTransformation,
    mesh: dict[str, int],
    *,
    update_in_backward: bool = False,
) -> Plan:
    """Counts the bytes of a model and an optimizer's state on each device of a mesh.

    Args:
        model: of :func:`stacked_model`.
        tx: the optimizer.
        mesh: sizes of the axes data, fsdp and tp.
        update_in_backward: whether each layer is updated as soon as it has a gradient, so that
            the largest part counts and not all: a layer, the head or the embedding.

    Raises:
        ValueError: if the layers are to be updated in the backward pass, and the model is no Llama
            or the optimizer needs the gradients of several layers at once; or if the mesh has
            several devices and the model is no Llama, of which alone it is known how it is cut.

    Examples:
        >>> import optax
        >>> from microadam_jax.planner import arithmetic_plan, parse_mesh, stacked_model
        >>> plan = arithmetic_plan(stacked_model("llama-60m"), optax.adam(1e-3), parse_mesh(""))
        >>> plan.parameters, plan.state
        (232294400, 464588804)
    """
    if update_in_backward and not model.llama:
        raise ValueError(
            f"The layers of {model.name} are not stacked, and cannot be updated in the backward "
            "pass: leave out --update-in-backward, or take a Llama."
        )
    if not model.llama and any(size > 1 for size in mesh.values()):
        raise ValueError(
            f"How {model.name} is cut over a mesh is not known; leave out --mesh, or take a Llama."
        )
    where = parameter_shardings(model.params, abstract_mesh(mesh))
    parameters = bytes_per_device(model.params, where)
    shapes = jax.eval_shape(lambda params: tx.init(params), model.params)
    state = bytes_per_device(shapes, state_shardings(tx, model.params, where))
    gradients = parameters
    if update_in_backward:
        require_layerwise(optax.with_extra_args_support(tx), model.params, "layers")
        gradients = max(
            bytes_per_device(part, where[name]) // (_layers(part) if name == "layers" else 1)
            for name, part in model.params.items()
        )
    return Plan(parameters, gradients, state)


def _layers(stack: Any) -> int:
    return jax.tree.leaves(stack)[0].shape[0]
