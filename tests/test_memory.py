import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from microadam_jax import MicroAdamLayout, Window, memory_report, microadam, top_k
from microadam_jax.__main__ import main
from microadam_jax.codecs import affine4
from microadam_jax.methods import METHODS
from microadam_jax.models import model_shapes

MATRIX = {"w": jax.ShapeDtypeStruct((64, 4096), jnp.float32)}
GIB = 2**30
README = pathlib.Path(__file__).parents[1] / "README.md"


def test_adam_of_any_tree_is_eight_bytes() -> None:
    report = memory_report(optax.adamw(1e-3), model_shapes("gpt2"))
    assert report.total == 8 * 124_439_808 + 4
    assert report.fields["ScaleByAdamState.mu"] == 4 * 124_439_808
    assert report.bytes_per_parameter == pytest.approx(8)


@pytest.mark.parametrize(("window", "k"), [(1, 1), (3, 10), (10, 3), (20, 3)])
@pytest.mark.parametrize("statistics", ["float32", "bfloat16"])
def test_microadam_is_its_formula(window: int, k: int, statistics: str) -> None:
    """Half a byte of codes, two statistics a bucket, m k entries of 3 bytes a block."""
    layout = MicroAdamLayout(top_k(count=k), affine4(256, statistics=statistics), Window(window))
    report = memory_report(microadam(1e-3, layout=layout), MATRIX)
    each = 4 if statistics == "float32" else 2
    formula = 0.5 + 2 * each / 256 + 3 * window * k / 256
    counts = 2 * 4
    assert report.total - counts == formula * report.parameters


def test_the_papers_layout_takes_the_published_bytes_for_llama2_7b() -> None:
    report = memory_report(microadam(1e-3, layout="paper"), model_shapes("llama2-7b"))
    residual = "ErrorFeedbackState.residual."
    statistics = report.fields[residual + "low"] + report.fields[residual + "high"]
    assert round((report.total - statistics) / GIB, 2) == 5.65
    assert round(report.total / GIB, 2) == 6.04


def test_random_keys_have_bytes_too() -> None:
    noisy = optax.add_noise(0.1, 0.5, jax.random.key(0))
    assert memory_report(noisy, MATRIX).total == 4 + 8


def test_small_leaves_and_padded_rows_are_named() -> None:
    params = {
        "norm": jax.ShapeDtypeStruct((512,), jnp.float32),
        "odd": jax.ShapeDtypeStruct((64, 5461), jnp.float32),
        **MATRIX,
    }
    report = memory_report(microadam(1e-3), params)
    assert report.remarks == {
        "too small to compress, kept dense": ("norm",),
        "rows of 5461 have no even divisor that fits, last block padded": ("odd",),
    }
    assert "kept dense (1): norm" in str(report)


def test_a_second_report_of_the_same_optimizer_says_the_same() -> None:
    """`eval_shape` answers a function that it knows from its cache, without calling it."""
    tx, params = microadam(1e-3), {"norm": jax.ShapeDtypeStruct((8,), jnp.float32)}
    assert memory_report(tx, params) == memory_report(tx, params)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"w": True}),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.partition({"all": tx}, {"w": "all"}),
    ],
)
def test_wrappers_keep_the_names_of_the_fields(wrap) -> None:
    report = memory_report(wrap(microadam(1e-3)), MATRIX)
    assert report.fields["ErrorFeedbackState.residual.codes"] == 64 * 4096 // 2


def test_nothing_is_allocated() -> None:
    huge = {"w": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    assert memory_report(microadam(1e-3), huge).parameters == 2**40


@pytest.mark.parametrize(
    "params", [{}, {"a": None}, {"e": jax.ShapeDtypeStruct((0, 4), "float32")}]
)
def test_trees_without_parameters(params: dict) -> None:
    report = memory_report(microadam(1e-3), params)
    assert report.parameters == 0
    assert "total" in str(report)


def test_the_command_prints_the_table_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", "llama2-7b"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0].strip(): line.split()[-2:] for line in lines}
    assert lines[0] == "llama2-7b: 6,738,415,616 parameters"
    assert rows["AdamW, float32"] == ["50.21", "8.000"]
    assert rows["microadam:layout=paper, as published *"] == ["5.65", "0.900"]
    shown = set()  # in README.md with Python's calls, on the command line with the planner's
    pattern = r"^\| (`\w.*) \| ([\d.]+) \| ([\d.]+) GiB \|$"
    for cell, size, total in re.findall(pattern, README.read_text(), re.M):
        for code in re.findall(r"`([^`]+)`", cell):
            label = re.sub(r"\(rank=(\d+)\)", r", rank \1", code)
            label = re.sub(r'\((\w+)="(\w+)"\)', r":\1=\2", label)
            assert rows[label][0] == total, label
            assert abs(float(rows[label][1]) - float(size)) <= 0.0051, label
            shown.add(re.split(r"[,:]", label)[0])
    assert shown == set(METHODS)


def test_the_command_prints_fields(capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", "gpt2", "--fields"])
    assert "ScaleByWindowAdamState.window_indices" in capsys.readouterr().out


def test_the_command_names_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "llama9"])
    assert "llama2-7b" in capsys.readouterr().err
