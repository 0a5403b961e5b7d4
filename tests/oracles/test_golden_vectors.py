"""Oracles and optimizers against numbers that the released torch packages were seen to return.

adam-mini 1.1.1, came-pytorch 0.1.3, and the state shapes of sn-sm. Weights are torch's
``(out, in)``, and a kernel ``(in, out)`` must give the same, transposed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_jax import Partition, adam_mini, came, scale_by_subset_norm
from microadam_jax.layout.names import transformer_rules
from microadam_jax.layout.subsets import Subsets
from tests.oracles.adam_mini import AdamMiniOracle
from tests.oracles.came import CameOracle
from tests.oracles.microadam import Floats, Indices
from tests.oracles.subset_norm import SubsetNormOracle, larger_side, run_size, runs

RATE, DECAY = 1e-2, 0.1

PARAMS = np.array([[1, -1, 0.5, 2], [0.25, -0.75, 1.5, -2]])
GRADS = np.array(
    [[[0.1, -0.2, 0.3, 0.4], [1, 2, -3, 4]], [[-0.1, 0.2, 0.05, 0.4], [0.5, -2, 1, 0]]]
)
MU = np.array([[-0.001, 0.002, 0.032, 0.076], [0.14, -0.02, -0.17, 0.36]])

ROW, COLUMN = np.indices((4, 4))
HEADS = (4 * ROW + COLUMN + 1) / 10
HEADS_GRAD = ((4 * ROW + COLUMN) % 5 - 2) * (1 + ROW) / 10
HEADS_GRADS = np.stack([HEADS_GRAD, 0.5 * HEADS_GRAD])
HEADS_MU = 0.09 * HEADS_GRADS[0] + 0.1 * HEADS_GRADS[1]

# Weights after two steps, and the second moment of each block.
BY_OUTPUT = np.array(
    [
        [0.994561553, -0.991122186, 0.481388211, 1.965572357],
        [0.242310137, -0.755290329, 1.512246370, -2.019702196],
    ]
)
WHOLE = np.array(
    [
        [0.997523189, -0.997045457, 0.496323884, 1.991249204],
        [0.239394009, -0.758056700, 1.518439889, -2.029322863],
    ]
)
WHOLE_NORM = np.array(
    [
        [0.999521673, -0.999043405, 0.497321814, 1.995245099],
        [0.239888608, -0.759566247, 1.521453738, -2.033341169],
    ]
)
BIAS = np.array(
    [
        [0.990526319, -0.990526319, 0.482071847, 1.980000019],
        [0.230607063, -0.759473681, 1.514043093, -2.016786575],
    ]
)
BIAS_NU = np.array([[0.000975, 0.0039, 0.0044, 0.0156], [0.06, 0.39, 0.4775, 0.76]])
BY_HEAD = np.array(
    [
        [0.116718903, 0.208059609, 0.299400330, 0.390740991],
        [0.465162903, 0.632638276, 0.715519488, 0.798400819],
        [0.887449205, 0.976497591, 1.119304657, 1.208353043],
        [1.297401309, 1.382865787, 1.468330264, 1.625472903],
    ]
)


@dataclass(frozen=True)
class Golden:
    """One parameter's way through two steps of the released Adam-mini.

    Attributes:
        blocks: the block of each element, for the oracle.
        nu: the second moments, in the shape in which the library keeps them.
    """

    params: Floats
    grads: Floats
    blocks: Indices
    mu: Floats
    nu: Floats
    after: Floats

    @property
    def transposed(self) -> Golden:
        axes = (self.params, *self.grads, self.blocks, self.mu, self.nu, self.after)
        params, first, second, blocks, mu, nu, after = (array.T for array in axes)
        return Golden(params, np.stack([first, second]), blocks, mu, nu, after)

    @property
    def flat(self) -> Golden:
        axes = (self.params, self.blocks, self.mu, self.nu, self.after)
        params, blocks, mu, nu, after = (array.reshape(-1) for array in axes)
        return Golden(params, self.grads.reshape(2, -1), blocks, mu, nu, after)


ROWS, COLUMNS = np.indices((2, 4))
OUTPUT = Golden(PARAMS, GRADS, ROWS, MU, np.array([[0.00621875], [0.421875]]), BY_OUTPUT)
TENSOR = Golden(PARAMS, GRADS, 0 * ROWS, MU, np.array([[0.214046881]]), WHOLE)
NORM = Golden(PARAMS, GRADS, 0 * ROWS, MU, np.array([[0.214046881]]), WHOLE_NORM)
ELEMENT = Golden(PARAMS, GRADS, 4 * ROWS + COLUMNS, MU, BIAS_NU, BIAS)
QUERY = Golden(HEADS, HEADS_GRADS, ROW // 2, HEADS_MU, np.array([[0.00315], [0.01755]]), BY_HEAD)
KEY = Golden(
    HEADS[:2], HEADS_GRADS[:, :2], ROW[:2] // 2, HEADS_MU[:2], np.array([[0.00315]]), BY_HEAD[:2]
)

ADAM_MINI = {
    "self_attn/v_proj/weight": OUTPUT,
    "mlp/fc1/weight": OUTPUT,
    "lm_head/weight": OUTPUT,
    "mlp/fc1/kernel": OUTPUT.transposed,
    "stem": TENSOR,
    "odd_norm": NORM,
    "norm/weight": NORM.flat,
    "mlp/fc1/bias": ELEMENT,
    "norm/bias": ELEMENT.flat,
    "self_attn/q_proj/weight": QUERY,
    "self_attn/k_proj/weight": KEY,
    "self_attn/q_proj/kernel": QUERY.transposed,
    "self_attn/k_proj/kernel": KEY.transposed,
}
TORCH_RULES = Partition(
    (("stem|odd_norm", "out in ->"), *transformer_rules(heads=2, kv_heads=1, weight="out in"))
)


def decays(path: str) -> bool:
    """What the released code spares is named "norm", "ln" or "bias"."""
    return not any(name in path for name in ("norm", "ln", "bias"))


def decay_mask(params: dict[str, Any]) -> dict[str, bool]:
    return {path: decays(path) for path in params}


@functools.cache
def adam_mini_run() -> tuple[dict[str, jax.Array], Any]:
    """The weights and the state after two steps, of all parameters at once."""
    tx = adam_mini(RATE, b2=0.95, weight_decay=DECAY, mask=decay_mask, partition=TORCH_RULES)
    params = {path: jnp.asarray(golden.params, jnp.float32) for path, golden in ADAM_MINI.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(2):
        grads = {
            path: jnp.asarray(golden.grads[step], jnp.float32) for path, golden in ADAM_MINI.items()
        }
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state[0]


@pytest.mark.parametrize("path", ADAM_MINI)
def test_adam_mini_takes_the_steps_of_the_released_code(path: str) -> None:
    golden, (params, state) = ADAM_MINI[path], adam_mini_run()
    assert state.nu[path].shape == golden.nu.shape
    np.testing.assert_allclose(state.nu[path], golden.nu, rtol=1e-6)
    np.testing.assert_allclose(state.mu[path], golden.mu, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(params[path], golden.after, rtol=1e-6)


@pytest.mark.parametrize("path", ADAM_MINI)
def test_the_adam_mini_oracle_takes_them_too(path: str) -> None:
    golden = ADAM_MINI[path]
    oracle = AdamMiniOracle(
        golden.params, golden.blocks, RATE, b2=0.95, weight_decay=DECAY * decays(path)
    )
    for gradient in golden.grads:
        oracle.step(gradient)
    np.testing.assert_allclose(oracle.nu, golden.nu.reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(oracle.mu, golden.mu, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(oracle.theta, golden.after, rtol=1e-6)


# --- CAME ----------------------------------------------------------------------------------------

CAME_MATRIX = np.array(
    [
        [
            [0.887888908, -0.887888908, 0.388388872, 1.886888862],
            [0.138638884, -0.860361099, 1.609611154, -2.109111071],
        ],
        [
            [0.917819798, -0.897970975, 0.282230735, 1.708880186],
            [0.001976132, -0.830261290, 1.642861366, -2.183998346],
        ],
    ]
)
CAME_VECTOR = np.array(
    [
        [0.998000026, -0.998000026, 0.498500019, 1.996999979],
        [0.997246444, -0.997246444, 0.496835381, 1.992958546],
    ]
)
CAME = {
    "mlp/fc1/weight": (PARAMS, GRADS, CAME_MATRIX),
    "mlp/fc1/kernel": (PARAMS.T, GRADS.swapaxes(1, 2), CAME_MATRIX.swapaxes(1, 2)),
    "unnamed": (PARAMS, GRADS, CAME_MATRIX),
    "vector": (PARAMS[0], GRADS[:, 0], CAME_VECTOR),
}


@functools.cache
def came_run() -> list[dict[str, jax.Array]]:
    """The weights after each of two steps, of all parameters at once."""
    tx = came(RATE, weight_decay=DECAY, partition=TORCH_RULES)
    params = {path: jnp.asarray(start, jnp.float32) for path, (start, _, _) in CAME.items()}
    state, update, after = tx.init(params), jax.jit(tx.update), []
    for step in range(2):
        grads = {
            path: jnp.asarray(grads[step], jnp.float32) for path, (_, grads, _) in CAME.items()
        }
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after


@pytest.mark.parametrize("path", CAME)
def test_came_takes_the_steps_of_the_released_code(path: str) -> None:
    for params, after in zip(came_run(), CAME[path][2], strict=True):
        np.testing.assert_allclose(params[path], after, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("path", CAME)
def test_the_came_oracle_takes_them_too(path: str) -> None:
    start, grads, afters = CAME[path]
    oracle = CameOracle(start, RATE, weight_decay=DECAY)
    for gradient, after in zip(grads, afters, strict=True):
        oracle.step(gradient)
        np.testing.assert_allclose(oracle.theta, after, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize(
    ("b3", "published"), [(0.9999, 11.1), (0.99995, 15.7), (0.995, 1.57), (0.99, 1.11)]
)
def test_the_first_step_of_came_has_the_published_size(b3: float, published: float) -> None:
    # u is +-1 where the squared gradients have rank one.
    gradient = np.array([[1.0, 2.0], [-2.0, 4.0], [3.0, -6.0]])
    first = CameOracle(np.zeros((3, 2)), 1.0, b3=b3).step(gradient)
    np.testing.assert_allclose(np.abs(first), 0.1 / 0.9 / np.sqrt(1 - b3), rtol=1e-6)
    np.testing.assert_allclose(np.abs(first), published, rtol=5e-3)
    tx = came(1.0, b3=b3)
    kernel = {"kernel": jnp.asarray(gradient, jnp.float32)}
    updates, _ = tx.update(kernel, tx.init(kernel), kernel)
    np.testing.assert_allclose(updates["kernel"], first, rtol=1e-4)


# --- Subset norms --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "published"), [((12, 20), (1, 20)), ((20, 12), (20, 1)), ((16, 16), (16, 1))]
)
def test_the_larger_side_keeps_the_published_numbers(
    shape: tuple[int, int], published: tuple[int, int]
) -> None:
    row, column = np.indices(shape)
    expected = row if published[1] == 1 else column
    np.testing.assert_array_equal(larger_side(*shape), expected)
    tx = scale_by_subset_norm(partition=Partition(transformer_rules(weight="out in")))
    params = {"fc/weight": jnp.zeros(shape), "fc/kernel": jnp.zeros(shape[::-1])}
    nu = jax.eval_shape(tx.init, params).nu
    assert nu["fc/weight"].shape == published
    assert nu["fc/kernel"].shape == published[::-1]


@pytest.mark.parametrize(
    ("shape", "size", "published"),
    [
        ((12, 20), -2, 6),  # 15.49 / 2 is 7, which does not divide 240
        ((12, 20), -1, 15),
        ((12, 20), 7, 6),
        ((12, 20), 1000, 240),
        ((5461, 2048), -2, 1376),
        ((104729,), -2, 1),  # a prime
        ((2,), -2, 1),  # int(1.41 / 2) is 0
    ],
)
def test_runs_have_the_published_size(shape: tuple[int, ...], size: int, published: int) -> None:
    elements = int(np.prod(shape))
    assert run_size(elements, size) == published
    tx = scale_by_subset_norm(subsets=Subsets("runs", size=size))
    nu = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, jnp.float32)).nu
    assert nu.size == elements // published


def test_runs_are_consecutive_in_row_major_order() -> None:
    np.testing.assert_array_equal(runs((2, 3), 2), [[0, 0, 1], [1, 2, 2]])
    np.testing.assert_array_equal(runs((2, 2, 2), 4), [[[0, 0], [0, 0]], [[1, 1], [1, 1]]])


def test_subset_norms_of_one_step_by_hand() -> None:
    oracle = SubsetNormOracle([[1.0, 1.0]], np.array([[0, 0]]), 0.5, eps=1.0, weight_decay=0.1)
    oracle.step([[3.0, 4.0]])
    # eta_1 = 0.5 sqrt(0.001) / 0.1, m = 0.1 g, sqrt(V) = 5 sqrt(0.001); the decay comes last.
    root = np.sqrt(0.001)
    updated = 1 - 0.5 * root * np.array([[3.0, 4.0]]) / (5 * root + 1)
    np.testing.assert_allclose(oracle.theta, 0.95 * updated, rtol=1e-12)
