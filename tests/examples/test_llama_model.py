"""The decoder against a float64 oracle, its laws, and the published sizes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.config import PRESETS
from examples.llama.model import ModelConfig, Params, graph_of, init_params, rotate
from microadam_jax.models import model_shapes

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = ModelConfig(hidden=16, intermediate=24, layers=3, heads=2, vocab=11)


@functools.cache
def weights(config: ModelConfig) -> Params:
    params = jax.jit(lambda: init_params(config, 0))()
    # Larger than at initialization, so that every part of the model matters.
    return jax.tree.map(lambda w: w if w.ndim < 2 else w * 10, params)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph_of(config), params)(tokens)


def oracle(params: Params, tokens: np.ndarray, heads: int) -> np.ndarray:
    """Logits of one sequence, from the formulas, layer after layer."""

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def turn(x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angle = np.exp(1j * np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half))
        turned = (x[:, :half] + 1j * x[:, half:]) * angle
        return np.concatenate([turned.real, turned.imag], axis=-1)

    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    x = params["embedding"]["embedding"][tokens]
    causal = np.tril(np.ones((len(tokens), len(tokens)), bool))
    for i in range(len(params["layers"]["mlp_norm"]["scale"])):
        layer = jax.tree.map(lambda w: w[i], params["layers"])  # noqa: B023
        kernels = {name: w["kernel"] for name, w in (layer["attention"] | layer["mlp"]).items()}
        h = norm(x, layer["attention_norm"]["scale"])
        parts = []
        for query, key, value in zip(
            *(np.split(h @ kernels[name], heads, axis=-1) for name in ("query", "key", "value")),
            strict=True,
        ):
            scores = turn(query) @ turn(key).T / math.sqrt(query.shape[-1])
            scores = np.where(causal, scores, -np.inf)
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            parts.append(scores / scores.sum(axis=-1, keepdims=True) @ value)
        x = x + np.concatenate(parts, axis=-1) @ kernels["out"]
        h = norm(x, layer["mlp_norm"]["scale"])
        gate = h @ kernels["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ kernels["up"])) @ kernels["down"]
    return norm(x, params["norm"]["scale"]) @ params["head"]["kernel"]


@pytest.mark.parametrize("remat", [False, True])
def test_forward_agrees_with_oracle(remat: bool) -> None:
    config = ModelConfig(**vars(TINY) | {"remat": remat})
    params = weights(TINY)
    tokens = np.array([[1, 5, 2, 2, 10, 0, 7], [3, 3, 3, 9, 8, 1, 4]])
    logits = logits_of(config, params, tokens)
    expected = np.stack([oracle(params, row, config.heads) for row in tokens])
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)


def test_positions_do_not_see_later_tokens() -> None:
    params = weights(TINY)
    tokens = np.array([[1, 5, 2, 2, 10, 0, 7]])
    changed = tokens.copy()
    changed[0, 4] = 3
    before, after = (logits_of(TINY, params, each) for each in (tokens, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert jnp.all(jnp.any(before[:, 4:] != after[:, 4:], axis=-1))


def test_rotated_products_depend_on_distance_alone() -> None:
    query, key = np.random.default_rng(0).normal(size=(2, 8))
    shape = (1, 6, 1, 8)
    queries = rotate(jnp.broadcast_to(jnp.float32(query), shape))[0, :, 0]
    keys = rotate(jnp.broadcast_to(jnp.float32(key), shape))[0, :, 0]
    products = queries @ keys.T
    for distance in range(6):
        diagonal = jnp.diagonal(products, -distance)
        np.testing.assert_allclose(diagonal, jnp.full_like(diagonal, diagonal[0]), atol=1e-5)


@pytest.mark.parametrize("preset", ["60m", "130m", "350m", "1b"])
def test_presets_have_the_published_sizes(preset: str) -> None:
    shapes = jax.eval_shape(lambda: init_params(PRESETS[preset].model(32_000), 0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    published = model_shapes(f"llama-{preset}")
    assert count == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(published))
    assert shapes["layers"]["mlp"]["up"]["kernel"].shape[0] == PRESETS[preset].layers


def test_number_formats() -> None:
    config = ModelConfig(**vars(TINY) | {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"})
    params = jax.eval_shape(lambda: init_params(config, 0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    logits = jax.eval_shape(logits_of, config, params, jnp.zeros((1, 3), int))
    assert logits.dtype == jnp.float32


def test_layers_start_different() -> None:
    kernel = weights(TINY)["layers"]["mlp"]["up"]["kernel"]
    assert not jnp.array_equal(kernel[0], kernel[1])
