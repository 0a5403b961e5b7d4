import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.topk_compress import one_reduction, reference, topk_compress
from tests.pallas_kernels.blocks_of_every_kind import (
    KINDS,
    OTHER_SIZES,
    SHAPES,
    blocks_of,
    residual_of,
)

KERNELS = ["mosaic_tpu", "triton"]


def agree(implementation: str, gradient: Any, residual: Any, k: int = 3) -> None:
    run = functools.partial(topk_compress, k=k)
    expected = jax.jit(functools.partial(run, implementation="xla"))(gradient, *residual)
    kernel = functools.partial(run, implementation=implementation, interpret=True)
    for found, wanted in zip(jax.jit(kernel)(gradient, *residual), expected, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(implementation: str, shape: tuple[int, ...]) -> None:
    agree(implementation, jnp.asarray(blocks_of("normal", shape)), residual_of(shape))


@pytest.mark.parametrize(("shape", "size"), OTHER_SIZES.values(), ids=OTHER_SIZES)
def test_on_a_tpu_blocks_of_every_size(shape: tuple[int, ...], size: int) -> None:
    residual = residual_of((2, *shape), size=size)
    gradients = np.stack([blocks_of(kind, shape) for kind in ("not finite", "tied")])
    agree("mosaic_tpu", jnp.asarray(gradients), residual)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_kind_of_block_in_every_dtype(implementation: str, dtype: str) -> None:
    shape = (9, 700)
    # All kinds in one program, first with an empty residual: compilers take most of the time.
    residual = tuple(
        jnp.concatenate([jnp.zeros((len(KINDS), *x.shape), x.dtype), jnp.stack([x] * len(KINDS))])
        for x in residual_of(shape)
    )
    with np.errstate(over="ignore"):
        gradients = np.stack([blocks_of(kind, shape) for kind in KINDS * 2])
        agree(implementation, jnp.asarray(gradients).astype(dtype), residual)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("k", [1, 7])
def test_every_count(implementation: str, k: int) -> None:
    agree(implementation, jnp.asarray(blocks_of("tied", (5, 512))), residual_of((5, 512)), k)


@pytest.mark.parametrize("implementation", KERNELS)
def test_float16_subnormals_are_numbers(implementation: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    nothing = tuple(jnp.zeros_like(x) for x in residual_of(every.shape))
    agree(implementation, jnp.asarray(every), nothing)


def test_what_a_kernel_cannot_do_is_refused_with_the_reason() -> None:
    gradient = jnp.zeros((4, 1200))
    residual = jnp.zeros((4, 2, 300), jnp.uint8), jnp.zeros((4, 2)), jnp.zeros((4, 2))
    with pytest.raises(NotImplementedError, match="an even size up to 512; these have 600"):
        topk_compress(gradient, *residual, k=1, implementation="mosaic_tpu")
    topk_compress(gradient, *residual, k=1)


@pytest.mark.parametrize(("size", "n"), [(64, 130), (172, 500), (2048, 2048)])
def test_triton_takes_other_blocks_and_vectors(size: int, n: int) -> None:
    blocks = (-(-n // size),)
    zeros = jnp.zeros(blocks)
    residual = jnp.zeros((*blocks, size // 2), jnp.uint8), zeros, zeros
    agree("triton", jnp.asarray(blocks_of("normal", (n,))), residual, k=5)


def test_triton_names_what_it_does_not_take() -> None:
    gradient, codes, zeros = jnp.zeros(5000), jnp.zeros((1, 2500), jnp.uint8), jnp.zeros(1)
    run = functools.partial(topk_compress, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"must have 2 to 4096 elements; these have 5000"):
        run(gradient, codes, zeros, zeros, k=1)
    with pytest.raises(NotImplementedError, match=r"at most 16 elements.*asked for 17"):
        run(jnp.zeros((4, 256)), *residual_of((4, 256)), k=17)
    with pytest.raises(NotImplementedError, match=r"may be empty; its shape is \(0, 256\)"):
        run(jnp.zeros((0, 256)), *residual_of((0, 256)), k=1)


def test_bad_arguments_are_refused() -> None:
    gradient, residual = jnp.zeros((4, 256)), residual_of((4, 256))
    with pytest.raises(ValueError, match=r"k must lie between 1 and the block size 256; got 0"):
        topk_compress(gradient, *residual, k=0)
    with pytest.raises(ValueError, match=r"needs 2 blocks in each row; got codes \(4, 1, 128\)"):
        topk_compress(jnp.zeros((4, 512)), *residual, k=3)
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16; got int32"):
        topk_compress(gradient.astype(int), *residual, k=3)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_the_program_for_gpus_gives_the_bits_of_the_reference(k: int) -> None:
    """Of XLA's two programs only that of CPUs runs here, but both can."""
    shape = (3, 700)
    gradients = jnp.asarray(np.stack([blocks_of(kind, shape) for kind in KINDS]))
    residual = tuple(jnp.stack([x] * len(KINDS)) for x in residual_of(shape))
    wanted = jax.jit(functools.partial(reference.compress, k=k))(gradients, *residual)
    found = jax.jit(functools.partial(one_reduction.compress, k=k))(gradients, *residual)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
