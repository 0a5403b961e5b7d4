"""The cross entropy of a head in chunks of its vocabulary, against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax.layers import chunked_cross_entropy

pytestmark = pytest.mark.usefixtures("fewer_optimizations")


def oracle(x: np.ndarray, w: np.ndarray, labels: Any, seeds: np.ndarray) -> tuple[Any, ...]:
    """Losses of tokens, and the gradients of ``sum(seeds * losses)``."""
    logits = x @ w
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    p = exponents / exponents.sum(-1, keepdims=True)
    chosen = np.arange(w.shape[1]) == labels[..., None]
    d = seeds[..., None] * (p - chosen)
    dw = x.reshape(-1, len(w)).T @ d.reshape(-1, w.shape[1])
    return -np.log((p * chosen).sum(-1)), d @ w.T, dw


@pytest.mark.parametrize(
    ("vocab", "chunk", "tokens"),
    [(1, 4096, (3,)), (50, 7, (2, 5)), (64, 64, (4,)), (64, 16, ()), (50257, 4096, (2, 3))],
)
def test_losses_and_gradients_are_those_of_the_oracle(
    vocab: int, chunk: int, tokens: tuple[int, ...]
) -> None:
    random = np.random.default_rng(vocab)
    x, w = random.standard_normal((*tokens, 24)), random.standard_normal((24, vocab))
    labels, seeds = random.integers(0, vocab, tokens), random.standard_normal(tokens)

    def total(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = chunked_cross_entropy(x, w, jnp.asarray(labels), chunk=chunk)
        return jnp.sum(losses * jnp.asarray(seeds, jnp.float32)), losses

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, losses), (dx, dw) = run(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    for actual, expected in zip((losses, dx, dw), oracle(x, w, labels, seeds), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_heads_in_bfloat16_have_gradients_in_bfloat16() -> None:
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in ((9, 32), (32, 100)))
    labels, seeds = random.integers(0, 100, 9), np.full(9, 1 / 9)

    def mean(x: jax.Array, w: jax.Array) -> jax.Array:
        return chunked_cross_entropy(x, w, jnp.asarray(labels), chunk=48).mean()

    loss, (dx, dw) = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(x, w)
    wide = (np.asarray(a, np.float64) for a in (x, w))
    losses, expected_dx, expected_dw = oracle(*wide, labels, seeds)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    for actual, expected in ((dx, expected_dx), (dw, expected_dw)):
        actual = np.asarray(actual, np.float64)
        assert np.abs(actual - expected).max() < 0.01 * np.abs(expected).max()


def test_no_logits_of_the_whole_vocabulary() -> None:
    def mean(x: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
        return chunked_cross_entropy(x, w, labels, chunk=1024).mean()

    x, w, labels = jnp.zeros((512, 16)), jnp.zeros((16, 32000)), jnp.zeros(512, jnp.int32)
    program = jax.jit(jax.grad(mean, argnums=(0, 1))).lower(x, w, labels).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.2 * 512 * 32000 * 4


def test_mistakes_are_told() -> None:
    x, w, labels = jnp.ones((2, 3, 4)), jnp.ones((4, 5)), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match="chunk must be a positive integer; got 0"):
        chunked_cross_entropy(x, w, labels, chunk=0)
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\), \(5, 4\) and \(2, 3\)"):
        chunked_cross_entropy(x, w.T, labels)
    with pytest.raises(TypeError, match="labels must be integers, columns of kernel; got float32"):
        chunked_cross_entropy(x, w, labels.astype(jnp.float32))


def test_labels_that_are_no_columns_have_no_loss() -> None:
    x, w, labels = jnp.ones((3, 4)), jnp.ones((4, 5)), jnp.array([1, -100, 5])
    assert (jnp.isnan(chunked_cross_entropy(x, w, labels)) == jnp.array([0, 1, 1])).all()

    def kept(x: jax.Array) -> jax.Array:
        return jnp.where(labels == 1, chunked_cross_entropy(x, w, labels), 0).sum()

    loss, gradient = jax.value_and_grad(kept)(x)
    np.testing.assert_allclose(loss, np.log(5), rtol=1e-6)
    assert not gradient[1:].any()


def test_columns_without_probability_may_come_first() -> None:
    kernel = jnp.concatenate([jnp.full((1, 20), -jnp.inf), jnp.ones((1, 20))], axis=1)
    losses = chunked_cross_entropy(jnp.ones((2, 1)), kernel, jnp.array([25, 30]), chunk=10)
    np.testing.assert_allclose(losses, np.log(20), rtol=1e-6)


PLACES = {
    "tokens": (P("data"), P(), P("data")),
    "rows of the head": (P("data"), P("tensor"), P("data")),
    "as FSDP cuts": (P("data"), P("data"), P("data")),
    "columns of the head": (P("data"), P(None, "tensor"), P("data")),
    "channels": (P("data", "tensor"), P("tensor"), P("data")),
    "the head alone": (P(), P("tensor"), P()),
}


@pytest.mark.parametrize("name", PLACES)
def test_gradients_on_explicit_axes_are_those_of_one_device(name: str) -> None:
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((16, 8), (8, 100)))
    labels = jnp.arange(16)

    def mean(x: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return chunked_cross_entropy(x, kernel, labels, chunk=30).mean()

    expected = jax.grad(mean, (0, 1))(x, kernel, labels)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        pairs = zip((x, kernel, labels), PLACES[name], strict=True)
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in pairs]
        found = jax.jit(jax.grad(mean, (0, 1)))(*placed)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
