"""What parameters, gradients, hyperparameters, masks and states may be, for every optimizer."""

import math
import re
from typing import Any

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from microadam_jax import adam_mini, adam_sn, adamw8bit, microadam, sparse_mfac
from microadam_jax.methods import METHODS, Method

pytestmark = pytest.mark.usefixtures("fewer_optimizations")
# Tracing takes no compiler.
each_name = pytest.mark.parametrize("name", METHODS)
KERNEL = jnp.full((8, 32), 0.5)


def make(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return METHODS[name].factory(1e-2, **options)


def undecayed(name: str) -> optax.GradientTransformationExtraArgs:
    """Without weight decay, where there is any."""
    takes = METHODS[name].parameters
    return make(name, **({"weight_decay": 0} if "weight_decay" in takes else {}))


def trace(tx: Any, grads: Any, params: Any) -> Any:
    return jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, params), params)[0]


@each_name
def test_complex_parameters_are_refused_and_their_parts_are_not(name: str) -> None:
    params = {"kernel": KERNEL.astype(jnp.complex64)}
    with pytest.raises(TypeError, match=r"'kernel' has dtype complex64.*split_real_and_imaginary"):
        jax.eval_shape(make(name).init, params)
    tx = optax.contrib.split_real_and_imaginary(make(name))
    assert trace(tx, params, params)["kernel"].dtype == jnp.complex64


def test_both_parts_of_a_complex_parameter_move() -> None:
    tx = optax.contrib.split_real_and_imaginary(adam_mini(0.1))
    params = jnp.ones(4, jnp.complex64)
    updates, _ = tx.update(jnp.full(4, 2 - 3j), tx.init(params), params)
    np.testing.assert_allclose(updates, np.full(4, -0.1 + 0.1j), rtol=1e-5)


@each_name
@pytest.mark.parametrize(
    "leaf", [jnp.arange(3), True, 5, jax.random.key(0)], ids=["int32", "bool", "number", "key"]
)
def test_what_is_no_real_number_is_refused(name: str, leaf: Any) -> None:
    with pytest.raises(TypeError, match=r"'other' has dtype .*optax\.masked"):
        make(name).init({"kernel": KERNEL, "other": leaf})


@each_name
def test_gradients_of_integers_are_refused(name: str) -> None:
    tx, params = make(name), {"kernel": KERNEL}
    grads = {"kernel": np.zeros((8, 32), jax.dtypes.float0)}
    with pytest.raises(TypeError, match="float0"):
        tx.update(grads, jax.eval_shape(tx.init, params), params)


@each_name
def test_functions_are_refused_in_one_sentence(name: str) -> None:
    model = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"activation' is no array.*is_inexact_array"):
        make(name).init(model)


@each_name
def test_a_whole_equinox_model_may_be_given_to_update(name: str) -> None:
    """Its functions have no gradients."""
    model = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = make(name)
    step = eqx.filter_eval_shape(tx.update, params, jax.eval_shape(tx.init, params), model)
    assert jax.tree.structure(step[0]) == jax.tree.structure(params)


@each_name
def test_a_parameter_without_gradient_may_be_given_to_update(name: str) -> None:
    tx, moving = make(name), {"kernel": KERNEL, "frozen": None}
    params = {"kernel": KERNEL, "frozen": jnp.ones(3)}
    updates, state = jax.eval_shape(tx.update, moving, tx.init(moving), params)
    assert updates["frozen"] is None
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(moving))


@each_name
def test_python_floats_are_parameters(name: str) -> None:
    tx = make(name)
    state = tx.init({"kernel": KERNEL, "scale": 0.5})
    arrays = {"kernel": KERNEL, "scale": jnp.asarray(0.5)}
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, tx.init(arrays))
    updates = trace(tx, arrays, arrays)

    def step(kernel: jax.Array, state: Any) -> Any:
        return tx.update({"kernel": kernel, "scale": 1.0}, state, {"kernel": kernel, "scale": 0.5})

    assert jax.eval_shape(step, KERNEL, state)[0] == updates


@each_name
def test_parameters_may_be_left_out_where_nothing_decays(name: str) -> None:
    tx, params = undecayed(name), {"kernel": KERNEL}
    state = jax.eval_shape(tx.init, params)
    assert jax.eval_shape(tx.update, params, state)[0] == trace(tx, params, params)
    if "weight_decay" in METHODS[name].parameters:
        with pytest.raises(ValueError, match="params"):
            jax.eval_shape(make(name, weight_decay=0.1).update, params, state)


@pytest.mark.parametrize("name", ["microadam", "adam_mini4bit", "adam_sn"])
def test_the_step_without_parameters_is_the_same(name: str) -> None:
    tx, params = undecayed(name), {"kernel": jnp.full((64, 128), 0.5)}
    grads = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((64, 128)), "float32")}
    update, state = jax.jit(tx.update), tx.init(params)
    with_them, without = update(grads, state, params), update(grads, state)
    jax.tree.map(np.testing.assert_array_equal, without, with_them)


@each_name
def test_hyperparameters_in_bfloat16_are_refused(name: str) -> None:
    """As ``inject_hyperparams`` gives them for bfloat16 parameters: 0.999 would be 1."""
    params = {"kernel": KERNEL.astype(jnp.bfloat16)}
    with pytest.raises(TypeError, match=r"bfloat16.*hyperparam_dtype=jnp\.float32"):
        jax.eval_shape(inject(METHODS[name])(1e-2).init, params)
    trace(inject(METHODS[name], hyperparam_dtype=jnp.float32)(1e-2), params, params)


def inject(method: Method, **options: Any) -> Any:
    return optax.inject_hyperparams(method.factory, static_args=method.static_args, **options)


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.static_args])
def test_integers_that_shape_the_state_have_to_be_static(name: str) -> None:
    """As in Optax's own transformations."""
    method, params = METHODS[name], {"kernel": KERNEL}
    with pytest.raises(ValueError, match=re.escape(f"static_args={method.static_args}")):
        jax.eval_shape(optax.inject_hyperparams(method.factory)(1e-2).init, params)


@pytest.mark.parametrize("make_tx", [microadam, adam_mini])
def test_hyperparameters_in_float32_are_not_rounded_on_the_way(make_tx: Any) -> None:
    """Around parameters in bfloat16, in which 0.999 would give NaN in the first step."""
    params = {"kernel": KERNEL.astype(jnp.bfloat16)}
    grads = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((8, 32)), "bfloat16")}

    def second_of(tx: Any) -> Any:
        _, state = tx.update(grads, tx.init(params), params)
        return np.asarray(tx.update(grads, state, params)[0]["kernel"], np.float32)

    injected = optax.inject_hyperparams(make_tx, hyperparam_dtype=jnp.float32)(1e-2)
    np.testing.assert_allclose(second_of(injected), second_of(make_tx(1e-2)), rtol=1e-2)


@pytest.mark.parametrize("make_tx", [adam_mini, adam_sn, sparse_mfac])
def test_a_mask_that_is_a_module_is_a_tree(make_tx: Any) -> None:
    model = eqx.nn.Linear(8, 4, key=jax.random.key(0))
    mask = eqx.tree_at(lambda m: m.bias, jax.tree.map(lambda _: True, model), replace=False)
    assert callable(mask)
    grads = jax.tree.map(jnp.zeros_like, model)
    tx = make_tx(0.1, weight_decay=0.5, mask=mask)
    updates, _ = jax.jit(tx.update)(grads, tx.init(model), model)
    np.testing.assert_allclose(updates.weight, -0.05 * model.weight, rtol=1e-6)
    assert not updates.bias.any()


RESTORED = ("microadam", "adam_mini", "adamw8bit", "sparse_mfac", "galore", "snsm")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in RESTORED else pytest.mark.matrix) for n in METHODS]
)
def test_states_of_numpy_arrays(name: str) -> None:
    """As Flax restores them, in a step that is not compiled."""
    tx, params = make(name), {"kernel": jnp.full((4, 64), 0.5)}
    size = math.prod(params["kernel"].shape)
    grads = {"kernel": jnp.sin(jnp.arange(size, dtype=jnp.float32)).reshape(4, 64)}
    state = tx.init(params)
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(state, saved)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    found, expected = tx.update(grads, restored, params), tx.update(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_numpy_gradients_and_parameters() -> None:
    params, grads = np.full((4, 64), 0.5, np.float32), np.ones((4, 64), np.float32)
    tx = adamw8bit(1e-2)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = tx.update(jnp.asarray(grads), tx.init(jnp.asarray(params)), jnp.asarray(params))
    np.testing.assert_array_equal(updates, expected)
