import functools
import gc
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest

from microadam_jax import (
    Blocks,
    Storage,
    adam_mini,
    adam_mini4bit,
    adam_mini8bit,
    adamw4bit_factored,
    adamw8bit,
    came,
    error_feedback,
    lion4bit,
    memory_report,
    microadam,
    quantize_state,
    scale_by_adam_mini,
    scale_by_window_adam,
)
from microadam_jax.codecs import affine4, dynamic4, dynamic8, linear4
from microadam_jax.engine import leaf_loops
from microadam_jax.methods import METHODS
from tests.llama_100m import llama_100m
from tests.oracles import low_bit as oracle

ROW = Blocks(64, shards=1)
LOW_BIT = {name: m.factory for name, m in METHODS.items() if m.kind == "low bits"}
ELEMENTWISE = {
    name: make for name, make in LOW_BIT.items() if "matrices" not in METHODS[name].parameters
}
LARGE = {"mlp": {"kernel": (96, 1024)}, "bias": (64,), "stack": (3, 32, 512)}


def tree(shapes=LARGE, seed: int | None = None):
    random = np.random.default_rng(seed)

    def leaf(shape):
        return jnp.asarray(
            np.zeros(shape) if seed is None else random.standard_normal(shape), jnp.float32
        )

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def run(tx, params, steps: int = 4):
    state, update, updates = tx.init(params), jax.jit(tx.update), None
    for step in range(steps):
        updates, state = update(tree(seed=step), state, params)
    return updates, state


def equal(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    ("inner", "codecs"),
    [
        (optax.adamw(1e-3), {"mu": "dynamic8", "nu": "dynamic8_unsigned"}),
        (optax.lion(1e-3), {"mu": "dynamic8"}),
        (optax.sgd(1e-3, momentum=0.9), {"trace": "dynamic8"}),
        (adam_mini(1e-3), {"mu": "dynamic8"}),
        (came(1e-3), {"mu": "dynamic8"}),
        (optax.contrib.muon(1e-3), {"mu": "dynamic8"}),
    ],
    ids=["adamw", "lion", "sgd", "adam_mini", "came", "muon"],
)
def test_any_transformation(inner, codecs) -> None:
    params = tree()
    exact, _ = run(inner, params)
    stored, state = run(quantize_state(inner, codecs), params)
    for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(exact), strict=True):
        one, other = np.asarray(one).ravel(), np.asarray(other).ravel()
        assert one @ other > 0.95 * np.linalg.norm(one) * np.linalg.norm(other)
    assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(state))


def test_float32_is_the_transformation_itself() -> None:
    inner, params = optax.adamw(1e-3), tree()
    stored, _ = run(quantize_state(inner, {"mu": "float32", "nu": "float32"}), params)
    equal(stored, run(inner, params)[0])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_leaf_by_leaf_is_at_once(rounding: str) -> None:
    codecs = {"mu": dynamic4(rounding=rounding), "nu": "e4m3_expanded"}
    inner, params = optax.scale_by_adam(), tree()
    one, one_state = run(quantize_state(inner, codecs, elementwise=True), params)
    other, other_state = run(quantize_state(inner, codecs), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)
    equal(
        jax.tree.map(lambda x: x.astype(jnp.float32), one_state.inner_state.mu),
        jax.tree.map(lambda x: x.astype(jnp.float32), other_state.inner_state.mu),
    )


@pytest.mark.parametrize("make", LOW_BIT.values(), ids=LOW_BIT)
def test_chunks_change_nothing(make, monkeypatch: pytest.MonkeyPatch) -> None:
    params = tree()
    whole, whole_state = run(make(1e-3), params)
    monkeypatch.setattr(leaf_loops, "CACHED", 2**12)
    cut, cut_state = run(make(1e-3), params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
    jax.tree.map(close, cut, whole)
    for one, other in zip(jax.tree.leaves(cut_state), jax.tree.leaves(whole_state), strict=True):
        # Another loop may be contracted otherwise, which moves a code by a level.
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert (~np.isclose(one, other, rtol=1e-5)).sum() <= 0.001 * one.size


@pytest.mark.parametrize(
    "tx",
    [
        microadam(1e-3),
        microadam(1e-3, layout="paper"),
        optax.chain(
            error_feedback(residual=affine4(rounding="stochastic")), scale_by_window_adam()
        ),
    ],
    ids=["one operation", "other buckets", "stochastic"],
)
def test_chunks_change_no_bit_of_error_feedback(tx, monkeypatch: pytest.MonkeyPatch) -> None:
    params = tree()
    whole = run(tx, params)
    monkeypatch.setattr(leaf_loops, "CACHED", 2**12)
    jax.clear_caches()
    lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
    assert "stablehlo.while" in lowered.as_text()
    equal(run(tx, params), whole)
    jax.clear_caches()


def test_chunks_of_a_stochastic_codec_draw_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaf_loops, "CACHED", 2**12)
    tx, params = lion4bit(1e-3), {"w": jnp.zeros((64, 512))}
    # Between two levels, in all rows alike.
    _, state = tx.update({"w": jnp.ones((64, 512)).at[:, 1:].set(0.5)}, tx.init(params), params)
    (stored,) = optax.tree_utils.tree_get(state, "mu").values()
    codes = np.asarray(stored["codes"]["w"])
    assert len(np.unique(codes.reshape(64, -1), axis=0)) == 64


def after_steps(
    tx: optax.GradientTransformation, start: np.ndarray, grads: list[np.ndarray]
) -> jax.Array:
    """Takes a step for each gradient, and returns the parameters."""
    params = jnp.asarray(start, jnp.float32)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adamw_against_the_oracle_over_many_steps() -> None:
    """The parameters are never set equal again."""
    maps = oracle.dynamic_map(8, True), oracle.dynamic_map(8, False)
    store = [lambda x, m=m: np.stack([oracle.scaled(m, row) for row in x]) for m in maps]
    random = np.random.default_rng(0)
    grads = [0.01 * random.standard_normal((4, 64)) for _ in range(100)]
    start = random.standard_normal((4, 64))
    expected = oracle.adamw(grads, start, 1e-2, 0.1, *store)
    everything = {
        "mu_codec": Storage(dynamic8(ROW), min_size=0),
        "nu_codec": Storage(dynamic8(ROW, signed=False), min_size=0),
    }
    tx = adamw8bit(1e-2, weight_decay=0.1, **everything)
    params = after_steps(tx, start, grads)
    # A number within a rounding of a middle takes the other code, and moves a little.
    assert np.abs(params - expected).mean() < 1e-3 * np.abs(expected - start).mean()


def test_a_row_seen_once_stays_where_adamw_leaves_it() -> None:
    """Zero second moments far below their block's largest would make steps of m / eps."""
    params = {"embedding": jnp.zeros((64, 256))}
    seen = jnp.zeros((64, 256)).at[3].set(1.0).at[3, 0].set(3e-4)
    moved = {}
    for name, tx in (("adamw", optax.adamw(1e-3)), ("adamw8bit", adamw8bit(1e-3))):
        state, update = tx.init(params), jax.jit(tx.update)
        moved[name] = jnp.zeros((64, 256))
        for step in range(20):
            gradients = {"embedding": seen if step == 0 else 0 * seen}
            updates, state = update(gradients, state, params)
            moved[name] += updates["embedding"]
    assert float(jnp.abs(moved["adamw8bit"]).max()) <= 1.05 * float(jnp.abs(moved["adamw"]).max())


def test_small_elements_of_a_block_move_no_faster_than_with_adamw() -> None:
    gradients = {"kernel": jnp.full((64, 256), 4e-4).at[:, 0].set(1.0)}
    tx = adamw8bit(1e-3, weight_decay=0.0)
    params = jax.tree.map(jnp.zeros_like, gradients)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(200):
        updates, state = update(gradients, state, params)
    assert float(jnp.abs(updates["kernel"]).max()) <= 1.05e-3


@pytest.mark.parametrize(
    "name", ["adamw4bit", "adamw4bit_factored", "adam_mini8bit", "adam_mini4bit"]
)
def test_a_unit_without_any_more_gradient_stands_still(name: str) -> None:
    """A moment that is rounded to nearest would stay, while the second one vanishes."""
    params = {"mlp": {"up_proj": {"kernel": jnp.zeros((16, 256))}}}
    steps = 2500

    def moved(tx: optax.GradientTransformation) -> float:
        def step(carry: Any, t: jax.Array) -> tuple[Any, None]:
            g = jax.random.normal(jax.random.fold_in(jax.random.key(0), t % 50), (16, 256))
            g = g.at[:, 5].multiply(jnp.where(t < 100, 1.0, 0.0))
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda _: g, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps))[0][0])
        return float(jnp.abs(jax.tree.leaves(run((params, tx.init(params))))[0][:, 5]).max())

    own = METHODS[name].factory(1e-3, weight_decay=0.0)
    assert moved(own) < 1.3 * moved(optax.adamw(1e-3, weight_decay=0.0))


def test_lion_against_the_oracle_over_many_steps() -> None:
    """Rounded to nearest, as random numbers are the library's own."""
    levels = oracle.dynamic_map(4, True)
    random = np.random.default_rng(0)
    grads = [0.5 + random.standard_normal((4, 64)) for _ in range(100)]
    start = random.standard_normal((4, 64))
    expected = oracle.lion(
        grads, start, 1e-2, 0.1, lambda x: np.stack([oracle.scaled(levels, row) for row in x])
    )
    codec = Storage(dynamic4(ROW), min_size=0)
    tx = lion4bit(1e-2, weight_decay=0.1, mu_codec=codec)
    params = after_steps(tx, start, grads)
    assert np.abs(params - expected).mean() < 1e-3 * np.abs(expected - start).mean()


@pytest.mark.parametrize(("rounding", "turned"), [("nearest", 0.0), ("stochastic", 0.9)])
def test_lion_in_four_bits_needs_stochastic_rounding(rounding: str, turned: float) -> None:
    """A hundredth of a small gradient is less than half a step between two levels."""
    params, tx = jnp.zeros((64, 512)), lion4bit(1.0, mu_codec=dynamic4(64, rounding=rounding))
    state, update = tx.init(params), jax.jit(tx.update)
    leader = jnp.arange(512) % 64 == 0  # holds the scale of its block
    for small, steps in ((0.05, 100), (-0.05, 400)):
        g = jnp.broadcast_to(jnp.where(leader, 1, small), (64, 512))
        for _ in range(steps):
            _, state = update(g, state, params)
    signs, _ = update(jnp.zeros((64, 512)), state, params)
    share = np.mean(np.asarray(signs)[:, ~leader] > 0)  # against a negative momentum
    assert share >= turned if turned else share == 0


@pytest.mark.parametrize("make", LOW_BIT.values(), ids=LOW_BIT)
def test_two_thousand_steps_on_a_quadratic(make) -> None:
    target = jnp.asarray(np.random.default_rng(0).standard_normal((16, 512)), jnp.float32)
    tx = make(optax.cosine_decay_schedule(0.05, 2000), weight_decay=0.0)

    def body(carry, key):
        params, state = carry
        noise = 0.1 * jax.random.normal(key, target.shape)
        updates, state = tx.update(params - target + noise, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"w": jnp.zeros_like(target)}["w"]
    keys = jax.random.split(jax.random.key(0), 2000)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, keys))((params, tx.init(params)))
    assert jnp.mean((params - target) ** 2) < 2e-3


def test_rules_and_small_leaves() -> None:
    storage = Storage("dynamic8", rules=(("embed", "float32"), ("norm", "bfloat16")))
    tx = quantize_state(optax.scale_by_adam(), {"mu": storage}, elementwise=True)
    params = {
        "embed": jnp.zeros((64, 256)),
        "norm": jnp.zeros((64, 256)),
        "kernel": jnp.zeros((64, 256)),
        "bias": jnp.zeros(256),
    }
    state = tx.init(params)
    codes = state.inner_state.mu[storage.label]["codes"]
    assert {name: str(leaf.dtype) for name, leaf in codes.items()} == {
        "embed": "float32",
        "norm": "bfloat16",
        "kernel": "uint8",
        "bias": "float32",
    }
    updates, after = tx.update(tree(jax.tree.map(jnp.shape, params), 0), state, params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    remarks = memory_report(tx, params).remarks
    assert remarks["too small for its codec, or excepted: kept in float32"] == ("bias", "embed")


def test_a_list_of_rules() -> None:
    tx = quantize_state(optax.scale_by_adam(), {"mu": [("bias", "float32"), (".*", "dynamic8")]})
    assert "float32" in next(iter(tx.init(tree()).inner_state.mu))
    with pytest.raises(ValueError, match=r"ends with a codec for all other leaves"):
        quantize_state(optax.scale_by_adam(), {"mu": [("bias", "float32")]})


def test_the_size_that_counts_is_that_of_a_layer() -> None:
    tx = quantize_state(optax.scale_by_adam(), {"mu": "dynamic8"})
    params = {"layers": {"norm": jnp.zeros((8, 512))}, "kernel": jnp.zeros((8, 512))}
    codes = next(iter(tx.init(params).inner_state.mu.values()))["codes"]
    assert codes["layers"]["norm"].dtype == jnp.float32
    assert codes["kernel"].dtype == jnp.uint8


def test_another_codec_is_an_error_with_both_names(tmp_path: Path) -> None:
    params = {"w": jnp.zeros((64, 256))}
    eight = quantize_state(optax.scale_by_adam(), {"mu": dynamic8()})
    other = quantize_state(optax.scale_by_adam(), {"mu": dynamic8(128)})
    with pytest.raises(ValueError, match=r"'mu'.*dynamic8_b256.*dynamic8_b128"):
        other.update(params, eight.init(params))
    none = adam_mini(1e-3)
    with pytest.raises(ValueError, match=r"'mu'.*dynamic8_b256.*without codec"):
        none.update(params, adam_mini8bit(1e-3).init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", eight.init(params))
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="dynamic8_b256") as error:
            checkpointer.restore(
                tmp_path / "state", jax.eval_shape(lambda p: other.init(p), params)
            )
    assert "dynamic8_b128" in str(error.value)
    gc.collect()


@pytest.mark.parametrize(
    ("inner", "field"),
    [
        (optax.adan(1e-2), "g"),
        (optax.adan(1e-2), "v"),
        (optax.sm3(1e-2), "nu"),
        (optax.rprop(1e-2), "prev_updates"),
        (optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2), "z"),
        (optax.contrib.prodigy(1.0), "exp_avg"),
    ],
)
def test_fields_that_may_be_negative_are_refused_to_codecs_that_are_not(
    inner: optax.GradientTransformation, field: str
) -> None:
    params = {"w": jnp.zeros((64, 256))}
    with pytest.raises(ValueError, match=f"{field!r} of .* may have both signs"):
        quantize_state(inner, {field: "dynamic8_unsigned"}).init(params)
    quantize_state(inner, {field: "dynamic8"}).init(params)


def test_what_no_codec_can_hold_is_refused() -> None:
    params = jnp.zeros((64, 256))
    with pytest.raises(ValueError, match="'count' holds int32"):
        quantize_state(optax.adam(1e-3), {"count": "float32"}).init(params)
    with pytest.raises(ValueError, match=r"the root of nu - mu\*\*2"):
        quantize_state(optax.rmsprop(1e-3, centered=True), {"nu": "dynamic8_unsigned"}).init(params)


def test_scalars_of_a_state_are_no_moments_of_a_single_parameter() -> None:
    params = jnp.ones((64, 256))
    inner = optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2)
    tx = quantize_state(inner, {"z": "float32"}, elementwise=True)
    updates, _ = tx.update(params, tx.init(params), params)
    expected, _ = inner.update(params, inner.init(params), params)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_bad_arguments_are_refused() -> None:
    adam = optax.scale_by_adam()
    with pytest.raises(ValueError, match="no field 'trace' to store; it has count, mu, nu"):
        quantize_state(adam, {"trace": "dynamic8"}).init(tree())
    with pytest.raises(ValueError, match="'mu' has both signs, which linear4_unsigned"):
        quantize_state(adam, {"mu": "linear4_unsigned"})
    for make in (adam_mini, adamw4bit_factored):
        with pytest.raises(ValueError, match="'mu' has both signs, which rank1"):
            make(1e-3, mu_codec="rank1_linear4")
    with pytest.raises(ValueError, match="elementwise=True promises"):
        quantize_state(optax.contrib.muon(1e-3), {"mu": "dynamic8"}, elementwise=True)
    for make in (adam_mini, adamw4bit_factored):
        with pytest.raises(ValueError, match="'mu' has both signs, which rank1"):
            make(1e-3, mu_codec="rank1_linear4")
    with pytest.raises(ValueError, match="elementwise=True promises"):
        quantize_state(
            optax.chain(optax.clip_by_global_norm(1.0), adam), {"mu": "dynamic8"}, elementwise=True
        )
    with pytest.raises(ValueError, match="Unknown codec 'int8'"):
        quantize_state(adam, {"mu": "int8"})


@pytest.mark.slow
@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_temporaries_are_small(make) -> None:
    """With gradient and state donated: no float32 moment is written, nor an update twice."""
    tx, params = make(1e-3, weight_decay=0.1), llama_100m()
    state = jax.eval_shape(lambda p: tx.init(p), params)
    step = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert step.memory_analysis().temp_size_in_bytes < 0.1 * size


def test_decay_and_rate_in_chunks_are_those_of_the_chain() -> None:
    mask, params = {"mlp": True, "bias": False, "stack": True}, tree(seed=9)
    rate = optax.linear_schedule(0.1, 0.0, 5)
    for choice in (mask, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)):
        ours = adam_mini(rate, weight_decay=0.1, mask=choice)
        chain = optax.chain(
            scale_by_adam_mini(),
            optax.add_decayed_weights(0.1, choice),
            optax.scale_by_learning_rate(rate),
        )
        one, other = run(ours, params), run(chain, params)
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), one, other)
    with pytest.raises(ValueError, match="needs the parameters"):
        ours.update(params, ours.init(params))


def test_linear4_is_a_codec_of_adam_mini() -> None:
    tx = adam_mini4bit(1e-3, mu_codec=linear4(signed=True, rounding="stochastic"))
    updates, _ = run(tx, tree())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


BRANCHING = {
    "galore": (lambda: optax.contrib.galore(1e-2, rank=4), "mu"),
    "novograd": (lambda: optax.novograd(1e-2), "mu"),
    "mechanize": (lambda: optax.contrib.mechanize(optax.adamw(1e-2, weight_decay=0.1)), "mu"),
}


@pytest.mark.parametrize("name", BRANCHING)
def test_bfloat16_around_a_transformation_that_branches(name) -> None:
    """The branch that keeps the state and the one that computes it have one dtype."""
    make, field = BRANCHING[name]
    tx = quantize_state(make(), {field: "float32"})
    whole = tree({"kernel": (16, 512)}, seed=0)
    gradient = tree({"kernel": (16, 512)}, seed=1)
    params, grads = optax.tree_utils.tree_cast((whole, gradient), jnp.bfloat16)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(grads, state, params)
    types = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert types((updates, after)) == types((params, state))
    whole, gradient = optax.tree_utils.tree_cast((params, grads), jnp.float32)
    expected, _ = jax.jit(make().update)(gradient, make().init(whole), whole)
    one, other = (np.asarray(x["kernel"], np.float32) for x in (updates, expected))
    np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2 * np.abs(other).max())
