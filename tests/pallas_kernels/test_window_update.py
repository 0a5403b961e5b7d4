import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.window_update import reference, window_apply, window_update
from tests.pallas_kernels.blocks_of_every_kind import OTHER_SIZES, SIZE, window_of

KERNELS = ["mosaic_tpu", "triton"]
SHAPES = {"one tile": (128, 512), "odd rows": (37, 256), "padded": (5, 700), "lead": (2, 9, 2560)}


def slow(case: Any) -> Any:
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", ["float32", *map(slow, ["bfloat16", "float16"])])
def test_agrees_with_the_reference(implementation: str, shape: tuple[int, ...], dtype: str) -> None:
    agree(implementation, window_of(shape, 10, 3), shape, dtype)


# One to six entries of a block, of which two bfloat16 fill a sublane.
@pytest.mark.parametrize(
    ("shape", "size", "k"),
    [(*case, k) for case, k in zip(OTHER_SIZES.values(), (2, 2, 3, 1, 6), strict=True)],
    ids=OTHER_SIZES,
)
def test_on_a_tpu_blocks_of_every_size(shape: tuple[int, ...], size: int, k: int) -> None:
    agree("mosaic_tpu", window_of(shape, 10, k, size=size), shape, "float32", size)


def test_agrees_where_bytes_lie_in_tiles_of_32_blocks() -> None:
    agree("mosaic_tpu", window_of((3, 8192), 10, 3), (3, 8192), "float32")


def test_on_a_gpu_blocks_of_every_size() -> None:
    values, indices = window_of((9, 512), 10, 3)
    agree("triton", (values, indices % 172), (9, 300), "float32", size=172)


def agree(
    implementation: str, window: Any, shape: tuple[int, ...], dtype: str, size: int = SIZE
) -> None:
    length = window[0].shape[-2]
    weights = jnp.asarray(0.9 ** np.arange(length), jnp.float32)
    run = functools.partial(window_update, size=size, n=shape[-1], dtype=dtype)
    arguments = (*window, weights, 0.5 * weights, jnp.float32(1e-8))
    expected = jax.jit(functools.partial(run, implementation="xla"))(*arguments)
    kernel = functools.partial(run, implementation=implementation, interpret=True)
    found = jax.jit(kernel)(*arguments)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype) == (shape, dtype)
    np.testing.assert_array_almost_equal_nulp(np.asarray(found), np.asarray(expected), 2)


@pytest.mark.parametrize("implementation", KERNELS)
def test_empty_rows_and_what_is_not_finite(implementation: str) -> None:
    values, indices = window_of((9, 512), 10, 3)
    values = values.at[:, :, 4:].set(0).at[3, 0, 0, 0].set(jnp.inf).at[4, 1, 1, 1].set(jnp.nan)
    indices = indices.at[:, :, 4:].set(0)
    weights = jnp.ones(10)
    run = functools.partial(window_update, size=SIZE, n=512)
    arguments = (values, indices, weights, weights, 1e-8)
    found = run(*arguments, implementation=implementation, interpret=True)
    np.testing.assert_allclose(found, run(*arguments, implementation="xla"), rtol=3e-7)


@pytest.mark.parametrize(("rows", "k"), [(10, 3), (1, 8)])
def test_on_entries_or_on_blocks_the_same_bits(rows: int, k: int) -> None:
    values, indices = window_of((9, 512), rows, k)
    values = values.at[:, :, 4:].set(0).at[3, 0, 0, 0].set(jnp.inf).at[4, 1, -1, 1].set(jnp.nan)
    values, weights = values.astype(jnp.float32), jnp.asarray(0.9 ** np.arange(rows), jnp.float32)
    terms = (values * weights[:, None], jnp.square(values) * (0.5 * weights)[:, None])
    arguments = (*terms, indices.at[:, :, 4:].set(0))
    for eps in (0.0, 1e-8):
        one, other = (
            jax.jit(functools.partial(adam, size=SIZE))(*arguments, eps)
            for adam in (reference.adam_of_entries, reference.adam_of_blocks)
        )
        np.testing.assert_array_equal(one, other)


def test_what_does_not_fit_is_refused() -> None:
    values, indices = window_of((9, 512), 2, 3)
    weights = jnp.ones(2)
    with pytest.raises(ValueError, match="A row of 300 elements has 5 blocks of 64"):
        window_update(values, indices, weights, weights, 0.0, size=64, n=300)
    with pytest.raises(NotImplementedError, match="an even size up to 512; these have 600"):
        window_update(
            values, indices, weights, weights, 0.0, size=600, n=999, implementation="mosaic_tpu"
        )


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
    ("shape", "decay"), [((37, 512), None), ((5, 700), 0.25), ((2, 9, 512), 0.25)]
)
def test_applied_it_agrees_with_the_reference(
    implementation: str, shape: tuple[int, ...], decay: float | None
) -> None:
    found, expected = applied(implementation, shape, "float32", decay)
    # The reference may contract a product and a sum, and the kernel others.
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("implementation", KERNELS)
def test_applied_to_bfloat16_it_rounds_the_parameter_once(implementation: str) -> None:
    found, expected = applied(implementation, (37, 512), "bfloat16", 0.25)
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=2**-9)


def test_triton_applies_to_float16_and_to_vectors() -> None:
    found, expected = applied("triton", (700,), "float16", 0.25)
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=2**-12)


def applied(
    implementation: str, shape: tuple[int, ...], dtype: str, decay: float | None
) -> tuple[Any, Any]:
    """In float32, what the kernel and the reference make of parameters of ``dtype``."""
    weights = jnp.asarray(0.9 ** np.arange(10), jnp.float32)
    params = jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)
    scalars = [None if x is None else jnp.asarray(x, dtype) for x in (-0.125, decay)]
    arguments = (*window_of(shape, 10, 3), params, weights, 0.5 * weights, 1e-8, *scalars)
    run = functools.partial(window_apply, size=SIZE)
    expected = jax.jit(functools.partial(run, implementation="xla"))(*arguments)
    kernel = functools.partial(run, implementation=implementation, interpret=True)
    found = jax.jit(kernel)(*arguments)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype) == (shape, dtype)
    return np.asarray(found, np.float32), np.asarray(expected, np.float32)


@pytest.mark.parametrize(
    ("implementation", "dtype", "taken"),
    [("mosaic_tpu", "float16", "float32 or bfloat16"), ("triton", "int32", "bfloat16 or float16")],
)
def test_a_kernel_applies_to_no_other_dtype(implementation: str, dtype: str, taken: str) -> None:
    weights = jnp.ones(10)
    with pytest.raises(NotImplementedError, match=f"{taken}; these are {dtype}"):
        window_apply(
            *window_of((9, 512), 10, 3),
            jnp.zeros((9, 512), dtype),
            weights,
            weights,
            0.0,
            jnp.float32(1),
            size=SIZE,
            implementation=implementation,
        )
