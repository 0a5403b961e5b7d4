"""Subspace methods against the float64 oracles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from microadam_jax import (
    Matrices,
    Refresh,
    apollo,
    apollo_mini,
    dct_adamw,
    fira,
    galore,
    grass,
    ldadam,
    snsm,
)
from microadam_jax.subspace import (
    Discard,
    FeedBack,
    RawRest,
    SignOfRest,
    Subspace,
    orthogonal_gaussian,
    sampled_rows,
    top_k_rows,
    uniform_rows,
)
from tests.oracles.microadam import Floats, Indices
from tests.oracles.subset_norm import larger_side
from tests.oracles.subspace import (
    DctAdamOracle,
    LDAdamOracle,
    ProjectedAdamOracle,
    SnsmOracle,
    refresh_steps,
)
from tests.transforms.matrices_with_spectra import SHAPES, each_shape, gradients

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

RANK, EVERY, STEPS = 4, 4, 14
# Kernels are (in, out): the smaller side is compressed, of a square the inputs, LDAdam's outputs.
COMPRESSED = {"wide": 0, "tall": 1, "square": 0}


def rate(step: Any) -> Any:
    """A schedule, so that a weight decay that read another step would show."""
    return 0.01 / (1 + 0.1 * step)


def start(shape: tuple[int, ...]) -> Floats:
    return np.random.default_rng(9).standard_normal(shape)


def vectors(state: Any, compressed: int) -> Floats:
    """The basis that a state holds, as columns in float64."""
    (basis,) = state.basis
    basis = np.asarray(basis, np.float64)
    return basis if compressed == 0 else basis.T


def selection(state: Any, compressed: int, rows: int) -> Floats:
    """The rows that a state selects, as weighted columns of the identity."""
    indices, *weights = (np.asarray(leaf).ravel() for leaf in state.basis)
    basis = np.zeros((rows, len(indices)))
    basis[indices, np.arange(len(indices))] = weights[0] if weights else 1.0
    return basis


def compare(
    tx: optax.GradientTransformation,
    oracle: Any,
    shape: tuple[int, int],
    basis_of: Callable[[Any], Floats] | None,
    tolerance: float = 2e-5,
) -> Any:
    """Steps both and compares what they add; the oracle takes the basis of ``tx``."""
    params = jnp.asarray(start(shape), jnp.float32)
    state, update = tx.init(params), jax.jit(tx.update)
    for _, g in zip(range(STEPS), gradients(shape), strict=False):
        updates, state = update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(jnp.asarray(g, jnp.float32), np.float64)
        if basis_of is None:
            expected = oracle.step(g)
        else:
            basis = basis_of(state[0])
            expected = oracle.step(g, lambda _: basis)  # noqa: B023
        scale = np.abs(expected).max()
        np.testing.assert_allclose(updates, expected, rtol=0, atol=tolerance * scale + 1e-9)
    return state


def every(first: int = 0) -> Callable[[int], bool]:
    steps = refresh_steps(EVERY, STEPS, first)
    return lambda step: step in steps


@each_shape
@pytest.mark.parametrize(
    ("factory", "options", "published"),
    [
        (galore, {}, {"alpha": 0.25}),
        (fira, {}, {"alpha": 0.25, "complement": "fira"}),
        (fira, {"scale": 1.0}, {"alpha": 1.0, "complement": "fira"}),
        (galore, {"complement": RawRest(0.3)}, {"alpha": 0.25, "complement": "raw", "weight": 0.3}),
        (
            galore,
            {"complement": SignOfRest(0.1)},
            {"alpha": 0.25, "complement": "sign", "weight": 0.1},
        ),
        (
            galore,
            {"update_interval": Refresh(EVERY, moments="reset")},
            {"alpha": 0.25, "reset": True},
        ),
    ],
    ids=["galore", "fira", "fira, scale 1", "raw", "sign", "reset"],
)
def test_galore_and_fira(shape: str, factory: Any, options: Any, published: Any) -> None:
    tx = factory(rate, **{"weight_decay": 0.1, "rank": RANK, "update_interval": EVERY, **options})
    side = COMPRESSED[shape]
    oracle = ProjectedAdamOracle(
        start(SHAPES[shape]), side, RANK, every(), rate, eps=1e-6, weight_decay=0.1, **published
    )
    compare(tx, oracle, SHAPES[shape], lambda state: vectors(state, side))


@each_shape
@pytest.mark.parametrize(
    ("factory", "complement", "scale"),
    [(apollo, "channel", 1.0), (apollo, "channel", 4.0), (apollo_mini, "tensor", 128.0)],
)
def test_apollo(shape: str, factory: Any, complement: Any, scale: float) -> None:
    """With a kept basis, which the oracle can read."""
    tx = factory(
        rate,
        scale=scale,
        weight_decay=0.1,
        update_interval=EVERY,
        subspace=orthogonal_gaussian(RANK),
    )
    side = COMPRESSED[shape]
    oracle = ProjectedAdamOracle(
        start(SHAPES[shape]),
        side,
        RANK,
        every(),
        rate,
        eps=1e-6,
        weight_decay=0.1,
        complement=complement,
        weight=scale,
    )
    compare(tx, oracle, SHAPES[shape], lambda state: vectors(state, side))


@each_shape
@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize(
    "subspace",
    [
        top_k_rows(RANK),
        sampled_rows(RANK),
        sampled_rows(RANK, replacement=False),
        uniform_rows(RANK),
    ],
    ids=str,
)
def test_grass(shape: str, subspace: Subspace, larger: bool) -> None:
    side = COMPRESSED[shape] if not larger or shape == "square" else 1 - COMPRESSED[shape]
    tx = grass(
        rate,
        scale=0.5,
        update_interval=EVERY,
        subspace=subspace,
        matrices=Matrices(side="larger" if larger else "smaller"),
    )
    oracle = ProjectedAdamOracle(
        start(SHAPES[shape]), side, RANK, every(), rate, alpha=0.5, reset=True, corrected_eps=True
    )
    rows = SHAPES[shape][side]
    compare(tx, oracle, SHAPES[shape], lambda state: selection(state, side, rows))


def test_steps_of_grass_are_no_larger_after_a_refresh_than_at_first() -> None:
    """Each of the rows has a gradient while it is selected, and then never again."""
    tx = grass(1.0, rank=1, update_interval=50)
    params = {"kernel": jnp.zeros((8, 16))}
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(400):
        gradient = jnp.zeros((8, 16)).at[t // 50].set(1.0)
        updates, state = update({"kernel": gradient}, state, params)
        assert float(jnp.abs(updates["kernel"]).max()) == pytest.approx(1, abs=1e-4)


@each_shape
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("fed", [True, False], ids=["fed in", "power iteration"])
def test_ldadam(shape: str, feedback: bool, fed: bool) -> None:
    """By itself, the oracle's power iteration drifts from the float32 one only by rounding."""
    side = {"wide": 0, "tall": 1, "square": 1}[shape]
    tx = ldadam(rate, weight_decay=0.1, rank=RANK, complement=FeedBack() if feedback else Discard())
    oracle = LDAdamOracle(
        start(SHAPES[shape]), side, RANK, every(), rate, weight_decay=0.1, feedback=feedback
    )
    tolerance = 5e-5 if fed else 2e-3
    basis_of = (lambda state: vectors(state, side)) if fed else None
    compare(tx, oracle, SHAPES[shape], basis_of, tolerance)


@each_shape
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("interval", [1, 4])
def test_dct_adamw(shape: str, feedback: bool, interval: int) -> None:
    tx = dct_adamw(
        rate,
        weight_decay=0.1,
        rank=RANK,
        update_interval=Refresh(interval, first=1, moments="rotate"),
        complement=FeedBack(momentum=False) if feedback else Discard(),
    )
    steps = refresh_steps(interval, STEPS, 1)
    oracle = DctAdamOracle(
        start(SHAPES[shape]),
        COMPRESSED[shape],
        RANK,
        lambda step: step in steps,
        rate,
        weight_decay=0.1,
        rotate=True,
        feedback=feedback,
    )
    compare(tx, oracle, SHAPES[shape], None)


@each_shape
@pytest.mark.parametrize("moments", ["keep", "reset", "rotate_first", "released"])
def test_snsm(shape: str, moments: Any) -> None:
    tx = snsm(
        rate, weight_decay=0.1, rank=RANK, update_interval=Refresh(EVERY, first=1, moments=moments)
    )
    side = COMPRESSED[shape]
    oracle = SnsmOracle(
        start(SHAPES[shape]),
        side,
        RANK,
        every(1),
        rate,
        weight_decay=0.1,
        subsets=torch_larger_side(SHAPES[shape]),
        moments="rotate" if moments == "rotate_first" else moments,
    )
    compare(tx, oracle, SHAPES[shape], lambda state: vectors(state, side))


@each_shape
@pytest.mark.parametrize("subspace", [top_k_rows(RANK), uniform_rows(RANK)], ids=str)
def test_snsm_of_rows(shape: str, subspace: Subspace) -> None:
    side = {"wide": 1, "tall": 0, "square": 1}[shape]
    tx = snsm(
        rate,
        update_interval=EVERY,
        subspace=subspace,
        matrices=Matrices(side="larger", square="out"),
    )
    oracle = SnsmOracle(
        start(SHAPES[shape]), side, RANK, every(1), rate, subsets=torch_larger_side(SHAPES[shape])
    )
    rows = SHAPES[shape][side]
    compare(tx, oracle, SHAPES[shape], lambda state: selection(state, side, rows))


def torch_larger_side(shape: tuple[int, int]) -> Indices:
    """The released rule speaks of (out, in)."""
    return larger_side(*shape[::-1]).T
