"""Measures on a GPU all that could not be known without one, and writes it down; under ten minutes.

make gpu-report                                    # on a machine with a GPU
python -m benchmarks.gpu_report --parts step --again
JAX_PLATFORMS=cpu python -m benchmarks.gpu_report --small --out /tmp/report   # CPUs can do it

Four parts, each in a process of its own, whose rows are kept in ``--out``: a part that is there is
not run again. ``--write`` puts the tables into docs/performance.md and says which implementation
None should take.

kernels   each kernel and the reference on the same inputs: blocks of the twelve models, each dtype
copy      the bandwidth that a copy reaches
step      milliseconds, share of that bandwidth and memory of a jitted, donated step
pretrain  the losses of the 60M preset with four optimizers, from the same weights
"""

import argparse
import csv
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.gpu_programs import minimum
from benchmarks.scale import BASE, step_of, table, write
from microadam_jax import MicroAdamLayout, Window, top_k
from microadam_jax.codecs import dynamic4, dynamic8, float8
from microadam_jax.methods import METHODS
from microadam_jax.models import MODELS, model_shapes
from pallas_kernels.blockwise_codec import blockwise_step
from pallas_kernels.topk_compress import topk_compress
from pallas_kernels.window_update import window_update

Row = dict[str, Any]
KERNELS = ("triton", "jax_triton")
OPTIMIZERS = ("microadam", "adam_mini", "adamw8bit", "adam_mini4bit", "adamw_fp8")
PRETRAINED = "adamw,microadam,adam_mini4bit,adamw8bit"
ROOT = pathlib.Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "gpu_report")
    parser.add_argument("--again", action="store_true", help="run parts that are there already")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        bandwidth = kept(args.out, "copy")
        for row in PARTS[args.one](args.small, bandwidth[0]["GB/s"] if bandwidth else None):
            print("ROW", json.dumps(row), flush=True)
        return 0
    if not args.small and jax.default_backend() != "gpu":
        raise SystemExit(
            f"JAX has no GPU here, but {jax.default_backend()}: pip install microadam-jax[cuda] on "
            "a machine that has one, or rehearse with --small."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [part for part in args.parts if not is_done(part, args)]
    rows = {part: kept(args.out, part) for part in PARTS}
    for part, found in rows.items():
        if found:
            print(f"\n{part}\n" + "\n".join(table(found)))
    print("\n" + verdict(rows))
    if args.write:
        for part, found in rows.items():
            if found:
                write(f"gpu {part}", table(found))
        write("gpu verdict", [verdict(rows)])
    return int(bool(failed))


def is_done(part: str, args: argparse.Namespace) -> bool:
    """Runs a part unless it is there; returns False if it failed, and says why."""
    if kept(args.out, part) and not args.again:
        return True
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--one", part, "--out", args.out]
    result = subprocess.run(
        [*map(str, command), *["--small"] * args.small], capture_output=True, text=True, cwd=ROOT
    )
    lines = [line[4:] for line in result.stdout.splitlines() if line.startswith("ROW ")]
    if result.returncode:
        print(f"{part} failed:\n{result.stderr[-2000:]}", file=sys.stderr)
        return False
    (args.out / f"{part}.json").write_text("\n".join(lines))
    return True


def kept(out: pathlib.Path, part: str) -> list[Row]:
    """The rows of a part that was run."""
    path = out / f"{part}.json"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def device() -> str:
    """Of which the rows are."""
    return jax.devices()[0].device_kind


def block_sizes() -> list[tuple[int, int]]:
    """One row length for each size of block in the twelve models, and the size."""
    blocks = top_k().blocks
    leaves = [leaf for name in MODELS for leaf in jax.tree.leaves(model_shapes(name))]
    lengths = sorted({leaf.shape[-1] for leaf in leaves if leaf.ndim > 1})
    return sorted({blocks.layout(n).size: n for n in lengths if n > 1}.items())


def kernels(small: bool, _: float | None) -> Iterator[Row]:
    """How many results of each kernel differ from the reference's."""
    interpret = jax.default_backend() == "cpu"
    sizes = block_sizes()[-2:] if small else block_sizes()
    for name in KERNELS:
        for size, n in sizes:
            for dtype in ("float32",) if small else ("float32", "bfloat16", "float16"):
                row = {"device": device(), "kernel": name, "block": size, "row": n, "dtype": dtype}
                try:
                    yield row | compared(name, size, n, dtype, interpret)
                except NotImplementedError as error:
                    yield row | {"note": str(error)[:160]}
                    break


def compared(name: str, size: int, n: int, dtype: str, interpret: bool) -> Row:
    """Compresses a random gradient twice, and applies a window of the results."""
    random = np.random.default_rng(0)
    gradient = jnp.asarray(random.normal(size=(8, n)), dtype)
    blocks = (8, -(-n // size))
    zeros = jnp.zeros((*blocks, size // 2), jnp.uint8), jnp.zeros(blocks), jnp.zeros(blocks)
    k = min(3, size)
    compress = functools.partial(topk_compress, k=k)
    *_, codes, low, high = compress(gradient, *zeros, implementation="xla")
    arrays = gradient, codes, low, high
    wanted = compress(*arrays, implementation="xla")
    found = compress(*arrays, implementation=name, interpret=interpret)
    names = ("values", "indices", "codes", "low", "high")
    row: Row = {
        f"{what} that differ": int(jnp.sum(x != y))
        for what, x, y in zip(names, found, wanted, strict=True)
    }
    if name == "triton":
        window = wanted[0][..., None, :], wanted[1][..., None, :]
        one = jnp.ones(1)
        update = functools.partial(window_update, *window, one, one, 1e-8, size=size, n=n)
        x, y = update(implementation="xla"), update(implementation=name, interpret=interpret)
        row["largest difference of a window's update"] = float(jnp.max(jnp.abs(x - y)))
        row |= codes_compared(gradient, interpret)
    return row


def codes_compared(gradient: jax.Array, interpret: bool) -> Row:
    """Takes a step on moments in 8 and in 4 bits, and in floating point."""
    row: Row = {}
    for codec in (dynamic8(), dynamic4(), float8("e4m3")):
        moment = codec.encode(0.5 * gradient.astype(jnp.float32))

        def rule(moments: Any, inputs: Any) -> Any:
            new = 0.5 * moments[0] + 0.5 * inputs[0].astype(jnp.float32)
            return new, [new]

        take = functools.partial(blockwise_step, rule, [codec], [moment], [gradient], [None])
        _, (wanted,) = take(implementation="xla")
        _, (found,) = take(implementation="triton", interpret=interpret)
        row[f"{codec.name} codes that differ"] = int(jnp.sum(found.codes != wanted.codes))
    return row


def copy(small: bool, _: float | None) -> Iterator[Row]:
    """The bandwidth of a copy: bytes read and written."""
    x = jnp.zeros(2**20 if small else 2**29, jnp.float32)
    negated = jax.jit(jnp.negative)
    seconds = median_of(lambda: negated(x), rounds=5 if small else 20)
    yield {"device": device(), "GB/s": round(2 * x.nbytes / seconds / 1e9, 1)}


def median_of(run: Callable[[], Any], rounds: int) -> float:
    """The median seconds of a call, after one to warm up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def built(name: str, implementation: str | None) -> optax.GradientTransformation:
    """An optimizer with the implementation of its kernels named; None for its default."""
    if name == BASE:
        return optax.adamw(1e-3)
    if implementation is None:
        return METHODS[name].factory(1e-3)
    if name == "microadam":
        layout = MicroAdamLayout(
            top_k(implementation=implementation), window=Window(implementation=implementation)
        )
        return METHODS[name].factory(1e-3, layout=layout)
    return METHODS[name].factory(1e-3, implementation=implementation)


def step(small: bool, bandwidth: float | None) -> Iterator[Row]:
    """Times of a jitted, donated step."""
    models = {"gpt2": "124M", "llama-1b": "1B"}
    dtypes = ("float32",) if small else ("float32", "bfloat16")
    for model, size in list(models.items())[: 1 if small else 2]:
        for dtype in dtypes:
            shapes = model_shapes(model, dtype)
            if small:
                shapes, size = (
                    {"h": {"0": {"kernel": jax.ShapeDtypeStruct((64, 768), dtype)}}},
                    "49k",
                )
            for name, implementation, fused in runs(small):
                row = {
                    "device": device(),
                    "tree": size,
                    "dtype": dtype,
                    "optimizer": name,
                    "implementation": implementation or "None",
                    "applied": "fused" if fused else "after",
                }
                try:
                    yield row | timed(built(name, implementation), name, shapes, fused, bandwidth)
                except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                    yield row | {"note": str(error).partition("\n")[0][:160]}


def runs(small: bool) -> Iterator[tuple[str, str | None, bool]]:
    """Optimizers, implementations, and whether the update is applied in the same pass."""
    yield BASE, None, False
    for name in OPTIMIZERS:
        named = (None,) if name == "adam_mini" or small else (None, "triton")
        for implementation in named:
            for fused in (False, True):
                yield name, implementation, fused


def timed(tx: Any, name: str, shapes: Any, fused: bool, bandwidth: float | None) -> Row:
    """The times of an optimizer, whose minimal bytes are those of a step that is fused."""
    jitted = jax.jit(step_of(tx, fused=fused), donate_argnums=(0, 1))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), shapes)
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, 1e-2, x.dtype), shapes)
    state = jax.jit(tx.init)(params)
    least = minimum(name, shapes, jax.eval_shape(tx.init, shapes))
    compiled = jitted.lower(params, state, gradients).compile()
    held = [params, state]

    def once() -> Any:
        held[:] = compiled(*held, gradients)
        return held

    seconds = median_of(once, rounds=10)
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    row: Row = {"ms": round(1e3 * seconds, 3), "memory of the step, GB": round(peak / 1e9, 2)}
    if bandwidth:
        row["% of copy bandwidth"] = round(100 * least / seconds / 1e9 / bandwidth)
    return row


def pretrain(small: bool, _: float | None) -> Iterator[Row]:
    """Held-out losses after training for some steps."""
    size = (
        ["--steps", "4", "--batch", "2", "--seq-len", "16"]
        if small
        else [
            "--preset",
            "60m",
            "--steps",
            "400",
            "--batch",
            "32",
            "--seq-len",
            "256",
            "--tokenizer",
            "bpe",
            "--vocab-size",
            "32000",
            "--compute-dtype",
            "bfloat16",
        ]
    )
    out = ROOT / "runs" / "gpu_report_pretrain"
    command = [sys.executable, "examples/pretrain_llama.py", "--optimizer", PRETRAINED, *size]
    result = subprocess.run(
        [*command, "--out", str(out), "--overwrite"], capture_output=True, text=True, cwd=ROOT
    )
    if result.returncode:
        raise SystemExit(f"{result.stdout[-1000:]}\n{result.stderr[-1000:]}")
    with (out / "summary.csv").open() as stream:
        for row in csv.DictReader(stream):
            yield {"device": device(), **row}


PARTS: dict[str, Callable[[bool, float | None], Iterator[Row]]] = {
    "kernels": kernels,
    "copy": copy,
    "step": step,
    "pretrain": pretrain,
}


def verdict(rows: dict[str, list[Row]]) -> str:
    """Which implementation None should take, from the times."""
    timed_rows = [row for row in rows["step"] if "ms" in row]
    if not any(row["implementation"] != "None" for row in timed_rows):
        return "No kernel was timed: None takes XLA's program."
    lines = []
    for name in OPTIMIZERS:
        own = [row for row in timed_rows if row["optimizer"] == name]
        best = {
            how: sum(row["ms"] for row in own if row["implementation"] == how)
            for how in {row["implementation"] for row in own}
        }
        if best:
            lines.append(f"{name}: {min(best, key=best.__getitem__)}")
    return "Fastest over all trees, where None is XLA's program: " + "; ".join(lines) + "."


if __name__ == "__main__":
    sys.exit(main())
