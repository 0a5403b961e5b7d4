"""MicroAdam in float32 against the float64 oracle, step by step."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_jax import (
    Blocks,
    MicroAdamLayout,
    Window,
    accumulate_into_residual,
    microadam,
    top_k,
)
from microadam_jax.codecs import affine4
from tests.oracles.microadam import AdamOracle, MicroAdamOracle

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

STEPS = 32  # the window of 10 turns over three times
EVERYTHING = {"min_size": 0, "min_row": 0}

FAST = MicroAdamLayout(top_k(**EVERYTHING), affine4(), Window(10, dtype="float32"))
PAPER = MicroAdamLayout(
    top_k(density=0.01, blocks=Blocks(32768, shards=1), **EVERYTHING),
    affine4(Blocks(64, shards=1)),
    Window(10, dtype="float32"),
)
SHAPES = {
    "matrix": (12, 512),
    "vector": (700,),
    "stacked layers": (2, 3, 256),
    "odd rows": (5, 301),
    "short rows": (6, 7),
    "scalar": (),
    "empty": (0, 8),
    "GPT-2's vocabulary": (3, 50257),
    "Llama-2's MLP": (2, 11008),
    "GPT-2's width": (20, 768),
}


def gradients(shape: tuple[int, ...], seed: int = 0) -> Iterator[np.ndarray]:
    """Gradients with a mean and with elements of different scale, so that feedback matters."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal(shape))
    mean = rng.standard_normal(shape)
    while True:
        yield (scale * (mean + rng.standard_normal(shape))).astype(np.float32)


def oracle_for(layout: MicroAdamLayout, params: np.ndarray, **options: Any) -> MicroAdamOracle:
    row = params.shape[-1] if params.ndim else 1
    blocks = layout.compressor.blocks.layout(row)
    quantize = layout.residual != "float32"
    return MicroAdamOracle(
        params,
        block_size=blocks.size,
        count=layout.compressor.survivors(blocks.size),
        bucket=layout.residual.buckets.layout(row).size if quantize else 1,
        quantize=quantize,
        window=layout.window.length,
        normalized=layout.window.normalized,
        **options,
    )


def kept(state: Any, step: int) -> np.ndarray:
    """The indices that the newest row of the window holds."""
    window = state[1].window_indices
    return np.asarray(window[..., (step - 1) % window.shape[-2], :]).reshape(-1, window.shape[-1])


def assert_follows(
    layout: MicroAdamLayout,
    shape: tuple[int, ...],
    alpha: float | None = None,
    weight_decay: float = 0.0,
) -> None:
    rng = np.random.default_rng(1)
    params = rng.standard_normal(shape).astype(np.float32)
    oracle = oracle_for(
        layout, params, learning_rate=0.01, weight_decay=weight_decay, alpha=alpha or 0.0
    )
    tx = microadam(0.01, weight_decay=weight_decay, alpha=alpha, layout=layout)
    update = jax.jit(tx.update)
    params = jnp.asarray(params)
    state = tx.init(params)
    for step, gradient in zip(range(1, STEPS + 1), gradients(shape), strict=False):
        updates, state = update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        expected = oracle.step(gradient)
        for found, chosen in zip(kept(state, step), oracle.selections[-1], strict=True):
            assert set(found[: len(chosen)]) >= set(chosen), f"selections differ in step {step}"
        scale = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=2e-5 * scale + 1e-12)
    np.testing.assert_allclose(params, oracle.theta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", [FAST, PAPER], ids=["fast", "paper"])
def test_presets(layout: MicroAdamLayout, shape: tuple[int, ...]) -> None:
    assert_follows(layout, shape)


@pytest.mark.parametrize("alpha", [None, 0.1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("residual", ["float32", affine4(64)], ids=["exact", "4-bit"])
def test_options(residual: Any, weight_decay: float, alpha: float | None) -> None:
    compressor = top_k(count=5, blocks=Blocks(64), **EVERYTHING)
    layout = MicroAdamLayout(compressor, residual, Window(4, dtype="float32"))
    assert_follows(layout, (6, 256), alpha, weight_decay)


@pytest.mark.parametrize("alpha", [None, 0.1])
@pytest.mark.parametrize("residual", ["float32", affine4(64)], ids=["exact", "4-bit"])
def test_micro_batches_in_the_residual(residual: Any, alpha: float | None) -> None:
    compressor = top_k(count=5, blocks=Blocks(64), **EVERYTHING)
    layout = MicroAdamLayout(compressor, residual, Window(4, dtype="float32"))
    inner = microadam(0.01, weight_decay=0.1, alpha=alpha, layout=layout)
    tx, params = accumulate_into_residual(inner, every_k=3), np.ones((6, 256), np.float32)
    oracle = oracle_for(layout, params, learning_rate=0.01, weight_decay=0.1, alpha=alpha or 0.0)
    update, state, batches = jax.jit(tx.update), tx.init(params), gradients(params.shape)
    for _ in range(STEPS):
        for _ in range(2):
            gradient = next(batches)
            updates, state = update(gradient, state, params)
            oracle.add(gradient / 3)
            assert not updates.any()
        gradient = next(batches)
        updates, state = update(gradient, state, params)
        expected = oracle.step(gradient / 3)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=2e-5 * scale)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("length", [1, 3, 25])
@pytest.mark.parametrize("normalized", [False, True])
def test_windows(length: int, normalized: bool) -> None:
    window = Window(length, dtype="float32", normalized=normalized)
    assert_follows(MicroAdamLayout(FAST.compressor, "float32", window), (4, 256))


def test_leaves_kept_dense_are_adam() -> None:
    params = np.random.default_rng(2).standard_normal((3, 5)).astype(np.float32)
    tx = microadam(0.01, b1=0.8, b2=0.99, weight_decay=0.1)
    oracle = AdamOracle(params, learning_rate=0.01, b1=0.8, b2=0.99, weight_decay=0.1)
    params = jnp.asarray(params)
    state = tx.init(params)
    for _, gradient in zip(range(STEPS), gradients((3, 5)), strict=False):
        updates, state = tx.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(updates, oracle.step(gradient), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_arithmetic_is_float32_whatever_the_gradients_are(dtype: str) -> None:
    """Gradients that every dtype holds exactly give the same update, rounded to the dtype."""
    with jax.enable_x64(True):
        tx = microadam(0.5, layout=FAST)
        grids = [np.round(next(gradients((4, 256), seed)) * 2) / 2 for seed in range(5)]
        outcomes = []
        for precision in (dtype, "float32"):
            params = jnp.zeros((4, 256), precision)
            state = tx.init(params)
            for gradient in grids:
                updates, state = tx.update(jnp.asarray(gradient, precision), state, params)
            assert updates.dtype == precision
            outcomes.append((updates, state))
        (low, low_state), (full, full_state) = outcomes
        jax.tree.map(np.testing.assert_array_equal, low_state, full_state)
        np.testing.assert_array_equal(low, full.astype(dtype))


def test_updates_take_the_dtype_of_the_parameters_not_of_the_gradients() -> None:
    tx = microadam(0.1, layout=FAST)
    params = {"w": jnp.zeros((4, 256)), "b": jnp.zeros(3)}
    gradients = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.bfloat16), params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == {"w": jnp.float32, "b": jnp.float32}
