import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microadam_jax import Blocks
from microadam_jax.blocks import BlockLayout, blocked_shape, in_row, merge, split

SPECS = st.builds(
    Blocks,
    size=st.integers(1, 40).map(lambda half: 2 * half),
    shards=st.sampled_from([1, 2, 3, 4, 8, 16]),
)
SHAPES = st.lists(st.integers(0, 5), max_size=2).flatmap(
    lambda lead: st.one_of(
        st.integers(0, 300).map(lambda row: (*lead, row)), st.just(()) if not lead else st.nothing()
    )
)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "int32", "uint8", "bool"])


@pytest.mark.parametrize(
    ("spec", "row", "size", "count"),
    [
        (Blocks(), 4096, 256, 16),
        (Blocks(), 11008, 172, 64),
        (Blocks(shards=16), 11008, 172, 64),
        (Blocks(shards=16), 5120, 160, 32),
        (Blocks(), 768, 192, 4),  # 8 shards would need blocks of 96, below half the size
        (Blocks(), 5461, 256, 22),  # 43 * 127: no even divisor, so the last block is padded
        (Blocks(), 257, 256, 2),
        (Blocks(), 100, 100, 1),
        (Blocks(), 7, 8, 1),  # rounded up to even, so that two codes share a byte
        (Blocks(), 1, 2, 1),
        (Blocks(), 0, 2, 0),
        (Blocks(size=32768, shards=1), 4096, 4096, 1),
        (Blocks(size=32768, shards=1), 128256, 32064, 4),
    ],
)
def test_layout_of_known_rows(spec: Blocks, row: int, size: int, count: int) -> None:
    assert spec.layout(row) == BlockLayout(row, size, count)


@given(SPECS, st.integers(0, 5000))
def test_layout_covers_the_row_with_even_blocks(spec: Blocks, row: int) -> None:
    layout = spec.layout(row)
    assert layout.size % 2 == 0
    assert layout.size <= spec.size or layout.count <= 1
    assert 0 <= layout.padding < layout.size or row == 0
    assert int(in_row(layout).sum()) == row


@given(SPECS, SHAPES, DTYPES)
def test_merge_undoes_split(spec: Blocks, shape: tuple[int, ...], dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).integers(0, 100, shape)).astype(dtype)
    layout = spec.layout_of(x)
    blocks = split(x, layout)
    assert blocks.shape == blocked_shape(shape, layout, layout.size)
    assert blocks.dtype == x.dtype
    back = merge(blocks, layout, shape)
    assert back.shape == shape
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(back), np.asarray(x))


@given(SPECS, st.integers(1, 300))
def test_slicing_leading_axes_commutes_with_blocking(spec: Blocks, row: int) -> None:
    x = jnp.arange(4 * 3 * row, dtype=jnp.float32).reshape(4, 3, row)
    layout = spec.layout_of(x)
    np.testing.assert_array_equal(split(x, layout)[1:3, 2], split(x[1:3, 2], layout))


@given(SPECS, st.integers(1, 40), st.sampled_from([2, 4, 8]))
def test_block_boundaries_are_shard_boundaries(spec: Blocks, blocks: int, devices: int) -> None:
    """Wherever the block count divides over the devices, so do the blocks themselves."""
    row = 32 * blocks
    layout = spec.layout(row)
    if layout.count % devices:
        return
    x = jnp.arange(row)
    for rows, whole in zip(
        jnp.split(x, devices), jnp.split(split(x, layout), devices), strict=True
    ):
        np.testing.assert_array_equal(rows, whole.reshape(-1))


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 200))
def test_the_promised_shards_divide_the_blocks(shards: int, multiple: int) -> None:
    """Rows of ``shards`` blocks of an allowed size always get a block count for the shards."""
    for size in (128, 192, 256):
        assert Blocks(shards=shards).layout(size * shards * multiple).count % shards == 0


@pytest.mark.parametrize("size", [0, -2, 3])
def test_odd_or_empty_blocks_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="positive multiple of 2"):
        Blocks(size=size)


def test_shards_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive integer; got 0"):
        Blocks(shards=0)


def test_a_traced_size_is_refused_with_the_reason() -> None:
    with pytest.raises(TypeError, match="inject_hyperparams"):
        jax.eval_shape(lambda size: Blocks(size=size).layout(8), jnp.int32(4))
