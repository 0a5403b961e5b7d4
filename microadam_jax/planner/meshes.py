"""The mesh of a plan, and where a Llama's parameters and batches lie on it."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax.sharding import fitted, shards_along
from microadam_jax.trees import path_name

AXES = ("data", "fsdp", "tp")
ROWS = ("data", "fsdp")  # what the sequences of a batch are dealt out over

# By the end of the path; kernels of layers have the layer axis in front. The last axis is cut over
# tp at most: a row has too few blocks for 64 devices, and states that cannot be cut are whole.
_SPECS = {
    "embed_tokens/embedding": P(("tp", "fsdp")),
    "q_proj/kernel": P(None, "fsdp", "tp"),
    "k_proj/kernel": P(None, "fsdp", "tp"),
    "v_proj/kernel": P(None, "fsdp", "tp"),
    "o_proj/kernel": P(None, ("tp", "fsdp")),
    "gate_proj/kernel": P(None, "fsdp", "tp"),
    "up_proj/kernel": P(None, "fsdp", "tp"),
    "down_proj/kernel": P(None, ("tp", "fsdp")),
    "lm_head/kernel": P("fsdp", "tp"),
}


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the sizes of the axes data, fsdp and tp from text such as ``"fsdp=64,tp=4"``.

    Args:
        text: sizes of some axes; the others have size 1.

    Returns:
        The size of each axis, in order.

    Raises:
        ValueError: if the text is no such list, or of 2**31 devices and more.

    Examples:
        >>> from microadam_jax.planner import parse_mesh
        >>> parse_mesh("fsdp=64,tp=4")
        {'data': 1, 'fsdp': 64, 'tp': 4}
    """
    sizes: dict[str, int] = {}
    for entry in filter(None, text.split(",")):
        axis, _, size = entry.partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {text} must be a list such as fsdp=64,tp=4 of sizes of the axes "
                f"{', '.join(AXES)}, each once at most."
            )
        sizes[axis] = int(size)
    if (devices := math.prod(sizes.values())) >= 2**31:
        raise ValueError(f"--mesh {text} has {devices:,} devices, too many.")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh without devices, for arithmetic."""
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A sharding for each parameter of a stacked Llama; what a spec does not divide is whole."""

    def place(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        return fitted(NamedSharding(mesh, _spec(path)), leaf.shape)

    return jax.tree.map_with_path(place, params)


def undivided(params: Any, sizes: dict[str, int]) -> list[str]:
    """The parameters of a stacked Llama that a mesh should cut, but does not divide."""
    mesh = abstract_mesh(sizes)
    return [
        path_name(path)
        for path, leaf in jax.tree.leaves_with_path(params)
        if any(
            n % shards_along(mesh, entry) for n, entry in zip(leaf.shape, _spec(path), strict=False)
        )
    ]


def _spec(path: jax.tree_util.KeyPath) -> P:
    return _SPECS.get("/".join(path_name(path).split("/")[-2:]), P())


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """Bytes of the arrays of a tree on one device."""

    def size(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings)))
