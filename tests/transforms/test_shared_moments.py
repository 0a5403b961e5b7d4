"""Second moments that parameters share: against the float64 oracles, and laws that they obey."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pytest

from microadam_jax import (
    Partition,
    adagrad_sn,
    adam_mini,
    adam_sn,
    came,
    scale_by_adam_mini,
    scale_by_subset_norm,
)
from microadam_jax.layout.names import transformer_rules
from microadam_jax.layout.subsets import Subsets
from microadam_jax.transforms import scale_by_came
from tests.oracles.adam_mini import AdamMiniOracle
from tests.oracles.came import CameOracle
from tests.oracles.microadam import Indices
from tests.oracles.subset_norm import SubsetNormOracle, larger_side, run_size, runs

pytestmark = [
    pytest.mark.usefixtures("fewer_optimizations"),
    # The warning has tests of its own: here some parameters follow no rule on purpose.
    pytest.mark.filterwarnings("ignore:.*no rule of the partition names:UserWarning"),
]

STEPS = 32
DECAY = 0.1
IN_OUT = Partition(transformer_rules(heads=4, kv_heads=2))
OUT_IN = Partition(transformer_rules(heads=4, kv_heads=2, weight="out in"))
WHOLE = Partition((("whole", "a b c ->"),))

Shape = tuple[int, ...]
Tree = dict[str, Any]
Optimizer = optax.GradientTransformation


def rate(step: Any) -> Any:
    """A schedule, so that a weight decay that read another step would show."""
    return 0.05 / (1 + step)


def gradients(shapes: dict[str, Shape], seed: int = 0) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Gradients with a mean and with elements of different scale."""
    random = np.random.default_rng(seed)
    scales = {path: np.exp(random.standard_normal(shape)) for path, shape in shapes.items()}
    means = {path: random.standard_normal(shape) for path, shape in shapes.items()}
    while True:
        yield {
            path: scales[path] * (means[path] + random.standard_normal(shape))
            for path, shape in shapes.items()
        }


def cast(tree: Tree, dtype: Any) -> Tree:
    return {path: jnp.asarray(leaf, dtype) for path, leaf in tree.items()}


def starts(shapes: dict[str, Shape], dtype: Any = jnp.float32) -> Tree:
    return cast(next(gradients(shapes, seed=1)), dtype)


# --- The blocks of each kind of parameter, element by element ------------------------------------


@dataclass(frozen=True)
class Shared:
    """Which elements of a parameter share a number.

    Attributes:
        ids: the block of each element.
        kept: the block of each number in the state.
    """

    ids: Indices
    kept: Indices


def by(shape: Shape, *axes: int) -> Shared:
    """One block for each index of ``axes``."""
    sizes = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    kept = np.arange(math.prod(sizes)).reshape(sizes)
    return Shared(np.broadcast_to(kept, shape), kept)


def columns(rows: int, ids: npt.ArrayLike) -> Shared:
    """The blocks of the columns of a matrix, of which every element is kept."""
    return Shared(np.tile(ids, (rows, 1)), np.asarray([ids]))


def transposed(shared: Shared) -> Shared:
    return Shared(shared.ids.T, shared.kept.T)


# 4 query heads, 2 key heads and 2 value heads of 3 elements each, side by side.
GROUPED = [*np.repeat(np.arange(6), 3), *range(6, 12)]
# Slot, head, element: query and key by head, value by element.
HEAD, ELEMENT = np.indices((2, 4))
SLOTS = np.stack([HEAD, 2 + HEAD, 4 + 4 * HEAD + ELEMENT])

BLOCKS = {
    "norm/scale": by((12,)),
    "mlp/kernel": by((6, 5), 1),
    "embed_tokens/embedding": by((7, 4), 0),
    "pos_embedding": by((1, 5, 4), 1),
    "query/kernel": by((6, 3, 4), 1),
    "value/kernel": by((6, 3, 4), 1, 2),
    "out/kernel": by((2, 3, 6), 2),
    "q_proj/kernel": Shared(
        np.tile(np.repeat(np.arange(4), 3), (6, 1)), np.arange(4).reshape(1, 4)
    ),
    "k_proj/kernel": Shared(
        np.tile(np.repeat(np.arange(2), 3), (6, 1)), np.arange(2).reshape(1, 2)
    ),
    "v_proj/kernel": by((6, 6), 1),
    "grouped/qkv/kernel": columns(5, GROUPED),
    "slots/qkv/kernel": Shared(np.broadcast_to(SLOTS, (6, 3, 2, 4)), SLOTS[None]),
    "flat_slots/qkv/kernel": by((6, 3, 8), 1, 2),
    "conv/kernel": by((3, 3, 2, 5), 3),
    "conv_1d/kernel": by((3, 2, 5), 2),
    "experts/wi": by((3, 4, 5), 0, 2),
    "q_einsum/w": by((3, 6, 4), 0),
    "kv_einsum/w": Shared(
        np.broadcast_to(SLOTS[1:, :, None] - 2, (2, 2, 6, 4)), SLOTS[1:, :, None] - 2
    ),
    "attn_vec_einsum/w": by((3, 4, 6), 2),
    "mlp/linear": by((6, 5), 1),
    "lora_a": by((6, 2), 1),
    "query/bias": by((3, 4), 0, 1),
    "unnamed": by((4, 5), 0, 1),
    "temperature": by(()),
    "empty/kernel": by((0, 4), 0, 1),
}
TORCH_BLOCKS = {
    "fc/weight": by((5, 6), 0),
    "q_proj/weight": transposed(BLOCKS["q_proj/kernel"]),
    "in_proj_weight": transposed(BLOCKS["grouped/qkv/kernel"]),
    "conv/weight": by((5, 2, 3, 3), 0),
    "ln_1/weight": by((12,)),
    "fc/bias": by((5,), 0),
}


def larger(shape: Shape, input_axes: int) -> Shared:
    """Subsets of a linear map whose inputs are its first axes."""
    inputs, outputs = math.prod(shape[:input_axes]), math.prod(shape[input_axes:])
    ids = larger_side(outputs, inputs).T.reshape(shape)
    full = [(axis < input_axes) == (inputs > outputs) for axis in range(len(shape))]
    return Shared(ids, ids[tuple(slice(None if keeps else 1) for keeps in full)])


def each(count: int, shared: Shared) -> Shared:
    """The same for each of several parameters, which a new first axis counts."""
    blocks = np.arange(count) * (shared.ids.max() + 1)
    return Shared(*(np.add.outer(blocks, ids) for ids in (shared.ids, shared.kept)))


LARGER = {
    "wide/kernel": larger((5, 7), 1),
    "tall/kernel": larger((7, 5), 1),
    "square/kernel": larger((6, 6), 1),  # a subset for each output, as in torch's weights
    "query/kernel": larger((6, 3, 4), 1),
    "tall/query/kernel": larger((6, 2, 2), 1),
    "out/kernel": larger((2, 3, 7), 2),
    "tall/out/kernel": larger((3, 3, 6), 2),
    "conv/kernel": larger((3, 3, 2, 5), 3),
    "wide_conv/kernel": larger((2, 2, 1, 7), 3),
    "experts/wi": each(3, larger((4, 5), 1)),
    "experts/wo": each(3, larger((5, 4), 1)),
    "grouped/qkv/kernel": larger((5, 24), 1),
    "norm/scale": by((6,), 0),
    "embed_tokens/embedding": by((7, 4), 0, 1),
    "q_einsum/w": by((3, 4, 2), 0, 1, 2),
    "unnamed": by((4, 5), 0, 1),
    "temperature": by(()),
    "empty/kernel": by((0, 4), 0, 1),
}
FEW_LARGER = {
    path: LARGER[path] for path in ("wide/kernel", "tall/query/kernel", "experts/wi", "norm/scale")
}
TORCH_LARGER = {
    "wide/weight": transposed(larger((5, 7), 1)),
    "tall/weight": transposed(larger((7, 5), 1)),
    "square/weight": transposed(larger((6, 6), 1)),
}

RUN_SHAPES = {
    "kernel": (6, 8),
    "crossing/kernel": (6, 7),
    "query/kernel": (4, 3, 6),
    "prime": (37,),
    "prime/kernel": (3, 37),
    "norm/scale": (12,),
    "pair": (2,),
    "temperature": (),
    "empty/kernel": (0, 4),
}


def in_runs(shape: Shape, size: int) -> Shared:
    """Runs, of which a row keeps its own where it consists of whole ones."""
    ids, run = runs(shape, size), run_size(math.prod(shape), size)
    if not shape:
        return Shared(ids, ids)
    if shape[-1] % run == 0:
        return Shared(ids, ids[..., ::run])
    return Shared(ids, ids.reshape((1,) * (len(shape) - 1) + (-1,))[..., ::run])


# CAME factors the last two axes; a linear map of more axes is a matrix of its inputs and outputs.
CAME_MATRICES = {
    "kernel": ((6, 5), (6, 5)),
    "row/kernel": ((1, 5), (1, 5)),
    "query/kernel": ((6, 3, 4), (6, 12)),
    "out/kernel": ((2, 3, 6), (6, 6)),
    "conv/kernel": ((3, 3, 2, 5), (18, 5)),
    "grouped/qkv/kernel": ((5, 24), (5, 24)),
    "slots/qkv/kernel": ((6, 3, 2, 4), (6, 24)),
    "experts/wi": ((3, 4, 5), (3, 4, 5)),
    "embed_tokens/embedding": ((7, 4), (7, 4)),
    "unnamed": ((2, 3, 4), (2, 3, 4)),
    "query/bias": ((3, 4), (3, 4)),
    "norm/scale": ((12,), (12,)),
    "temperature": ((), ()),
}


# --- Optimizers against oracles ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Comparison:
    """An optimizer, and an oracle for each parameter.

    Attributes:
        make: the optimizer, from its learning rate and further settings.
        shapes: of the parameters, by their paths.
        oracle: of the parameter at a path, from its start and the same settings.
        shared: which elements share a number, where whole blocks do.
        options: settings of both.
    """

    make: Callable[..., Optimizer]
    shapes: dict[str, Shape]
    oracle: Callable[..., Any]
    shared: dict[str, Shared]
    options: dict[str, Any]

    def optimizer(self, **more: Any) -> Optimizer:
        return self.make(rate, weight_decay=DECAY, **self.options, **more)

    def oracles(self, params: Tree) -> dict[str, Any]:
        return {
            path: self.oracle(path, leaf, learning_rate=rate, weight_decay=DECAY, **self.options)
            for path, leaf in params.items()
        }


def mini(blocks: dict[str, Shared], partition: Partition = IN_OUT, **options: Any) -> Comparison:
    def oracle(path: str, start: Any, **options: Any) -> AdamMiniOracle:
        return AdamMiniOracle(start, blocks[path].ids, **options)

    shapes = {path: shared.ids.shape for path, shared in blocks.items()}
    make = functools.partial(adam_mini, partition=partition)
    return Comparison(make, shapes, oracle, blocks, options)


def subset_norm(
    alias: Callable[..., Optimizer],
    subsets: Subsets,
    shared: dict[str, Shared],
    partition: Partition = IN_OUT,
    **options: Any,
) -> Comparison:
    def oracle(path: str, start: Any, **options: Any) -> SubsetNormOracle:
        adagrad = {"b2": None} if alias is adagrad_sn else {}
        ids, reduction = shared[path].ids, subsets.reduction
        return SubsetNormOracle(start, ids, reduction=reduction, **options, **adagrad)

    shapes = {path: shared.ids.shape for path, shared in shared.items()}
    make = functools.partial(alias, subsets=subsets, partition=partition)
    return Comparison(make, shapes, oracle, shared, options)


def in_runs_of(
    alias: Callable[..., Optimizer],
    size: int,
    reduction: Any = "sum",
    paths: Iterable[str] = RUN_SHAPES,
) -> Comparison:
    shared = {path: in_runs(RUN_SHAPES[path], size) for path in paths}
    return subset_norm(alias, Subsets("runs", size, reduction), shared)


class ReshapedCame(CameOracle):
    """CAME of a parameter that is a matrix, or a batch of them, in another shape."""

    def __init__(self, start: Any, matrix: Shape, **options: Any) -> None:
        super().__init__(np.reshape(start, matrix), **options)
        self.shape = np.shape(start)

    def step(self, grads: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return super().step(np.reshape(grads, self.theta.shape)).reshape(self.shape)


def factored(*paths: str, **options: Any) -> Comparison:
    def oracle(path: str, start: Any, **options: Any) -> ReshapedCame:
        return ReshapedCame(start, CAME_MATRICES[path][1], **options)

    shapes = {path: CAME_MATRICES[path][0] for path in paths or CAME_MATRICES}
    return Comparison(functools.partial(came, partition=IN_OUT), shapes, oracle, {}, options)


COMPARISONS = {
    "adam_mini": mini(BLOCKS),
    "adam_mini, other settings": mini({"whole": by((2, 3, 4))}, WHOLE, b1=0.5, b2=0.9, eps=0.1),
    "adam_mini, out in": mini(TORCH_BLOCKS, OUT_IN),
    "adam_sn": subset_norm(adam_sn, Subsets(), LARGER),
    "adam_sn, out in": subset_norm(adam_sn, Subsets(), TORCH_LARGER, OUT_IN),
    "adam_sn, mean": subset_norm(
        adam_sn, Subsets(reduction="mean"), FEW_LARGER, b1=0.5, b2=0.9, eps=0.1
    ),
    "adam_sn, runs of a root": in_runs_of(adam_sn, -1),
    "adam_sn, runs of half a root": in_runs_of(adam_sn, -2),
    "adam_sn, runs of 4": in_runs_of(adam_sn, 4, "mean"),
    "adam_sn, runs of all": in_runs_of(adam_sn, 1000),
    "adagrad_sn": subset_norm(adagrad_sn, Subsets(), FEW_LARGER),
    "adagrad_sn, mean": subset_norm(adagrad_sn, Subsets(reduction="mean"), TORCH_LARGER, OUT_IN),
    "adagrad_sn, runs": in_runs_of(adagrad_sn, -1),
    "came": factored(),
    "came, other settings": factored(
        "kernel",
        "out/kernel",
        "norm/scale",
        b1=0.5,
        b2=0.99,
        b3=0.9,
        eps=1e-3,
        instability_eps=1e-2,
        clip_threshold=0.5,
    ),
}


@dataclass(frozen=True)
class Trajectory:
    """What an optimizer and the oracles did to the same parameters.

    Attributes:
        updates: of each step.
        expected: those of the oracles.
        state: the last one, of the rescaling.
        oracles: after the last step.
    """

    updates: list[Tree]
    expected: list[Tree]
    state: Any
    oracles: dict[str, Any]


def stepping(tx: Optimizer, params: Tree) -> tuple[Any, Callable[..., Any]]:
    """The first state, and a compiled step to the update, the next state and parameters."""

    @jax.jit
    def step(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any, Tree]:
        updates, state = tx.update(grads, state, params)
        return updates, state, optax.apply_updates(params, updates)

    return jax.jit(tx.init)(params), step


@functools.cache
def trajectory(
    comparison: Comparison, grad_dtype: str = "float32", param_dtype: str = "float32"
) -> Trajectory:
    params = starts(comparison.shapes, param_dtype)
    oracles = comparison.oracles(params)
    state, step = stepping(comparison.optimizer(), params)
    updates, expected = [], []
    for _, drawn in zip(range(STEPS), gradients(comparison.shapes), strict=False):
        grads = cast(drawn, grad_dtype)
        update, state, params = step(grads, state, params)
        updates.append(update)
        expected.append({path: oracle.step(grads[path]) for path, oracle in oracles.items()})
    return Trajectory(updates, expected, state[0], oracles)


PARAMETERS = [
    pytest.param(name, path, id=f"{name}-{path}")
    for name, comparison in COMPARISONS.items()
    for path in comparison.shapes
]


@pytest.mark.parametrize(("name", "path"), PARAMETERS)
def test_every_step_is_the_oracles(name: str, path: str) -> None:
    run = trajectory(COMPARISONS[name])
    for step, (updates, expected) in enumerate(zip(run.updates, run.expected, strict=True)):
        scale = np.abs(expected[path]).max(initial=0)
        np.testing.assert_allclose(
            updates[path], expected[path], rtol=2e-5, atol=1e-5 * scale, err_msg=f"step {step}"
        )


@pytest.mark.parametrize(
    ("name", "path"), [param for param in PARAMETERS if not param.values[0].startswith("came")]
)
def test_the_state_holds_one_number_for_each_block(name: str, path: str) -> None:
    comparison = COMPARISONS[name]
    run, kept = trajectory(comparison), comparison.shared[path].kept
    nu, oracle = run.state.nu[path], run.oracles[path]
    assert nu.shape == kept.shape
    np.testing.assert_allclose(nu, oracle.nu[kept], rtol=1e-5)
    np.testing.assert_allclose(run.state.mu[path], oracle.mu, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", CAME_MATRICES)
def test_the_state_of_came_holds_a_number_for_each_row_and_column(path: str) -> None:
    run = trajectory(COMPARISONS["came"])
    oracle, state = run.oracles[path], run.state
    np.testing.assert_allclose(
        state.mu[path], oracle.mu.reshape(oracle.shape), rtol=1e-5, atol=1e-6
    )
    if not oracle.factored:
        np.testing.assert_allclose(state.nu_row[path], oracle.nu, rtol=1e-5)
        return
    for field in ("nu_row", "nu_col", "instability_row", "instability_col"):
        found, expected = getattr(state, field)[path], getattr(oracle, field)
        assert found.ndim == len(oracle.shape)
        np.testing.assert_allclose(found.ravel(), expected.ravel(), rtol=2e-5, err_msg=field)


# --- Dtypes --------------------------------------------------------------------------------------

METHODS = {
    "adam_mini": mini(
        {path: BLOCKS[path] for path in ("norm/scale", "query/kernel", "q_proj/kernel")}
    ),
    "adam_sn": subset_norm(
        adam_sn, Subsets(), {path: LARGER[path] for path in ("norm/scale", "query/kernel")}
    ),
    "adagrad_sn": in_runs_of(adagrad_sn, -1, paths=("kernel", "crossing/kernel")),
    "came": factored("kernel", "query/kernel", "norm/scale"),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_arithmetic_is_float32_for_bfloat16_gradients(name: str) -> None:
    run = trajectory(METHODS[name], "bfloat16")
    for updates, expected in zip(run.updates, run.expected, strict=True):
        for path, update in updates.items():
            assert update.dtype == jnp.float32
            scale = np.abs(expected[path]).max(initial=0)
            np.testing.assert_allclose(
                update, expected[path], rtol=2e-5, atol=1e-5 * scale, err_msg=path
            )


@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_float32_for_bfloat16_parameters(name: str) -> None:
    low, full = (
        trajectory(METHODS[name], "bfloat16", "bfloat16"),
        trajectory(METHODS[name], "bfloat16"),
    )
    floats = [leaf for leaf in jax.tree.leaves(low.state) if leaf.dtype != jnp.int32]
    assert {str(leaf.dtype) for leaf in floats} == {"float32"}
    for found, expected in zip(*map(jax.tree.leaves, (low.state, full.state)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    first = low.updates[0]
    for path, expected in low.expected[0].items():
        assert first[path].dtype == jnp.bfloat16
        # Each link of the chain rounds once.
        np.testing.assert_allclose(
            first[path].astype(jnp.float32),
            expected,
            rtol=3 * 2**-8,
            atol=2**-8 * np.abs(expected).max(initial=0),
            err_msg=path,
        )


@pytest.mark.parametrize("name", METHODS)
def test_a_bfloat16_momentum_is_rounded_after_its_use(name: str) -> None:
    comparison = METHODS[name]
    params = starts(comparison.shapes)
    oracles = comparison.oracles(params)
    state, take = stepping(comparison.optimizer(mu_dtype=jnp.bfloat16), params)
    for _, drawn in zip(range(STEPS), gradients(comparison.shapes), strict=False):
        grads = cast(drawn, jnp.float32)
        updates, state, params = take(grads, state, params)
        for path, oracle in oracles.items():
            expected = oracle.step(grads[path])
            scale = np.abs(expected).max(initial=0)
            np.testing.assert_allclose(
                updates[path], expected, rtol=2e-5, atol=1e-5 * scale, err_msg=path
            )
            stored = state[0].mu[path]
            assert stored.dtype == jnp.bfloat16
            stored = np.asarray(stored, np.float64).reshape(oracle.mu.shape)
            np.testing.assert_allclose(stored, oracle.mu, rtol=2**-8, atol=1e-6, err_msg=path)
            oracle.mu = stored
    others = jax.tree.leaves(state[0]._replace(mu=None))
    assert {str(leaf.dtype) for leaf in others} <= {"float32", "int32"}


# --- Laws ----------------------------------------------------------------------------------------

LAYERS = 3
LAYER = {
    "norm/scale": (12,),
    "mlp/bias": (5,),
    "query/bias": (3, 4),
    "mlp/kernel": (6, 5),
    "square/kernel": (4, 4),
    "odd/kernel": (3, 7),
    "query/kernel": (6, 3, 4),
    "value/kernel": (6, 3, 4),
    "out/kernel": (2, 3, 6),
    "q_proj/kernel": (6, 12),
    "grouped/qkv/kernel": (5, 24),
    "slots/qkv/kernel": (6, 3, 2, 4),
    "conv/kernel": (3, 3, 2, 5),
    "experts/wi": (3, 4, 5),
    "kv_einsum/w": (2, 3, 6, 4),
    "embed_tokens/embedding": (7, 4),
}
# Enough for transformations that only ask which axes are layers, inputs and outputs.
FEW = ("norm/scale", "query/bias", "square/kernel", "odd/kernel", "query/kernel", "experts/wi")
TRANSFORMATIONS: dict[str, Callable[..., Optimizer]] = {
    "adam_mini": scale_by_adam_mini,
    "larger side": scale_by_subset_norm,
    "runs": functools.partial(scale_by_subset_norm, subsets=Subsets("runs", size=-1)),
    "AdaGrad in runs": functools.partial(
        scale_by_subset_norm, b2=None, subsets=Subsets("runs", size=4)
    ),
    "came": scale_by_came,
}


@functools.cache
def one_layer(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Initialization and step of the parameters of a layer, compiled once for all tests."""
    tx = TRANSFORMATIONS[name](partition=IN_OUT)
    return jax.jit(tx.init), jax.jit(tx.update)


def layer_gradients(name: str, steps: int, seed: int) -> list[dict[str, npt.NDArray[np.float32]]]:
    shapes = LAYER if name == "adam_mini" else {path: LAYER[path] for path in FEW}
    drawn = gradients(shapes, seed)
    return [jax.tree.map(np.float32, next(drawn)) for _ in range(steps)]


@pytest.mark.parametrize("layer_axis", [0, 1])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_stacked_layers_are_as_if_each_were_alone(name: str, layer_axis: int) -> None:
    init, update = one_layer(name)
    alone, states = [], []
    layers = [layer_gradients(name, 6, seed) for seed in range(LAYERS)]
    for grads in layers:
        state, updates = init(grads[0]), []
        for gradient in grads:
            step, state = update(gradient, state)
            updates.append(step)
        alone.append(updates)
        states.append(state)

    partition = Partition(IN_OUT.rules, layer_axis=layer_axis)
    tx = TRANSFORMATIONS[name](partition=partition)
    stacked = [
        {
            f"layers/{path}": np.stack([layer[step][path] for layer in layers], layer_axis)
            for path in layers[0][0]
        }
        for step in range(6)
    ]
    state, update = jax.jit(tx.init)(stacked[0]), jax.jit(tx.update)
    for step, gradient in enumerate(stacked):
        updates, state = update(gradient, state)
        for path in layers[0][0]:
            expected = np.stack([layer[step][path] for layer in alone], layer_axis)
            np.testing.assert_allclose(
                updates[f"layers/{path}"], expected, rtol=1e-5, atol=1e-6, err_msg=path
            )
    if name == "came":
        return
    for path in layers[0][0]:
        expected = np.stack([layer.nu[path] for layer in states], layer_axis)
        np.testing.assert_allclose(state.nu[f"layers/{path}"], expected, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_where_gradients_are_zero_updates_are_too(name: str) -> None:
    init, update = one_layer(name)
    (dense,) = layer_gradients(name, 1, seed=0)
    nothing = jax.tree.map(np.zeros_like, dense)
    # Tokens that do not occur, or the first inputs of a kernel.
    sparse = jax.tree.map(np.copy, dense)
    for gradient in sparse.values():
        gradient[0] = 0
    state = init(dense)
    for gradient in (nothing, nothing, sparse, sparse):
        updates, state = update(gradient, state)
        for path, step in jax.tree.map(np.asarray, updates).items():
            assert (step[0] == 0).all(), path
            assert (step == 0).all() or gradient is sparse, path
            assert np.isfinite(step).all(), path
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("adam_mini", {"partition": Partition(())}),
        ("larger side", {"partition": Partition(())}),
        ("runs", {"subsets": Subsets("runs", size=3)}),
        ("came", {"partition": Partition(())}),
    ],
)
def test_the_state_of_another_partition_is_refused(name: str, changed: dict[str, Any]) -> None:
    tx = TRANSFORMATIONS[name](partition=IN_OUT)
    other = TRANSFORMATIONS[name](**{"partition": IN_OUT, **changed})
    params = {"query/kernel": jnp.ones((6, 3, 4))}
    with pytest.raises(
        ValueError,
        match=r"state of 'query/kernel' holds a second moment of shape \(.*\), but by these rules "
        r"it has \(.*\). Use the partition that the state was made with",
    ):
        tx.update(params, other.init(params))


def test_adam_mini_with_blocks_of_one_element_is_adam() -> None:
    shapes = {"kernel": (4, 5), "scale": (7,), "temperature": ()}
    ours = adam_mini(rate, b1=0.8, b2=0.99, eps=1e-3, partition=Partition(()))
    adam = optax.adam(rate, b1=0.8, b2=0.99, eps=1e-3)
    params = starts(shapes)
    state, reference = ours.init(params), adam.init(params)
    update, update_reference = jax.jit(ours.update), jax.jit(adam.update)
    for _, drawn in zip(range(20), gradients(shapes), strict=False):
        grads = cast(drawn, jnp.float32)
        updates, state = update(grads, state, params)
        expected, reference = update_reference(grads, reference, params)
        for path in shapes:
            np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_runs_of_one_element_are_adam_with_another_eps(reduction: Any) -> None:
    """The eps beside the uncorrected root is Adam's eps over the root of its correction."""
    b2, eps = 0.99, 1e-3
    tx = scale_by_subset_norm(b2=b2, eps=eps, subsets=Subsets("runs", 1, reduction))
    shapes = {"kernel": (3, 4), "scale": (5,)}
    state = tx.init(starts(shapes))
    reference = optax.scale_by_adam(b2=b2).init(starts(shapes))
    for step, drawn in zip(range(1, 6), gradients(shapes), strict=False):
        adam = optax.scale_by_adam(b2=b2, eps=eps / math.sqrt(1 - b2**step))
        grads = cast(drawn, jnp.float32)
        updates, state = tx.update(grads, state)
        expected, reference = adam.update(grads, reference)
        for path in shapes:
            np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5)


@pytest.mark.parametrize("b2", [0.99, None])
@pytest.mark.parametrize(
    ("shape", "options", "size"),
    [((16, 32), {}, 16), ((4, 64), {}, 4), ((8, 8), {"rule": "runs", "size": 16}, 16)],
)
def test_the_mean_differs_from_the_sum_by_the_root_of_the_size(
    shape: Shape, options: dict[str, Any], size: int, b2: float | None
) -> None:
    """To the last bit, as the root is a power of two."""
    params = {"kernel": jnp.zeros(shape)}
    outcomes = []
    for reduction in ("sum", "mean"):
        subsets = Subsets(**options, reduction=reduction)
        tx = scale_by_subset_norm(b2=b2, eps=0.0, subsets=subsets)
        state, update = tx.init(params), jax.jit(tx.update)
        for _, drawn in zip(range(4), gradients({"kernel": shape}), strict=False):
            updates, state = update(cast(drawn, jnp.float32), state)
        outcomes.append((updates["kernel"], state.nu["kernel"]))
    (summed, sums), (averaged, means) = outcomes
    np.testing.assert_array_equal(averaged, math.sqrt(size) * summed)
    np.testing.assert_array_equal(sums, size * means)
