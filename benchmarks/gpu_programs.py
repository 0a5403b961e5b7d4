"""Counts what XLA makes of a step on a GPU: launches, bytes and temporaries, without a GPU.

JAX_PLATFORMS=cpu python -m benchmarks.gpu_programs                       # all: an hour of one core
JAX_PLATFORMS=cpu python -m benchmarks.gpu_programs --trees gpt2 --only microadam --show
JAX_PLATFORMS=cpu python -m benchmarks.gpu_programs --layers 12 --write

The step is the jitted update and ``optax.apply_updates``, parameters and state donated, compiled
for an H100 by the real compiler. Bytes are counted in the compiled program
(``benchmarks.launches``), each array once for each kernel that reads or writes it. It needs the
extra ``targets``. ``--write`` puts the table into docs/performance.md.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.launches import Program
from benchmarks.scale import BASE, build, stacked_layers, step_of, table, write
from microadam_jax import run_with
from microadam_jax.models import model_shapes
from microadam_jax.planner.targets import target
from microadam_jax.trees import KeyPath

OPTIMIZERS = (BASE, "adam_mini", "microadam", "adamw8bit", "adam_mini4bit", "adamw_fp8")
TREES: dict[str, Callable[[int], Any]] = {
    "one matrix": lambda _: {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")},
    "gpt2": lambda layers: first_layers("gpt2", layers),
    "llama2-7b, layers": lambda layers: {"layers": first_layers("llama2-7b", layers)["layers"]},
    "llama2-7b, stacked": lambda layers: stacked_layers(
        {"layers": first_layers("llama2-7b", max(2, layers))["layers"]}
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--layers", type=int, default=1, help="layers of a model (two if stacked)")
    parser.add_argument("--device", default="h100", choices=["h100", "h200"])
    parser.add_argument("--fused", action="store_true", help="with fused_apply")
    parser.add_argument("--implementation", choices=["triton"], help="a kernel in place of XLA")
    parser.add_argument("--show", action="store_true", help="print the launches that move most")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    args = parser.parse_args()
    mesh = Mesh(np.array(target(args.device).devices), ("x",))
    rows = []
    for tree in args.trees:
        for name in args.only:
            tx = build(name)
            if args.implementation:
                tx = run_with(tx, implementation=args.implementation)
            row, program = counted(name, tx, tree, args, mesh)
            print(row, flush=True)
            rows.append(row)
            if args.show:
                print(*program.listing(), sep="\n")
    lines = table(rows)
    print("\n".join(["", *lines, ""]))
    if args.write:
        write("gpu programs", lines)
    return 0


def first_layers(model: str, layers: int) -> Any:
    """A model with its embeddings and its first layers."""
    shapes = model_shapes(model)
    (key,) = shapes.keys() & {"layers", "h"}
    return {**shapes, key: {str(i): shapes[key][str(i)] for i in range(layers)}}


def counted(
    name: str, tx: optax.GradientTransformation, tree: str, args: argparse.Namespace, mesh: Mesh
) -> tuple[dict[str, Any], Program]:
    """A row of the table, and the program."""
    shapes = TREES[tree](args.layers)
    start = time.process_time()
    compiled = step_for(tx, shapes, mesh, fused=args.fused)
    seconds = time.process_time() - start
    program = Program(compiled.as_text())
    totals = program.totals()
    state = jax.eval_shape(tx.init, shapes)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    least = minimum(name, shapes, state) / size
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    moved = totals.moved / size
    row = {
        "tree": tree,
        "optimizer": ", ".join(
            [name, *["fused"] * args.fused, *filter(None, [args.implementation])]
        ),
        "leaves": len(jax.tree.leaves(shapes)),
        "launches": totals.launches,
        "a leaf": round(totals.launches / len(jax.tree.leaves(shapes)), 1),
        "bytes/param at least": f"{least:.2f}",
        "read": f"{totals.read / size:.2f}",
        "written": f"{totals.written / size:.2f}",
        "of the least": f"{moved / least:.2f}",
        "temporaries, bytes/param": f"{temporaries / size:.2f}",
        "compile, CPU s": round(seconds),
    }
    return row, program


def step_for(
    tx: optax.GradientTransformation, shapes: Any, mesh: Mesh, *, fused: bool = False
) -> Any:
    """Compiles the step for one device, parameters and state donated."""
    here = NamedSharding(mesh, PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    params, state = placed(shapes), placed(jax.eval_shape(tx.init, shapes))
    with jax.set_mesh(mesh):
        traced = jax.jit(step_of(tx, fused=fused), donate_argnums=(0, 1)).trace(
            params, state, params
        )
        return traced.lower(lowering_platforms=("cuda",)).compile()


def minimum(name: str, shapes: Any, state: Any) -> float:
    """The fewest bytes that a step moves: gradient, parameters twice and state twice.

    Of a window all is read and one row written. Adam-mini reads the gradient twice, since the
    mean of a block's squares is part of the step of each of its elements.
    """
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    total = parameters * (4 if name.startswith("adam_mini") else 3)

    def moved(path: KeyPath, leaf: Any) -> float:
        size = leaf.size * leaf.dtype.itemsize
        in_window = ".window_" in jax.tree_util.keystr(path) and leaf.ndim > 2
        return size * (1 + 1 / leaf.shape[-2] if in_window else 2)

    return total + sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(moved, state)))


if __name__ == "__main__":
    sys.exit(main())
