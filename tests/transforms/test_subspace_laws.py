"""Laws that subspaces, and methods in them, obey; and where their states lie on a mesh."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from microadam_jax import (
    Matrices,
    Refresh,
    adam_sn,
    fira,
    galore,
    grass,
    ldadam,
    project_gradients,
    snsm,
    subspace_momentum,
)
from microadam_jax.layout.subsets import Subsets
from microadam_jax.methods import METHODS
from microadam_jax.subspace import (
    Discard,
    FeedBack,
    NormMatchedRest,
    ScaledGradient,
    Subspace,
    dct_columns,
    gaussian,
    orthogonal_gaussian,
    power_iteration,
    randomized_svd,
    sampled_rows,
    srht,
    svd,
    top_k_rows,
    uniform_rows,
)
from tests.contracts.meshes import AXES, collectives, mesh_of
from tests.oracles.subspace import leading_singular_vectors, refresh_steps
from tests.transforms.matrices_with_spectra import SHAPES, each_shape, gradients

pytestmark = pytest.mark.usefixtures("fewer_optimizations")

ORTHOGONAL = {
    "svd": svd(5),
    "randomized_svd": randomized_svd(5),
    "power_iteration": power_iteration(5),
    "orthogonal_gaussian": orthogonal_gaussian(5),
    "srht": srht(5),
    "top_k_rows": top_k_rows(5),
    "sampled_rows": sampled_rows(5, replacement=False),
    "uniform_rows": uniform_rows(5),
    "dct_columns": dct_columns(5),
}
SUBSPACES = ORTHOGONAL | {"sampled with replacement": sampled_rows(5), "gaussian": gaussian(5)}
each_subspace = pytest.mark.parametrize("name", SUBSPACES)


def passed(tx: optax.GradientTransformation, *steps: Any) -> tuple[Any, Any]:
    """The last updates and state after the gradients ``steps``."""
    state, update, updates = tx.init(steps[0]), jax.jit(tx.update), None
    for g in steps:
        updates, state = update(g, state)
    return updates, state


def through(subspace: Subspace, **options: Any) -> optax.GradientTransformation:
    """What of a gradient goes through a subspace and back."""
    return project_gradients(optax.identity(), subspace, Refresh(1), **options)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (3, 8, 12)], ids=str)
@pytest.mark.parametrize("name", ORTHOGONAL)
def test_bases_are_orthonormal(name: str, shape: tuple[int, ...]) -> None:
    """An orthogonal projection splits the square of a norm in two, and has its rank."""
    g = jnp.asarray(next(gradients(shape)), jnp.float32)
    stack = "layers" if len(shape) == 3 else "mlp"
    once, _ = passed(through(ORTHOGONAL[name]), {stack: {"kernel": g}})
    once = once[stack]["kernel"]
    inside, whole = (np.sum(np.square(x), axis=(-2, -1)) for x in (once, g))
    outside = np.sum(np.square(g - once), axis=(-2, -1))
    np.testing.assert_allclose(inside + outside, whole, rtol=1e-5)
    assert (np.linalg.matrix_rank(np.asarray(once), tol=1e-4) <= 5).all()


@pytest.mark.parametrize("name", ["svd", "randomized_svd", "power_iteration"])
@each_shape
def test_leading_subspaces_are_the_singular_one(name: str, shape: str) -> None:
    """The randomized one by its second digit, because the spectrum falls."""
    g = next(gradients(SHAPES[shape]))
    steps = [jnp.asarray(g, jnp.float32)] * (20 if name == "power_iteration" else 1)
    out, _ = passed(through(ORTHOGONAL[name]), *steps)
    u = leading_singular_vectors(g, 5)
    best = u @ u.T @ g
    error = np.linalg.norm(out - best) / np.linalg.norm(g - best)
    assert error < (1e-4 if name == "svd" else 0.1)


def test_the_singular_vectors_have_no_arbitrary_sign() -> None:
    g = jnp.asarray(next(gradients((12, 20))), jnp.float32)
    one, other = (passed(through(svd(4)), x)[1].basis.vectors for x in (g, -g))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_mean_of_what_sampled_rows_keep_is_the_gradient() -> None:
    g = jnp.asarray(next(gradients((6, 8))), jnp.float32)
    draws = 4000
    tx = through(sampled_rows(3))
    state = tx.init(g)

    def step(state: Any, _: Any) -> tuple[Any, Any]:
        updates, state = tx.update(g, state)
        return state, updates

    _, kept = jax.lax.scan(step, state, length=draws)
    mean, error = kept.mean(0), kept.std(0) / draws**0.5
    assert (np.abs(mean - g) < 5 * error + 1e-6).all()


def test_the_mean_of_gaussian_projections_is_the_gradient() -> None:
    g = jnp.asarray(next(gradients((6, 8))), jnp.float32)
    tx = through(gaussian(3))
    _, kept = jax.lax.scan(lambda s, _: tx.update(g, s)[::-1], tx.init(g), length=4000)
    assert (np.abs(kept.mean(0) - g) < 5 * kept.std(0) / 4000**0.5).all()


def test_a_row_that_is_drawn_twice_counts_twice() -> None:
    g = jnp.zeros((4, 8)).at[2].set(1.0)  # the only row that can be drawn
    updates, state = passed(through(sampled_rows(3)), g)
    assert (np.asarray(state.basis.indices) == 2).all()
    np.testing.assert_allclose(updates, g, rtol=1e-6)


@pytest.mark.parametrize(
    ("refresh", "first"), [(Refresh(4), 0), (Refresh(4, first=1), 1)], ids=["0", "1"]
)
def test_bases_change_when_they_should(refresh: Refresh, first: Any) -> None:
    tx = project_gradients(optax.identity(), orthogonal_gaussian(3), refresh)
    g = jnp.ones((6, 8))
    state, changes = tx.init(g), []
    for step in range(14):
        _, new = tx.update(g, state)
        if not np.array_equal(new.basis.vectors, state.basis.vectors):
            changes.append(step)
        state = new
    assert changes == refresh_steps(4, 14, first)


def test_staggered_refreshes_are_spread_over_the_interval() -> None:
    tx = project_gradients(optax.identity(), orthogonal_gaussian(3), Refresh(4, stagger=True))
    grads = {f"w{i}": jnp.ones((6, 8)) for i in range(4)}
    state, changes = tx.init(grads), []
    for _ in range(9):
        _, new = tx.update(grads, state)
        one, other = new.basis.vectors, state.basis.vectors
        changes.append({n for n in grads if not np.array_equal(one[n], other[n])})
        state = new
    assert changes[0] == set(grads)
    assert changes[1:5] == changes[5:9]
    assert sorted(map(len, changes[1:5])) == [1, 1, 1, 1]


def test_the_whole_space_is_adam_in_another_basis() -> None:
    """GaLore with full rank, scale 1 and one basis: for Adam's sake, of a diagonal gradient."""
    shape = (4, 6)
    tx = galore(1e-2, scale=1.0, subspace=top_k_rows(4), update_interval=Refresh(10**6))
    adam = optax.adam(1e-2, eps=0)
    grads = [jnp.asarray(g, jnp.float32) for _, g in zip(range(5), gradients(shape), strict=False)]
    params = jnp.zeros(shape)
    state, expected_state = tx.init(params), adam.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        expected, expected_state = adam.update(g, expected_state, params)
        np.testing.assert_allclose(updates, expected, rtol=2e-3)  # by its eps


def kernels(shape: tuple[int, int], steps: int) -> list[dict[str, jax.Array]]:
    some = zip(range(steps), gradients(shape), strict=False)
    return [{"kernel": jnp.asarray(g, jnp.float32)} for _, g in some]


def test_snsm_without_momentum_does_not_see_the_subspace() -> None:
    g = kernels((8, 12), 5)
    expected, _ = passed_with_params(adam_sn(-1.0, b1=0.0), *g)  # its learning rate negates
    for subspace in (svd(3), uniform_rows(2)):
        updates, _ = passed(subspace_momentum(b1=0.0, subspace=subspace), *g)
        np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-4, atol=1e-5)


def test_snsm_in_the_whole_space_is_subset_norm_with_momentum() -> None:
    g = kernels((8, 12), 5)
    expected, _ = passed_with_params(adam_sn(-1.0), *g)
    tx = subspace_momentum(subspace=svd(8), refresh=Refresh(10**6, first=1))
    updates, _ = passed(tx, *g)
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-3, atol=1e-4)


def test_snsm_may_be_adagrad() -> None:
    tx = subspace_momentum(b2=None, subspace=svd(2), subsets=Subsets("runs", size=4))
    g = jnp.full((4, 8), 3.0)
    updates, _ = passed(tx, g)
    inside = 0.1 / 2  # a constant matrix lies in its leading subspace; a run of 4 has norm 6
    np.testing.assert_allclose(updates, np.full((4, 8), inside), rtol=1e-4)


def passed_with_params(tx: optax.GradientTransformation, *steps: Any) -> tuple[Any, Any]:
    state, updates, zeros = tx.init(steps[0]), None, jax.tree.map(jnp.zeros_like, steps[0])
    for g in steps:
        updates, state = tx.update(g, state, zeros)
    return updates, state


def test_ldadam_remembers_all_that_it_does_not_apply() -> None:
    """E' + P g_l + beta P m~ - beta P_old m = a."""
    tx, (b1, g) = ldadam(1e-2, rank=3), (0.908, gradients((8, 12)))
    params = jnp.zeros((8, 12))
    state = tx.init(params)
    for _ in range(5):
        old = jax.tree.map(np.asarray, state[0])
        gradient = jnp.asarray(next(g), jnp.float32)
        _, state = tx.update(gradient, state, params)
        new = state[0]
        a, p, p_old = gradient + old.complement.residual, new.basis.vectors, old.basis.vectors
        mu, beta = old.inner_state.mu, b1 / (1 - b1)
        moved = p.T @ p_old @ mu
        owed = new.complement.residual + p @ (p.T @ a) + beta * (p @ moved - p_old @ mu)
        np.testing.assert_allclose(owed, a, rtol=1e-4, atol=1e-4)
        assert (np.asarray(new.inner_state.nu) >= 0).all()


def test_an_unchanged_basis_rotates_nothing() -> None:
    rotated, kept = (
        galore(1e-2, subspace=top_k_rows(3), update_interval=Refresh(1, moments=moments))
        for moments in ("rotate", "keep")
    )
    rows = jnp.arange(1.0, 7.0)[:, None]  # the same rows are the longest in every step
    g = [rows * (1 + 0.1 * jnp.abs(jnp.sin(jnp.arange(8.0) + k))) for k in range(6)]
    one, other = (passed_with_params(tx, *g)[0] for tx in (rotated, kept))
    np.testing.assert_allclose(one, other, rtol=1e-4)


@each_subspace
def test_gradients_of_zeros_and_of_low_rank_are_no_nan(name: str) -> None:
    """With a rank above the smaller side of one of them, too, and in any dtype."""
    grads = {
        "zero": jnp.zeros((6, 8)),
        "zero, half": jnp.zeros((6, 8), jnp.float16),
        "one": jnp.outer(jnp.arange(6.0), jnp.ones(8)).astype(jnp.bfloat16),
        "thin": jnp.ones((2, 9), jnp.float16),
    }
    orthonormal = SUBSPACES[name].orthonormal
    refresh = Refresh(1, moments="rotate" if orthonormal else "keep", momentum_share=0.5)
    complements = (FeedBack(), NormMatchedRest()) if orthonormal else (Discard(), ScaledGradient())
    for complement in complements:
        tx = project_gradients(
            optax.scale_by_adam(), SUBSPACES[name], refresh, complement, b1=0.9, b2=0.99
        )
        updates, state = passed(tx, grads, grads, grads)
        assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda g: g.dtype, grads)
        for leaf in jax.tree.leaves((updates, state)):
            assert np.isfinite(leaf.astype(jnp.float32)).all()


SEEKING = {
    "svd": svd(2),
    "randomized_svd": randomized_svd(2),
    "power_iteration": power_iteration(2),
    "top_k_rows": top_k_rows(2),
    "sampled_rows": sampled_rows(2),
    "distinct rows": sampled_rows(2, replacement=False),
    "dct_columns": dct_columns(2),
}


@pytest.mark.parametrize("name", SEEKING)
@pytest.mark.parametrize("every", [1, 200])
def test_the_first_gradient_that_is_not_zero_finds_the_basis(name: str, every: int) -> None:
    """The steps before it leave no trace, and a later gradient of zeros leaves the basis."""
    tx = project_gradients(
        optax.trace(0.9), SEEKING[name], Refresh(every), matrices=Matrices(side="in")
    )
    g = jnp.asarray(next(gradients((2, 6, 8))), jnp.float32)
    update, zeros = jax.jit(tx.update), {"layers": {"kernel": jnp.zeros_like(g)}}
    grads = {"layers": {"kernel": g}}
    half = {"layers": {"kernel": g.at[1].set(0)}}  # the second of two layers starts later
    state = tx.init(zeros)
    for quiet in (zeros, zeros, half):
        _, state = update(quiet, state)
    updates, after = update(grads, state)
    begins = tx.init(zeros)._replace(count=jnp.int32(3 if every == 1 else 0))
    expected, _ = update(grads, begins)
    found, right = (tree["layers"]["kernel"][1] for tree in (updates, expected))
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)
    assert jnp.linalg.norm(found) > 0
    _, later = update(zeros, after)
    jax.tree.map(np.testing.assert_array_equal, later.basis, after.basis)


@pytest.mark.parametrize("name", ["galore", "fira", "grass", "snsm", "ldadam", "dct_adamw"])
def test_a_layer_without_a_gradient_leaves_the_others_their_bases(name: str) -> None:
    """As an expert that nothing was sent to, or a layer of a stack that is frozen."""
    refresh = Refresh(4, moments="reset" if name == "grass" else "keep")
    tx = METHODS[name].factory(1e-2, rank=2, update_interval=refresh)
    stacks = [
        {"layers": {"kernel": jnp.asarray(g, jnp.float32)}}
        for g, _ in zip(gradients((3, 8, 12)), range(7), strict=False)
    ]
    dead = jax.tree.map(lambda g: g.at[2].set(0), stacks)
    alive, others = (passed_with_params(tx, *steps) for steps in (stacks, dead))
    for one, other in zip(jax.tree.leaves(alive), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(*(x[:2] if len(x.shape) == 3 else x for x in (one, other)))


@pytest.mark.parametrize(
    ("shape", "late"),
    [((2, 8, 12), slice(None)), ((2, 8, 12), 1), ((2, 3, 8, 12), (1, 2)), ((3, 8, 12), 1)],
    ids=["all", "one layer", "one expert of a layer", "one expert"],
)
def test_moments_begin_where_a_first_gradient_comes_between_two_bases(
    shape: tuple[int, ...], late: Any
) -> None:
    """Their age would else be that of the matrices beside them, and a step five times too large."""
    name = "experts/wi" if 3 in shape else "kernel"
    g = {"layers" if shape[0] == 2 else "block": {name: jnp.ones(shape)}}
    quiet = jax.tree.map(lambda x: x.at[late].set(0), g)
    updates, _ = passed_with_params(grass(1.0, rank=2, update_interval=1000), *[quiet] * 99, g)
    (u,) = jax.tree.leaves(updates)
    np.testing.assert_allclose(np.abs(u).max((-2, -1)), 1, rtol=1e-3)


def test_a_limiter_that_saw_zeros_opens_again() -> None:
    """The released code would shorten everything to 1.01 times zero from then on."""
    zeros, g = jnp.zeros((6, 8)), jnp.asarray(next(gradients((6, 8))), jnp.float32)
    tx = project_gradients(optax.identity(), svd(2), Refresh(1), NormMatchedRest())
    updates, _ = passed(tx, zeros, g)
    assert np.abs(updates).max() > 0.1


@pytest.mark.parametrize("name", ["svd", "power_iteration"])
def test_no_decomposition_runs_between_refreshes(name: str) -> None:
    """It stands in a conditional whose predicate is a scalar, also for stacked layers."""
    params = {"layers": {"kernel": jnp.zeros((3, 8, 12))}, "head": jnp.zeros((8, 12))}
    tx = project_gradients(optax.scale_by_adam(), SUBSPACES[name], Refresh(10))
    compiled = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
    entry = compiled[compiled.index("ENTRY") :]
    assert " conditional(" in entry
    assert "lapack" in compiled
    assert "lapack" not in entry


def test_any_transformation_goes_inside() -> None:
    params = {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}
    g = jax.tree.map(lambda p: 2 * p, params)
    for inner in (
        optax.trace(0.9, nesterov=True),
        optax.scale_by_lion(),
        optax.scale_by_rms(),
        optax.chain(optax.scale_by_adam(mu_dtype=jnp.bfloat16), optax.scale(2.0)),
    ):
        for moments in ("keep", "reset"):
            tx = project_gradients(inner, svd(2), Refresh(2, moments=moments))
            updates, state = passed(tx, g, g, g)
            plain = optax.with_extra_args_support(inner)
            expected, _ = passed(plain, *[g["bias"]] * 3)
            np.testing.assert_allclose(updates["bias"], expected, rtol=1e-5)
            assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(params))


def test_a_reset_starts_the_moments_anew() -> None:
    tx = project_gradients(optax.trace(0.9), svd(2), Refresh(3, moments="reset"))
    g = {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}
    updates, _ = passed(tx, g, g, g, g)
    np.testing.assert_allclose(updates["kernel"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], 1 + 0.9 + 0.81 + 0.729, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name, row in METHODS.items() if "update_interval" in row.parameters]
)
def test_an_interval_alone_leaves_all_else_as_the_method_publishes_it(name: str) -> None:
    make = functools.partial(METHODS[name].factory, 1e-2, **METHODS[name].at_rank(3))
    params = {"mlp": {"kernel": jnp.ones((12, 9))}}
    trees = [{"mlp": {"kernel": g}} for g in itertools.islice(gradients((12, 9)), 5)]
    results = []
    for interval in (2, Refresh(2)):
        tx = make(update_interval=interval)
        state = tx.init(params)
        for grads in trees:
            updates, state = jax.jit(tx.update)(grads, state, params)
        results.append((updates, state))
    jax.tree.map(np.testing.assert_array_equal, *results)


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: svd(0), "rank"),
        (lambda: gaussian(2.0), "rank"),
        (lambda: Refresh(0), "every"),
        (lambda: Refresh(moments="forget"), "moments"),
        (lambda: Refresh(first=2), "first"),
        (lambda: Refresh(momentum_share=2.0), "momentum_share"),
        (lambda: randomized_svd(2, oversample=-1), "oversample"),
        (lambda: Matrices(side="left"), "side"),
        (lambda: Matrices(square="left"), "square"),
        (lambda: FeedBack(dtype="int8"), "dtype"),
        (lambda: snsm(1e-2, rank=2, subspace=sampled_rows(2)), "RawRest takes .*ReplacedRows"),
        (lambda: fira(1e-2, rank=2, subspace=gaussian(2)), "NormMatchedRest takes .*Gaussian"),
        (
            lambda: ldadam(1e-3, rank=2, subspace=gaussian(2), complement=Discard()),
            r"Refresh\(moments='rotate'\) takes .*Gaussian.*replacement=False",
        ),
        (lambda: subspace_momentum(subspace=svd(1), refresh=Refresh(moments="rotate")), "second"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"complement": FeedBack()}, "b1"),
        ({"refresh": Refresh(moments="rotate"), "b1": 0.9}, "b2"),
        ({"refresh": Refresh(moments="rotate"), "b1": 0.9, "b2": 0.99}, "'mu' or 'trace'"),
    ],
)
def test_moments_that_are_not_there_are_refused(options: Any, message: str) -> None:
    tx = project_gradients(optax.identity(), svd(1), **options)
    with pytest.raises(ValueError, match=message):
        tx.init(jnp.zeros((4, 4)))


# --- Meshes --------------------------------------------------------------------------------------

WITHOUT_GATHER = {
    name: SUBSPACES[name]
    for name in (
        "top_k_rows",
        "sampled_rows",
        "sampled with replacement",
        "uniform_rows",
        "gaussian",
        "orthogonal_gaussian",
        "dct_columns",
    )
}


@pytest.mark.parametrize("mode", AXES)
@pytest.mark.parametrize("name", WITHOUT_GATHER)
def test_selections_along_a_whole_axis_gather_no_gradient(name: str, mode: str) -> None:
    """Norms of rows are summed over devices, and nothing else moves."""
    tx = project_gradients(
        optax.scale_by_adam(), WITHOUT_GATHER[name], Refresh(1), matrices=Matrices(side="in")
    )
    rows, columns = 16, 256
    g = jnp.asarray(next(gradients((rows, columns))), jnp.float32)
    expected, _ = jax.jit(tx.update)(g, tx.init(g))
    mesh = mesh_of(mode)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(g, NamedSharding(mesh, P(None, ("fsdp", "tp"))))
        state = tx.init(sharded)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (sharded, state))
        jitted = jax.jit(tx.update, out_shardings=shardings if mode == "auto" else None)
        update = jitted.lower(sharded, state).compile()
        updates, after = update(sharded, state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert all(size <= 2 * rows for _, size in collectives(update.as_text()))
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, P("fsdp", "tp")) for name in SUBSPACES),
        *((name, spec) for name in ("svd", "top_k_rows") for spec in (P(None, "tp"), P("fsdp"))),
    ],
    ids=str,
)
def test_explicit_axes_of_any_placement(name: str, spec: P) -> None:
    subspace = SUBSPACES[name]
    complement = FeedBack() if subspace.orthonormal else ScaledGradient()
    inner = optax.scale_by_adam()
    tx = project_gradients(inner, subspace, Refresh(3), complement, b1=0.9, b2=0.999)
    mesh = mesh_of("explicit")
    heads = jnp.asarray(next(gradients((16, 32))), jnp.float32).reshape(16, 8, 4)
    params = {"query": {"kernel": heads}, "mlp": jnp.asarray(next(gradients((16, 32))), "float32")}
    expected, _ = jax.jit(tx.update)(params, tx.init(params))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, NamedSharding(mesh, spec))
        state = tx.init(sharded)
        updates, after = jax.jit(tx.update)(sharded, state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, sharded)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, updates, expected)
