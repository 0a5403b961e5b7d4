"""Parameters in bfloat16 against float64 NumPy, against float32, and what is promised of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import microadam_jax as m
from microadam_jax.codecs import dynamic8
from microadam_jax.codecs.rounding import bfloat16_stochastic, dither
from microadam_jax.codecs.split import Split
from microadam_jax.engine.stored_step import typed_key
from microadam_jax.methods import METHODS
from microadam_jax.transforms.round_updates import round_updates
from microadam_jax.trees import leaf_keys
from tests.contracts.meshes import collectives, mesh_of, place
from tests.oracles.rounding import CompensatedOracle, MomentumOracle, StochasticOracle, stochastic

ROUNDINGS = ("stochastic", "compensated", "momentum")
SHAPES = {"matrix": (3, 1000), "odd": (5, 37), "scalar": (), "empty": (0, 4), "layers": (2, 4, 96)}


def params_of(seed: int = 0, scale: float = 1.0) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * random.standard_normal(shape), jnp.bfloat16)
        for name, shape in SHAPES.items()
    }


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def numbers(count: int, seed: int, exponents: tuple[int, int]) -> np.ndarray:
    """float32 of all bits in a range of exponents."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2**32, count, np.uint64)
    exponent = random.integers(*exponents, count).astype(np.uint64)
    return ((bits & 0x807FFFFF) | (exponent << 23)).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("exponents", [(12, 254), (110, 140), (12, 20)], ids=str)
def test_apply_updates_lands_on_the_bfloat16_that_was_meant(
    rounding: Any, exponents: tuple[int, int]
) -> None:
    """Of any size of parameter and update down to 1e-35: differences must be normal numbers."""
    count = 100_000
    p = jnp.asarray(numbers(count, 0, exponents)).astype(jnp.bfloat16)
    d = jnp.asarray(numbers(count, 1, exponents))
    p = jnp.where(jnp.isfinite(p), p, 1)
    tx = round_updates(optax.scale(1.0), rounding, error="int16")
    # The gradient is the update, and must not be rounded on its way: it is float32 here.
    state = tx.init(p)
    updates, state = jax.jit(tx.update)(d, state, p)
    landed = np.asarray(optax.apply_updates(p, updates)).astype(np.float32)
    new = np.asarray(p.astype(jnp.float32) + d)
    if rounding == "stochastic":
        key = typed_key(leaf_keys(0, jnp.int32(0), p)[()])
        meant = np.asarray(bfloat16_stochastic(jnp.asarray(new), key)).astype(np.float32)
    else:
        meant = np.asarray(Split(16).split(jnp.asarray(new), None)[0]).astype(np.float32)
    np.testing.assert_array_equal(landed, meant)
    within = np.isfinite(new) & (np.abs(new) < 3e38)
    x = new[within].astype(np.float64)
    below, above = stochastic(x, np.zeros(x.shape)), stochastic(x, np.full(x.shape, 1 - 2**-24))
    assert np.isin(landed[within], np.concatenate([below, above])).all()
    assert (np.abs(landed[within] - x) <= np.abs(above - below)).all()


def test_stochastic_rounding_has_no_bias() -> None:
    x = jnp.broadcast_to(jnp.asarray([1.001, -1.0066, 3.1e-5, 7e4, 0.5])[:, None], (5, 200_000))
    rounded = np.asarray(bfloat16_stochastic(x, jax.random.key(3)), np.float64)
    step = np.ptp(rounded, axis=1)
    error = (rounded.mean(axis=1) - np.asarray(x[:, 0], np.float64)) / np.maximum(step, 1e-30)
    assert (np.abs(error) < 4 * 0.5 / np.sqrt(x.shape[1])).all()
    assert step[4] == 0


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38])
def test_what_is_not_finite_stays_so(special: float) -> None:
    x = jnp.full(64, special, jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) | jnp.uint32(0xFFFF)
    loud = jax.lax.bitcast_convert_type(bits, jnp.float32)  # a NaN with all of its low bits
    key = jax.random.key(0)
    for value in (x, loud) if np.isnan(special) else (x,):
        for rounded in (bfloat16_stochastic(value, key), Split(8).split(value, key)[0]):
            if abs(special) == 3.4e38:
                assert set(np.unique(np.asarray(rounded, np.float32))) <= {
                    np.float32(3.3895314e38),
                    np.inf,
                }
            else:
                np.testing.assert_array_equal(np.asarray(rounded, np.float32), np.float32(special))


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_an_infinite_parameter_that_does_not_move_stays(rounding: Any) -> None:
    tx, params = round_updates(optax.sgd(0.1), rounding), jnp.array([-jnp.inf, 1.0], jnp.bfloat16)
    updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), params)


def test_16_bits_restore_every_float32_and_8_bits_are_24_bit_floats() -> None:
    x = jnp.asarray(numbers(300_000, 2, (0, 254)))
    near, codes = Split(16).split(x, None)
    np.testing.assert_array_equal(Split(16).join(near, codes), x)
    key = jax.random.key(1)
    near, codes = Split(8).split(x, key)
    draws = np.floor(np.asarray(dither(key, x.shape), np.float64) * 256) / 256
    normal = np.abs(np.asarray(x)) > 1e-37
    expected = stochastic(np.asarray(x, np.float64), draws, 16)
    restored = np.asarray(Split(8).join(near, codes), np.float64)
    np.testing.assert_array_equal(restored[normal], expected[normal])
    error = np.abs(restored - np.asarray(x, np.float64))[normal] / np.abs(x)[normal]
    assert error.max() < 2**-15  # FlashOptim's, to nearest: 1.54e-5, half of it


def test_a_parameter_that_was_set_to_zero_takes_nothing_odd_from_its_code() -> None:
    x = jnp.asarray([1.003, -1.003, 0.9979])
    _, codes = Split(16).split(x, None)
    for pruned in (0.0, -0.0):
        whole = Split(16).join(jnp.full(3, pruned, jnp.bfloat16), codes)
        assert np.isfinite(whole).all()
        assert np.abs(whole).max() < 1e-38


@pytest.mark.parametrize("rounding", ["stochastic", "int8", "int16", "float32"])
def test_against_the_oracle(rounding: str) -> None:
    compensated = rounding != "stochastic"
    how: Any = "compensated" if compensated else "stochastic"
    error = rounding if compensated else "int8"
    tx = round_updates(optax.identity(), how, seed=5, error=error)
    params = params_of()
    state, update = tx.init(params), jax.jit(tx.update)
    digits = {"int8": 16}.get(rounding, 24)
    oracles = {
        name: CompensatedOracle(p, digits, even=rounding == "float32")
        if compensated
        else StochasticOracle(p)
        for name, p in in_float64(params).items()
    }
    for step in range(30):
        given = wide(params_of(step + 1, 0.01))
        keys = {
            path[0].key: typed_key(k) for path, k in leaf_keys(5, jnp.int32(step), params).items()
        }
        updates, state = update(given, state, params)
        params = optax.apply_updates(params, updates)
        for name, oracle in oracles.items():
            draws = np.asarray(dither(keys[name], SHAPES[name]), np.float64)
            cut = 2**8 if digits == 16 else 2**16
            u = np.asarray(given[name], np.float64)
            expected = oracle.apply(u, np.floor(draws * cut) / cut)
            np.testing.assert_array_equal(np.asarray(params[name], np.float64), expected)


def test_the_momentum_takes_up_the_error_as_eco_says() -> None:
    """The factor is found by differentiation; the oracle has it from the paper."""
    settings = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    tx = round_updates(optax.adamw(3e-3, **settings), "momentum", seed=2)
    params = params_of()
    state, update = tx.init(params), jax.jit(tx.update)
    oracles = {name: MomentumOracle(p, 3e-3, **settings) for name, p in in_float64(params).items()}
    for step in range(40):
        gradients = params_of(step + 1)
        keys = {
            path[0].key: typed_key(k) for path, k in leaf_keys(2, jnp.int32(step), params).items()
        }
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        mu = optax.tree_utils.tree_get(state, "mu")
        for name, oracle in oracles.items():
            draws = np.asarray(dither(keys[name], SHAPES[name]), np.float64)
            oracle.step(np.asarray(gradients[name], np.float64), np.floor(draws * 2**16) / 2**16)
            p = np.asarray(params[name], np.float64)
            # A draw next to the part cut off may fall to the other side in float32.
            same = p == oracle.parameter
            assert (~same).sum() <= 0.002 * same.size
            np.testing.assert_allclose(
                np.asarray(mu[name])[same], oracle.m[same], rtol=2e-3, atol=2e-3
            )
            oracle.parameter, oracle.m = p, np.asarray(mu[name], np.float64)


@pytest.mark.parametrize("error", ["int16", "float32"])
def test_a_whole_float32_learns_bit_for_bit_as_float32_does(error: str) -> None:
    """With the same gradients; decay is that of the parameter with its error."""
    inner = optax.adamw(1e-3, weight_decay=0.1)
    tx = round_updates(inner, "compensated", error=error)
    params = {name: p for name, p in params_of().items() if name in ("odd", "layers")}
    masters = wide(params)
    state, master_state = tx.init(params), inner.init(masters)
    for step in range(5):
        # One operation after another: compiled, sums and products may be rounded together.
        gradients = {name: params_of(step + 1)[name] for name in params}
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        moved, master_state = inner.update(wide(gradients), master_state, masters)
        masters = optax.apply_updates(masters, moved)
    for name, p in params.items():
        kept = state.error[error]["codes"][name]
        split = Split(16).join(p, Split(16).Encoded(kept))
        np.testing.assert_array_equal(
            split if error == "int16" else p.astype(jnp.float32) + kept, masters[name]
        )
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, master_state)


@pytest.mark.parametrize(
    ("rounding", "error"),
    [
        ("stochastic", "int8"),
        ("momentum", "int8"),
        ("compensated", "int8"),
        ("compensated", "int16"),
    ],
)
def test_weights_decay_as_they_should(rounding: Any, error: str) -> None:
    """Each step takes a millionth, of which bfloat16 holds 1/256 and 24 bits 1/32768."""
    tx = round_updates(optax.adamw(1e-4, weight_decay=0.01), rounding, error=error)
    params = params_of(3)["matrix"]

    def step(_: Any, carry: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jnp.zeros_like(params), state, params)
        return optax.apply_updates(params, updates), state

    after, _ = jax.jit(lambda c: jax.lax.fori_loop(0, 10_000, step, c))((params, tx.init(params)))
    before, after = np.asarray(params, np.float64), np.asarray(after, np.float64)
    # The projection on the weights: noise is 1.6 units in the last place of each of 3000.
    shrunk = np.sum(after * before) / np.sum(before**2)
    assert abs(np.log(shrunk) + 0.01) < 1e-3
    plain = optax.adamw(1e-4, weight_decay=0.01)
    updates, _ = plain.update(jnp.zeros_like(params), plain.init(params), params)
    assert (optax.apply_updates(params, updates) == params).all()  # as it is without


def noisy_quadratic(tx: optax.GradientTransformation, dtype: Any, steps: int) -> float:
    """The mean squared distance from the optimum after steps with noisy gradients."""
    target = 0.5 * jax.random.normal(jax.random.key(9), (1024,))

    def step(t: jax.Array, carry: Any) -> Any:
        params, state = carry
        noise = 0.5 * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), target.shape)
        gradient = (params.astype(jnp.float32) - target + noise).astype(dtype)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    zeros = jnp.zeros(target.shape, dtype)
    run = jax.jit(lambda c: jax.lax.fori_loop(0, steps, step, c))
    params, _ = run((zeros, tx.init(zeros)))
    return float(jnp.mean((params.astype(jnp.float32) - target) ** 2))


def test_a_noisy_quadratic_as_float32_solves_it() -> None:
    steps = 1000
    adam = optax.adam(optax.linear_schedule(6e-3, 6e-5, steps))
    full = noisy_quadratic(adam, jnp.float32, steps)
    nearest = noisy_quadratic(adam, jnp.bfloat16, steps)
    found = {
        name: noisy_quadratic(round_updates(adam, name), jnp.bfloat16, steps) for name in ROUNDINGS
    }
    # Measured: float32 0.000413, to nearest 0.0060, stochastic 0.000505, the others 0.000413 and
    # 0.000414. In 2000 steps of half the rate: 0.000235, 0.0323, 0.000332, 0.000236, 0.000236.
    assert nearest > 10 * full
    assert found["stochastic"] < 1.4 * full
    assert found["compensated"] < 1.02 * full
    assert found["momentum"] < 1.02 * full


SAMPLE = ("microadam", "adam_mini4bit", "adamw8bit", "came")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.matrix) for n in METHODS]
)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_behind_every_optimizer_of_the_library(name: str, rounding: Any) -> None:
    """The first step is that of float32 parameters, rounded; the state is theirs, too."""
    inner = METHODS[name].factory(1e-3)
    tx, params = round_updates(inner, rounding), params_of()
    state = jax.jit(tx.init)(params)
    gradients = params_of(1)
    updates, new = jax.jit(tx.update)(gradients, state, params)
    moved, expected = jax.jit(inner.update)(
        wide(gradients), jax.jit(inner.init)(wide(params)), wide(params)
    )
    same = jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, new, state)
    assert jax.tree.all(same)
    assert jax.tree.structure(new.inner_state) == jax.tree.structure(expected)
    for leaf, p, u in zip(*map(jax.tree.leaves, (updates, params, moved)), strict=True):
        u, p = np.asarray(u), np.asarray(p, np.float32)
        step = 2.0**-7 * np.maximum(np.abs(p), np.abs(p + u))
        assert (np.abs(np.asarray(leaf) - u) <= step + 2e-6).all()


@pytest.mark.parametrize("name", ["sgd", "adam", "lion", "adafactor", "muon"])
def test_behind_optimizers_of_optax(name: str) -> None:
    inner = (optax.contrib.muon if name == "muon" else getattr(optax, name))(1e-3)
    tx, params = round_updates(inner), params_of()
    del params["empty"]  # which Muon divides by the size of
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_parameters_of_other_dtypes() -> None:
    params = {"w": jnp.ones((4, 64), jnp.bfloat16), "norm": jnp.ones(64), "none": None}
    for rounding in ROUNDINGS:
        inner = optax.adamw(1e-3)
        tx = round_updates(inner, rounding)
        updates, state = tx.update(params, tx.init(params), params)
        alone, _ = inner.update(wide(params), inner.init(wide(params)), wide(params))
        np.testing.assert_array_equal(updates["norm"], alone["norm"])
        assert updates["norm"].dtype == jnp.float32
        again, _ = tx.update(params, state, params)
        assert jax.tree.structure(again) == jax.tree.structure(params)
    with pytest.raises(TypeError, match="'w' is in float16"):
        tx.init({"w": jnp.ones(3, jnp.float16)})


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (optax.sgd(0.1), "none in float32 for 'w'"),
        (m.adam_mini4bit(1e-3), "A moment in few bits"),
        (m.microadam(1e-3), "none in float32 for 'w'"),
        (optax.adam(1e-3, mu_dtype=jnp.bfloat16), "none in float32"),
        (optax.chain(optax.scale_by_adam(), optax.adam(1e-3)), "2 of them"),
        (optax.lion(1e-3), "no derivative by its first moment"),
        (optax.contrib.muon(1e-3), "mixes elements"),
    ],
)
def test_momenta_that_cannot_take_up_an_error(inner: Any, message: str) -> None:
    params = {"w": jnp.ones((16, 512), jnp.bfloat16)}
    with pytest.raises(ValueError, match=message):
        round_updates(inner, "momentum").init(params)


@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd(1e-2, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        m.adam_mini(1e-3),
        m.adam_sn(1e-2),
        optax.nadam(1e-3),
        optax.masked(optax.adam(1e-3), {"w": True, "v": True}),
    ],
    ids=["sgd", "adamw", "adam_mini", "adam_sn", "nadam", "masked"],
)
def test_an_error_in_the_momentum_comes_back_in_the_next_updates(inner: Any) -> None:
    """Of what rounding took, steps without gradient return all, whatever the optimizer."""
    params = {"w": jnp.full((8, 128), 1.0, jnp.bfloat16), "v": jnp.full(64, 0.3, jnp.bfloat16)}
    tx = round_updates(inner, "momentum")
    state, update = tx.init(params), jax.jit(tx.update)
    exact = wide(params)
    exact_state = inner.init(exact)
    for step in range(40):
        noise = np.random.default_rng(step).standard_normal(128)
        gradients = jax.tree.map(
            lambda p, noise=noise: jnp.broadcast_to(
                1 + 0.1 * noise[-p.shape[-1] :], p.shape
            ).astype(jnp.bfloat16),
            params,
        )
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        moved, exact_state = inner.update(wide(gradients), exact_state, exact)
        exact = optax.apply_updates(exact, moved)
    for name, p in params.items():
        gap = np.asarray(p, np.float64).mean() - np.asarray(exact[name], np.float64).mean()
        way = abs(np.asarray(exact[name]).mean() - (1.0 if name == "w" else 0.3))
        assert abs(gap) < 0.02 * way


def test_mistakes_are_told() -> None:
    params = jnp.ones(8, jnp.bfloat16)
    with pytest.raises(ValueError, match="'stochastic', 'compensated', 'momentum'; got 'nearest'"):
        round_updates(optax.sgd(1.0), "nearest")  # pyrefly: ignore
    with pytest.raises(ValueError, match="rounded to nearest, which loses small errors"):
        round_updates(optax.sgd(1.0), "compensated", error=dynamic8(symmetric=True))
    with pytest.raises(ValueError, match="dynamic8_b256 has no -1"):
        round_updates(optax.sgd(1.0), "compensated", error="dynamic8")
    with pytest.raises(ValueError, match=r"Unknown codec 'int2'.*int8 and int16"):
        round_updates(optax.sgd(1.0), "compensated", error="int2")
    with pytest.raises(ValueError, match="8 or 16; got 4"):
        Split(4)
    tx = round_updates(optax.sgd(1.0), "compensated")
    with pytest.raises(ValueError, match=r"tx\.update\(updates, state, params\)"):
        tx.update(params, tx.init(params))
    other = round_updates(optax.sgd(1.0), "compensated", error="int16")
    with pytest.raises(ValueError, match="in int16, and this optimizer in int8"):
        tx.update(params, other.init(params), params)


def test_the_memory_report_says_what_is_kept() -> None:
    params = {
        "w": jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16),
        "norm": jax.ShapeDtypeStruct((1024,), jnp.float32),
    }
    inner = m.adam_mini4bit(1e-3)
    alone = m.memory_report(inner, params).total
    reports = {
        name: m.memory_report(round_updates(inner, "compensated", error=name), params)
        for name in ("int8", "int16", "float32", "linear4")
    }
    kept = {name: report.total - alone - 4 for name, report in reports.items()}
    size = 256 * 1024
    assert kept == {
        "int8": size + 1, "int16": 2 * size + 1, "float32": 4 * size + 1,
        "linear4": size // 2 + 2048 * 4 + 2,
    }  # fmt: skip
    assert reports["int8"].fields["RoundUpdatesState.error.int8.codes"] == size + 1
    assert reports["int8"].remarks["in float32: updates are not rounded"] == ("norm",)
    assert m.memory_report(round_updates(inner), params).total == alone + 4


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_the_same_bits_on_any_mesh(rounding: Any) -> None:
    params = {"w": params_of()["matrix"][:2, :512].reshape(8, 128)}
    tx = round_updates(optax.adamw(1e-2), rounding)

    def run(params: Any) -> Any:
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        for step in range(3):
            g = jnp.asarray(np.random.default_rng(step).standard_normal((8, 128)), jnp.bfloat16)
            g = {"w": jax.device_put(g, params["w"].sharding)}
            updates, state = update(g, state, params)
            params = jax.jit(optax.apply_updates)(params, updates)
        return params, state

    alone = run(params)
    for mode in ("auto", "explicit"):
        mesh = mesh_of(mode)
        with jax.set_mesh(mesh):
            placed = place(params, {"w": P("fsdp", "tp")}, mesh)
            sharded = run(placed)
            jax.tree.map(np.testing.assert_array_equal, sharded, alone)
            compiled = jax.jit(tx.update).lower(placed, sharded[1], placed).compile()
        assert collectives(compiled.as_text()) == []


def test_diagnostics_tell_the_share_of_lost_updates() -> None:
    params = {"large": jnp.ones(128, jnp.bfloat16), "small": jnp.full(64, 1e-4, jnp.bfloat16)}
    grads = jax.tree.map(jnp.ones_like, params)
    for inner in (optax.adam(1e-3), round_updates(optax.adam(1e-3))):
        tx = m.with_diagnostics(inner, {"large": "large"})
        _, state = tx.update(grads, tx.init(params), params)
        share = optax.tree_utils.tree_get(state, "lost_share")
        assert share == {"large": 1.0, "other": 0.0}
    tx = m.with_diagnostics(optax.adam(1e-3))
    _, state = tx.update(grads, tx.init(params))
    assert np.isnan(state.lost_share["other"])
    zero = jax.tree.map(jnp.zeros_like, params)
    assert tx.update(zero, tx.init(params), params)[1].lost_share == {"other": 0.0}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_wrappers_scans_and_donation(rounding: Any) -> None:
    params = {"a": jnp.ones((4, 64), jnp.bfloat16), "b": jnp.ones(8, jnp.bfloat16), "c": None}
    tx = round_updates(optax.adam(1e-2), rounding)

    def run(tx: Any, steps: int = 4) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        scan = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps)[0], donate_argnums=0)
        return scan(jax.tree.map(jnp.copy, (params, tx.init(params))))[0]

    alone = run(tx)
    masked = run(optax.masked(tx, {"a": True, "b": False, "c": True}))
    np.testing.assert_array_equal(masked["a"], alone["a"])
    parts = {"x": tx, "y": optax.set_to_zero()}
    partitioned = run(optax.partition(parts, {"a": "x", "b": "y", "c": "y"}))
    np.testing.assert_array_equal(partitioned["a"], alone["a"])
    np.testing.assert_array_equal(partitioned["b"], params["b"])
    several = run(optax.MultiSteps(tx, 2), 8)
    np.testing.assert_array_equal(several["a"], alone["a"])
    injected = optax.inject_hyperparams(
        lambda learning_rate: round_updates(optax.adam(learning_rate), rounding),
        hyperparam_dtype=jnp.float32,
    )
    np.testing.assert_array_equal(run(injected(learning_rate=1e-2))["a"], alone["a"])
    nothing: dict[str, Any] = {"a": None}
    assert tx.update(nothing, tx.init(nothing), nothing)[0] == nothing


def test_in_boxes_of_flax() -> None:
    values = jnp.ones((16, 256), jnp.bfloat16)
    for box in (lambda x: nn.LogicallyPartitioned(x, ("embed", "mlp")), lambda x: nnx.Param(x)):
        for rounding in ("stochastic", "compensated"):
            tx = round_updates(m.adam_mini4bit(1e-3), rounding)
            params = {"kernel": box(values)}
            updates, state = tx.update(params, tx.init(params), params)
            _, new = tx.update(params, state, params)
            assert jax.tree.structure(new) == jax.tree.structure(state)
            landed = optax.apply_updates(params, updates)
            assert jax.tree.leaves(landed)[0].dtype == jnp.bfloat16
            assert jax.tree.structure(landed) == jax.tree.structure(params)


@pytest.mark.parametrize("error", ["linear4", "e4m3"])
def test_codecs_by_name_lose_no_small_errors(error: str) -> None:
    tx = round_updates(optax.sgd(1e-5), "compensated", error=error)
    start = jnp.ones(4096, jnp.bfloat16)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jnp.ones_like(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=1000)
    assert float(params.astype(jnp.float32).mean()) == pytest.approx(0.99, abs=2e-3)
