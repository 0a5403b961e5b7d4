"""Each kernel through the real compiler of each device, in place and without copies."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from microadam_jax import top_k
from microadam_jax.codecs import dynamic4, dynamic8, float8, int4
from pallas_kernels.blockwise_codec import blockwise_step
from pallas_kernels.topk_compress import topk_compress
from pallas_kernels.window_update import window_apply, window_update

MOVED = re.compile(r" = (\w+\[\d\S*) (?:copy|transpose)\(")  # arrays; a scalar is no matter
INTEGERS = dynamic8(keep_sign=True), dynamic4(rounding="stochastic")
BYTES = dynamic8(keep_sign=True), dynamic8(signed=False, rounding="stochastic")
NIBBLES = dynamic4(), dynamic4(rounding="stochastic")
CUT = int4(), int4(rounding="stochastic")
FLOATS = float8("e4m3", expansion=True), float8("e5m2", rounding="stochastic", expansion=True)


def compiled(
    function: Callable[..., Any], mesh: Mesh, platform: str, *arrays: Any, donate: tuple[int, ...]
) -> Any:
    placed = NamedSharding(mesh, PartitionSpec())
    arrays = tuple(jax.ShapeDtypeStruct(*array, sharding=placed) for array in arrays)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(function, donate_argnums=donate, out_shardings=placed)
        return jitted.trace(*arrays).lower(lowering_platforms=(platform,)).compile()


def compress_on_tpu(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Any:
    blocks = (*shape[:-1], -(-shape[-1] // 256))
    return compiled(
        functools.partial(topk_compress, k=3, implementation="mosaic_tpu"),
        mesh,
        "tpu",
        (shape, dtype),
        ((*blocks, 128), jnp.uint8),
        (blocks, jnp.float32),
        (blocks, jnp.float32),
        donate=(1, 2, 3),
    )


def is_in_place_without_copies(program: Any, state: int) -> None:
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= state
    assert memory.temp_size_in_bytes <= 0.05 * state
    assert MOVED.findall(program.as_text()) == []


def test_topk_compress_on_every_tpu(tpu: Mesh) -> None:
    shape = (512, 2048)
    program = compress_on_tpu(tpu, shape, jnp.float32)
    is_in_place_without_copies(program, math.prod(shape) * (128 + 8) // 256)


@pytest.mark.parametrize(
    "shape",
    [(256, 256), (512, 1024), (256, 11008), (128, 8192), (2, 256, 2048)],
    ids=["one block", "four blocks", "43 blocks", "32 blocks", "stacked layers"],
)
def test_topk_compress_in_place_for_every_shape(v5e: Mesh, shape: tuple[int, ...]) -> None:
    program = compress_on_tpu(v5e, shape, jnp.bfloat16)
    is_in_place_without_copies(program, math.prod(shape) * (128 + 8) // 256)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_topk_compress_of_odd_and_padded_rows(v5e: Mesh, dtype: str) -> None:
    assert "topk_compress" in compress_on_tpu(v5e, (37, 1000), dtype).as_text()


def window_of(shape: tuple[int, ...]) -> tuple[Any, Any]:
    window = (*shape[:-1], shape[-1] // 256, 10, 3)
    return (window, jnp.bfloat16), (window, jnp.uint8)


def window_on_tpu(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Any:
    update = functools.partial(
        window_update, size=256, n=shape[-1], dtype=dtype, implementation="mosaic_tpu"
    )
    return compiled(
        update,
        mesh,
        "tpu",
        *window_of(shape),
        ((10,), jnp.float32),
        ((10,), jnp.float32),
        ((), jnp.float32),
        donate=(),
    )


# Blocks of 192, 160, 172 and 216; their codes are laid out in two ways, and windows too.
@pytest.mark.parametrize("tpu", ["v5e", "v6e"], indirect=True)
@pytest.mark.parametrize("n", [768, 5120, 11008, 13824])
def test_microadam_in_place_on_rows_of_models(tpu: Mesh, n: int) -> None:
    shape, compressor = (256, n), top_k()
    layout = compressor.blocks.layout(n)
    k, blocks = compressor.survivors(layout.size), (256, layout.count)
    scalar, weights, per_block = ((), jnp.float32), ((10,), jnp.float32), (blocks, jnp.float32)
    program = compiled(
        functools.partial(topk_compress, k=k, implementation="mosaic_tpu"),
        tpu,
        "tpu",
        (shape, jnp.float32),
        ((*blocks, layout.size // 2), jnp.uint8),
        per_block,
        per_block,
        donate=(1, 2, 3),
    )
    state = math.prod(blocks) * (layout.size // 2 + 8)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= state
    assert memory.temp_size_in_bytes <= 0.05 * state
    # What is sent is laid out anew, here for a caller and in a step for the window.
    assert [x for x in MOVED.findall(program.as_text()) if x.startswith("u8")] == []
    window = (*blocks, 10, k)
    program = compiled(
        functools.partial(window_apply, size=layout.size, implementation="mosaic_tpu"),
        tpu,
        "tpu",
        (window, jnp.bfloat16),
        (window, jnp.uint8),
        (shape, jnp.float32),
        weights,
        weights,
        scalar,
        scalar,
        scalar,
        donate=(2,),
    )
    is_in_place_without_copies(program, math.prod(shape) * 4)


def test_window_update_on_every_tpu(tpu: Mesh) -> None:
    program = window_on_tpu(tpu, (512, 2048), jnp.float32)
    assert program.memory_analysis().temp_size_in_bytes == 0
    assert MOVED.findall(program.as_text()) == []


def test_window_update_of_rows_of_32_blocks(v5e: Mesh) -> None:
    """Bytes lie in tiles of 32 blocks there."""
    program = window_on_tpu(v5e, (256, 8192), jnp.float32)
    assert program.memory_analysis().temp_size_in_bytes == 0
    assert MOVED.findall(program.as_text()) == []


@pytest.mark.parametrize("size", [250, 256])
def test_without_the_kernel_a_window_is_expanded_once(v5e: Mesh, size: int) -> None:
    shape = (256, 32 * size)
    window, weights = (256, 32, 10, 3), ((10,), jnp.float32)
    program = compiled(
        functools.partial(window_update, size=size, n=shape[-1], implementation="xla"),
        v5e,
        "tpu",
        (window, jnp.bfloat16),
        (window, jnp.uint8),
        weights,
        weights,
        ((), jnp.float32),
        donate=(),
    )
    assert program.memory_analysis().temp_size_in_bytes <= 4.1 * math.prod(shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_window_apply_on_every_tpu_is_in_place(tpu: Mesh, dtype: str) -> None:
    shape, weights, scalar = (512, 2048), ((10,), jnp.float32), ((), jnp.dtype(dtype))
    apply = functools.partial(window_apply, size=256, implementation="mosaic_tpu")
    arrays = *window_of(shape), (shape, jnp.dtype(dtype)), weights, weights, ((), jnp.float32)
    program = compiled(apply, tpu, "tpu", *arrays, scalar, scalar, donate=(2,))
    is_in_place_without_copies(program, math.prod(shape) * jnp.dtype(dtype).itemsize)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blockwise_codec_on_every_tpu_is_in_place(tpu: Mesh, dtype: str) -> None:
    # What the compiler keeps for itself, up to 0.3 MB, does not grow with the leaf.
    blockwise_codec_on(tpu, (2048, 1024), dtype, dtype)


def test_blockwise_codec_of_odd_and_padded_rows_and_half_precision(v5e: Mesh) -> None:
    blockwise_codec_on(v5e, (37, 601), "float16", "float32", in_place=False)


def test_blockwise_codec_of_eight_bit_floats_on_every_tpu(tpu: Mesh) -> None:
    blockwise_codec_on(tpu, (2048, 1024), "bfloat16", "bfloat16", FLOATS)


# Blocks of 172; of 86, 128 of them in a tile; of 128, more in a row than a tile of bytes has.
@pytest.mark.parametrize("tpu", ["v5e", "v6e"], indirect=True)
@pytest.mark.parametrize(
    ("n", "codecs"),
    [(11008, BYTES), (11008, NIBBLES), (4096, FLOATS), (2048, CUT)],
    ids=["8 bits", "4 bits", "floats", "root mean squares"],
)
def test_blockwise_codec_on_rows_of_models(tpu: Mesh, n: int, codecs: Any) -> None:
    # Scales of 128 blocks fill lanes, and are turned; nothing else is.
    in_place = codecs is not NIBBLES
    blockwise_codec_on(tpu, (256, n), "float32", "float32", codecs, in_place=in_place)


@pytest.mark.parametrize(
    ("shape", "codecs"),
    [((512, 1024), INTEGERS), ((64, 11008), INTEGERS), ((37, 601), FLOATS), ((64, 5504), CUT)],
    ids=["blocks of 256", "blocks of 172", "padded floats", "root mean squares"],
)
def test_blockwise_codec_on_h200_is_in_place(
    h200: Mesh, shape: tuple[int, ...], codecs: Any
) -> None:
    blockwise_codec_on(h200, shape, "bfloat16", "float32", codecs, implementation="triton")


def blockwise_codec_on(
    mesh: Mesh,
    shape: tuple[int, ...],
    dtype: str,
    kept: str,
    codecs: Any = INTEGERS,
    *,
    in_place: bool = True,
    implementation: str = "mosaic_tpu",
) -> None:
    encoded = [jax.eval_shape(c.zeros, jax.ShapeDtypeStruct(shape, jnp.float32)) for c in codecs]
    arrays, structure = jax.tree.flatten(encoded)

    def step(gradient: Any, params: Any, rate: Any, key: Any, *stored: Any) -> Any:
        def rule(moments: Any, inputs: Any) -> Any:
            gradient, params = inputs
            moved = [0.9 * m + 0.1 * gradient.astype(jnp.float32) for m in moments]
            u = (moved[0] / (jnp.abs(moved[1]) + 1e-8)).astype(params.dtype)
            return params - rate * u, moved

        return blockwise_step(
            rule,
            codecs,
            structure.unflatten(stored),
            (gradient, params),
            (None, jax.random.wrap_key_data(key)),  # the second rounds stochastically
            replaces=1,
            implementation=implementation,
        )

    program = compiled(
        step,
        mesh,
        "tpu" if implementation == "mosaic_tpu" else "cuda",
        (shape, jnp.dtype(dtype)),
        (shape, jnp.dtype(kept)),
        ((), jnp.dtype(kept)),
        ((2,), jnp.uint32),
        *((x.shape, x.dtype) for x in arrays),
        donate=(1, *range(4, 4 + len(arrays))),
    )
    assert "blockwise_codec" in program.as_text()
    if in_place:
        state = sum(x.size * x.dtype.itemsize for x in arrays)
        is_in_place_without_copies(program, state + math.prod(shape) * jnp.dtype(kept).itemsize)


@pytest.mark.parametrize("size", [172, 256])
def test_topk_compress_on_h200(h200: Mesh, size: int) -> None:
    shape, blocks = (37, 4 * size - 24), (37, 4)
    program = compiled(
        functools.partial(topk_compress, k=3, implementation="triton"),
        h200,
        "cuda",
        (shape, jnp.bfloat16),
        ((*blocks, size // 2), jnp.uint8),
        (blocks, jnp.float32),
        (blocks, jnp.float32),
        donate=(1, 2, 3),
    )
    is_in_place_without_copies(program, math.prod(blocks) * (size // 2 + 8))
    assert 'custom_call_target="__gpu$xla.gpu.triton"' in program.as_text()


@pytest.mark.parametrize("size", [172, 256])
def test_window_update_on_h200(h200: Mesh, size: int) -> None:
    shape, window = (37, 4 * size - 24), (37, 4, 10, 3)
    program = compiled(
        functools.partial(window_update, size=size, n=shape[-1], implementation="triton"),
        h200,
        "cuda",
        (window, jnp.bfloat16),
        (window, jnp.uint8),
        ((10,), jnp.float32),
        ((10,), jnp.float32),
        ((), jnp.float32),
        donate=(),
    )
    assert program.memory_analysis().temp_size_in_bytes <= 0.05 * 4 * math.prod(shape)
    assert MOVED.findall(program.as_text()) == []


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_window_apply_on_h200_is_in_place(h200: Mesh, dtype: str) -> None:
    shape, window = (37, 1000), (37, 4, 10, 3)
    arrays = (window, jnp.bfloat16), (window, jnp.uint8), (shape, jnp.dtype(dtype))
    weights, eps, scalar = ((10,), jnp.float32), ((), jnp.float32), ((), jnp.dtype(dtype))
    apply = functools.partial(window_apply, size=256, implementation="triton")
    arguments = *arrays, weights, weights, eps, scalar, scalar
    program = compiled(apply, h200, "cuda", *arguments, donate=(2,))
    is_in_place_without_copies(program, math.prod(shape) * jnp.dtype(dtype).itemsize)
    assert 'custom_call_target="__gpu$xla.gpu.triton"' in program.as_text()
