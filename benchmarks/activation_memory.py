"""Measures what a scanned Llama keeps for its backward pass, by count and by the compiler.

python -m benchmarks.activation_memory                       # for this machine's CPU
python -m benchmarks.activation_memory --topology v5e:2x2    # or h200:1; needs no such device

In all of these attention keeps its inputs alone, as FlashAttention does.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples.llama.model import Block, ModelConfig
from microadam_jax.layers import compress_residuals, saved_bytes
from microadam_jax.planner.targets import target

Layer = Callable[[Block, jax.Array], jax.Array]


def apply(block: Block, x: jax.Array) -> jax.Array:
    """One layer."""
    return block(x)


products = jax.checkpoint(apply, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
inputs = jax.checkpoint(apply)

# How the block computes, and what is done to it.
VARIANTS: dict[str, tuple[str, Layer]] = {
    "all, bfloat16": ("fp8", apply),
    "all, codes": ("fp8", compress_residuals(apply)),
    "COAT": ("coat", apply),
    "products, bfloat16": ("fp8", products),
    "products, codes": ("fp8", compress_residuals(products)),
    "inputs, bfloat16": ("fp8", inputs),
    "inputs, codes": ("fp8", compress_residuals(inputs)),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """The model and its batch."""

    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    layers: int = 8
    batch: int = 8
    length: int = 512

    def blocks(self, activations: str) -> Block:
        """The shapes of the stacked layers, with float32 parameters."""
        config = ModelConfig(
            self.hidden,
            self.intermediate,
            self.layers,
            self.heads,
            vocab=256,
            compute_dtype="bfloat16",
            activations=activations,
        )
        stack = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))
        return jax.eval_shape(lambda: stack(jax.random.split(jax.random.key(0), self.layers)))

    @property
    def x(self) -> jax.ShapeDtypeStruct:
        """The input of the first layer."""
        return jax.ShapeDtypeStruct((self.batch, self.length, self.hidden), jnp.bfloat16)


def units(variant: str, size: Size) -> float:
    """Counts what one layer saves, in sizes of its bfloat16 input."""
    activations, layer = VARIANTS[variant]
    shape = jax.eval_shape(lambda b: jax.tree.map(lambda a: a[0], b), size.blocks(activations))
    saved = saved_bytes(layer, shape, size.x, after=layer).totals[0]
    return saved / (2 * size.x.size)


def compiled(variant: str, size: Size, topology: str | None = None) -> Any:
    """The compiled gradient of the mean square of the last layer's output."""
    activations, layer = VARIANTS[variant]

    def loss(blocks: Block, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, block: (layer(block, x), None), x, blocks)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    arguments, setting, options = (size.blocks(activations), size.x), contextlib.nullcontext(), {}
    if topology:
        there = target(topology)
        mesh = Mesh(there.devices[:1], ("x",))
        whole = NamedSharding(mesh, PartitionSpec())
        arguments = jax.tree.map(lambda a: a.update(sharding=whole), arguments)
        setting, options = jax.set_mesh(mesh), {"lowering_platforms": (there.platform,)}
    with setting:
        return jax.jit(jax.grad(loss)).trace(*arguments).lower(**options).compile()


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", help="such as v5e:2x2 or h200:1")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    args = vars(parser.parse_args())
    topology, size = args.pop("topology"), Size(**args)
    print(f"{size}, {topology or 'this CPU'}\n")
    print("| kept of a layer | units | temporaries, MB | beside all, bfloat16 |")
    print("|---|---|---|---|")
    base = None
    for name in VARIANTS:
        program = compiled(name, size, topology)
        memory = program.memory_analysis().temp_size_in_bytes / 1e6
        base = base or memory
        print(
            f"| {name} | {units(name, size):.2f} | {memory:.0f} | {memory / base:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
