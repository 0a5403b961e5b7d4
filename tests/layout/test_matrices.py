"""Which parameters are matrices, how they are folded, and what their states take."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_jax import (
    Matrices,
    Partition,
    apollo,
    apollo_mini,
    fira,
    galore,
    grass,
    ldadam,
    memory_report,
    snsm,
)
from microadam_jax.layout.axes import Axes
from microadam_jax.layout.names import transformer_rules
from microadam_jax.layout.view import WHOLE, Layout, MatrixView
from microadam_jax.models import model_shapes
from microadam_jax.subspace import Discard, FeedBack, MatrixDimensionNumbers, top_k_rows

GIB = 2**30
LARGER = {"side": "larger", "square": "out"}
HEAD = "lm_head/kernel"


def sides(matrices: Matrices, path: str, shape: tuple[int, ...]) -> tuple[Any, Any] | None:
    """The compressed and the kept axes of a parameter."""
    tree: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    for key in reversed(path.split("/")):
        tree = {key: tree}
    ((_, view),) = matrices.list(tree)
    return None if view is None else (view.compressed, view.kept)


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        ({}, (4, 6), ((0,), (1,))),
        ({}, (6, 4), ((1,), (0,))),
        ({}, (4, 4), ((0,), (1,))),
        ({"square": "out"}, (4, 4), ((1,), (0,))),
        ({"square": "out"}, (4, 6), ((0,), (1,))),
        ({"side": "larger"}, (4, 6), ((1,), (0,))),
        ({"side": "larger"}, (6, 4), ((0,), (1,))),
        ({"side": "larger", "square": "out"}, (4, 4), ((1,), (0,))),
        ({"side": "in"}, (6, 4), ((0,), (1,))),
        ({"side": "out"}, (4, 6), ((1,), (0,))),
    ],
)
def test_the_published_side_is_compressed(options: Any, shape: Any, expected: Any) -> None:
    assert sides(Matrices(**options), "mlp/kernel", shape) == expected


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("query/kernel", (32, 4, 8), ((0,), (1, 2))),
        ("out/kernel", (4, 8, 64), ((0, 1), (2,))),
        ("layers/mlp/kernel", (3, 4, 6), ((1,), (2,))),
        ("experts/wi", (3, 4, 6), ((1,), (2,))),
        ("conv/kernel", (3, 3, 2, 32), ((0, 1, 2), (3,))),
        ("nameless", (4, 6), ((0,), (1,))),
        ("embed_tokens/embedding", (4, 6), None),
        ("norm/scale", (6,), None),
        ("layers/norm/scale", (3, 6), None),
        ("nameless", (3, 4, 6), None),
        ("mlp/kernel", (0, 6), None),
    ],
)
def test_names_tell_the_axes(path: str, shape: Any, expected: Any) -> None:
    assert sides(Matrices(), path, shape) == expected


def test_torch_kernels_by_another_rule() -> None:
    """Their square is compressed along the same side of the map, which lies on the other axis."""
    matrices = Matrices(partition=Partition(transformer_rules(weight="out in")))
    assert sides(matrices, "mlp/weight", (4, 4)) == ((1,), (0,))
    assert sides(Matrices(), "mlp/kernel", (4, 4)) == ((0,), (1,))


def test_dimension_numbers_count_before_names() -> None:
    numbers = (("mlp/kernel", MatrixDimensionNumbers(-1, (0, 1))),)
    matrices = Matrices(side="in", dimension_numbers=numbers)
    assert sides(matrices, "layer_0/mlp/kernel", (3, 4, 6)) == ((2,), (0, 1))
    assert sides(matrices, "layer_0/other/kernel", (4, 6)) == ((0,), (1,))


@pytest.mark.parametrize("numbers", [(0, 0), ((), 1), (0, 7)])
def test_dimension_numbers_that_do_not_fit_are_refused(numbers: Any) -> None:
    matrices = Matrices(dimension_numbers=(("w", MatrixDimensionNumbers(*numbers)),))
    with pytest.raises(ValueError, match="does not describe 'w'"):
        sides(matrices, "w", (4, 6))


def test_a_batch_folds_and_unfolds() -> None:
    view = MatrixView((2, 3, 4, 5), compressed=(3,), kept=(1, 2))
    x = jnp.arange(120.0).reshape(2, 3, 4, 5)
    matrices = view.fold(x)
    assert matrices.shape == (2, 5, 12)
    np.testing.assert_array_equal(matrices[1, 4], x[1, :, :, 4].ravel())
    np.testing.assert_array_equal(view.unfold(matrices, WHOLE, x), x)
    low = Layout(rows=2, columns=None)
    assert view.shape_of(low) == (2, 3, 4, 2)
    assert view.shape_of(Layout(rows=None, columns=7)) == (2, 1, 7, 5)
    assert view.fold(jnp.zeros(view.shape_of(low))).shape == (2, 2, 12)


@pytest.mark.parametrize(
    ("tx", "published"),
    [
        (galore(1e-2, rank=512), 1.942),
        (fira(1e-2, rank=512), 1.942),
        (ldadam(1e-3, rank=512), 4.192),
        (ldadam(1e-3, rank=512, complement=Discard()), 1.942),
        (snsm(1e-2, rank=512), 1.169),
        (snsm(1e-2, subspace=top_k_rows(512), matrices=Matrices(**LARGER)), 0.576),
        (grass(1e-2, rank=512), 1.614),
        (grass(1e-2, rank=512, matrices=Matrices(exclude=HEAD, **LARGER)), 1.145),
        (apollo(1e-2, rank=512), 1.614),
        (apollo_mini(1e-2), 0.491),
    ],
)
def test_a_llama_of_a_billion_takes_the_published_bytes(
    tx: optax.GradientTransformation, published: float
) -> None:
    """The published counts are of bfloat16 states, which take half of these."""
    report = memory_report(tx, model_shapes("llama-1b"))
    assert round(report.total / 2 / GIB, 3) == published
    (alone,) = (paths for text, paths in report.remarks.items() if text.startswith("no matrix"))
    assert len(alone) == 50  # an embedding and 49 norms
    excluded = report.remarks.get("excluded by its name, not projected", ())
    assert list(excluded) in ([], ["lm_head/kernel"])


def test_feedback_in_bfloat16_takes_half() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    report = memory_report(ldadam(1e-3, complement=FeedBack(dtype="bfloat16")), params)
    assert report.fields["ProjectGradientsState.complement.residual"] == 2 * 64 * 64


def test_the_report_says_what_is_not_compressed_and_what_is_gathered() -> None:
    mesh = jax.make_mesh((8,), ("x",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {
        "small": {"kernel": jax.ShapeDtypeStruct((16, 64), jnp.float32)},
        "sharded": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=spec)},
    }
    remarks = memory_report(galore(1e-2, rank=16), params).remarks
    assert remarks == {
        "gradient gathered every 200 steps for a new basis": ("sharded/kernel",),
        "rank 16 of 16 rows, not compressed": ("small/kernel",),
    }
    assert not memory_report(grass(1e-2, rank=8), params).remarks


def test_heads_may_be_part_of_the_compressed_side() -> None:
    rules = (("proj", Axes("heads head_dim | embed -> embed")),)
    tx = galore(1e-2, rank=2, matrices=Matrices(partition=Partition(rules)))
    state = tx.init({"proj": jnp.zeros((2, 4, 16))})
    assert state[0].basis.vectors["proj"].shape == (2, 4, 2)
    assert state[0].inner_state.mu["proj"].shape == (1, 2, 16)
