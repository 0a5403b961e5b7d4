"""Quantized Side Tuning against float64 NumPy, what it keeps, and the paper's counts."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.extend import core

from examples.finetuning.bert import Bert, BertConfig
from examples.finetuning.bert import Block as BertBlock
from examples.llama.model import Block, Llama, ModelConfig
from microadam_jax.layers import adapter, fuse, max_pool, mix_hidden_states, saved_bytes
from microadam_jax.layers.nnx import SideNetwork, quantize_linears
from tests.oracles import side_network as oracle

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

DOWNSAMPLINGS = ("adapter", "lora", "max", "average")
LLAMA = ModelConfig(64, 96, 3, 4, 50, key_heads=2, tied=True)
BERT = BertConfig(64, 96, 3, 4, 50)
R, ROWS, LENGTH = 4, 2, 6
TOKENS = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, 50)


def linear_side(**options: Any) -> SideNetwork:
    sizes = {"layers": 3, "width": 64, "reduction": R, "rank": 8}
    return SideNetwork(
        lambda rngs: nnx.Linear(16, 16, rngs=rngs), rngs=nnx.Rngs(0), **sizes | options
    )


@functools.cache
def llama(downsample: str, mix: str = "paper") -> tuple[Llama, SideNetwork]:
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    quantize_linears(model.layers)
    narrow = dataclasses.replace(LLAMA, hidden=16, intermediate=24)
    side = SideNetwork(
        lambda rngs: Block(narrow, rngs=rngs),
        layers=3,
        width=64,
        reduction=R,
        downsample=downsample,
        rank=8,
        mix=mix,
        rngs=nnx.Rngs(1),
    )
    return model, side


def logits(model: Llama, side: SideNetwork, tokens: jax.Array) -> jax.Array:
    last, up = side.along(model.layers, model.embedding(tokens))
    return model.logits(side.mixed(model.norm(last), up))


@pytest.mark.parametrize("downsample", DOWNSAMPLINGS)
@pytest.mark.parametrize(("gate", "mix"), [("scalar", "paper"), ("channel", "released")])
def test_equals_the_formulas(downsample: str, gate: str, mix: str) -> None:
    side = linear_side(downsample=downsample, gate=gate, mix=mix)
    side.gammas[...] += jnp.linspace(-1, 1, side.gammas.size).reshape(side.gammas.shape)
    side.alpha[...] -= 0.3
    hidden = np.random.default_rng(0).standard_normal((4, 5, 64)).astype(np.float32)
    kernels, biases = side.layers.kernel[...], side.layers.bias[...]

    def down(index: int) -> Any:
        if downsample in ("max", "average"):
            return lambda h: oracle.pool(h, R, downsample)
        made = side.first if index == 0 else side.downsamplings
        a, b = (x[...] if index == 0 else x[...][index - 1] for x in (made.a, made.b))
        form = oracle.adapter if downsample == "adapter" else oracle.low_rank
        return lambda h: form(h, np.asarray(a, float), np.asarray(b, float))

    last = oracle.side_network(
        hidden.astype(float),
        [down(i) for i in range(4)],
        [lambda x, w=w, b=b: x @ w + b for w, b in zip(kernels, biases, strict=True)],
        np.asarray(side.gammas[...], float),
    )
    norm = last / np.sqrt((last**2).mean(-1, keepdims=True) + 1e-6)
    up = norm @ np.asarray(side.up.kernel[...], float) + side.up.bias[...]
    np.testing.assert_allclose(side(jnp.asarray(hidden)), up, 1e-4, 1e-4)
    expected = oracle.mix(hidden[-1], up, np.asarray(side.alpha[...]), mix)
    mixed = side.mixed(hidden[-1], side(iter(jnp.asarray(hidden))))
    np.testing.assert_allclose(mixed, expected, 1e-4, 1e-4)


@pytest.mark.parametrize("mix", ["paper", "residual"])
def test_starts_from_the_backbones_own_predictions(mix: str) -> None:
    model, side = llama("adapter", mix)
    np.testing.assert_array_equal(logits(model, side, TOKENS), model(TOKENS))


def test_one_scan_equals_layer_by_layer() -> None:
    model = Bert(BERT, rngs=nnx.Rngs(0))
    narrow = dataclasses.replace(BERT, hidden=16, intermediate=24)
    side = SideNetwork(
        lambda rngs: BertBlock(narrow, rngs=rngs), layers=3, width=64, reduction=R, rngs=nnx.Rngs(1)
    )
    mask = jnp.arange(LENGTH) < jnp.array([[4], [6]])
    last, up = side.along(model.layers, model.embed(TOKENS), mask)
    graph, state = nnx.split(model.layers)
    hidden = [model.embed(TOKENS)]
    for i in range(3):
        layer = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
        hidden.append(layer(hidden[-1], mask))
    np.testing.assert_allclose(last, hidden[-1], 1e-5, 1e-5)
    np.testing.assert_allclose(up, side(hidden, mask), 1e-4, 1e-5)


def test_no_gradient_reaches_the_backbone() -> None:
    model, side = llama("adapter", "residual")
    side.up.kernel[...] += 0.1
    graph, params, rest = nnx.split((model, side), nnx.Param, ...)
    rest = nnx.to_pure_dict(rest)

    def loss(params: Any) -> jax.Array:
        return jnp.square(logits(*nnx.merge(graph, params, rest), TOKENS)).mean()

    backbone, of_side = nnx.to_pure_dict(jax.grad(loss)(params)).values()
    # The head is tied to the embedding and reads the mixed state; it is the model's, and moves
    # only where the caller trains it.
    del backbone["embedding"]
    assert all(not np.any(g) for g in jax.tree.leaves(backbone))
    assert all(np.any(g) for g in jax.tree.leaves(of_side))


@pytest.mark.parametrize("downsample", DOWNSAMPLINGS)
def test_no_residual_of_the_backbone_is_kept(downsample: str) -> None:
    backbone, side = llama(downsample)
    graph, params = nnx.split(side)
    backbone_graph, weights = nnx.split(backbone)
    weights = nnx.to_pure_dict(weights)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(backbone_graph, weights)
        last, up = nnx.merge(graph, params).along(model.layers, model.embedding(tokens))
        return last.sum() + up.sum()

    kept = saved_bytes(loss, params, TOKENS, after=loss).before
    wide = {shape: n for (shape, _), n in kept.items() if shape and shape[-1] >= 64}
    states = {(3, ROWS, LENGTH, 64): 1, (ROWS, LENGTH, 64): 1}
    assert wide == (states if downsample in ("adapter", "lora") else {})


def test_linen_has_the_same_functions() -> None:
    class Side(linen.Module):
        @linen.compact
        def __call__(self, h0: jax.Array, h1: jax.Array) -> jax.Array:
            gamma = self.param("gamma", linen.initializers.zeros, ())
            alpha = self.param("alpha", linen.initializers.ones, ())
            h0, h1 = jax.lax.stop_gradient((h0, h1))
            side = linen.Dense(4)(fuse(max_pool(h1, 4), max_pool(h0, 4), gamma))
            return mix_hidden_states(h1, linen.Dense(16)(side), alpha)

    h0, h1 = jax.random.normal(jax.random.key(0), (2, 3, 16))
    y, params = Side().init_with_output(jax.random.key(1), h0, h1)
    np.testing.assert_array_equal(y, h1)
    a, b = jnp.ones((16, 2)), jnp.ones((2, 4))
    assert adapter(h0, a, b).shape == (3, 4)
    assert set(params["params"]) == {"gamma", "alpha", "Dense_0", "Dense_1"}


# Llama-2 7B, as in the paper: r = 16, rank 16.
N, D, FF, V, HEADS, RANK = 32, 4096, 11008, 32000, 32, 16
SEQ = 64


@functools.cache
def llama_7b(downsample: str = "adapter") -> tuple[Any, Any, Any, Any]:
    config = ModelConfig(D, FF, N, HEADS, V)
    narrow = dataclasses.replace(config, hidden=D // 16, intermediate=FF // 16)

    def make() -> tuple[Llama, SideNetwork]:
        model = Llama(config, rngs=nnx.Rngs(0))
        quantize_linears(model.layers)
        side = SideNetwork(
            lambda rngs: Block(narrow, rngs=rngs),
            layers=N,
            width=D,
            downsample=downsample,
            rngs=nnx.Rngs(1),
        )
        return model, side

    model, side = nnx.eval_shape(make)
    graph, backbone = nnx.split(model)
    side_graph, params = nnx.split(side, nnx.Param)
    return graph, nnx.to_pure_dict(backbone), side_graph, nnx.to_pure_dict(params)


def seven_b_loss(params: Any, backbone: Any, tokens: jax.Array) -> jax.Array:
    graph, _, side_graph, _ = llama_7b()
    return logits(nnx.merge(graph, backbone), nnx.merge(side_graph, params), tokens).mean()


def test_parameters_of_llama_2_7b() -> None:
    narrow = D // 16
    downsampling = D * RANK + RANK * narrow + 2 * narrow  # with its layer norm
    layer = 4 * narrow**2 + 3 * narrow * (FF // 16) + 2 * narrow
    up = narrow * D + D
    _, backbone, _, params = llama_7b()
    expected = (N + 1) * downsampling + N * layer + up + narrow + N + 1  # norm, gates, mix
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == expected
    share = count / (N * (4 * D**2 + 3 * D * FF + 2 * D) + 2 * V * D + D)
    print(f"{count:,} trained parameters, {100 * share:.2f} % of Llama-2 7B")
    assert 0.0040 < share < 0.0044  # the paper's 0.41 % counts no norm and shares D_0
    assert downsampling * N / count == pytest.approx(0.078, abs=0.001)
    codes = [leaf for leaf in jax.tree.leaves(backbone) if leaf.dtype == jnp.uint8]
    bits = 8 * sum(c.size for c in codes) / (N * (4 * D**2 + 3 * D * FF))
    assert bits == pytest.approx(4.125, abs=1e-6)


def test_flops_for_a_token_of_llama_2_7b() -> None:
    _, backbone, _, params = llama_7b()
    tokens = jax.ShapeDtypeStruct((1, SEQ), jnp.int32)
    traced = jax.make_jaxpr(jax.grad(seven_b_loss))(params, backbone, tokens)
    narrow, narrow_ff = D // 16, FF // 16
    backbone_once = 2 * N * (4 * D**2 + 3 * D * FF) + 4 * N * SEQ * D
    side_once = 2 * N * (4 * narrow**2 + 3 * narrow * narrow_ff) + 4 * N * SEQ * narrow
    # Forward, and two products of that size backward; but no gradient of a backbone's state.
    downsamplings = (N + 1) * (2 * 2 * D * RANK + 3 * 2 * RANK * narrow)
    up, head = 3 * 2 * narrow * D, 2 * 2 * D * V
    expected = backbone_once + 3 * side_once + downsamplings + up + head
    assert flops(traced.jaxpr) / SEQ == pytest.approx(expected, rel=1e-9)
    full = 3 * (backbone_once + 2 * D * V)
    print(f"{expected / 1e9:.1f} GFLOP a token, {full / expected:.2f} times fewer than full")
    assert full / expected > 2.5


def test_saved_bytes_of_llama_2_7b() -> None:
    graph, backbone, side_graph, params = llama_7b()

    def residuals(params: Any, backbone: Any, tokens: jax.Array) -> Any:
        def states(params: Any) -> jax.Array:
            model, side = nnx.merge(graph, backbone), nnx.merge(side_graph, params)
            last, up = side.along(model.layers, model.embedding(tokens))
            return side.mixed(model.norm(last), up)

        return jax.vjp(states, params)[1]

    tokens = jax.ShapeDtypeStruct((1, SEQ), jnp.int32)
    kept = jax.tree.leaves(jax.eval_shape(residuals, params, backbone, tokens))
    given = {leaf.shape for leaf in jax.tree.leaves(params)}
    kept = [leaf for leaf in kept if leaf.shape not in given]
    wide = [leaf.shape for leaf in kept if leaf.ndim > 2 and leaf.shape[-1] >= D]
    # Read by the downsamplings: N states and the embedding. Read by the mix: its two arguments.
    assert sorted(wide) == [(1, SEQ, D)] * (len(wide) - 1) + [(N, 1, SEQ, D)]
    assert len(wide) <= 5
    narrow = sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in wide)
    states = 4 * SEQ * D * (N + 1)
    print(f"states {states / 2**20:.1f} MiB, side network {narrow / 2**20:.1f} MiB")


def flops(jaxpr: Any) -> int:
    """Of all matrix products, with loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                inner = part.jaxpr if isinstance(part, core.ClosedJaxpr) else part
                if isinstance(inner, core.Jaxpr):
                    total += times * flops(inner)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2 * out * math.prod(left[axis] for axis in contracted)
    return total


class Noisy(nnx.Module):
    """A side layer with random numbers and running means."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dropout, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.norm(x))


def test_side_layers_keep_what_a_call_changes() -> None:
    hidden = jax.random.normal(jax.random.key(0), (4, 2, 5, 64))
    side = SideNetwork(Noisy, layers=3, width=64, reduction=4, rngs=nnx.Rngs(0))
    assert not (side(hidden) == side(hidden)).all()
    assert (side.layers.norm.mean[...] != 0).all()


def test_a_backbone_need_not_be_an_argument() -> None:
    """It is frozen, so that a loss may take the side network alone."""

    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear, self.dropout = nnx.Linear(64, 64, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.linear(x))

    x = jax.random.normal(jax.random.key(0), (4, 64))
    results = []
    for draws in (False, True):
        make = Layer if draws else lambda rngs: nnx.Linear(64, 64, rngs=rngs)
        backbone = nnx.split_rngs(splits=3)(nnx.vmap(make))(nnx.Rngs(3))
        side = linear_side(mix="residual")

        def loss(side: SideNetwork, backbone: nnx.Module) -> jax.Array:
            last, up = side.along(backbone, x)
            return jnp.mean((side.mixed(last, up) - x) ** 2)

        results += [nnx.value_and_grad(loss)(side, backbone)[0] for _ in range(2)]
        if not draws:
            seen = nnx.value_and_grad(lambda side, own=backbone: loss(side, own))(side)[0]
            np.testing.assert_array_equal(seen, results[0])
    still, again, drawn, anew = results
    assert still == again
    assert drawn != anew


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="reduction 3 does not divide the width 64"):
        SideNetwork(lambda rngs: None, layers=1, width=64, reduction=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mix must be one of 'paper', 'released', 'residual'"):
        linear_side(mix="none")
    with pytest.raises(ValueError, match=r"reads 4 hidden states, .*; got 3"):
        linear_side()(jnp.ones((3, 2, 64)))
    with pytest.raises(ValueError, match=r"reads 4 hidden states, .*; got more"):
        linear_side()(jnp.ones((6, 2, 64)))
    with pytest.raises(ValueError, match=r"width 64 reads .*; got \(2, 32\)"):
        linear_side()(jnp.ones((4, 2, 32)))
    for name, value in (("rank", 0), ("layers", -1), ("width", 0), ("reduction", 4.0)):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer; got {value}"):
            linear_side(**{name: value})
    stack = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(64, 64, rngs=rngs)))
    backbone = stack(nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"3 layers goes along a backbone of 3 stacked layers.*2"):
        linear_side().along(backbone, jnp.ones((2, 64)))
    with pytest.raises(ValueError, match="'residual' has none; got mix='paper' with no alpha"):
        mix_hidden_states(jnp.ones(3), jnp.ones(3), None)
    with pytest.raises(ValueError, match="does not divide the 10 channels"):
        max_pool(jnp.ones(10), 4)
