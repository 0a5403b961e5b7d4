"""The report of a GPU, rehearsed on a CPU at small sizes."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import gpu_report

ROOT = pathlib.Path(__file__).parents[1]


def test_it_says_what_none_should_take() -> None:
    rows: dict[str, list[gpu_report.Row]] = {part: [] for part in gpu_report.PARTS}
    assert "XLA" in gpu_report.verdict(rows)
    times = [("None", 2.0), ("triton", 1.5)]
    rows["step"] = [{"optimizer": "microadam", "implementation": i, "ms": ms} for i, ms in times]
    assert "microadam: triton" in gpu_report.verdict(rows)


def test_every_size_of_block_of_the_models_is_compared() -> None:
    sizes = dict(gpu_report.block_sizes())
    assert {160, 172, 192, 228, 256} <= sizes.keys()


def test_the_page_has_a_place_for_each_table() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    for part in (*gpu_report.PARTS, "programs", "verdict"):
        assert f"<!-- gpu {part} -->" in page


@pytest.mark.slow
def test_all_parts_run_and_are_kept(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--small", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    for part in gpu_report.PARTS:
        lines = (tmp_path / f"{part}.json").read_text().splitlines()
        assert lines
        for row in map(json.loads, lines):
            assert not any(value for key, value in row.items() if key.endswith("that differ"))
