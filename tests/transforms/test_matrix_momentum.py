"""Muon and Sinkhorn with momenta in few bits, against the oracle, Optax and Adam-mini."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from microadam_jax import (
    Partition,
    Storage,
    adam_mini8bit,
    fused_apply,
    memory_report,
    muon2bit,
    muon4bit,
    muon8bit,
    sinkhorn2bit,
    sinkhorn4bit,
    state_format,
)
from microadam_jax.codecs import dynamic4, dynamic8, int4, linear2
from microadam_jax.layout.names import transformer_rules
from microadam_jax.subspace import OUTPUT_HEAD, Matrices
from microadam_jax.transforms import scale_by_muon, scale_by_sinkhorn
from tests.oracles.low_bit import dynamic_map, scaled
from tests.oracles.matrix_momentum import MatrixMomentumOracle, muon, sinkhorn

pytestmark = pytest.mark.usefixtures("fewer_optimizations")
# A leaf, and how its matrices are found in it: axes of a batch first, then inputs, then outputs.
LEAVES = {
    "up/kernel": (12, 20),
    "down/kernel": (20, 12),
    "square": (16, 16),
    "query/kernel": (16, 2, 8),
    "layers/up/kernel": (3, 12, 20),
}


def rate(step: Any) -> Any:
    return 0.02 / (1 + 0.1 * step)


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {path: random.standard_normal(shape) for path, shape in shapes.items()}


def matrices_of(path: str, x: np.ndarray) -> list[np.ndarray]:
    return list(x) if path.startswith("layers") else [x.reshape(len(x), -1)]


def moved(tx: optax.GradientTransformation, start: Any, steps: int) -> dict[str, np.ndarray]:
    """The parameters after some steps, none of which is set equal to the oracle's."""
    params = nested({path: jnp.asarray(x, jnp.float32) for path, x in start.items()})
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for step in range(steps):
        grads = nested({k: jnp.asarray(g, jnp.float32) for k, g in drawn(LEAVES, step).items()})
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    ("factory", "direction"), [(muon8bit, muon), (sinkhorn4bit, sinkhorn)], ids=["muon", "sinkhorn"]
)
def test_every_matrix_follows_the_oracle(factory: Any, direction: Any, bits: int) -> None:
    start, steps = drawn(LEAVES, 99), 12
    levels = dynamic_map(8, signed=True)

    def store(mu: np.ndarray) -> np.ndarray:
        # Rows of at most 20 elements are blocks of their own, as those of the leaf are.
        return mu if bits == 32 else np.stack([scaled(levels, row) for row in mu])

    codec = "float32" if bits == 32 else Storage(dynamic8(32), min_size=0, min_row=1)
    found = moved(factory(rate, weight_decay=0.1, mu_codec=codec), start, steps)
    for path, x in start.items():
        oracles = [
            MatrixMomentumOracle(matrix, direction, rate, weight_decay=0.1, store=store)
            for matrix in matrices_of(path, x)
        ]
        for step in range(steps):
            for oracle, g in zip(
                oracles, matrices_of(path, drawn(LEAVES, step)[path]), strict=True
            ):
                oracle.step(g)
        expected = np.stack([oracle.theta for oracle in oracles]).reshape(x.shape)
        way = np.abs(expected - x).mean()
        # Near a middle a momentum takes the other level; heads are stored in rows of 8.
        coarse = 2e-2 if bits == 8 else 2e-4
        assert np.abs(found[path] - expected).mean() < coarse * way, path


def test_without_rounding_it_is_muon_of_optax() -> None:
    shapes = {"up/kernel": (12, 20), "down/kernel": (20, 12)}
    params = nested({k: jnp.asarray(x, jnp.float32) for k, x in drawn(shapes, 1).items()})
    ours, theirs = muon8bit(0.1, mu_codec="float32"), optax.contrib.muon(0.1, consistent_rms=0.2)
    state, other = ours.init(params), theirs.init(params)
    for step in range(3):
        grads = nested({k: jnp.asarray(x, jnp.float32) for k, x in drawn(shapes, step).items()})
        updates, state = ours.update(grads, state, params)
        expected, other = theirs.update(grads, other, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), updates, expected
        )


def test_what_is_no_matrix_moves_as_adam_mini_moves_it() -> None:
    params = {
        "wte": {"embedding": jnp.ones((64, 128))},
        "mlp": {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)},
        "lm_head": {"kernel": jnp.ones((64, 128))},
        "norm": {"scale": jnp.ones(64)},
    }
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size).reshape(p.shape)), params)
    found, expected = (
        jax.jit(tx.update)(grads, tx.init(params), params)[0]
        for tx in (muon8bit(0.1), adam_mini8bit(0.1))
    )
    kernel = found["mlp"].pop("kernel"), expected["mlp"].pop("kernel")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_the_root_mean_square_is_that_of_adamw() -> None:
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((64, 256)), jnp.float32)
    tx = scale_by_muon(consistent_rms=0.3)
    updates, _ = tx.update({"kernel": kernel}, tx.init({"kernel": kernel}))
    values = np.linalg.svd(updates["kernel"], compute_uv=False) / (0.3 * 16)
    assert 0.6 < values.min() < values.max() < 1.25
    assert 0.2 < np.sqrt(np.mean(np.square(updates["kernel"]))) < 0.4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(768, 1000), (1000, 1), (1, 7), (3, 50257)])
def test_rows_and_columns_have_one_size(shape: tuple[int, int], scale: float) -> None:
    random = np.random.default_rng(0)
    sizes = np.exp(random.standard_normal((shape[0], 1)) + random.standard_normal((1, shape[1])))
    gradient = jnp.asarray(scale * sizes * random.standard_normal(shape), jnp.float32)
    tx = scale_by_sinkhorn(eps=0.0)
    updates, _ = jax.jit(tx.update)({"kernel": gradient}, tx.init({"kernel": gradient}))
    kernel = updates["kernel"]
    for axis in (0, 1):
        size = np.sqrt(np.mean(np.square(kernel), axis))
        # Five rounds end with the columns.
        np.testing.assert_allclose(size, 0.2, rtol=1e-5 if axis == 0 else 0.2)
    np.testing.assert_array_equal(np.sign(kernel), np.sign(gradient))


def test_rows_and_columns_of_zeros_stay_zeros() -> None:
    gradient = jnp.ones((64, 128)).at[3].set(0).at[:, 5].set(0)
    tx = scale_by_sinkhorn()
    for g in (gradient, jnp.zeros((64, 128)), jnp.zeros((0, 128))):
        updates, _ = jax.jit(tx.update)({"kernel": g}, tx.init({"kernel": g}))
        assert np.isfinite(updates["kernel"]).all()
        np.testing.assert_array_equal(updates["kernel"] == 0, g == 0)


@pytest.mark.parametrize("factory", [muon8bit, muon4bit, sinkhorn4bit, sinkhorn2bit])
def test_layers_of_a_stack_go_one_after_another(factory: Any) -> None:
    """With the temporaries of one of them."""
    layers, shape = 32, (64, 256)
    params = {"layers": {"up": {"kernel": jax.ShapeDtypeStruct((layers, *shape), jnp.float32)}}}
    tx = factory(0.1)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    size = 4 * layers * shape[0] * shape[1]
    assert step.memory_analysis().temp_size_in_bytes < 1.9 * size


def test_a_step_that_applies_its_update() -> None:
    params = {"kernel": jnp.ones((16, 64)), "bias": jnp.ones(64)}
    grads = jax.tree.map(jnp.cos, params)
    tx = muon8bit(0.1, weight_decay=0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    new, after = fused_apply(tx)(grads, tx.init(params), params)
    jax.tree.map(np.testing.assert_allclose, new, optax.apply_updates(params, updates))
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
    ("few", "more", "beta", "codec"),
    [
        (sinkhorn2bit, sinkhorn4bit, 0.9, linear2),
        (muon2bit, muon8bit, 0.8, linear2),
        (muon4bit, muon8bit, 0.9, int4),
    ],
    ids=["sinkhorn2bit", "muon2bit", "muon4bit"],
)
def test_fewer_bits_are_another_codec_and_a_shorter_memory(
    few: Any, more: Any, beta: float, codec: Any
) -> None:
    params = {"kernel": jnp.ones((64, 256))}
    grads = jax.tree.map(jnp.cos, params)
    tx, other = few(0.1), more(0.1, beta=beta, mu_codec=codec(rounding="stochastic"))
    found = tx.update(grads, tx.init(params), params)
    expected = other.update(grads, other.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_four_bits_leave_dead_columns_alone() -> None:
    params = {"kernel": jnp.ones((64, 256))}
    grads = {"kernel": jax.random.normal(jax.random.key(0), (64, 256)).at[:, ::3].set(0)}
    tx = muon4bit(0.1)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
    assert not updates["kernel"][:, ::3].any()
    assert updates["kernel"][:, 1::3].all()


def test_noise_of_four_bits_turns_an_update_less_on_even_and_cut_steps() -> None:
    shape = (96, 160)

    def turned(codec: Any) -> jax.Array:
        tx = scale_by_muon(mu_codec=codec)
        state, update = tx.init({"kernel": jnp.zeros(shape)}), jax.jit(tx.update)
        signal, *keys = jax.random.split(jax.random.key(1), 30)
        for key in keys:
            g = jax.random.normal(signal, shape) + 3 * jax.random.t(key, 3, shape)
            updates, state = update({"kernel": g}, state)
        return updates["kernel"] / jnp.linalg.norm(updates["kernel"])

    def share_of_noise(codec: Any) -> float:
        return 1 - float(jnp.vdot(turned(codec), exact)) ** 2

    exact = turned("float32")
    even = share_of_noise(int4(rounding="stochastic"))
    assert even < 0.9 * share_of_noise(int4(rounding="stochastic", deviations=None))
    assert even < 0.8 * share_of_noise(dynamic4(rounding="stochastic"))


def test_a_state_of_other_matrices_is_refused() -> None:
    params = {"up": {"kernel": jnp.ones((16, 64))}}
    tx, other = muon8bit(0.1), muon8bit(0.1, matrices=Matrices(exclude="up/kernel"))
    with pytest.raises(ValueError, match=r"'up/kernel' holds a second moment of shape \(1, 1\)"):
        other.update(params, tx.init(params), params)
    assert state_format(tx, params) != state_format(other, params)


def test_a_momentum_needs_negative_numbers() -> None:
    with pytest.raises(ValueError, match="has both signs"):
        muon8bit(0.1, mu_codec="dynamic8_unsigned")


def test_vectors_that_no_rule_names_are_listed() -> None:
    params = {"temperatures": jax.ShapeDtypeStruct((9000,), jnp.float32)}
    assert memory_report(muon8bit(0.1), params).remarks


def test_gradients_of_any_magnitude_have_a_direction() -> None:
    g = {"kernel": jax.random.normal(jax.random.key(0), (64, 128))}
    for tx, largest in ((muon4bit(1.0), 2.0**50), (sinkhorn4bit(1.0), 2.0**100)):
        params = jax.tree.map(jnp.zeros_like, g)
        expected, _ = tx.update(g, tx.init(params), params)
        for size in (2.0**-10, largest):
            huge = jax.tree.map(lambda x, size=size: x * size, g)
            updates, _ = tx.update(huge, tx.init(params), params)
            np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=2e-3, atol=1e-5)


def test_the_rule_that_a_warning_advises_is_one_to_copy() -> None:
    params = {"head": {"weight": jnp.zeros((1000, 64))}}
    with pytest.warns(UserWarning, match="no rule of the partition") as warned:
        muon4bit(1e-3).init(params)
    found = re.search(r"Give (matrices=.*), transformer_rules\(weight", str(warned[0].message))
    assert found is not None
    names = {
        "Matrices": Matrices,
        "OUTPUT_HEAD": OUTPUT_HEAD,
        "Partition": Partition,
        "transformer_rules": transformer_rules,
    }
    given = eval(f"dict({found[1]})", names)
    state = muon4bit(1e-3, **given).init(params)
    assert state[0].nu["head"]["weight"].shape == (1000, 1)
