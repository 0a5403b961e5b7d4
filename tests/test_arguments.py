"""Numbers that shape a state, as arguments of the optimizers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from microadam_jax import (
    Blocks,
    MicroAdamLayout,
    Refresh,
    Window,
    apollo_mini,
    galore,
    grass,
    memory_report,
    microadam,
    snsm,
    top_k,
)
from microadam_jax.codecs import affine4
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
        ({"window": 0}, "Window.length must be a positive int"),
        ({"block_size": 7}, "Blocks.size must be a positive even integer"),
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
    with pytest.raises(TypeError, match=rf"{name} shapes the state.*static_args=\('{name}',\)"):
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
