import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import Window, top_k
from pallas_kernels.topk_compress import topk_compress
from tests.pallas_kernels.blocks_of_every_kind import blocks_of, residual_of


def kernel_on_mesh(
    mode: AxisType, shape: tuple[int, ...], spec: P, *, told: bool = False, context: bool = True
) -> None:
    arguments = (jnp.asarray(blocks_of("normal", shape)), *residual_of(shape))
    run = functools.partial(topk_compress, k=3)
    expected = run(*arguments, implementation="xla")
    mesh = jax.make_mesh((2, 2), ("a", "b"), (mode,) * 2, devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        placed = jax.device_put(arguments, sharding)
        kernel = functools.partial(
            run,
            implementation="mosaic_tpu",
            interpret=True,
            sharding=sharding if told else None,
        )
        found = jax.jit(kernel)(*placed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found[1].sharding.spec[: len(spec)] == tuple(spec)


def test_explicit_axes_place_the_kernel() -> None:
    kernel_on_mesh(AxisType.Explicit, (4, 512), P("a", "b"))


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
    with pytest.raises(ValueError, match=r"TopK.implementation must be None.*got 'cuda'"):
        top_k(implementation="cuda")
    with pytest.raises(ValueError, match=r"Window.implementation must be None.*got 'cuda'"):
        Window(implementation="cuda")
