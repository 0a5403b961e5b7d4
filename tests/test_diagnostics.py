"""What the diagnostics say is what NumPy finds, and they change nothing."""

import csv
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from examples.llama.comparison import compare
from examples.llama.config import from_flags
from examples.llama.metrics import DiagnosticsFile
from microadam_jax import (
    accumulate_into_residual,
    adamw8bit,
    error_feedback,
    microadam,
    to_dense,
    top_k,
    with_diagnostics,
)

pytestmark = pytest.mark.usefixtures("fewer_optimizations")
GROUPS = {"matrices": "w.*"}


def get(state: object, field: str) -> dict[str, jax.Array]:
    return optax.tree_utils.tree_get(state, field)


def test_the_numbers_of_one_block() -> None:
    compressor = top_k(count=1, min_size=0, min_row=0)
    tx = with_diagnostics(
        optax.chain(error_feedback(compressor, residual="bfloat16"), to_dense()), GROUPS
    )
    g = {"w": jnp.array([3.0, 4.0, 1.001])}
    _, state = jax.jit(tx.update)(g, tx.init(g))
    rest, stored = np.array([3, 1.001], np.float32), np.array([3, 1], np.float32)
    expected = {
        "update_norm": 4,
        "kept_mass": 16 / (25 + 1.001**2),
        "residual_norm": np.sqrt(10),
        "quantization_error": np.linalg.norm(rest - stored) / np.linalg.norm(rest),
    }
    for field, value in expected.items():
        np.testing.assert_allclose(get(state, field)["matrices"], value, rtol=1e-4)
    nothing = {"update_norm": 0, "kept_mass": 1, "residual_norm": 0, "quantization_error": 0}
    assert {field: get(state, field)["other"] for field in expected} == nothing


def test_without_error_feedback_nothing_is_said_of_a_residual(tmp_path: Path) -> None:
    params = {"w": jnp.ones((2, 8))}
    tx = with_diagnostics(optax.sgd(0.5), GROUPS)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert float(get(state, "update_norm")["matrices"]) == 2
    assert [get(state, field) for field in DiagnosticsFile.FIELDS[1:4]] == [{}, {}, {}]
    file = DiagnosticsFile(tmp_path / "diagnostics.csv", last_step=0)
    file.append(1, state)
    assert file.path.read_text().splitlines()[1:] == ["1,matrices,2.0,,,,0.0", "1,other,0.0,,,,0.0"]


@pytest.mark.parametrize("inner", [microadam(1e-2), optax.adam(1e-2)], ids=["micro", "adam"])
def test_the_state_can_be_mapped(inner: optax.GradientTransformation) -> None:
    params = {"w": jnp.full((16, 512), 0.5), "b": jnp.ones(8)}
    tx = with_diagnostics(inner, GROUPS)
    state = tx.init(params)
    mapped = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


@pytest.mark.parametrize("inner", [microadam(1e-2), adamw8bit(1e-2)], ids=["micro", "8bit"])
def test_nothing_else_changes_and_guards_go_around(inner: optax.GradientTransformation) -> None:
    params = {"w": jnp.full((16, 512), 0.5), "b": jnp.ones(8)}
    tx = optax.apply_if_finite(with_diagnostics(inner, GROUPS), 3)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    expected, _ = jax.jit(inner.update)(params, inner.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert get(after, "update_norm")["matrices"] > 0


@pytest.mark.slow
def test_the_example_logs_them(tmp_path: Path) -> None:
    flags = (
        "--hidden 64 --intermediate 128 --layers 2 --heads 2 --seq-len 16 --batch 2 "
        "--eval-batches 2 --max-bytes 100000 --steps 4 --log-every 2 --optimizer microadam "
        f"--diagnostics --out {tmp_path}"
    )
    assert compare(from_flags(flags.split()), Console(file=io.StringIO()))
    with (tmp_path / "microadam" / "diagnostics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["step"], row["group"]) for row in rows] == [
        (step, group) for step in "24" for group in ("attention", "feed-forward", "other")
    ]
    assert all(0 < float(row["kept_mass"]) < 1 for row in rows)


def test_guards_inside_are_refused() -> None:
    params = {"w": jnp.ones((64, 256))}
    for inner in (
        optax.MultiSteps(microadam(1e-3), 2).gradient_transformation(),
        optax.apply_if_finite(microadam(1e-3), 2),
        accumulate_into_residual(microadam(1e-3), 2),
    ):
        with pytest.raises(ValueError, match="Put it around with_diagnostics"):
            with_diagnostics(inner).init(params)
