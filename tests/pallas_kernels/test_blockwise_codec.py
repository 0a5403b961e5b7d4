import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from microadam_jax import Blocks, dynamic4, dynamic8, linear4
from pallas_kernels.blockwise_codec import blockwise_step
from tests.pallas_kernels.blocks_of_every_kind import KINDS, blocks_of

BY_128 = Blocks(128, shards=1)
CODECS = (
    dynamic8(keep_sign=True),
    dynamic8(signed=False),
    dynamic4(BY_128, rounding="stochastic"),
    dynamic4(Blocks(256, shards=1), symmetric=True),
    linear4(BY_128),
)
SHAPES = {
    "odd rows": (37, 256),
    "odd and padded blocks": (5, 601),
    "several tiles": (130, 2179),
    "leading axes": (2, 3, 33, 512),
    "heads": (3, 64, 128),
}


def keep(moments: Any, inputs: Any) -> Any:
    """Returns what was stored, and stores the inputs: codes depend on no rounding."""
    gradient, squares = (x.astype(jnp.float32) for x in inputs)
    return math.prod(moments), [gradient if codec.signed else squares for codec in CODECS]


def run(rule: Any, codecs: Any, inputs: Any, stored: Any, **how: Any) -> Any:
    encoded = [codec.encode(x) for codec, x in zip(codecs, stored, strict=True)]
    keys = [jax.random.key(which) for which in range(len(codecs))]
    step = functools.partial(blockwise_step, rule, codecs, keys=keys, **how)
    return jax.jit(step)(encoded, inputs)


def agree(inputs: Any, stored: jax.Array) -> None:
    """All codecs in one step: compilers take most of the time."""
    step = functools.partial(run, keep, CODECS, inputs, [stored] * len(CODECS))
    expected = step(implementation="xla")
    found = step(implementation="mosaic_tpu", interpret=True)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(shape: tuple[int, ...]) -> None:
    gradient, stored = (jnp.asarray(blocks_of("normal", shape, seed)) for seed in (0, 1))
    agree([gradient, gradient**2], jnp.abs(stored))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_kind_of_block_in_every_dtype(dtype: str) -> None:
    with np.errstate(over="ignore"):
        blocks = jnp.asarray(np.stack([blocks_of(kind, (32, 601)) for kind in KINDS]))
        gradient = blocks.astype(dtype)
    agree([gradient, jnp.abs(blocks)], jnp.where(jnp.abs(blocks) < 1e30, jnp.abs(blocks), 1))
