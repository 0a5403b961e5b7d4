"""A training step compiled for the real device, which need not be there."""

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import layers
from microadam_jax.execution import run_with
from microadam_jax.planner.arithmetic import Plan, arithmetic_plan
from microadam_jax.planner.llama import Model, loss, pieces
from microadam_jax.planner.meshes import AXES, ROWS, parameter_shardings
from microadam_jax.planner.targets import target
from microadam_jax.state_shardings import state_shardings

_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_SIZE = r"([\d.]+)([KMGT])"
# What the compiler says depends on the pass that gives up. Despite its words, the first of these
# counts arguments too: a program with 8 GiB of them and 12 GiB besides is refused for 20.
_TOO_LARGE = (
    re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompiledPlan:
    """Holds the compiler's counts for one training step, in bytes on each device.

    Attributes:
        plan: the arithmetic of parameters, gradients and state.
        temporaries: what the peak has besides parameters and state: gradients, activations and all
            else. None where the compiler gave up.
        total: the program's peak; where the compiler gave up, what it would have needed.
        limit: the device's memory where that is less; None where it fits.
        collectives: how many of each kind are in the program. One in the loop over layers counts
            once.
    """

    plan: Plan
    temporaries: int | None
    total: int
    limit: int | None
    collectives: dict[str, int]


def compiled_plan(
    model: Model,
    tx: optax.GradientTransformation,
    mesh: dict[str, int],
    topology: str,
    batch: int,
    seq: int,
    *,
    update_in_backward: bool = False,
    remat: bool = True,
) -> CompiledPlan:
    """Compiles forward pass, backward pass and update for TPUs or GPUs.

    Args:
        model: a Llama of :func:`stacked_model`.
        tx: the optimizer.
        mesh: sizes of the axes data, fsdp and tp.
        topology: TPUs such as ``"v5e:16x16"``, or a number of GPUs such as ``"h200:8"``.
        batch: sequences in a step.
        seq: tokens in a sequence.
        update_in_backward: whether each layer is updated inside the backward pass.
        remat: whether each layer is computed again in the backward pass. One that is updated in it
            always is.

    Raises:
        ValueError: if the compiler is not installed or does not know the topology, if the mesh
            does not have its number of devices or does not divide the batch, or if the model is
            no Llama.
    """
    if not model.llama:
        raise ValueError(f"There is no training step for {model.name}; take a Llama.")
    on = target(topology)
    if len(on.devices) != math.prod(mesh.values()):
        raise ValueError(
            f"--topology {topology} has {len(on.devices)} devices and --mesh "
            f"{','.join(f'{k}={v}' for k, v in mesh.items())} has {math.prod(mesh.values())}; "
            "make them equal."
        )
    rows = math.prod(mesh[axis] for axis in ROWS)
    if batch % rows:
        raise ValueError(f"--batch {batch} does not divide over data times fsdp, {rows}.")
    placed = Mesh(np.reshape(on.devices, tuple(mesh.values())), AXES)
    tx = run_with(tx, shardings=parameter_shardings(model.params, placed))
    plan = arithmetic_plan(model, tx, mesh, update_in_backward=update_in_backward)
    try:
        program = _compile(model, tx, placed, on.platform, batch, seq, update_in_backward, remat)
    except jax.errors.JaxRuntimeError as error:
        sizes = needed_and_available(str(error))
        if sizes is None:
            raise
        return CompiledPlan(plan, None, *sizes, {})
    memory = program.memory_analysis()
    # Not the sum of arguments and temporaries, which was 19 GiB for a program that fits in 15.75.
    peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    return CompiledPlan(
        plan,
        max(0, peak - memory.argument_size_in_bytes),
        peak,
        on.memory if on.memory is not None and peak > on.memory else None,
        dict(Counter(_COLLECTIVE.findall(program.as_text())).most_common()),
    )


def needed_and_available(message: str) -> tuple[int, int] | None:
    """Bytes in the error of a compiler that gives up for want of memory; None in other errors."""
    for pattern in _TOO_LARGE:
        if sizes := pattern.search(message):
            needed, unit, available, unit_available = sizes.groups()
            return (
                int(float(needed) * _UNITS[unit]),
                int(float(available) * _UNITS[unit_available]),
            )
    return None


def _compile(
    model: Model,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    platform: str,
    batch: int,
    seq: int,
    update_in_backward: bool,
    remat: bool,
) -> Any:
    where = parameter_shardings(model.params, mesh)
    where_state = state_shardings(tx, model.params, where)

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, tokens, mesh, remat=remat)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    def placed(shapes: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda leaf, s: leaf.update(sharding=s), shapes, shardings)

    if update_in_backward:
        training = layers.update_in_backward(tx, *pieces(mesh), shardings=where)
        jax.eval_shape(training.init, model.params)  # refuses what cannot work
        step = training.step
    state = jax.eval_shape(lambda params: tx.init(params), model.params)
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32, sharding=NamedSharding(mesh, P(ROWS)))
    jitted = jax.jit(
        step, donate_argnums=(0, 1), out_shardings=(where, where_state, NamedSharding(mesh, P()))
    )
    # The devices are not those of this process, so that links cannot count them by themselves.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jitted.trace(placed(model.params, where), placed(state, where_state), tokens)
    return traced.lower(lowering_platforms=(platform,)).compile()
