"""Which implementation of an operation runs."""

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

IMPLEMENTATIONS = ("xla", "mosaic_tpu", "triton", "jax_triton")
# Tried and left out; docs/performance.md has the details.
LEFT_OUT = {
    "mosaic_gpu": "its division is an approximation, and the oldest JAX that this library runs on "
    "can neither interpret such a kernel nor let it update a state in place"
}
GPU_COMPILERS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
CHECKED = (
    "jax.shard_map checks along which axes results vary, which a kernel does not say; give it "
    "check_vma=False"
)


def check_implementation(owner: str, implementation: str | None) -> None:
    """Raises an error unless ``implementation`` is None or one of the known names.

    Raises:
        NotImplementedError: if it was tried and left out; says why.
        ValueError: if there is no such implementation.
    """
    if implementation in LEFT_OUT:
        raise NotImplementedError(
            f"{owner}: there is no {implementation!r}: {LEFT_OUT[implementation]}. On GPUs use "
            "'triton' or 'xla'."
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{owner}.implementation must be None, which picks by device, or one of "
            f"{IMPLEMENTATIONS}; got {implementation!r}."
        )


def names_kernel(implementation: str | None) -> bool:
    """Returns True unless XLA's program is asked for, or the choice is left to the device."""
    return implementation not in (None, "xla")


def run(
    operation: str,
    implementation: str | None,
    xla: Callable[..., Any],
    kernels: Callable[[], Mapping[str, tuple[Callable[..., Any], str | None]]],
    arrays: tuple[jax.Array, ...],
    scalars: tuple[jax.Array, ...] = (),
    *,
    rank: int,
    padded: bool,
    sharding: NamedSharding | None = None,
) -> Any:
    """Runs an operation whose arrays and results all lie as the tensor does, block by block.

    Args:
        operation: its name, for errors.
        implementation: None picks ``mosaic_tpu`` where the program is compiled for TPUs. It picks
            ``xla`` on CPUs and GPUs, where the kernel does not take the shapes, and where the
            arrays may be sharded in a way that only the compiler knows.
        xla: the reference; it takes ``(*arrays, *scalars)``.
        kernels: tells by implementation the kernel, which takes the same, and the reason why it
            cannot take these shapes, or None.
        arrays: the axes of each lie as those of the first, unless they have size 1.
        scalars: the same on every device.
        rank: axes of the tensor, of which the last is cut into blocks.
        padded: whether the last block exceeds the row.
        sharding: where the tensor lies, which Explicit axes tell by themselves.

    Raises:
        NotImplementedError: if a named implementation cannot run; says why.
        ValueError: if there is no implementation of this name.
    """
    if only_xla(operation, implementation):
        return xla(*arrays, *scalars)
    place = _placement(arrays[0], sharding, named=implementation is not None)
    if padded and isinstance(place, NamedSharding) and any(place.spec[rank - 1 :]):
        place = "the last axis is sharded and its last block padded, so shards cut blocks"
    if implementation is not None:
        kernel, reason = kernels().get(implementation, (xla, "there is no such kernel"))
        reason = reason or (place if isinstance(place, str) else None)
        if reason is not None:
            raise NotImplementedError(
                f"{operation}: {implementation!r} cannot run here: {reason}. implementation=None "
                "falls back on 'xla' in such a case."
            )
        return _mapped(kernel, place, arrays, scalars)
    kernel, reason = kernels().get("mosaic_tpu", (xla, "there is no such kernel"))
    if isinstance(place, str) or reason is not None:
        return xla(*arrays, *scalars)

    def on_tpu(*operands: jax.Array) -> Any:
        return _mapped(kernel, place, operands[: len(arrays)], operands[len(arrays) :])

    return jax.lax.platform_dependent(*arrays, *scalars, tpu=on_tpu, default=xla)


def only_xla(operation: str, implementation: str | None) -> bool:
    """Returns True if no kernel is named, and none can be chosen where this process compiles for.

    Raises:
        NotImplementedError: if the named implementation was tried and left out; says why.
        ValueError: if there is no implementation of this name.
    """
    check_implementation(operation, implementation)
    return implementation == "xla" or (implementation is None and not compiles_for_tpus())


@functools.cache
def compiles_for_tpus() -> bool:
    """True if programs that this process traces may be compiled for TPUs.

    Their compiler is there, or a backend of another name that may have them. Elsewhere kernels that
    nobody could compile would take longer to trace than all else.
    """
    compiler = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
    return compiler or jax.default_backend() not in ("cpu", "gpu")


def compiles_for_gpus(x: jax.Array) -> bool:
    """True if a program on ``x`` may be compiled for GPUs, and no axis of ``x`` is Explicit.

    Elsewhere what only GPUs run would be traced for nothing; on Explicit axes that program would
    have to say how each constant is sharded.
    """
    return not any(jax.typeof(x).sharding.spec) and _gpu_compiler_is_there()


@functools.cache
def _gpu_compiler_is_there() -> bool:
    found = any(map(importlib.util.find_spec, GPU_COMPILERS))
    return found or jax.default_backend() in ("gpu", "cuda", "rocm")


def _placement(
    array: jax.Array, sharding: NamedSharding | None, *, named: bool
) -> str | NamedSharding | None:
    """The sharding to map over, None where all is on one device, or why neither is known."""
    mesh = jax.sharding.get_abstract_mesh()
    types = set(mesh.axis_types)
    if types == {AxisType.Manual}:
        return CHECKED if _varying_is_checked(mesh) else None
    explicit = types == {AxisType.Explicit}
    if explicit:
        sharding = jax.typeof(array).sharding
    if sharding is not None:
        axes = list(sharding.spec)
        while axes and axes[-1] is None:
            axes.pop()
        # On a mesh of one device too: what has a sharding in its type no kernel can index.
        mapped = explicit or sharding.mesh.size > 1
        return NamedSharding(sharding.mesh, PartitionSpec(*axes)) if mapped else None
    if mesh.empty:
        # Who names a kernel knows; should the arrays be sharded after all, the compiler says so.
        return None if named or jax.device_count() == 1 else "no mesh is set"
    if mesh.size == 1:
        return None
    return (
        "the mesh has Auto axes, so the placement of the arrays is not known, and a kernel does "
        "not partition itself; give run_with(tx, shardings=...), or use Explicit axes, which "
        "jax.make_mesh makes by default"
    )


def _varying_is_checked(mesh: AbstractMesh) -> bool:
    """Returns True if jax.shard_map has ``check_vma``, as by default: types say what varies."""
    one = jnp.zeros(())
    return jax.typeof(jax.lax.pcast(one, mesh.manual_axes, to="varying")) != jax.typeof(one)


def _mapped(
    kernel: Callable[..., Any],
    sharding: NamedSharding | str | None,
    arrays: tuple[jax.Array, ...],
    scalars: tuple[jax.Array, ...],
) -> Any:
    if sharding is None:
        return kernel(*arrays, *scalars)
    assert isinstance(sharding, NamedSharding)
    return jax.shard_map(
        kernel,
        mesh=sharding.mesh,
        in_specs=(*(_spec(sharding, x) for x in arrays), *[PartitionSpec()] * len(scalars)),
        out_specs=sharding.spec,
        check_vma=False,
    )(*arrays, *scalars)


def _spec(sharding: NamedSharding, array: jax.Array) -> PartitionSpec:
    """The specification of an array that is whole where its axis has size 1."""
    spec = sharding.spec
    return PartitionSpec(
        *(None if n == 1 else axis for axis, n in zip(spec, array.shape, strict=False))
    )
