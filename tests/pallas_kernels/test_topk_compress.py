import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.topk_compress import topk_compress
from tests.pallas_kernels.blocks_of_every_kind import KINDS, SHAPES, blocks_of, residual_of

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


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_kind_of_block_in_every_dtype(implementation: str, kind: str, dtype: str) -> None:
    shape = (9, 700)
    with np.errstate(over="ignore"):
        gradient = jnp.asarray(blocks_of(kind, shape)).astype(dtype)
    nothing = tuple(jnp.zeros_like(x) for x in residual_of(shape))
    agree(implementation, gradient, nothing)
    agree(implementation, gradient, residual_of(shape))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("k", [1, 7])
def test_every_count(implementation: str, k: int) -> None:
    agree(implementation, jnp.asarray(blocks_of("tied", (5, 512))), residual_of((5, 512)), k)


def test_float16_subnormals_are_numbers() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    nothing = tuple(jnp.zeros_like(x) for x in residual_of(every.shape))
    agree("mosaic_tpu", jnp.asarray(every), nothing)


def test_what_a_kernel_cannot_do_is_refused_with_the_reason() -> None:
    gradient = jnp.zeros((4, 128))
    residual = jnp.zeros((4, 2, 32), jnp.uint8), jnp.zeros((4, 2)), jnp.zeros((4, 2))
    with pytest.raises(NotImplementedError, match="blocks must have 256 elements; these have 64"):
        topk_compress(gradient, *residual, k=1, implementation="mosaic_tpu")
    topk_compress(gradient, *residual, k=1)


def test_bad_arguments_are_refused() -> None:
    gradient, residual = jnp.zeros((4, 256)), residual_of((4, 256))
    with pytest.raises(ValueError, match=r"k must lie between 1 and the block size 256; got 0"):
        topk_compress(gradient, *residual, k=0)
    with pytest.raises(ValueError, match=r"needs 2 blocks in each row; got codes \(4, 1, 128\)"):
        topk_compress(jnp.zeros((4, 512)), *residual, k=3)
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16; got int32"):
        topk_compress(gradient.astype(int), *residual, k=3)
