"""Layers that save codes, compiled for accelerators: less memory, and products of 8-bit floats."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.activation_memory import Size, compiled
from microadam_jax.layers import fp8_linear
from tests.targets.conftest import h200_devices, tpu_devices

SIZE = Size(hidden=256, intermediate=688, heads=4, layers=8, batch=8, length=256)


# Of devices that are not there, nothing can be read from the cache of compiled programs.
@functools.cache
def temporaries(variant: str, topology: str) -> int:
    return compiled(variant, SIZE, topology).memory_analysis().temp_size_in_bytes


# COAT's layers take a TPU's compiler minutes: 417 of 1289 MB in the benchmark.
@pytest.mark.parametrize(
    ("topology", "variant"),
    [("v5e:2x2", "all, codes"), ("h200:1", "all, codes"), ("h200:1", "COAT")],
)
def test_a_scanned_model_takes_less(topology: str, variant: str) -> None:
    _ = tpu_devices(topology) if "v5e" in topology else h200_devices()  # or skips
    bfloat16, coded = (temporaries(name, topology) for name in ("all, bfloat16", variant))
    print(f"{coded / bfloat16:.2f} of {bfloat16 / 1e6:.0f} MB")
    assert coded < 0.6 * bfloat16


def test_products_are_of_8_bit_floats_on_a_gpu(h200: Mesh) -> None:
    here = NamedSharding(h200, PartitionSpec())
    x = jax.ShapeDtypeStruct((4, 512, 1024), jnp.bfloat16, sharding=here)
    w = jax.ShapeDtypeStruct((1024, 2048), jnp.float32, sharding=here)
    loss = lambda w, x: jnp.sum(jnp.sin(fp8_linear(x, w).astype("float32")))  # noqa: E731
    with jax.set_mesh(h200):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(w, x)
        program = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    # In the header of each product's computation stand the dtypes of its operands.
    headers = re.findall(r"^%gemm_fusion_\S* \((.*?)\) ->", program, re.MULTILINE)
    operands = sorted(tuple(re.findall(r"f8e\dm\d", header)) for header in headers)
    assert operands == [("f8e4m3", "f8e4m3"), ("f8e4m3", "f8e5m2"), ("f8e5m2", "f8e4m3")]
