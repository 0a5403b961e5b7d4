"""Measures on a GPU what could not be known without one, and writes it down; under ten minutes.

make gpu-report                                                # on a machine with a GPU
make gpu-report ARGS=--rehearse                                # the same at sizes that a CPU can do
python -m benchmarks.gpu_report --parts step --minutes 30

Each part is a list of cases. Its rows are kept in ``--out`` as they come, and a case that is there
is not measured again. A part ends when its time is over: start it once more for what is missing.
``--write`` puts tables and plots into docs/performance.md.

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
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_programs import minimum
from benchmarks.gpu_verdict import PICTURES, verdict
from benchmarks.scale import BASE, build, shapes_of, step_of, table, write
from microadam_jax import run_with, top_k
from microadam_jax.codecs import dynamic4, dynamic8, float8
from microadam_jax.models import MODELS, model_shapes
from pallas_kernels.blockwise_codec import blockwise_step
from pallas_kernels.topk_compress import topk_compress
from pallas_kernels.window_update import window_update

Row = dict[str, Any]
KERNELS = ("triton", "jax_triton")
OPTIMIZERS = ("microadam", "adam_mini", "adamw8bit", "adam_mini4bit", "adamw_fp8")
PRETRAINED = "adamw,microadam,adam_mini4bit,adamw8bit"
SIXTY_MILLION = (
    "--preset 60m --steps 400 --batch 32 --seq-len 256 --tokenizer bpe --vocab-size 32000 "
    "--compute-dtype bfloat16"
)
ROOT = pathlib.Path(__file__).parents[1]
ONCE_MORE = 3  # the exit code of a process whose device may be unusable, with cases left


class Measuring(NamedTuple):
    """Tells the cases of a part what they need to know.

    Attributes:
        rehearse: whether a CPU stands in for the GPU, at small sizes.
        bandwidth: bytes a second of a copy, if that was measured.
    """

    rehearse: bool
    bandwidth: float | None


class Part(NamedTuple):
    """One of the four tables.

    Attributes:
        cases: what is measured, the most important first; a row has all items of its case.
        measure: the rows of a case.
        minutes: after which no case is begun.
    """

    cases: Callable[[bool], Iterator[Row]]
    measure: Callable[[Row, Measuring], Iterator[Row]]
    minutes: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=pathlib.Path, help="by default runs/gpu_report")
    parser.add_argument("--minutes", type=float, help="for each part, in place of its own")
    parser.add_argument("--again", action="store_true", help="forget the rows that are there")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes")
    parser.add_argument("--write", action="store_true", help="put tables and plots into the page")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return measure(args.one, args.out, args.rehearse, args.minutes)
    if not args.rehearse and jax.default_backend() != "gpu":
        raise SystemExit(
            f"JAX {jax.__version__} finds no GPU here, only {jax.default_backend()}: run this on a "
            "machine that has one, with microadam-jax[cuda] installed, or rehearse it with "
            "--rehearse."
        )
    if args.rehearse and args.write:
        raise SystemExit("--rehearse measures nothing that the page may show: drop --write.")
    args.out = args.out or ROOT / "runs" / ("gpu_rehearsal" if args.rehearse else "gpu_report")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = [part for part in args.parts if not run(part, args)]
    rows = {part: kept(args.out, part) for part in PARTS}
    for part, found in rows.items():
        print(f"\n{part}\n" + "\n".join(table(found) if found else ["nothing was measured"]))
    print("\n" + "\n".join(verdict(rows)))
    pictures = ROOT / "docs" / "pictures" if args.write else args.out
    drawn = {part: PICTURES[part](rows[part], pictures) for part in PICTURES if rows[part]}
    if args.write:
        for part, found in rows.items():
            if found:
                write(f"gpu {part}", [*table(found), *drawn.get(part, [])])
        write("gpu verdict", verdict(rows))
    return int(bool(failed))


def run(part: str, args: argparse.Namespace) -> bool:
    """Measures what is missing of a part in processes of their own; False if that failed."""
    if args.again:
        path(args.out, part).unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--one", part, "--out", args.out]
    command += ["--rehearse"] * args.rehearse
    minutes = args.minutes or PARTS[part].minutes
    end = time.monotonic() + 60 * minutes
    while True:
        left = (end - time.monotonic()) / 60
        before = len(kept(args.out, part))
        code = subprocess.run([*map(str, command), "--minutes", str(left)], cwd=ROOT).returncode
        if code != ONCE_MORE or len(kept(args.out, part)) == before:
            return code == 0


def measure(part: str, out: pathlib.Path, rehearse: bool, minutes: float) -> int:
    """Measures the cases that are missing until the time is over; returns the exit code."""
    end, failed = time.monotonic() + 60 * minutes, False
    copies = [row for row in kept(out, "copy") if row["device"] == device()]
    told = Measuring(rehearse, copies[0]["GB/s"] * 1e9 if copies else None)
    there = [row.items() for row in kept(out, part)]
    cases = [{"device": device(), **case} for case in PARTS[part].cases(rehearse)]
    missing = [case for case in cases if not any(case.items() <= items for items in there)]
    with path(out, part).open("a") as stream:
        for number, case in enumerate(missing):
            if time.monotonic() > end:
                print(f"{part}: {len(missing) - number} cases are left; start it once more.")
                return int(failed)
            broken = False
            try:
                rows = list(PARTS[part].measure(case, told))
            except NotImplementedError as error:
                rows = [{"note": first_line(error)}]
            except jax.errors.JaxRuntimeError as error:  # such as too little memory
                rows, broken = [{"note": first_line(error)}], True
            except Exception:
                traceback.print_exc()
                rows, failed = [], True
            for row in rows:
                print(json.dumps(case | row), file=stream, flush=True)
            if broken:
                return ONCE_MORE
    return int(failed)


def first_line(error: Exception) -> str:
    """Returns as much of a message as a table has room for."""
    return str(error).partition("\n")[0].replace("|", "/")[:160]


def path(out: pathlib.Path, part: str) -> pathlib.Path:
    """The file of a part's rows, one in a line."""
    return out / f"{part}.jsonl"


def kept(out: pathlib.Path, part: str) -> list[Row]:
    """The rows of a part that are there."""
    file = path(out, part)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@functools.cache
def device() -> str:
    """The name of the device that is measured."""
    return jax.devices()[0].device_kind


def block_sizes() -> list[tuple[int, int]]:
    """One row length for each size of block in the twelve models, and the size."""
    blocks = top_k().blocks
    leaves = [leaf for name in MODELS for leaf in jax.tree.leaves(model_shapes(name))]
    lengths = sorted({leaf.shape[-1] for leaf in leaves if leaf.ndim > 1})
    return sorted({blocks.layout(n).size: n for n in lengths if n > 1}.items(), reverse=True)


def kernel_cases(rehearse: bool) -> Iterator[Row]:
    """Kernels, sizes of blocks and dtypes of gradients."""
    for dtype in ("float32",) if rehearse else ("float32", "bfloat16", "float16"):
        for size, n in [(256, 700), (172, 344)] if rehearse else block_sizes():
            for name in KERNELS:
                yield {"kernel": name, "block": size, "row": n, "dtype": dtype}


def kernels(case: Row, told: Measuring) -> Iterator[Row]:
    """Counts the results of a kernel that differ from the reference's.

    It compresses a random gradient twice, and applies a window of the results.
    """
    name, size, n = case["kernel"], case["block"], case["row"]
    random = np.random.default_rng(0)
    gradient = jnp.asarray(random.normal(size=(8, n)), case["dtype"])
    blocks = (8, -(-n // size))
    zeros = jnp.zeros((*blocks, size // 2), jnp.uint8), jnp.zeros(blocks), jnp.zeros(blocks)
    compress = functools.partial(topk_compress, k=min(3, size))
    *_, codes, low, high = compress(gradient, *zeros, implementation="xla")
    arrays = gradient, codes, low, high
    wanted = compress(*arrays, implementation="xla")
    found = compress(*arrays, implementation=name, interpret=told.rehearse)
    names = ("values", "indices", "codes", "low", "high")
    row: Row = {
        f"{what} that differ": int(jnp.sum(x != y))
        for what, x, y in zip(names, found, wanted, strict=True)
    }
    if name == "triton":
        window = wanted[0][..., None, :], wanted[1][..., None, :]
        one = jnp.ones(1)
        update = functools.partial(window_update, *window, one, one, 1e-8, size=size, n=n)
        x = update(implementation="xla")
        y = update(implementation=name, interpret=told.rehearse)
        row["largest difference of a window's update"] = float(jnp.max(jnp.abs(x - y)))
        row |= codes_compared(gradient, told.rehearse)
    yield row


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


def copy_cases(rehearse: bool) -> Iterator[Row]:
    """One array."""
    yield {"MB": 4 if rehearse else 2**11}


def copy(case: Row, told: Measuring) -> Iterator[Row]:
    """The bandwidth of a copy: bytes read and written."""
    x = jnp.zeros(case["MB"] * 2**18, jnp.float32)
    negated = jax.jit(jnp.negative)
    seconds = median_of(lambda: negated(x), rounds=5 if told.rehearse else 20)
    yield {"GB/s": round(2 * x.nbytes / seconds / 1e9, 1)}


def median_of(call: Callable[[], Any], rounds: int) -> float:
    """The median seconds of a call, after one to warm up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step_cases(rehearse: bool) -> Iterator[Row]:
    """Trees, dtypes, optimizers, implementations, and whether the update is fused.

    The layers of the larger model are stacked, as compiling takes much of the time.
    """
    trees = ["one matrix"] if rehearse else ["llama-1b, stacked", "gpt2"]
    for dtype in ("float32",) if rehearse else ("float32", "bfloat16"):
        for tree in trees:
            yield step_case(tree, dtype, BASE, "None", False)
            for name in OPTIMIZERS:
                for implementation in ("None",) if name == "adam_mini" else ("None", "triton"):
                    for fused in (False, True):
                        yield step_case(tree, dtype, name, implementation, fused)


def step_case(tree: str, dtype: str, name: str, implementation: str, fused: bool) -> Row:
    """One program."""
    how = {"implementation": implementation, "applied": "fused" if fused else "after"}
    return {"tree": tree, "dtype": dtype, "optimizer": name, **how}


def step(case: Row, told: Measuring) -> Iterator[Row]:
    """Times of a jitted, donated step; its least bytes are those of one that is fused."""
    if told.rehearse:
        shapes: Any = {"kernel": jax.ShapeDtypeStruct((64, 768), case["dtype"])}
    else:
        model, _, stacked = case["tree"].partition(", ")
        shapes = shapes_of(model, bool(stacked), case["dtype"])
    tx = build(case["optimizer"])
    if case["implementation"] != "None":
        tx = run_with(tx, implementation=case["implementation"])
    taken = step_of(tx, fused=case["applied"] == "fused")
    state_shapes = jax.eval_shape(tx.init, shapes)
    if told.rehearse and case["implementation"] != "None":
        jax.eval_shape(taken, shapes, state_shapes, shapes)
        yield {"note": "traced: a CPU cannot run it"}
        return
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), shapes)
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, 1e-2, x.dtype), shapes)
    state = jax.jit(tx.init)(params)
    jitted = jax.jit(taken, donate_argnums=(0, 1))
    compiled = jitted.lower(params, state, gradients).compile()
    held = [params, state]
    del params, state  # donated: not to be held twice

    def once() -> Any:
        held[:] = compiled(*held, gradients)
        return held

    seconds = median_of(once, rounds=3 if told.rehearse else 10)
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    row: Row = {"ms": round(1e3 * seconds, 3), "memory of the step, GB": round(peak / 1e9, 2)}
    if told.bandwidth:
        least = minimum(case["optimizer"], shapes, state_shapes)
        row["% of copy bandwidth"] = round(100 * least / seconds / told.bandwidth)
    yield row


def pretrain_cases(rehearse: bool) -> Iterator[Row]:
    """One comparison."""
    yield {"model": "tiny" if rehearse else "60M"}


def pretrain(case: Row, told: Measuring) -> Iterator[Row]:
    """Held-out losses after training for some steps."""
    flags = "--steps 4 --batch 2 --seq-len 16" if told.rehearse else SIXTY_MILLION
    out = ROOT / "runs" / f"gpu_report_pretrain_{case['model']}"
    command = [sys.executable, "examples/pretrain_llama.py", "--optimizer", PRETRAINED]
    command += [*flags.split(), "--out", str(out), "--overwrite"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{result.stdout[-1000:]}\n{result.stderr[-1000:]}")
    with (out / "summary.csv").open() as stream:
        yield from csv.DictReader(stream)


PARTS = {
    "kernels": Part(kernel_cases, kernels, 1.5),
    "copy": Part(copy_cases, copy, 0.5),
    "step": Part(step_cases, step, 4.0),
    "pretrain": Part(pretrain_cases, pretrain, 3.0),
}


if __name__ == "__main__":
    sys.exit(main())
