"""Checks what is right for small parameters and was wrong, or failed, for large ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import microadam_jax
from microadam_jax.methods import METHODS
from microadam_jax.subspace import dct_columns

BEYOND = 2**31  # elements, that int32 cannot count


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


LARGE = {
    "row": {"w": shape(2 * BEYOND + 1)},
    "kernel": {"mlp": {"kernel": shape(65536, 65536)}},
    "column": {"mlp": {"kernel": shape(BEYOND + 1, 1)}},
    "embedding": {"embedding": shape(262144, 16384, dtype="bfloat16")},
    "stack": {"layers": {"mlp": {"kernel": shape(96, 16384, 4096), "bias": shape(96, 4096)}}},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", METHODS)
def test_leaves_of_more_elements_than_int32_counts(name: str) -> None:
    tx = getattr(microadam_jax, name)(1e-3)
    for tree in LARGE.values() if name in ("microadam", "sparse_mfac") else [LARGE["row"]]:
        state = jax.eval_shape(tx.init, tree)
        updates, new = jax.eval_shape(tx.update, tree, state, tree)
        assert jax.tree.map(jnp.shape, (updates, new)) == jax.tree.map(jnp.shape, (tree, state))


@pytest.mark.parametrize("rows", [96, 50257])
def test_cosines_of_a_vocabulary(rows: int) -> None:
    """An angle is a product of two numbers below 100514, whose bits are more than 32."""
    columns = np.array([0, 1, rows // 2, rows - 1])
    kept = (jnp.asarray(columns, jnp.int32)[:, None],)
    basis = dct_columns(4).basis(kept, (rows, 4), jax.random.key(0))
    numbers = np.arange(rows)[:, None] * (2 * columns + 1) % (4 * rows)
    expected = np.sqrt(2 / rows) * np.cos(np.pi * numbers / (2 * rows))
    expected[0] /= np.sqrt(2)
    found = basis.back(jnp.eye(4))
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.sqrt(2 / rows), rtol=0)
