import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import run_with
from pallas_kernels.topk_compress import topk_compress
from pallas_kernels.window_update import window_apply, window_update
from tests.pallas_kernels.blocks_of_every_kind import blocks_of, residual_of, window_of

KERNELS = ["mosaic_tpu", "triton"]


def kernel_on_mesh(
    mode: AxisType,
    shape: tuple[int, ...],
    spec: P,
    *,
    implementation: str = "mosaic_tpu",
    side: int = 2,
    told: bool = False,
    context: bool = True,
) -> None:
    arguments = (jnp.asarray(blocks_of("normal", shape)), *residual_of(shape))
    run = functools.partial(topk_compress, k=3)
    expected = run(*arguments, implementation="xla")
    devices = jax.devices()[: side * side]
    mesh = jax.make_mesh((side, side), ("a", "b"), (mode,) * 2, devices=devices)
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        placed = jax.device_put(arguments, sharding)
        kernel = functools.partial(
            run, implementation=implementation, interpret=True, sharding=sharding if told else None
        )
        found = jax.jit(kernel)(*placed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found[1].sharding.spec[: len(spec)] == tuple(spec)


@pytest.mark.parametrize(
    ("implementation", "side"), [("mosaic_tpu", 2), ("triton", 2), ("triton", 1)]
)
def test_explicit_axes_place_the_kernel(implementation: str, side: int) -> None:
    kernel_on_mesh(
        AxisType.Explicit, (4, 512), P("a", "b"), implementation=implementation, side=side
    )


@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_of_a_window_have_on_shards_the_bits_of_one_device(implementation: str) -> None:
    weights = jnp.linspace(1, 0.5, 3)
    window = window_of((4, 1024), 3, 2)
    params = jnp.asarray(blocks_of("normal", (4, 1024)))
    options = {"size": 256, "implementation": implementation, "interpret": True}

    @jax.jit
    def both(window: Any, params: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = window_update(*window, weights, weights, 0.0, n=1024, **options)
        step = jnp.float32(-0.5)
        return u, window_apply(*window, params, weights, weights, 0.0, step, **options)

    expected = both(window, params)
    mesh = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = both(*jax.device_put((window, params), NamedSharding(mesh, P("a", "b"))))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(x.sharding.spec == P("a", "b") for x in found)


def test_auto_axes_refuse_a_named_kernel() -> None:
    with pytest.raises(NotImplementedError, match="cannot run here: the mesh has Auto"):
        kernel_on_mesh(AxisType.Auto, (4, 512), P("a", "b"))


@pytest.mark.parametrize("context", [True, False], ids=["mesh set", "no mesh set"])
def test_on_auto_axes_the_sharding_may_be_told(context: bool) -> None:
    kernel_on_mesh(AxisType.Auto, (4, 512), P("a", "b"), told=True, context=context)


def test_shards_that_cut_a_block_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="last block padded"):
        kernel_on_mesh(AxisType.Explicit, (4, 500), P("a", "b"))


def test_none_takes_no_kernel_that_never_ran() -> None:
    arguments = (jnp.zeros((4, 512)), *residual_of((4, 512)))
    traced = jax.jit(functools.partial(topk_compress, k=3)).trace(*arguments)
    assert "triton" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_named_kernel_for_gpus_is_refused_on_a_cpu() -> None:
    arguments = (jnp.zeros((4, 512)), *residual_of((4, 512)))
    with pytest.raises(ValueError, match="interpret mode"):
        topk_compress(*arguments, k=3, implementation="triton")


def test_unknown_implementations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"run_with.implementation must be None.*got 'cuda'"):
        run_with(optax.identity(), implementation="cuda")
    with pytest.raises(ValueError, match=r"topk_compress.implementation must be None.*got 'cuda'"):
        topk_compress(jnp.zeros((4, 512)), *residual_of((4, 512)), k=3, implementation="cuda")
    with pytest.raises(NotImplementedError, match=r"no 'mosaic_gpu': its division.*use 'triton'"):
        run_with(optax.identity(), implementation="mosaic_gpu")
