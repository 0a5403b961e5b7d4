"""Numbers that shape a state, as arguments of the optimizers."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from microadam_jax import (
    Blocks,
    Matrices,
    MicroAdamLayout,
    Refresh,
    Storage,
    Window,
    accumulate_into_residual,
    adam_mini,
    adam_mini8bit,
    adam_sn,
    adamw4bit_factored,
    adamw8bit,
    apollo_mini,
    came,
    compress,
    error_feedback,
    explain_partition,
    galore,
    grass,
    memory_report,
    microadam,
    muon8bit,
    project_gradients,
    quantize_state,
    round_updates,
    run_with,
    snsm,
    sparse_ggt,
    sparse_mfac,
    state_shardings,
    top_k,
    with_diagnostics,
)
from microadam_jax.codecs import affine4
from microadam_jax.layers import update_in_backward
from microadam_jax.methods import METHODS
from microadam_jax.subspace import gaussian, svd, top_k_rows

PARAMS = {"mlp": {"kernel": jax.ShapeDtypeStruct((1000, 11008), "float32")}}


def state_of(tx: optax.GradientTransformation) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(tx.init, PARAMS))


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        ({}, MicroAdamLayout()),
        ({"density": 0.05}, MicroAdamLayout(top_k(density=0.05))),
        ({"window": 4}, MicroAdamLayout(window=Window(4))),
        (
            {"block_size": 128, "density": 0.02},
            MicroAdamLayout(top_k(density=0.02, blocks=Blocks(128)), affine4(Blocks(128))),
        ),
    ],
    ids=str,
)
def test_microadam_takes_the_numbers_of_its_layout(arguments: Any, layout: Any) -> None:
    assert state_of(microadam(1e-3, **arguments)) == state_of(microadam(1e-3, layout=layout))


def test_the_papers_buckets_stay_with_other_blocks() -> None:
    state = jax.eval_shape(microadam(1e-3, layout="paper", block_size=4096).init, PARAMS)
    assert state[0].residual.low["mlp"]["kernel"].shape == (1000, 11008 // 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 1.5}, r"TopK.density must lie in \(0, 1\]"),
        ({"window": 0}, "Window.length must be a positive integer; got 0"),
        ({"block_size": 7}, "Blocks.size must be a positive multiple of 2"),
        ({"block_size": 65536}, "at most 32768"),
        ({"layout": "slow"}, "Unknown layout 'slow'"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        microadam(1e-3, **arguments)


@pytest.mark.parametrize("argument", [{"density": 0.1}, {"window": 4}, {"block_size": 128}])
def test_traced_numbers_of_a_layout_are_refused(argument: dict[str, Any]) -> None:
    (name,) = argument
    injected = optax.inject_hyperparams(microadam)(1e-3, **argument)
    with pytest.raises(TypeError, match=rf"{name} must be .*static_args=\('{name}',\)"):
        injected.init({"w": jnp.zeros((8, 512))})
    injected = optax.inject_hyperparams(microadam, static_args=(name,))(1e-3, **argument)
    injected.init({"w": jnp.zeros((8, 512))})


@pytest.mark.parametrize(
    ("make", "rank", "bytes_each"), [(galore, 128, 1.536), (grass, 128, 1.024), (snsm, 64, 0.516)]
)
def test_a_rank_is_a_number(make: Any, rank: int, bytes_each: float) -> None:
    """Four bytes for each of 2 n r or n r moments and m r entries of a basis, m = 1000."""
    params = {"mlp": {"kernel": jax.ShapeDtypeStruct((1000, 1000), "float32")}}
    report = memory_report(make(1e-2, rank=rank), params)
    assert report.bytes_per_parameter == pytest.approx(bytes_each, abs=5e-3)


def test_a_rank_and_a_subspace_agree() -> None:
    assert state_of(galore(1e-2, subspace=svd(64))) == state_of(galore(1e-2, rank=64))
    assert state_of(apollo_mini(1e-2)) == state_of(apollo_mini(1e-2, subspace=gaussian(1)))
    with pytest.raises(ValueError, match=r"rank=64 contradicts subspace=SingularVectors\(rank=32"):
        galore(1e-2, rank=64, subspace=svd(32))
    with pytest.raises(TypeError, match=r"a subspace with its rank, such as svd\(128\); got <func"):
        galore(1e-2, subspace=svd)
    with pytest.raises(ValueError, match="rank of a subspace must be a positive integer; got 0"):
        galore(1e-2, rank=0)
    with pytest.raises(ValueError, match=r"update interval of a subspace.*got 0"):
        galore(1e-2, update_interval=0)


def test_an_interval_keeps_what_the_method_does_with_moments() -> None:
    params = {"kernel": jnp.ones((8, 4))}
    number = grass(1e-2, update_interval=3, subspace=top_k_rows(2))
    spec = grass(1e-2, rank=2, update_interval=Refresh(3, moments="reset"))
    states = []
    for tx in (number, spec):
        state = tx.init(params)
        for step in range(5):
            grads = {"kernel": jnp.cos(jnp.arange(32.0) * (step + 1)).reshape(8, 4)}
            _, state = tx.update(grads, state, params)
        states.append(state)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, *states))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: microadam(1e-3, layout=None), "layout must be .*'paper'.* got None"),
        (lambda: adam_mini(1e-3, partition="kernel"), "partition must be .* Partition.*'kernel'"),
        (lambda: adamw4bit_factored(1e-3, partition={}), "partition must be .* Partition.*{}"),
        (lambda: came(1e-3, partition=[]), r"partition must be .* Partition.*\[\]"),
        (lambda: adam_sn(1e-3, subsets="runs"), "subsets must be .* Subsets.*'runs'"),
        (lambda: snsm(1e-3, subsets=8), "subsets must be .* Subsets.*got 8"),
        (lambda: muon8bit(1e-3, matrices="kernel"), "matrices must be .* Matrices.*'kernel'"),
        (lambda: Matrices(partition=4), "partition must be .* Partition.*got 4"),
        (lambda: explain_partition(PARAMS, [("w", "in | out -> out")]), r"partition must .*\[\("),
        (lambda: memory_report(adam_mini, PARAMS), r"tx must be a transf.*Call it: adam_mini\("),
        (lambda: galore(1e-3, matrices="kernel"), "matrices must be .* Matrices.*'kernel'"),
        (lambda: galore(1e-3, complement="sign"), "complement must be .* Discard.*'sign'"),
        (lambda: project_gradients(optax.trace(0.9), svd), "subspace must be a subspace.*<func"),
        (lambda: project_gradients(optax.trace(0.9), svd(2), 10), "refresh must be .*got 10"),
        (lambda: adam_mini8bit(1e-3, mu_codec=8), "codec must be .*dynamic8.*got 8"),
        (lambda: error_feedback(top_k(), None), "codec must be .*dynamic8.*got None"),
        (lambda: affine4(64.0), "Blocks.size must be an integer of Python; got 64.0"),
        (lambda: quantize_state(optax.trace(0.9), "dynamic8"), "codecs must name .*'dynamic8'"),
        (lambda: compress(top_k), "compressor must be .*<function top_k"),
        (lambda: sparse_mfac(1e-3, compressor=0.1), "compressor must be .*got 0.1"),
        (lambda: sparse_ggt(1e-3, window=2.5), r"window must be .*Window\(10\); got 2.5"),
        (lambda: top_k(0.1, blocks=256), r"blocks must be .*Blocks\(256\); got 256"),
        (lambda: run_with(optax.adam), r"tx must be a transf.*Call it: adam\("),
        (lambda: with_diagnostics(None), "inner must be a transf.*got None"),
        (lambda: quantize_state(optax.sgd, {}), r"inner must be a transf.*Call it: sgd\("),
        (lambda: round_updates(optax.sgd), r"inner must be a transf.*Call it: sgd\("),
        (lambda: accumulate_into_residual(optax.sgd, 2), r"inner must be a.*Call it: sgd\("),
        (lambda: project_gradients(optax.sgd, svd(2)), r"inner must be a.*Call it: sgd\("),
        (lambda: state_shardings(optax.sgd, PARAMS, None), r"tx must be a.*Call it: sgd\("),
        (lambda: update_in_backward(optax.sgd, len, len, len), r"tx must be a.*Call it: sgd\("),
        (
            lambda: snsm(1e-3, weight_decay=lambda count: 0.1),
            "weight_decay must be a number.*<func",
        ),
    ],
)
def test_parts_of_another_class_are_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: came(1e-3, b1=0.0), r"b1 must lie in \(0, 1\).*optax.adafactor"),
        (lambda: adam_mini(1e-3, mu_dtype="float23"), "mu_dtype must be .* got 'float23'"),
        (lambda: error_feedback(residual="dynamic8_unsigned"), "both signs.*dynamic8_unsigned"),
        (lambda: top_k(count=1.5), "count must be a positive integer; got 1.5"),
        (lambda: with_diagnostics(optax.sgd(1), {"other": "w"}), "one 'other'.*{'other': 'w'}"),
        (lambda: Window(True), "Window.length must be a positive integer; got True"),
    ],
)
def test_values_that_a_state_cannot_have_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", METHODS)
def test_a_rate_is_a_number_or_a_schedule(name: str) -> None:
    for rate in (None, "1e-3", True):
        with pytest.raises(TypeError, match=f"learning_rate must be a number.*got {rate!r}"):
            METHODS[name].factory(rate)
    METHODS[name].factory(lambda count: 1e-3)


OUT_OF_RANGE = [
    (name, argument, value)
    for name, method in METHODS.items()
    for argument, value in [("b1", 1.0), ("b2", 1), ("b2", -0.5), ("beta", 1.5), ("eps", -1e-8)]
    if argument in inspect.signature(method.factory).parameters
]


@pytest.mark.parametrize(("name", "argument", "value"), OUT_OF_RANGE)
def test_rates_of_moving_averages_are_below_one(name: str, argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{argument} (is the|must) .*; got {value}"):
        METHODS[name].factory(1e-3, **{argument: value})


def test_a_rule_that_matches_nothing_is_warned_of() -> None:
    params = {"wte": {"embedding": jnp.zeros((64, 128))}}
    misspelt = Storage("dynamic8", rules=[("embeding", "float32")])
    with pytest.warns(UserWarning, match="'embeding'.* none of 1 leaves, such as 'wte/embedding'"):
        adamw8bit(1e-3, mu_codec=misspelt).init(params)
    adamw8bit(1e-3, mu_codec=Storage("dynamic8", rules=[("embedding", "float32")])).init(params)
