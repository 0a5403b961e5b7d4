import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import Blocks, adam_mini, adam_sn, adamw8bit, quantize_state, run_with
from microadam_jax.codecs import dynamic4, dynamic8, float8, int4, linear4
from pallas_kernels.blockwise_codec import blockwise_step
from tests.pallas_kernels.blocks_of_every_kind import KINDS, blocks_of

BY_128 = Blocks(128, shards=1)
CODECS = (
    dynamic8(keep_sign=True),
    linear4(Blocks(256, shards=1), signed=False),
    dynamic4(BY_128, rounding="stochastic"),
)
FLOATS = (
    float8("e4m3", block=BY_128, expansion=True),
    float8("e5m2", block=Blocks(256, shards=1), expansion=False, rounding="stochastic"),
)
ADAM = dynamic8(keep_sign=True), dynamic8(signed=False)
KERNELS = "mosaic_tpu", "triton"
SHAPES = {
    "odd rows": (37, 256),
    "odd and padded blocks": (5, 257),
    "leading axes": (2, 3, 33, 256),
    "heads": (3, 64, 128),
}


def keep(moments: Any, inputs: Any) -> Any:
    """Returns what was stored, and stores the inputs: codes depend on no rounding."""
    gradient, squares = (x.astype(jnp.float32) for x in inputs)
    return math.prod(moments), [gradient, squares, gradient][-len(moments) :]


def run(rule: Any, codecs: Any, inputs: Any, stored: Any, **how: Any) -> Any:
    encoded = [codec.encode(x) for codec, x in zip(codecs, stored, strict=True)]
    drawn = enumerate(codec.needs_key for codec in codecs)
    keys = [jax.random.key(which) if draws else None for which, draws in drawn]
    step = functools.partial(blockwise_step, rule, codecs, keys=keys, **how)
    return jax.jit(step)(encoded, inputs)


def agree(
    inputs: Any, stored: jax.Array, codecs: Any = CODECS, kernels: tuple[str, ...] = KERNELS
) -> None:
    """All codecs in one step: compilers take most of the time."""
    step = functools.partial(run, keep, codecs, inputs, [stored] * len(codecs))
    expected = step(implementation="xla")
    for kernel in kernels:
        same(step(implementation=kernel, interpret=True), expected)


def same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(one, other)


def moments_of(shape: tuple[int, ...]) -> tuple[Any, jax.Array]:
    gradient, stored = (jnp.asarray(blocks_of("normal", shape, seed)) for seed in (0, 1))
    return [gradient, gradient**2], jnp.abs(stored)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(shape: tuple[int, ...]) -> None:
    agree(*moments_of(shape), kernels=("mosaic_tpu",))


# Llama-2's rows of 11008 have blocks of 172, and of 86 for a codec of at most 128.
@pytest.mark.parametrize(
    "shape", [(2, 3, 344), (16, 96), (5, 257), (77,)], ids=["172", "96", "padded", "vector"]
)
def test_on_a_gpu_blocks_of_every_size(shape: tuple[int, ...]) -> None:
    agree(*moments_of(shape), kernels=("triton",))


# What the block rule makes of rows of models; 500 is more than two registers.
@pytest.mark.parametrize(
    ("shape", "size"),
    [((130, 5504), 256), ((5, 77), 128), ((33, 1500), 512), ((40, 22016), 128)],
    ids=["172", "one padded block", "500", "two tiles of 86"],
)
def test_blocks_between_registers(shape: tuple[int, ...], size: int) -> None:
    blocks = Blocks(size, shards=1 if size == 512 else 8)
    codecs = (
        dynamic8(blocks, keep_sign=True),
        linear4(blocks, signed=False),
        dynamic4(blocks, rounding="stochastic"),
    )
    agree(*moments_of(shape), codecs, ("mosaic_tpu",))


def test_eight_bit_floats_between_registers() -> None:
    codecs = float8("e4m3", expansion=True), float8("e5m2", expansion=False, rounding="stochastic")
    agree(*moments_of((37, 344)), codecs, ("mosaic_tpu",))


@pytest.mark.parametrize("shape", [(37, 1024), (5, 344)], ids=["128", "86"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_of_root_mean_squares(shape: tuple[int, ...], kernel: str) -> None:
    """Sums of another order differ by a last bit, and then few codes do."""
    inputs, stored = moments_of(shape)
    codecs = int4(), int4(rounding="stochastic")
    step = functools.partial(run, keep, codecs, inputs, [stored] * 2)
    found = step(implementation=kernel, interpret=True)
    expected = step(implementation="xla")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for (codes, scales), (others, wanted) in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(scales, wanted, rtol=1e-6)
        assert np.mean(codes != others) < 1e-3


def test_several_tiles() -> None:
    agree(*moments_of((130, 2179)), CODECS[2:3], ("mosaic_tpu",))


def test_eight_bit_floats() -> None:
    agree(*moments_of((37, 257)), FLOATS, ("mosaic_tpu",))


@pytest.mark.parametrize(
    ("dtype", "codecs", "kernels"),
    [
        ("float32", CODECS, ("mosaic_tpu",)),
        ("bfloat16", CODECS, ("mosaic_tpu",)),
        ("float16", CODECS, KERNELS),
        ("float32", FLOATS, KERNELS),
    ],
    ids=["float32", "bfloat16", "float16", "floats"],
)
def test_every_kind_of_block_in_every_dtype(
    dtype: str, codecs: Any, kernels: tuple[str, ...]
) -> None:
    with np.errstate(over="ignore"):
        blocks = jnp.asarray(np.stack([blocks_of(kind, (32, 257)) for kind in KINDS]))
        gradient = blocks.astype(dtype)
    stored = jnp.where(jnp.abs(blocks) < 1e30, jnp.abs(blocks), 1)
    agree([gradient, jnp.abs(blocks)], stored, codecs, kernels)


def adam(moments: Any, inputs: Any) -> Any:
    """A step that reads one number for each row, and one for each column."""
    gradient, parameter, rows, columns = inputs
    mu, nu = (0.5 * m + 0.5 * g for m, g in zip(moments, (gradient, gradient**2), strict=True))
    u = mu / (jnp.sqrt(nu) + rows * columns)
    return (parameter - u).astype(parameter.dtype), [mu, nu]


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [("float32", "mosaic_tpu"), ("bfloat16", "mosaic_tpu"), ("float32", "triton")],
)
def test_a_step_is_within_a_rounding(dtype: str, kernel: str) -> None:
    shape = (40, 256)
    (gradient, squares), stored = moments_of(shape)
    inputs = gradient, gradient.astype(dtype), squares[:, :1] + 0.1, squares[:1] + 0.1
    step = functools.partial(run, adam, ADAM, inputs, [stored] * 2, replaces=1)
    found, expected = step(implementation=kernel, interpret=True), step(implementation="xla")
    assert found[0].dtype == dtype
    tolerance = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    one, other = (np.asarray(x[0], np.float32) for x in (found, expected))
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
    for codec, one, other in zip(ADAM, found[1], expected[1], strict=True):
        # What was decoded may differ by a rounding, and so may what lies between two codes.
        assert np.mean(np.asarray(one.codes) != np.asarray(other.codes)) < 1e-3, codec
        np.testing.assert_allclose(one.scales, other.scales, rtol=1e-6)


def test_a_sharded_leaf_draws_the_same_numbers() -> None:
    shape, codecs = (64, 512), CODECS[2:3]
    inputs, stored = moments_of(shape)
    expected = run(keep, codecs, inputs, [stored], implementation="xla")
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        inputs, stored = jax.device_put((inputs, stored), NamedSharding(mesh, P("a", "b")))
        for kernel in KERNELS:
            found = run(keep, codecs, inputs, [stored], implementation=kernel, interpret=True)
            assert found[1][0].scales.sharding.spec == P("a", "b")
            same(found, expected)


REFUSED = {
    "vector": ((8192,), "needs two axes or more"),
    "few rows": ((64, 4, 256), "the last axis but one needs 32 elements"),
}


@pytest.mark.parametrize(("shape", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_named_kernel_says_why_it_cannot_run(shape: tuple[int, ...], reason: str) -> None:
    tx, params = run_with(adamw8bit(1e-3), implementation="mosaic_tpu"), jnp.zeros(shape)
    with pytest.raises(NotImplementedError, match=reason):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((600,), r"an even size up to 512, .*; these have \[600\]"),
        ((120, 60), r"the same for all moments, .*; these have \[120, 60\]"),
    ],
    ids=["long", "of two sizes"],
)
def test_blocks_that_no_tile_is_made_for(sizes: tuple[int, ...], reason: str) -> None:
    codecs, leaf = [dynamic8(Blocks(size, shards=1)) for size in sizes], jnp.zeros((64, 600))
    encoded, keys = [codec.zeros(leaf) for codec in codecs], [None] * len(codecs)
    with pytest.raises(NotImplementedError, match=reason):
        blockwise_step(keep, codecs, encoded, [leaf, leaf], keys, implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("shape", "sizes", "reason"),
    [
        ((), (256,), "the tensor needs an axis"),
        ((4, 300), (150, 100), r"times as long as the shortest; these have \[150, 100\]"),
        ((5000,), (5000,), r"at most 4096 elements; these have \[5000\]"),
    ],
    ids=["scalar", "no common unit", "long blocks"],
)
def test_on_a_gpu_too(shape: tuple[int, ...], sizes: tuple[int, ...], reason: str) -> None:
    codecs, leaf = [dynamic8(Blocks(size, shards=1)) for size in sizes], jnp.zeros(shape)
    encoded, keys = [codec.zeros(leaf) for codec in codecs], [None] * len(codecs)
    with pytest.raises(NotImplementedError, match=reason):
        blockwise_step(keep, codecs, encoded, [leaf, leaf], keys, implementation="triton")


def test_an_update_that_no_kernel_was_tried_with_is_refused() -> None:
    inputs, stored = moments_of((32, 256))

    def rule(moments: Any, inputs: Any) -> Any:
        return jnp.arcsinh(moments[0]) + inputs[0], moments

    with pytest.raises(NotImplementedError, match=r"no kernel was tried with .* 'asinh'"):
        run(rule, CODECS[:1], inputs, [stored], implementation="mosaic_tpu")


def test_named_kernels_need_a_step_that_has_one() -> None:
    params = jnp.zeros((8, 512))
    tx = run_with(quantize_state(optax.adam(1e-3), {"mu": "dynamic8"}), implementation="mosaic_tpu")
    with pytest.raises(ValueError, match=r"needs quantize_state\(..., elementwise=True\)"):
        tx.update(params, tx.init(params), params)
    for inner in (optax.adam(1e-3), adam_mini(1e-3), adam_sn(1e-3)):
        tx = run_with(inner, implementation="triton")
        with pytest.raises(ValueError, match="'triton' names kernels, and no transformation in"):
            tx.update(params, tx.init(params), params)
