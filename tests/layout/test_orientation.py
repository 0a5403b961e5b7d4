"""Which kernels are taken for (out, in), and what is said where nothing tells."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from microadam_jax import Matrices, Partition, explain_partition
from microadam_jax.layout.axes import Axes
from microadam_jax.layout.names import transformer_rules

Shape = tuple[int, ...]

GPT2 = {
    "h/0/attn/c_attn/kernel": (48, 16),
    "h/0/attn/c_attn/bias": (48,),
    "h/0/attn/c_proj/kernel": (16, 16),
    "h/0/attn/c_proj/bias": (16,),
    "h/0/mlp/c_fc/kernel": (64, 16),
    "h/0/mlp/c_fc/bias": (64,),
    "h/0/mlp/c_proj/kernel": (16, 64),
    "h/0/mlp/c_proj/bias": (16,),
}


def tree(shapes: dict[str, Shape]) -> dict[str, Any]:
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def moments(params: Any, partition: Partition | None = None) -> dict[str, Shape]:
    found = explain_partition(params, partition).assignments
    return {a.path: a.sharing.moment_shape for a in found}


def without_biases(shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {path: shape for path, shape in shapes.items() if path.endswith("kernel")}


def turned(shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {path: shape[::-1] for path, shape in shapes.items()}


@pytest.mark.parametrize("shapes", [GPT2, without_biases(GPT2)], ids=["biases", "no biases"])
def test_gpt2_of_hugging_face_flax_keeps_a_number_for_each_output(shapes: Any) -> None:
    found = moments(tree(shapes))
    assert found["h/0/attn/c_attn/kernel"] == (48, 1)
    assert found["h/0/attn/c_proj/kernel"] == (16, 1)
    assert found["h/0/mlp/c_fc/kernel"] == (64, 1)
    assert found["h/0/mlp/c_proj/kernel"] == (16, 1)
    assert "stored (out, in)" in str(explain_partition(tree(shapes)))


def test_the_same_names_with_kernels_from_inputs_to_outputs() -> None:
    for shapes in (turned(GPT2), turned(without_biases(GPT2))):
        found = moments(tree(shapes))
        assert found["h/0/attn/c_attn/kernel"] == (1, 48)
        assert found["h/0/attn/c_proj/kernel"] == (1, 16)
        assert found["h/0/mlp/c_fc/kernel"] == (1, 64)
        assert found["h/0/mlp/c_proj/kernel"] == (1, 16)
        assert "(out, in)" not in str(explain_partition(tree(shapes)))
        assert "assumed" not in str(explain_partition(tree(shapes)))


def test_heads_of_a_fused_kernel_lie_on_its_first_axis() -> None:
    report = explain_partition(tree(GPT2), Partition(transformer_rules(heads=4)))
    (c_attn,) = (a for a in report.assignments if a.path.endswith("c_attn/kernel"))
    assert c_attn.sharing.moment_shape == (48, 1)
    assert c_attn.sharing.blocks == 4 + 4 + 16
    x = jnp.arange(48.0 * 16).reshape(48, 16)
    mean = c_attn.sharing.mean(x)
    assert jnp.allclose(mean[:4], x[:4].mean())
    assert jnp.allclose(mean[32:], x[32:].mean(axis=1, keepdims=True))


def test_stacks_of_such_kernels_are_turned_too() -> None:
    shapes = {path.replace("h/0/", "h/"): (7, *shape) for path, shape in GPT2.items()}
    found = moments(tree(shapes))
    assert found["h/attn/c_attn/kernel"] == (7, 48, 1)
    assert found["h/mlp/c_proj/kernel"] == (7, 16, 1)


def test_transposed_convolutions_of_flax() -> None:
    linen = nn.ConvTranspose(6, (3, 3), transpose_kernel=True)
    params = linen.init(jax.random.key(0), jnp.ones((1, 8, 8, 5)))["params"]
    assert moments(params)["kernel"] == (1, 1, 6, 1)
    module = nnx.ConvTranspose(5, 6, (3, 3), transpose_kernel=True, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert moments({"up": state})["up/kernel"] == (1, 1, 6, 1)
    plain = nn.ConvTranspose(6, (3, 3)).init(jax.random.key(0), jnp.ones((1, 8, 8, 5)))["params"]
    assert moments(plain)["kernel"] == (1, 1, 1, 6)


@pytest.mark.parametrize("path", ["conv2_d_transpose/w", "net/~/conv2_d_transpose_1/w"])
def test_transposed_convolutions_of_haiku(path: str) -> None:
    assert moments(tree({path: (3, 3, 6, 6)})) == {path: (1, 1, 6, 1)}


@pytest.mark.parametrize(
    "shapes",
    [
        {"ConvTranspose_0/kernel": (3, 3, 6, 5)},
        {"ConvTranspose_0/kernel": (3, 3, 6, 6), "ConvTranspose_0/bias": (6,)},
        {"attn/c_proj/kernel": (16, 16)},
    ],
)
def test_where_nothing_tells_the_report_says_what_it_assumed(shapes: dict[str, Shape]) -> None:
    report = explain_partition(tree(shapes))
    kernel = next(a for a in report.assignments if a.path.endswith("kernel"))
    assert kernel.sharing.moment_shape == (*(1,) * (len(kernel.shape) - 1), kernel.shape[-1])
    assert "assumed (in, out)" in str(report)


def test_a_rule_of_ones_own_describes_the_kernel_as_it_is_stored() -> None:
    rules = (("c_attn/kernel", Axes("out | in -> out")), *transformer_rules())
    assert moments(tree(GPT2), Partition(rules))["h/0/attn/c_attn/kernel"] == (48, 1)


def test_subspaces_know_the_sides() -> None:
    views = dict(Matrices(side="in").list(tree(GPT2)))
    view = views["h/0/attn/c_attn/kernel"]
    assert view is not None
    assert (view.compressed, view.kept) == ((1,), (0,))
