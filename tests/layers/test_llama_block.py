"""Checks what a Llama block saves, its gradients, and what a compiled model takes."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.activation_memory import Size, compiled
from examples.llama.model import Block, ModelConfig
from microadam_jax.layers import (
    Fp8ActivationCodes,
    compress_residuals,
    fp8_linear,
    fp8_multiply,
    fp8_rms_norm,
    fp8_silu,
    saved_bytes,
)

# Three times as wide in the middle: COAT's table has 8/3, which gives a Llama 7B's 11008.
HIDDEN, INTERMEDIATE, ROWS, LENGTH = 192, 512, 2, 64
CONFIG = ModelConfig(HIDDEN, INTERMEDIATE, 1, 3, 256, compute_dtype="bfloat16")
UNIT = ROWS * LENGTH * HIDDEN * 2  # bytes of the block's input in bfloat16
X = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, HIDDEN)).astype("bfloat16")
CT = jax.random.normal(jax.random.key(1), X.shape)


@functools.cache
def block(activations: str, dtype: str = "bfloat16") -> Block:
    config = dataclasses.replace(CONFIG, activations=activations, compute_dtype=dtype)
    return Block(config, rngs=nnx.Rngs(0))


def apply(block: Block, x: jax.Array) -> jax.Array:
    return block(x)


PRODUCTS = jax.checkpoint(apply, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


def units(f: Callable[..., Any], *args: Any) -> float:
    return saved_bytes(f, *args, after=f).totals[0] / UNIT


def test_a_block_saves_little() -> None:
    # With "fp8" attention keeps what FlashAttention would, which is all that differs before codes.
    report = saved_bytes(apply, block("fp8"), X)
    bfloat16, coded = (total / UNIT for total in report.totals)
    coat = units(apply, block("coat"), X)
    print(f"bfloat16 {bfloat16:.2f} units, coded {coded:.2f}, COAT {coat:.2f}")
    assert coded <= 0.55 * bfloat16
    assert coat <= 0.60 * bfloat16
    # Also of the least that bfloat16 takes, by COAT's count less rotary positions, linear in JAX.
    assert coat <= 0.60 * (22.66 - 2)
    assert units(compress_residuals(PRODUCTS), block("fp8"), X) <= 0.55 * (22.66 - 2)


# Table 2 of COAT: what each kind of layer saves, in units.
PUBLISHED = {"norm": 1.0, "act": 4.0, "rope": 2.0, "attention": 3.0, "linear": 3.33}


def test_the_published_units_of_a_block() -> None:
    """By count of codes; the table leaves out scales.

    Rotary positions are linear, so that JAX saves nothing for them. The attention's output is
    saved by nobody else here, and so as codes: half of the unit that COAT's table has.
    """
    h, i = jnp.zeros(X.shape, "bfloat16"), jnp.zeros((*X.shape[:-1], INTERMEDIATE), "bfloat16")
    kernel = lambda n, m: jnp.zeros((n, m))  # noqa: E731
    square, wide = kernel(HIDDEN, HIDDEN), kernel(HIDDEN, INTERMEDIATE)
    down = kernel(INTERMEDIATE, HIDDEN)
    linear = lambda w, x: fp8_linear(x, w)  # noqa: E731
    heads = h.reshape(ROWS, LENGTH, 3, -1)
    mix = jax.checkpoint(functools.partial(jax.nn.dot_product_attention, is_causal=True))
    counted = {
        "norm": 2 * codes(lambda s, x: fp8_rms_norm(x, s), jnp.zeros(HIDDEN), h),
        "act": codes(lambda _, g, u: fp8_multiply(fp8_silu(g), u), (), i, i),
        "rope": 0.0,
        "attention": units(lambda _, q, k, v: mix(q, k, v), (), heads, heads, heads),
        "linear": codes(linear, (square,) * 3, h)
        + codes(linear, square, h)
        + codes(linear, (wide, wide), h)
        + codes(linear, down, i),
    }
    counted_here = counted | {"rope": 2.0, "linear": counted["linear"] + 0.5}
    assert counted_here == pytest.approx(PUBLISHED, abs=0.01)
    assert sum(PUBLISHED.values()) == pytest.approx(13.33)
    assert sum(counted.values()) == pytest.approx(13.33 - 2 - 0.5, abs=0.01)


def codes(f: Callable[..., Any], *args: Any) -> float:
    """Units of the codes that are saved, without their scales."""
    arrays = saved_bytes(f, *args, after=f).before
    return (
        sum(np.prod(shape) * n for (shape, dtype), n in arrays.items() if dtype == "uint8") / UNIT
    )


@functools.cache
def gradients(activations: str, f: Any = apply, dtype: str = "bfloat16") -> list[np.ndarray]:
    loss = lambda block, x: jnp.sum(CT * f(block, x).astype("float32"))  # noqa: E731
    slopes = jax.jit(jax.grad(loss, (0, 1)))(block(activations, dtype), X.astype(dtype))
    return [np.asarray(leaf, float) for leaf in jax.tree.leaves(slopes)]


def error(actual: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """In norm, of all gradients together."""
    pairs = list(zip(actual, expected, strict=True))
    return (
        sum(np.sum((a - e) ** 2) for a, e in pairs) / sum(np.sum(e**2) for _, e in pairs)
    ) ** 0.5


@pytest.mark.parametrize(
    "inside", [apply, PRODUCTS, jax.checkpoint(apply)], ids=["all", "products", "inputs"]
)
def test_gradients_of_a_block_in_codes(inside: Any) -> None:
    found = error(gradients("fp8", compress_residuals(inside)), gradients("exact"))
    print(f"{100 * found:.1f} %")
    assert found < 0.05


def test_gradients_of_a_block_of_coat() -> None:
    """Its forward pass is rounded too, and E5M2 has two bits after the point: 7 % each time."""
    found = error(gradients("coat"), gradients("exact", dtype="float32"))
    print(f"{100 * found:.1f} %")
    assert found < 0.15


class Exact:
    """A codec that keeps bfloat16."""

    number = property(lambda self: self)

    def encode(self, x: jax.Array, key: None = None) -> Fp8ActivationCodes:
        return Fp8ActivationCodes(x.astype("bfloat16"), jnp.float32(1))

    def decode(self, codes: Any, shape: Any = None) -> jax.Array:
        return getattr(codes, "codes", codes).astype("float32")


def in_float32(left: Any, one: Any, right: Any, other: Any, axes: Any, _: Any) -> jax.Array:
    product = jax.lax.dot_general(
        one.number.decode(left.codes), other.number.decode(right.codes), (axes, ((), ()))
    )
    return product * left.scales * right.scales


@pytest.mark.slow
def test_the_parts_of_the_error_of_coat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their squares add up: of E5M2 gradients, of linear maps in E4M3, and of groups of 16."""
    linear, elementwise = (
        sys.modules[f"microadam_jax.layers.fp8_{name}"] for name in ("linear", "elementwise")
    )
    monkeypatch.setattr(linear, "_product", in_float32)
    e4m3, e5m2, groups = linear.FORWARD, linear.BACKWARD, elementwise.GROUPS
    exact = gradients("exact", dtype="float32")
    for forward, backward, within, percent in [
        (e4m3, e5m2, groups, 7.8),
        (Exact(), e5m2, Exact(), 5.5),
        (e4m3, Exact(), Exact(), 4.4),
        (Exact(), Exact(), groups, 3.2),
        (e4m3, e4m3, groups, 6.2),
        (e4m3, Exact(), groups, 5.5),
    ]:
        monkeypatch.setattr(linear, "FORWARD", forward)
        monkeypatch.setattr(linear, "BACKWARD", backward)
        monkeypatch.setattr(elementwise, "GROUPS", within)
        jax.clear_caches()
        assert 100 * error(gradients.__wrapped__("coat"), exact) == pytest.approx(percent, abs=0.2)
    jax.clear_caches()


@pytest.mark.slow
def test_a_scanned_model_takes_less_on_a_cpu() -> None:
    size = Size(hidden=192, intermediate=512, heads=3, layers=8, batch=8, length=256)
    bfloat16, codes, coat = (
        compiled(variant, size).memory_analysis().temp_size_in_bytes
        for variant in ("all, bfloat16", "all, codes", "COAT")
    )
    print(f"codes {codes / bfloat16:.2f}, COAT {coat / bfloat16:.2f} of {bfloat16 / 1e6:.0f} MB")
    assert codes < 0.5 * bfloat16
    assert coat < 0.5 * bfloat16
