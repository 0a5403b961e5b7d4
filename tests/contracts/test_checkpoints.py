"""Orbax saves every state, and what is restored goes on bit for bit, on any mesh."""

import gc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from microadam_jax import (
    Blocks,
    Matrices,
    MicroAdamLayout,
    Partition,
    Window,
    adagrad_sn,
    adam_mini,
    adam_sn,
    adamw8bit,
    galore,
    microadam,
    require_state_format,
    sparse_ggt,
    sparse_mfac,
    state_format,
    state_shardings,
)
from microadam_jax.codecs import affine4, dynamic8
from microadam_jax.layout.subsets import Subsets
from tests.contracts.catalogue import ENTRIES, SPECS, VARIANTS, gradients, marks_of, parameters
from tests.contracts.closeness import assert_close_but_for_levels
from tests.contracts.meshes import mesh_of, place

pytestmark = [
    pytest.mark.usefixtures("fewer_optimizations"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::UserWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ),
]

RESUMED = ENTRIES | VARIANTS


def saveable() -> tuple[Any, Any]:
    """The contract's parameters without the zero-size leaf, which Orbax refuses, and specs."""
    params, specs = parameters(), dict(SPECS)
    del params["empty"], specs["empty"]
    return params, specs


def run(tx: optax.GradientTransformation, params: Any, state: Any, steps: range) -> Any:
    update = jax.jit(tx.update)
    for step in steps:
        _, state = update(gradients(params, step), state, params)
    return state


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in RESUMED])
def test_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    tx, (params, _) = RESUMED[name].make(), saveable()
    halfway = run(tx, params, tx.init(params), range(5))  # the window of 3 has wrapped
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halfway)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.eval_shape(lambda p: tx.init(p), params)
        )
    jax.tree.map(np.testing.assert_array_equal, restored, halfway)
    straight = run(tx, params, halfway, range(5, 8))
    jax.tree.map(np.testing.assert_array_equal, run(tx, params, restored, range(5, 8)), straight)


CHEAP = ("microadam, all compressed", "adam_mini")


@pytest.mark.parametrize(
    "name",
    [name if name in CHEAP else pytest.param(name, marks=pytest.mark.matrix) for name in RESUMED],
)
def test_restores_on_other_meshes(name: str, tmp_path: Path) -> None:
    """Bit for bit, unless numbers are summed over devices."""
    entry = RESUMED[name]
    tx, (params, specs) = entry.make(), saveable()
    halfway = run(tx, params, tx.init(params), range(4))
    expected = run(tx, params, halfway, range(4, 6))
    shapes = jax.eval_shape(lambda p: tx.init(p), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halfway)
        checkpointer.wait_until_finished()
        for devices in ((1, 1), (1, 2), (4, 2)):
            mesh = mesh_of("auto", devices)
            sharded = place(params, specs, mesh)
            placed = jax.tree.map(lambda leaf: leaf.sharding, sharded)
            where = state_shardings(tx, params, placed)
            target = jax.tree.map(
                lambda leaf, sharding: leaf.update(sharding=sharding), shapes, where
            )
            restored = checkpointer.restore(tmp_path / "state", target)
            jax.tree.map(np.testing.assert_array_equal, restored, halfway)
            update = jax.jit(tx.update, out_shardings=(placed, where))
            for step in range(4, 6):
                _, restored = update(place(gradients(params, step), specs, mesh), restored, sharded)
            assert jax.tree.map(lambda leaf: leaf.sharding, restored) == where
            if entry.shares:
                assert_close_but_for_levels(restored, expected)
            else:
                jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_another_block_size_is_refused(tmp_path: Path) -> None:
    params, _ = saveable()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", microadam(1e-3, layout="paper").init(params))
        checkpointer.wait_until_finished()
        other = jax.eval_shape(lambda p: microadam(1e-3).init(p), params)
        with pytest.raises(ValueError, match="shape"):
            checkpointer.restore(tmp_path / "state", other)
    gc.collect()  # Orbax leaves reads behind; their warnings belong to this test


WINDOWED = microadam(1e-3)
REFUSED = {
    "block size": (
        microadam(1e-3, layout=MicroAdamLayout(residual=affine4(Blocks(128)))),
        r"residual was Affine4.*size=256.*now Affine4.*size=128",
    ),
    "codec": (
        microadam(1e-3, layout=MicroAdamLayout(residual="bfloat16")),
        r"residual was .*ffine4.*is now .*bfloat16",
    ),
    "window": (
        microadam(1e-3, layout=MicroAdamLayout(window=Window(5))),
        "window was 10 in bfloat16 and is now 5 in bfloat16",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_state_of_other_settings_is_refused_with_both(change: str) -> None:
    params, _ = saveable()
    saved = state_format(WINDOWED, params)
    require_state_format(saved, microadam(1e-4, b1=0.8), params)
    other, sentence = REFUSED[change]
    with pytest.raises(ValueError, match=sentence):
        require_state_format(saved, other, params)


def test_other_codecs_and_dtypes_of_moments_are_refused_with_both() -> None:
    params = {"w": jax.ShapeDtypeStruct((64, 1024), np.float32)}
    saved = state_format(adamw8bit(1e-3), params)
    with pytest.raises(ValueError, match=r"dynamic8_b256.*is now not there.*dynamic8_b64"):
        require_state_format(saved, adamw8bit(1e-3, mu_codec=dynamic8(64)), params)
    saved = state_format(adam_mini(1e-3), params)
    with pytest.raises(ValueError, match="mu was float32: 65,536 and is now bfloat16: 65,536"):
        require_state_format(saved, adam_mini(1e-3, mu_dtype="bfloat16"), params)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (adam_sn(1e-2), adagrad_sn(1e-2), "subset norms was .*average and is now .*added up"),
        (
            adam_sn(1e-2),
            adam_sn(1e-2, subsets=Subsets(reduction="mean")),
            "was the sum of squares.*is now the mean",
        ),
        (
            adam_mini(1e-2),
            adam_mini(1e-2, partition=Partition((("kernel", "in | out -> in"),))),
            "another partition",
        ),
        (
            galore(1e-2, rank=8, matrices=Matrices(side="in")),
            galore(1e-2, rank=8, matrices=Matrices(side="out")),
            "another side",
        ),
        (sparse_ggt(1e-2), sparse_mfac(1e-2), "other links"),
    ],
)
def test_what_the_numbers_of_arrays_do_not_tell_is_refused(
    before: Any, after: Any, sentence: str
) -> None:
    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 64), np.float32)}}
    saved = state_format(before, params)
    require_state_format(saved, before, params)
    with pytest.raises(ValueError, match=sentence):
        require_state_format(saved, after, params)
    # What was saved before these were told is taken as it was.
    for told in "arrays", "subset norms":
        saved.pop(told, None)
    require_state_format(saved, before, params)


def test_another_format_version_is_refused_with_both() -> None:
    params, _ = saveable()
    saved = state_format(WINDOWED, params) | {"state format": 0}
    with pytest.raises(ValueError, match="state format was 0 and is now 1"):
        require_state_format(saved, WINDOWED, params)
