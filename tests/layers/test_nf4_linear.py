"""Products with frozen weights in NF4: values, gradients, what they keep, and Flax's modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax.codecs import nf4
from microadam_jax.layers import nf4_linear, saved_bytes
from microadam_jax.layers.nnx import FrozenWeight, Nf4Linear, quantize_linears, replace_linears

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

W = jax.random.normal(jax.random.key(0), (96, 128)) / 10
X = jax.random.normal(jax.random.key(1), (4, 7, 96))
CODES = nf4().encode(W)
DECODED = np.asarray(nf4().decode(CODES, W.shape), float)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_decoded_weights(dtype: str) -> None:
    x = X.astype(dtype)
    y, pull = jax.vjp(lambda x: nf4_linear(x, CODES, W.shape), x)
    (dx,) = pull(jnp.ones_like(y))
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    np.testing.assert_allclose(
        np.asarray(y, float), np.asarray(x, float) @ DECODED, tolerance, tolerance
    )
    np.testing.assert_allclose(
        np.asarray(dx, float)[0, 0], DECODED.sum(1), 3 * tolerance, 3 * tolerance
    )


def test_keeps_codes_only() -> None:
    def f(x: jax.Array, codes: tuple[jax.Array, ...]) -> jax.Array:
        return nf4_linear(x, nf4().encode(W)._replace(codes=codes[0]), W.shape)

    kept = saved_bytes(f, X, (CODES.codes,), after=f).before
    assert not [kind for kind in kept if kind[1] != "uint8" and np.prod(kind[0]) > 10]


def test_refuses_codes_of_other_weights() -> None:
    with pytest.raises(ValueError, match="Stacked layers are taken one at a time"):
        nf4_linear(X, CODES, (96, 256))


def test_stacked_layers_in_a_scan_equal_single_ones() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs: nnx.Rngs) -> nnx.Sequential:
        return nnx.Sequential(nnx.Linear(64, 64, rngs=rngs))

    stacked, x = stack(nnx.Rngs(0)), jax.random.normal(jax.random.key(2), (5, 64))
    kernels, biases = stacked.layers[0].kernel[...], stacked.layers[0].bias[...] + 0.1
    stacked.layers[0].bias[...] = biases
    assert quantize_linears(stacked) == 1
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    expected = np.asarray(x, float)
    for kernel, bias in zip(kernels, biases, strict=True):
        codec = nf4()
        expected = expected @ np.asarray(codec.decode(codec.encode(kernel), kernel.shape)) + bias
    np.testing.assert_allclose(run(x, stacked), expected, 1e-4, 1e-5)
    assert not [v for v in jax.tree.leaves(nnx.state(stacked, nnx.Param)) if v.ndim == 3]
    assert len(jax.tree.leaves(nnx.state(stacked, FrozenWeight))) == 4


def test_qlora_trains_the_adapter_alone() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs))
    x = jax.random.normal(jax.random.key(3), (5, 64))
    quantize_linears(model)
    before = model(x)
    replace_linears(model, lambda base: nnx.LoRA(64, 4, 64, base_module=base, rngs=rngs))
    np.testing.assert_array_equal(model(x), before)
    loss = lambda model: jnp.square(model(x) - 1).mean()  # noqa: E731
    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    assert [g.shape for g in jax.tree.leaves(gradient)] == [(64, 4), (4, 64)]
    assert isinstance(model.layers[0].base_module, Nf4Linear)


def test_says_when_there_is_nothing_to_quantize() -> None:
    with pytest.raises(ValueError, match=r"There is no nnx.Linear to quantize in this Dropout"):
        quantize_linears(nnx.Dropout(0.1, rngs=nnx.Rngs(0)))


def test_a_shared_layer_stays_shared_and_a_subclass_what_it_is() -> None:
    shared = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    adapted = nnx.LoRALinear(64, 64, lora_rank=2, rngs=nnx.Rngs(0))
    model = nnx.Sequential(shared, nnx.relu, shared, adapted)
    assert quantize_linears(model) == 1
    assert isinstance(model.layers[0], Nf4Linear)
    assert model.layers[0] is model.layers[2]
    assert model.layers[3] is adapted


def test_layers_in_containers_of_python_are_replaced_too() -> None:
    def make() -> nnx.Linear:
        return nnx.Linear(64, 64, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.modules = nnx.List([make()])
            self.list = nnx.data([make(), [make()]])
            self.dict = nnx.data({"a": make()})
            self.tuple = nnx.data((make(), make()))

    model = Model()
    assert quantize_linears(model) == 6
    assert not any(type(node) is nnx.Linear for _, node in nnx.iter_graph(model))


def test_other_layers_and_formats_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Only an nnx.Linear can be quantized; got Conv"):
        Nf4Linear(nnx.Conv(2, 2, (1,), rngs=nnx.Rngs(0)))  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(TypeError, match="codec must be one that nf4"):
        Nf4Linear(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "nf4")  # pyrefly: ignore[bad-argument-type]
    own = nnx.Linear(2, 2, dot_general=lambda *a, **b: 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot call dot_general="):
        Nf4Linear(own)
    with pytest.raises(TypeError, match="a floating-point array as x; got one of int32"):
        nf4_linear(X.astype(jnp.int32), CODES, W.shape)


def test_weights_on_explicit_axes_are_multiplied_as_on_one_device() -> None:
    def total(x: jax.Array, w: jax.Array, out_sharding: P | None = None) -> jax.Array:
        return nf4_linear(x, nf4().encode(w), W.shape, out_sharding=out_sharding).sum()

    expected = jax.grad(total)(X, W)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    for of_x, of_w in [
        (P("data"), P()),
        (P("data", None, "tensor"), P()),
        (P("data"), P("data")),
        (P("data", None, "tensor"), P("tensor")),
        (P("data"), P(None, "tensor")),
    ]:
        with jax.set_mesh(mesh):
            x, w = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((X, of_x), (W, of_w)))
            found = jax.grad(total)(x, w, P("data"))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_codes_keep_the_names_of_the_kernels_axes() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    init = nnx.with_metadata(
        nnx.initializers.lecun_normal(), out_sharding=(None, "tensor"), mesh=mesh
    )
    with jax.set_mesh(mesh):
        layer = Nf4Linear(nnx.Linear(64, 128, rngs=nnx.Rngs(0), kernel_init=init))
    specs = nnx.get_partition_spec(nnx.state(layer))
    assert specs["_codes"].get_value() == P(None, "tensor")
