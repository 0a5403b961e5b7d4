"""How long an optimizer's step takes beside AdamW's: interleaved runs in one process, medians.

python -m benchmarks.optimizer_step
python -m benchmarks.optimizer_step --trees llama-60m --only adam_mini microadam --size 1e8

A step is ``tx.update`` and ``optax.apply_updates`` in one program, state and parameters donated;
the last column sets ``fused_apply`` beside it. It prints a table for the device it runs on.
Refreshes of subspaces fall in the first round alone, and so not in the medians, but for LDAdam's
and DCT-AdamW's, which come in every step.
"""

import argparse
import datetime
import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.scale import BASE, step_of
from microadam_jax import memory_report, microadam, run_with
from microadam_jax.aliases.windowed import MICROADAM_LAYOUTS
from microadam_jax.engine.descent import Fusable
from microadam_jax.methods import METHODS
from microadam_jax.models import MODELS, Shapes, model_shapes
from microadam_jax.optimizer_names import optimizer

# Which of the kernels are made for a platform.
KERNELS = {"cpu": (), "gpu": ("triton",), "tpu": ("mosaic_tpu",)}
RANK = 16
OTHER_SETTINGS = ("adam_mini:mu_dtype=bfloat16", "adamw4bit:nu_codec=linear4_unsigned")
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    BASE: lambda: optax.adamw(1e-3),
    **{
        name: functools.partial(method.factory, 1e-3, **method.at_rank(RANK))
        for name, method in METHODS.items()
        if name != "microadam"  # see optimizers()
    },
    **{text: functools.partial(optimizer, text) for text in OTHER_SETTINGS},
}


class Candidate(NamedTuple):
    """A compiled step and what it works on.

    Attributes:
        step: from parameters, state and gradients to new parameters and state.
        params: the latest.
        state: the latest.
        moved: bytes that a step reads and writes at least.
        temporary: bytes that the program allocates beside its arguments and results.
    """

    step: Any
    params: Any
    state: Any
    moved: int
    temporary: int

    def run(self, gradients: Any) -> tuple["Candidate", float]:
        """One step, and the seconds it took."""
        start = time.perf_counter()
        params, state = jax.block_until_ready(self.step(self.params, self.state, gradients))
        return self._replace(params=params, state=state), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="+", default=["llama-60m", "resnet-50"], choices=MODELS)
    parser.add_argument("--size", type=float, default=8e6, help="parameters of each tree, at most")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of optimizers' names")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    known = [name for name, _ in optimizers(("",))]
    for beginning in args.only:
        if not any(name.startswith(beginning) for name in known):
            parser.error(f"--only {beginning}: no name begins so; there are {', '.join(known)}")
    device = jax.devices()[0]
    print(
        f"{datetime.date.today()}, {device.device_kind} ({device.platform}, {platform.machine()}), "
        f"Python {platform.python_version()}, JAX {jax.__version__}, {args.rounds} rounds"
    )
    for tree in args.trees:
        compare(tree, scaled(model_shapes(tree), args.size), tuple(args.only), args.rounds)


def scaled(shapes: Shapes, size: float) -> Shapes:
    """The tree with its long axes but the last divided by the least power of two that makes it fit.

    It keeps its leaves, so that what a leaf costs by itself counts as much, and the length of their
    rows, which blocks are cut from.
    """

    def divided(leaf: jax.ShapeDtypeStruct, factor: int) -> jax.ShapeDtypeStruct:
        rows = (n if n < 16 else max(16, n // factor) for n in leaf.shape[:-1])
        return leaf.update(shape=(*rows, *leaf.shape[-1:]))

    for factor in (2**power for power in range(20)):
        fitted = jax.tree.map(functools.partial(divided, factor=factor), shapes)
        if sum(leaf.size for leaf in jax.tree.leaves(fitted)) <= size:
            return fitted
    raise ValueError(f"No tree of these leaves has {size:,.0f} parameters or fewer; give more.")


def optimizers(only: tuple[str, ...]) -> Iterator[tuple[str, optax.GradientTransformation]]:
    """By name; MicroAdam in each layout, and by each implementation that this device may have."""
    for name, make in OPTIMIZERS.items():
        if name.startswith((BASE, *only)):
            yield name, make()
    for layout_name, layout in MICROADAM_LAYOUTS.items():
        for implementation in ("xla", *KERNELS[jax.default_backend()]):
            name = f"microadam, {layout_name}, {implementation}"
            if name.startswith(only):
                tx = microadam(1e-3, layout=layout)
                yield name, run_with(tx, implementation=implementation)


def candidate(tx: optax.GradientTransformation, step: Any, gradients: Any) -> Candidate:
    """The step, compiled for parameters that are all zero."""
    params = jax.tree.map(jnp.zeros_like, gradients)
    state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients).compile()
    return Candidate(
        compiled,
        params,
        state,
        # Of a window only one row is written, which this counts as all of them.
        moved=nbytes(gradients) + 2 * nbytes(params) + 2 * nbytes(state),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
    )


def nbytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def compare(tree: str, shapes: Shapes, only: tuple[str, ...], rounds: int) -> None:
    """Times one step of each optimizer in each round, and prints the table."""
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    gradients = treedef.unflatten(
        jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    )
    size = sum(leaf.size for leaf in leaves)
    print(f"\n{tree}, scaled to {size:,} parameters in {len(leaves)} leaves\n", flush=True)

    steps: dict[tuple[str, str], Candidate] = {}
    kept: dict[str, str] = {}
    for name, tx in optimizers(only):
        try:
            steps[name, "two passes"] = candidate(tx, step_of(tx), gradients)
        except NotImplementedError as error:
            print(f"{name}: {error}")
            continue
        kept[name] = f"{memory_report(tx, shapes).bytes_per_parameter:.2f}"
        if isinstance(tx, Fusable):
            steps[name, "fused"] = candidate(tx, step_of(tx, fused=True), gradients)

    array = jnp.zeros(size)
    copy = jax.jit(jnp.negative).lower(array).compile()
    seconds: dict[Any, list[float]] = {which: [] for which in ("copy", *steps)}
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(copy(array))
        seconds["copy"].append(time.perf_counter() - start)
        for which in steps:
            steps[which], taken = steps[which].run(gradients)
            seconds[which].append(taken)
    medians = {which: statistics.median(times) for which, times in seconds.items()}
    bandwidth = 2 * array.nbytes / medians["copy"]

    print(f"Copying moves {bandwidth / 1e9:.1f} GB/s.\n")
    print(
        "| optimizer | state, bytes/param | ms | of AdamW's time | of copy bandwidth "
        "| temporaries, bytes/param | fused_apply, of the time before |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name, bytes_kept in kept.items():
        median, own = medians[name, "two passes"], steps[name, "two passes"]
        fused = f"{medians[name, 'fused'] / median:.2f}" if (name, "fused") in steps else "-"
        print(
            f"| {name} | {bytes_kept} | {1e3 * median:.1f} "
            f"| {median / medians[BASE, 'two passes']:.1f} "
            f"| {own.moved / median / bandwidth:.2f} | {own.temporary / size:.2f} | {fused} |"
        )


if __name__ == "__main__":
    main()
