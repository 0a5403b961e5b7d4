"""Where parameters, optimizer state and batches live on a mesh of devices."""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import state_shardings

from .config import Config, PretrainError
from .model import Params, init_params

AXES = ("data", "fsdp", "tensor")

# By the module that holds the parameter. Kernels of layers have the layer axis in front.
_SPECS = {
    "embedding": P("tensor", "fsdp"),
    "query": P(None, "fsdp", "tensor"),
    "key": P(None, "fsdp", "tensor"),
    "value": P(None, "fsdp", "tensor"),
    "out": P(None, "tensor", "fsdp"),
    "gate": P(None, "fsdp", "tensor"),
    "up": P(None, "fsdp", "tensor"),
    "down": P(None, "tensor", "fsdp"),
    "attention_norm": P(),
    "mlp_norm": P(),
    "norm": P(),
    "head": P("fsdp", "tensor"),
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a run live.

    Attributes:
        mesh: The devices, with the axes data, fsdp and tensor.
        params: A `NamedSharding` for each parameter.
        batches: The sharding of tokens `(micro-batch, row, position)`: rows are split.
    """

    mesh: Mesh
    params: Params
    batches: NamedSharding

    def state(self, optimizer: optax.GradientTransformation, params: Params) -> Any:
        """Places the state that belongs to a parameter where the parameter is.

        Args:
            optimizer: The optimizer.
            params: The shapes of the parameters.

        Returns:
            A `NamedSharding` for each leaf; what belongs to no parameter is everywhere.
        """
        return state_shardings(optimizer, params, self.params)


def place(config: Config, vocab: int) -> Placement:
    """Spreads the model and the batches of a configuration over its mesh.

    Args:
        config: The configuration.
        vocab: Number of tokens of the tokenizer.

    Returns:
        The placement; nothing is allocated.

    Raises:
        PretrainError: If there are too few devices, or the mesh does not divide an array.
    """
    mesh = make_mesh(config.mesh)
    rows = config.batch // config.accumulation
    if rows % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise PretrainError(
            f"--mesh {config.mesh} does not divide the {rows} sequences of a micro-batch over "
            "the axes data and fsdp."
        )

    def place_parameter(path: jax.tree_util.KeyPath, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        sharding = NamedSharding(mesh, _SPECS[path[-2].key])
        try:
            sharding.shard_shape(shape.shape)
        except ValueError:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise PretrainError(
                f"--mesh {config.mesh} does not divide {name}, whose shape is {shape.shape}."
            ) from None
        return sharding

    shapes = jax.eval_shape(lambda: init_params(config.model(vocab), config.seed))
    return Placement(
        mesh=mesh,
        params=jax.tree.map_with_path(place_parameter, shapes),
        batches=NamedSharding(mesh, P(None, ("data", "fsdp"))),
    )


def make_mesh(text: str) -> Mesh:
    """Builds the mesh that a `--mesh` flag describes.

    Args:
        text: Sizes of some of the axes, such as `"data=2,tensor=2"`; other axes have size 1.

    Returns:
        A mesh over the first devices, with all three axes.

    Raises:
        PretrainError: If the text is malformed or asks for more devices than there are.
    """
    given: dict[str, int] = {}
    for entry in filter(None, text.split(",")):
        axis, _, size = entry.partition("=")
        if axis not in AXES or axis in given or not size.isdecimal() or int(size) < 1:
            raise PretrainError(
                f"--mesh {text} must be a list such as data=2,fsdp=2 of sizes of the axes "
                f"{', '.join(AXES)}, each at most once."
            )
        given[axis] = int(size)
    sizes = {axis: given.get(axis, 1) for axis in AXES}
    count = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    devices = jax.devices()
    if count > len(devices):
        raise PretrainError(
            f"--mesh {text} needs {count} devices, but there are {len(devices)} here."
        )
    if jax.process_count() > 1 and count != len(devices):
        raise PretrainError(
            f"--mesh {text or 'of one device'} uses {count} of the {len(devices)} devices of "
            f"{jax.process_count()} processes; make the sizes multiply to {len(devices)}, for "
            "every process has to take part."
        )
    # Auto axes: XLA places the activations, so that the model needs no annotation.
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:count],
    )
