"""Which parameters stack layers, in the containers of many frameworks."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.scale import shapes_of
from microadam_jax import Matrices, Partition, Storage, explain_partition, top_k
from microadam_jax.codecs import rank1_linear4
from microadam_jax.compressors import power_sgd
from microadam_jax.layout.names import transformer_rules
from microadam_jax.layout.stacks import STACKED, layer_axes, layer_axis_of
from microadam_jax.layout.subsets import Subsets
from microadam_jax.models import MODELS
from microadam_jax.trees import LeafShape, leaf_shapes, path_name

Shape = tuple[int, ...]


def tree(**shapes: Shape) -> dict[str, Any]:
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def axes(params: Any, **options: Any) -> dict[str, int | None]:
    leaves = leaf_shapes(params)
    found = layer_axes(tuple(leaves.values()), **options)
    return {path_name(path): found[leaf.path] for path, leaf in leaves.items()}


def moments(params: Any, partition: Partition | None = None) -> dict[str, Shape]:
    found = explain_partition(params, partition).assignments
    return {a.path: a.sharing.moment_shape for a in found}


LINEN_BLOCK = {
    "attention/query/kernel": (64, 8, 16),
    "attention/query/bias": (8, 16),
    "attention/out/kernel": (8, 16, 64),
    "mlp/kernel": (64, 256),
    "norm/scale": (64,),
}


@pytest.mark.parametrize(
    "container",
    [
        *("blocks/block_0", "blocks/Block_11", "layers/layer_0", "layers/layer0", "layers/0"),
        *("h/11", "h/h_3", "layers/layers_2", "encoder/layers/EncoderBlock_1", "hidden_layers"),
        *("conv_stack", "hidden_layers/0", "dense_h", "blocks"),
    ],
)
@pytest.mark.parametrize("path", LINEN_BLOCK)
def test_single_layers_are_none(container: str, path: str) -> None:
    """Whether the rest of the layer stands beside the leaf or not."""
    alone = tree(**{f"{container}/{path}": LINEN_BLOCK[path]})
    whole = tree(**{f"{container}/{path}": shape for path, shape in LINEN_BLOCK.items()})
    assert set(axes(whole).values()) == {None}
    # One leaf of a container that may be a stack cannot show that it is none.
    if container not in ("blocks", "dense_h") and len(LINEN_BLOCK[path]) > 1:
        if path.endswith("bias"):
            return
        assert set(axes(alone).values()) == {None}


def test_the_query_of_a_linen_block_has_a_number_for_each_head() -> None:
    params = tree(**{"blocks/block_0/attention/query/kernel": (64, 8, 16)})
    assert list(moments(params).values()) == [(1, 8, 1)]


def test_a_kernel_of_two_axes_is_no_stack() -> None:
    params = tree(**{"layers/layer_0/mlp/kernel": (16, 24), "dense_h/kernel": (16, 48)})
    assert list(moments(params).values()) == [(1, 48), (1, 24)]


def test_a_torch_like_weight_alone_is_no_stack() -> None:
    leaves = [LeafShape("h/weight", (128, 64)), LeafShape("layers/mlp/weight", (7, 128, 64))]
    assert layer_axes(leaves) == {"h/weight": None, "layers/mlp/weight": 0}


@pytest.mark.parametrize(
    "shapes",
    [
        {"layers/mlp/kernel": (7, 16, 24), "layers/norm/scale": (7, 16)},
        {"layers/Dense_0/kernel": (7, 16, 24), "layers/Dense_0/bias": (7, 24)},
        {"layers/Block_0/mlp/kernel": (7, 16, 24), "layers/Block_0/norm/scale": (7, 16)},
        {"moe_layers/MoeBlock_0/wi_0": (7, 5, 16, 24), "moe_layers/norm/scale": (7, 16)},
        {"decoder_stack/mlp/kernel": (7, 16, 24), "decoder_stack/norm/scale": (7, 16)},
        {"ScanBlock_0/mlp/kernel": (7, 16, 24)},
        {"blocks/temperature": (7,), "blocks/w1": (7, 16, 24)},
    ],
)
def test_stacks_of_one_size_are_stacks(shapes: dict[str, Shape]) -> None:
    assert set(axes(tree(**shapes)).values()) == {0}


@pytest.mark.parametrize(
    "shapes",
    [
        {"layers/a/kernel": (7, 16, 24), "layers/b/kernel": (8, 16, 24)},
        {"layers/a/kernel": (7, 16, 24), "layers/a/bias": (7,)},
        {"layers/a/kernel": (7, 16, 24), "layers/count": ()},
        {"layers/a/kernel": (7, 16, 24), "layers/0/kernel": (7, 16, 24)},
        {"conv_stack/Conv_0/kernel": (3, 3, 8, 16), "conv_stack/Conv_1/kernel": (3, 3, 16, 16)},
        {"layers/layer_0/a/kernel": (7, 4, 4), "layers/layer_1/a/bias": (7, 4)},
        {"ScanLSTMCell_0/hf/kernel": (16, 16), "ScanLSTMCell_0/hf/bias": (16,)},
    ],
)
def test_layers_of_several_sizes_are_none(shapes: dict[str, Shape]) -> None:
    assert set(axes(tree(**shapes)).values()) == {None}


def test_a_stack_within_a_single_layer_is_one() -> None:
    shapes = {"blocks/block_0/layers/mlp/kernel": (7, 16, 24), "blocks/block_0/scale": (16,)}
    assert axes(tree(**shapes)) == {
        "blocks/block_0/layers/mlp/kernel": 0,
        "blocks/block_0/scale": None,
    }


def test_a_pattern_of_ones_own_is_trusted_but_for_indices() -> None:
    shapes = {"trunk/mlp/kernel": (16, 24), "trunk/layer_0/kernel": (16, 24), "trunk/1": (16,)}
    found = axes(tree(**shapes), stacked="trunk")
    assert found == {"trunk/mlp/kernel": 0, "trunk/layer_0/kernel": None, "trunk/1": None}


# --- Frameworks -----------------------------------------------------------------------------------


class LinenNet(nn.Module):
    """A sequential called ``layers``, and blocks in a container."""

    def setup(self) -> None:
        self.layers = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(16)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers(x)


class LinenBlocks(nn.Module):
    """Blocks that Linen names, in a module called ``blocks``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = nn.MultiHeadDotProductAttention(num_heads=4, name=f"block_{i}")(x)
        return x


def frameworks() -> dict[str, Any]:
    key, rngs = jax.random.key(0), nnx.Rngs(0)
    linear = nnx.Sequential(nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs))
    cells = {"gru": nnx.GRUCell(8, 16, rngs=rngs), "lstm": nnx.OptimizedLSTMCell(8, 16, rngs=rngs)}
    blocks = LinenBlocks().init(key, jnp.ones((1, 2, 16)))["params"]
    return {
        "linen sequential": LinenNet().init(key, jnp.ones((1, 16)))["params"],
        "linen blocks": {"blocks": blocks},
        "nnx sequential": {"net": nnx.to_pure_dict(nnx.state(linear, nnx.Param))},
        "nnx cells": {k: nnx.to_pure_dict(nnx.state(v, nnx.Param)) for k, v in cells.items()},
        "equinox": eqx.filter(eqx.nn.MLP(16, 16, 24, 2, key=key), eqx.is_array),
    }


@pytest.mark.parametrize("name", list(frameworks()))
def test_modules_of_frameworks_hold_single_layers(name: str) -> None:
    params = frameworks()[name]
    assert set(axes(params).values()) == {None}
    report = explain_partition(params, Partition(transformer_rules(weight="out in")))
    assert report.unnamed == ()


# --- Everybody who asks ---------------------------------------------------------------------------

SINGLE = tree(**{"blocks/block_0/query/kernel": (64, 8, 64), "blocks/block_0/mlp": (64, 128)})


def test_sizes_of_storage_and_top_k_count_the_whole_layer() -> None:
    """A row of 512 would be too small for either."""
    leaves = jax.tree_util.tree_leaves_with_path(SINGLE)
    codecs = Storage(rank1_linear4()).assign(SINGLE)
    for path, leaf in leaves:
        assert codecs[path] == rank1_linear4()
        for pattern in (STACKED, "blocks"):
            assert not top_k(stacked=pattern).keeps_dense(path, leaf)
        assert top_k(stacked="blocks/block_0").keeps_dense(path, leaf)


def test_each_layer_is_a_matrix_of_its_own_only_in_a_stack() -> None:
    (path, leaf), *_ = jax.tree_util.tree_leaves_with_path(
        {"layers/layer_0/kernel": jnp.zeros((8, 4, 16))}
    )
    for pattern in (STACKED, "layers"):
        assert power_sgd(stacked=pattern).first(path, leaf).right.shape == (1, 1, 16, 4)
    assert power_sgd(stacked="layer_0").first(path, leaf).right.shape == (8, 1, 16, 4)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_leaf_alone_says_of_real_models_what_the_tree_says(model: str, stacked: bool) -> None:
    """Compressors see one leaf at a time."""
    leaves = leaf_shapes(shapes_of(model, stacked))
    alone = {leaf.path: layer_axis_of(path, leaf.shape, STACKED) for path, leaf in leaves.items()}
    assert alone == layer_axes(tuple(leaves.values()))


def test_subspaces_and_subsets_see_the_matrix_of_a_single_layer() -> None:
    views = dict(Matrices().list(SINGLE))
    query = views["blocks/block_0/query/kernel"]
    assert query is not None
    assert (query.rows, query.columns) == (64, 512)
    mlp = views["blocks/block_0/mlp"]
    assert mlp is not None
    assert (mlp.rows, mlp.columns) == (64, 128)
    subsets = Subsets("runs", size=64)
    runs = {a.path: subsets.of(a).moment_shape for a in Partition().assign(SINGLE).values()}
    assert runs["blocks/block_0/query/kernel"] == (64, 8, 1)


def test_axes_do_not_depend_on_values() -> None:
    shapes = {"layers/mlp/kernel": (7, 16, 24), "layers/norm/scale": (7, 16)}
    arrays = {path: np.zeros(shape) for path, shape in shapes.items()}
    assert axes(arrays) == axes(tree(**shapes))


def test_a_box_tells_the_layer_axis_of_its_whole_container() -> None:
    leaves = [
        LeafShape("layers/up/kernel", (64, 5, 96), ("embed", "layers", "mlp")),
        LeafShape("layers/norm/scale", (64, 5)),
    ]
    assert set(layer_axes(leaves).values()) == {1}


def test_what_may_be_stacked_along_the_next_axis_is_left_open() -> None:
    along_the_next = [
        LeafShape("layers/norm/scale", (64, 5)),
        LeafShape("layers/query/kernel", (64, 5, 64)),
    ]
    assert set(layer_axes(along_the_next).values()) == {None}
    along_the_first = [
        LeafShape("layers/norm/scale", (5, 64)),
        LeafShape("layers/query/kernel", (5, 64, 64)),
    ]
    assert set(layer_axes(along_the_first).values()) == {0}
