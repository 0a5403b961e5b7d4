"""Every optimizer at the size of real models: traces, compile times, and steps of GPT-2.

python -m benchmarks.scale                      # all; about two hours on two cores
python -m benchmarks.scale --short              # what CI runs; within ten minutes
python -m benchmarks.scale --parts budget --models llama2-7b --only microadam adamw8bit
python -m benchmarks.scale --parts steps --stacked --write

Each optimizer runs in a process of its own with ``optax.adamw`` beside it, so that one failure
stops none. Compile times are processor seconds, which other work on the machine hardly changes.
``--write`` puts the tables into docs/performance.md.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.places import filled
from microadam_jax import fused_apply
from microadam_jax.methods import METHODS
from microadam_jax.models import MODELS, model_shapes

BASE = "optax.adamw"
SHORT = ("microadam", "adam_mini", "adamw8bit", "adam_mini4bit", "adamw_fp8", "adamw4bit_factored")
BUDGET = 6.0  # times AdamW's time to trace and compile
LARGE_BUDGET = 12.0  # of methods that need whole matrices
# An inverse of squared gradients makes steps that are the smaller, the more elements there are.
RATES = {
    "apollo_mini": 1e-4,
    "lowrank_mfac": 1e4,
    "mfac": 1e5,
    "sparse_ggt": 3e2,
    "sparse_mfac": 1e4,
}
NOISE = 4 / 3  # by which other work on the machine may change a ratio
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "performance.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=None)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--short",
        action="store_true",
        help="trace all on GPT-2 and Llama-2 7B, and take steps of GPT-2 with six",
    )
    parser.add_argument("--stacked", action="store_true", help="stack the layers of a model")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for an optimizer")
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        (part,) = args.parts
        for row in PARTS[part](args.one, args.models, args.stacked):
            print("ROW", json.dumps(row), flush=True)
        return 0
    if args.short:
        failures = [
            table_of("trace", list(METHODS), ["gpt2", "llama2-7b"], args),
            table_of("steps", list(SHORT), ["gpt2"], args),
        ]
        return int(any(failures))
    failures = [table_of(part, args.only, args.models, args) for part in args.parts]
    return int(any(failures))


def table_of(
    part: str, names: list[str], models: list[str] | None, args: argparse.Namespace
) -> bool:
    """Prints a part's table, and writes it if asked to; returns whether anything failed."""
    run = functools.partial(in_own_process, part, models=models, args=args)
    rows: list[dict[str, Any]] = []
    # Traces take one core, and nothing in them is timed to a hundredth.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() if part == "trace" else 1) as pool:
        for name, found in zip(names, pool.map(run, names), strict=True):
            rows += found
            print(part, name, *found, sep="\n  ", flush=True)
    lines = table(rows)
    print("\n".join(["", *lines, ""]), flush=True)
    if args.write:
        write(f"scale {part}{' stacked' if args.stacked else ''}", lines)
    return any("failure" in row for row in rows)


def in_own_process(
    part: str, name: str, models: list[str] | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one optimizer, or what became of it."""
    chosen = ["--models", *models] if models else []
    stacked = ["--stacked"] if args.stacked else []
    command = [sys.executable, "-m", "benchmarks.scale", "--one", name, "--parts", part]
    try:
        result = subprocess.run(
            [*command, *chosen, *stacked], capture_output=True, text=True, timeout=args.timeout
        )
        output, error = result.stdout, result.stderr.strip().splitlines()
        ended = f"ended with {result.returncode}"  # a signal, of which nothing is printed
        failure = (error or [ended])[-1] if result.returncode else None
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode()
        failure = f"not done after {args.timeout} s"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    return rows if failure is None else [*rows, {"optimizer": name, "failure": failure}]


def build(name: str) -> optax.GradientTransformation:
    """An optimizer with a learning rate that suits the quadratic."""
    if name == BASE:
        return optax.adamw(1e-3)
    return METHODS[name].factory(RATES.get(name, 1e-3))


def stacked_layers(tree: Any) -> Any:
    """``tree`` with numbered layers stacked along a first axis."""
    if not isinstance(tree, dict):
        return tree
    tree = {key: stacked_layers(value) for key, value in tree.items()}
    if tree and all(key.isdigit() for key in tree):
        layers = list(tree.values())
        return jax.tree.map(lambda leaf: leaf.update(shape=(len(layers), *leaf.shape)), layers[0])
    return tree


def shapes_of(model: str, stacked: bool, dtype: str = "float32") -> Any:
    """The parameters of a model, as shapes."""
    shapes = model_shapes(model, dtype)
    return stacked_layers(shapes) if stacked else shapes


def trace(name: str, models: list[str] | None, stacked: bool) -> Iterator[dict[str, Any]]:
    """Traces init and update, and compares the types of the states."""
    for model in models or MODELS:
        for dtype in ("float32", "bfloat16"):
            tx, shapes = build(name), shapes_of(model, stacked, dtype)
            start = time.process_time()
            state = jax.eval_shape(tx.init, shapes)
            updates, new = jax.eval_shape(tx.update, shapes, state, shapes)
            seconds = time.process_time() - start
            same = avals(new) == avals(state) and avals(updates) == avals(shapes)
            row = {"optimizer": name, "model": model, "dtype": dtype, "seconds": round(seconds, 1)}
            yield row if same else {**row, "failure": "the types of the state change"}


def avals(tree: Any) -> Any:
    """Shapes and dtypes."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def step_of(
    tx: optax.GradientTransformation, *, fused: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """Builds the step of a training loop, from ``(params, state, gradients)``.

    Donate the first two. Their order is that of the results: JAX pairs donated arguments and
    results of one type in order, and XLA copies where it pairs a parameter with a moment.
    """
    apply = fused_apply(tx) if fused else None

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        if apply is not None:
            return apply(gradients, state, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Compiled(NamedTuple):
    """The programs of an optimizer, and processor seconds to make them; the step is donated."""

    init: Any
    step: Any
    init_seconds: float
    step_seconds: float


def compiled(name: str, shapes: Any) -> Compiled:
    """Compiles an optimizer for the parameters of a model."""
    tx = build(name)
    start = time.process_time()
    init = jax.jit(tx.init).lower(shapes).compile()
    between = time.process_time()
    state = jax.eval_shape(tx.init, shapes)
    step = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(shapes, state, shapes).compile()
    return Compiled(init, step, between - start, time.process_time() - between)


class Beside(NamedTuple):
    """The programs of AdamW and of an optimizer, and how much longer the second's step took."""

    base: Compiled
    own: Compiled
    ratio: float


def compiled_beside(name: str, shapes: Any) -> Beside:
    """Compiles an optimizer between AdamWs.

    AdamW takes so little that one measurement of it moves the ratio by a third: three are taken,
    and their median counts. A ratio above the budget is measured twice, and the smaller counts,
    as other work on the machine only adds.
    """
    compiled(BASE, {"warm": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
    bases = [compiled(BASE, shapes), compiled(BASE, shapes)]
    own = compiled(name, shapes)
    bases.append(compiled(BASE, shapes))
    base = sorted(bases, key=lambda programs: programs.step_seconds)[1]
    if own.step_seconds > allowed(name) * base.step_seconds:
        own = min(own, compiled(name, shapes), key=lambda programs: programs.step_seconds)
    return Beside(base, own, own.step_seconds / base.step_seconds)


def budget(name: str, models: list[str] | None, stacked: bool) -> Iterator[dict[str, Any]]:
    """Sets the time to trace and compile beside AdamW's."""
    for model in models or ("gpt2", "llama2-7b"):
        shapes = shapes_of(model, stacked)
        base, own, ratio = compiled_beside(name, shapes)
        row = {
            "optimizer": name,
            "model": model,
            "step, s": round(own.step_seconds, 1),
            "of AdamW's": round(ratio, 1),
            "init, of AdamW's": round(own.init_seconds / base.init_seconds, 1),
        }
        yield within_budget(row, ratio)


def within_budget(row: dict[str, Any], ratio: float) -> dict[str, Any]:
    """``row``, with a failure if tracing and compiling took too long."""
    most = allowed(row["optimizer"])
    if ratio <= most * NOISE:
        return row
    return {**row, "failure": f"{ratio:.1f} times AdamW's time to compile, of {most:g}"}


def allowed(name: str) -> float:
    """The budget of an optimizer, in AdamW's time to compile."""
    whole = METHODS[name].kind in ("subspace", "full matrix")
    return LARGE_BUDGET if whole else BUDGET


def steps(name: str, models: list[str] | None, stacked: bool) -> Iterator[dict[str, Any]]:
    """Takes steps on a quadratic, beside AdamW's."""
    for model in models or ("gpt2",):
        shapes = shapes_of(model, stacked)
        target = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
        loss = jax.jit(
            lambda params, target=target: sum(
                jnp.sum(jnp.square(p - t))
                for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
            )
        )
        seconds: dict[str, list[float]] = {}
        losses: list[float] = []
        base, own, ratio = compiled_beside(name, shapes)
        for which, programs in ((BASE, base), (name, own)):
            params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            state, seconds[which] = programs.init(params), []
            for _ in range(6):
                gradients = jax.tree.map(lambda p, t: p - t, params, target)
                start = time.perf_counter()
                params, state = jax.block_until_ready(programs.step(params, state, gradients))
                seconds[which].append(time.perf_counter() - start)
                if which == name:
                    losses.append(float(loss(params)))
            del params, state
        falls = all(after < before for before, after in itertools.pairwise(losses))
        medians = {which: statistics.median(times[1:]) for which, times in seconds.items()}
        row = {
            "optimizer": name,
            "model": model,
            "compile, of AdamW's": round(ratio, 1),
            "step, ms": round(1e3 * medians[name]),
            "of AdamW's": round(medians[name] / medians[BASE], 1),
            "peak of the process, GiB": round(
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1
            ),
        }
        row = within_budget(row, ratio)
        yield row if falls else {**row, "failure": f"losses {losses}"}


PARTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "trace": trace,
    "budget": budget,
    "steps": steps,
}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table; failures in a column of their own."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *cells]]


def write(mark: str, lines: list[str]) -> None:
    """Puts a table into its place on the page."""
    PAGE.write_text(filled(PAGE.read_text(), mark, lines))


if __name__ == "__main__":
    sys.exit(main())
