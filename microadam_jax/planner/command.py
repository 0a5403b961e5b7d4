"""``python -m microadam_jax plan``: its flags, its table and its chart."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import jax
import optax

from microadam_jax.memory import GIB, format_table, memory_report
from microadam_jax.methods import METHODS
from microadam_jax.models import MODELS, model_shapes
from microadam_jax.optimizer_names import optimizer
from microadam_jax.planner.arithmetic import Plan, arithmetic_plan
from microadam_jax.planner.chart import draw, require_place
from microadam_jax.planner.compiled import CompiledPlan, compiled_plan
from microadam_jax.planner.llama import stacked_model
from microadam_jax.planner.meshes import parse_mesh, undivided
from microadam_jax.transforms.round_updates import Rounding, round_updates

T = TypeVar("T")
SHOWN = "adamw,adam_mini,adamw8bit,microadam,adam_mini4bit"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``plan``."""
    parser.add_argument("--model", required=True, choices=sorted(MODELS))
    parser.add_argument(
        "--optimizer",
        action="append",
        help=f"names, separated by commas, with options as microadam:layout=pretrain ({SHOWN})",
    )
    parser.add_argument("--mesh", default="", help="such as fsdp=64,tp=4; by default one device")
    parser.add_argument(
        "--param-dtype", "--dtype", default="float32", choices=["float32", "bfloat16"], dest="dtype"
    )
    parser.add_argument(
        "--rounding",
        choices=["nearest", *get_args(Rounding)],
        default="nearest",
        help="of parameters in bfloat16, see round_updates",
    )
    parser.add_argument(
        "--update-in-backward",
        action="store_true",
        help="update each layer as soon as it has a gradient; it is recomputed in any case",
    )
    parser.add_argument(
        "--remat",
        choices=["layer", "none"],
        help="what a compiled backward pass computes again (layer)",
    )
    parser.add_argument("--topology", help="compile for TPUs such as v5e:16x16, or GPUs: h200:8")
    parser.add_argument("--batch", type=_positive(int), help="sequences in a compiled step (256)")
    parser.add_argument("--seq", type=_positive(int), help="tokens in a sequence of it (2048)")
    parser.add_argument(
        "--memory-per-device", type=_positive(float), metavar="GIB", help="what fits in this"
    )
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw the table as bars")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the table that the flags ask for; a mistake in them ends the program."""
    # Nothing is computed here, so that no accelerator need be taken, or looked for.
    jax.config.update("jax_platforms", "cpu")
    try:
        model = stacked_model(options.model, options.dtype)
        mesh = parse_mesh(options.mesh)
        if options.rounding != "nearest" and options.dtype != "bfloat16":
            raise ValueError(f"--rounding {options.rounding} needs --param-dtype bfloat16.")
        for name in ("batch", "seq", "remat") if options.topology is None else ():
            if (value := getattr(options, name)) is not None:
                raise ValueError(
                    f"--{name} {value} is of a compiled step, and needs --topology, as v5e:4x4."
                )
        if options.chart:
            require_place(options.chart)  # before what may take minutes
        names = [name.strip() for name in ",".join(options.optimizer or [SHOWN]).split(",")]
        chosen = {name: optimizer(name) for name in names}
        if len(chosen) < len(names):
            raise ValueError(f"--optimizer {','.join(names)} has one of them twice.")
        if options.rounding != "nearest":
            chosen = {name: round_updates(tx, options.rounding) for name, tx in chosen.items()}
        shape = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
        rounded = "" if options.rounding == "nearest" else f", rounded {options.rounding}"
        dtype = options.dtype + rounded
        print(f"{model.name}: {model.parameters:,} parameters in {dtype}, mesh {shape}")
        if whole := undivided(model.params, mesh):
            print(f"not divided by this mesh, and so not cut: {', '.join(whole)}")
        if options.topology is None:
            plans = _of_each(
                chosen,
                lambda tx: arithmetic_plan(
                    model, tx, mesh, update_in_backward=options.update_in_backward
                ),
            )
            print_arithmetic(plans, options.memory_per_device)
            if model.llama:
                print_apart(chosen, model.params, model_shapes(options.model, options.dtype))
            parts = {name: dataclasses.asdict(plan) for name, plan in plans.items()}
        else:
            batch, seq = options.batch or 256, options.seq or 2048
            compiled = _of_each(
                chosen,
                lambda tx: compiled_plan(
                    model,
                    tx,
                    mesh,
                    options.topology,
                    batch,
                    seq,
                    update_in_backward=options.update_in_backward,
                    remat=options.remat != "none",
                ),
            )
            where = f"{options.topology}, {batch} x {seq} tokens a step"
            print(f"compiled for {where}, {_backward(options)}")
            print_compiled(compiled, options.memory_per_device)
            parts = {name: _parts(plan) for name, plan in compiled.items()}
        if options.chart:
            draw(parts, options.memory_per_device, options.chart)
            print(f"chart: {options.chart}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _of_each(
    chosen: Mapping[str, optax.GradientTransformation],
    plan: Callable[[optax.GradientTransformation], T],
) -> dict[str, T]:
    """The plans of optimizers; one that has none is named."""
    plans = {}
    for name, tx in chosen.items():
        try:
            plans[name] = plan(tx)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    return plans


def _backward(options: argparse.Namespace) -> str:
    if options.update_in_backward:
        return "each layer recomputed and updated in the backward pass"
    if options.remat == "none":
        return "all activations kept for the backward pass"
    return "each layer recomputed in the backward pass"


def print_arithmetic(plans: dict[str, Plan], memory: float | None) -> None:
    """Parameters, gradients and state on each device, and whether they fit."""
    header = ("GiB per device", "parameters", "gradients", "state", "total", *_fits(memory))
    rows = [
        (
            name,
            *map(_gib, (plan.parameters, plan.gradients, plan.state, plan.total)),
            *_verdict(plan.total, memory),
        )
        for name, plan in plans.items()
    ]
    print("\n".join(format_table([header, *rows])))
    print("Activations come on top; --topology compiles a step and counts them too.")


def print_apart(
    chosen: Mapping[str, optax.GradientTransformation], stacked: Any, apart: Any
) -> None:
    """Names optimizers of others that keep another state where layers are no stack, as here.

    Args:
        chosen: the optimizers.
        stacked: shapes of the parameters, layers in one stack.
        apart: the same with parameters of its own for each layer.
    """
    for name, tx in chosen.items():
        if name.partition(":")[0] not in METHODS:
            here, there = (memory_report(tx, params).total for params in (stacked, apart))
            if abs(there - here) > here / 100:
                print(
                    f"{name}: layers are stacked here, as for a scan, with {_gib(here)} GiB of "
                    f"state in all; with parameters of its own for each it keeps {_gib(there)}."
                )


def print_compiled(plans: dict[str, CompiledPlan], memory: float | None) -> None:
    """Prints the compiler's counts, and the collectives of the program."""
    names = ("parameters", "gradients *", "state", "other temporaries", "total", "fits")
    rows = []
    for name, compiled in plans.items():
        parts = _parts(compiled)
        fits = "no" if compiled.limit else "yes"
        if memory is not None and compiled.total > memory * GIB:
            fits = "no"
        if compiled.limit:
            fits += f", of {compiled.limit / GIB:.2f}"
        other = parts.get("other temporaries")
        gradients = parts.get("gradients")
        rows.append(
            (
                name,
                _gib(compiled.plan.parameters),
                "?" if gradients is None else _gib(gradients),
                _gib(compiled.plan.state),
                "?" if other is None else _gib(other),
                _gib(compiled.total),
                fits,
            )
        )
    print("\n".join(format_table([("GiB per device", *names), *rows])))
    print("* at most: the compiler may use up a gradient before the next one is there.")
    for name, compiled in plans.items():
        found = ", ".join(f"{count} {kind}" for kind, count in compiled.collectives.items())
        if compiled.temporaries is None:
            print(f"{name}: refused by the compiler; the total is what it says it needs.")
        else:
            print(f"{name}: collectives in the program (those of a layer once): {found or 'none'}")


def _positive(number: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = number(text)
        except ValueError:
            value = number(0)
        if not 0 < value < math.inf:
            kind = "whole number" if number is int else "number"
            raise argparse.ArgumentTypeError(f"{text} must be a positive {kind}")
        return value

    return parse


def _parts(compiled: CompiledPlan) -> dict[str, int]:
    plan = compiled.plan
    if compiled.temporaries is None:
        rest = max(0, compiled.total - plan.parameters - plan.state)
        return {"parameters": plan.parameters, "state": plan.state, "temporaries": rest}
    gradients = min(plan.gradients, compiled.temporaries)
    parts = dataclasses.asdict(plan) | {"gradients": gradients}
    return {**parts, "other temporaries": compiled.temporaries - gradients}


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _fits(memory: float | None) -> tuple[str, ...]:
    return () if memory is None else (f"fits {memory:g}",)


def _verdict(total: int, memory: float | None) -> tuple[str, ...]:
    return () if memory is None else ("yes" if total <= memory * GIB else "no",)
