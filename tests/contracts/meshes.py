"""Meshes, arrays on them, and the collectives of programs that are compiled for them."""

import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

COLLECTIVE = re.compile(
    r"= (.*) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def collectives(program: str) -> list[tuple[str, int]]:
    """Each collective of a compiled program, and the size of the largest array it yields."""
    return [
        (kind, max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes))
        for operands, kind in COLLECTIVE.findall(program)
        for shapes in [re.findall(r"\[([\d,]*)\]", operands)]
    ]


def place(tree: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def mesh_of(mode: str, devices: tuple[int, int] = (4, 2)) -> jax.sharding.Mesh:
    return jax.make_mesh(
        devices,
        ("fsdp", "tp"),
        axis_types=(AXES[mode],) * 2,
        devices=jax.devices()[: devices[0] * devices[1]],
    )
