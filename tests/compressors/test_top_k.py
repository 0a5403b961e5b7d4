import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microadam_jax import Blocks, top_k
from microadam_jax.compressors import BlockSparse
from pallas_kernels.topk_compress import reference
from tests.oracles.microadam import largest_magnitudes

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

EVERYTHING = {"min_size": 0, "min_row": 0}


def draw(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


METHODS = {
    "tournament": reference._by_tournament,
    "rounds": reference._by_rounds,
    "partial sort": lambda magnitude, k: jax.lax.top_k(magnitude, k)[1],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("size", "k"), [(2, 1), (10, 10), (250, 3), (256, 8), (300, 9), (1000, 41)]
)
def test_every_method_finds_the_largest_with_ties_to_the_lowest_index(
    method: str, size: int, k: int
) -> None:
    # Few distinct values, so that nearly every choice is a tie.
    magnitude = np.random.default_rng(k).integers(0, 4, (6, size)).astype(np.float32)
    indices = METHODS[method](jnp.asarray(magnitude), k)
    expected = np.stack([largest_magnitudes(row, k) for row in magnitude])
    np.testing.assert_array_equal(indices, expected)


@given(st.integers(0, 10_000), st.sampled_from([(256, 3), (32, 5), (64, 20)]))
def test_values_are_signed_and_exact(seed: int, case: tuple[int, int]) -> None:
    size, k = case
    blocks = draw((3, size), seed)
    values, indices = reference.select_top_k(jnp.asarray(blocks), k)
    expected = np.stack([largest_magnitudes(row, k) for row in blocks])
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(blocks, expected, -1))


@pytest.mark.parametrize("k", [3, 12])
def test_nan_and_infinity_are_taken_first(k: int) -> None:
    blocks = draw((1, 64))
    blocks[0, [5, 20]] = np.nan, -np.inf
    _, indices = reference.select_top_k(jnp.asarray(blocks), k)
    np.testing.assert_array_equal(indices[0, :2], [5, 20])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 257), (2, 3, 683), (0, 8), (8, 0)])
def test_kept_and_rest_make_the_whole(shape: tuple[int, ...]) -> None:
    compressor = top_k(count=3, blocks=Blocks(64), **EVERYTHING)
    x = jnp.asarray(draw(shape))
    sparse = compressor.compress(x)
    kept = np.asarray(sparse.kept())
    assert kept.shape == shape
    rest = np.asarray(x) - kept
    assert ((kept == 0) | (rest == 0)).all()
    assert (kept != 0).sum() == np.asarray(sparse.values != 0).sum()


@given(st.integers(0, 1000), st.sampled_from([0.01, 0.05, 0.3, 1.0]))
def test_compression_contracts(seed: int, density: float) -> None:
    x = jnp.asarray(draw((4, 256), seed))
    compressor = top_k(density=density, blocks=Blocks(128), **EVERYTHING)
    share = compressor.survivors(128) / 128
    rest = x - compressor.compress(x).kept()
    assert jnp.sum(rest**2) <= (1 - share) * jnp.sum(x**2) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("block", "published"), [(8064, 81), (12160, 122), (12672, 127), (20864, 209), (29056, 291)]
)
def test_counts_of_the_released_block_sizes(block: int, published: int) -> None:
    assert top_k(density=0.01).survivors(block) == published


def test_fast_counts_follow_the_block() -> None:
    assert [top_k().survivors(size) for size in (256, 192, 172, 160, 128, 64, 2)] == [
        3, 2, 2, 2, 2, 1, 1,
    ]  # fmt: skip


def test_small_leaves_are_kept_dense_by_their_size_per_layer() -> None:
    shape = jax.ShapeDtypeStruct
    path = (jax.tree_util.DictKey("layers"), jax.tree_util.DictKey("scale"))
    assert top_k().keeps_dense(path, shape((16, 256), "float32"))
    assert not top_k().keeps_dense(path, shape((16, 4096), "float32"))
    single = top_k(stacked="trunk")
    assert not single.keeps_dense(path, shape((16, 256), "float32"))
    assert single.keeps_dense(path, shape((15, 256), "float32"))
    assert single.keeps_dense(path, shape((4096, 8), "float32"))
    assert single.keeps_dense(path, shape((), "float32"))


def test_dense_arithmetic_on_a_sparse_update_is_refused() -> None:
    sparse = top_k(count=1, **EVERYTHING).compress(jnp.ones(4))
    assert isinstance(jax.tree.map(lambda leaf: leaf, sparse), BlockSparse)
    with pytest.raises(TypeError, match=r"to_dense\(\) before it"):
        jax.tree.map(lambda leaf: -0.1 * leaf, sparse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\]; got 0.0"),
        ({"density": 1.5}, r"density must lie in \(0, 1\]; got 1.5"),
        ({"count": 0}, "count must be a positive integer; got 0"),
        ({"density": 0.1, "count": 1}, "either a density or a count"),
        ({"blocks": Blocks(65536)}, "at most 32768"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k(**arguments)
