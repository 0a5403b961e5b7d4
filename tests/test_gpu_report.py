"""The report of a GPU, rehearsed on a CPU at small sizes."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import gpu_report, gpu_verdict

ROOT = pathlib.Path(__file__).parents[1]


def case(name: str, implementation: str, applied: str, ms: float) -> gpu_report.Row:
    row = gpu_report.step_case(*gpu_verdict.LARGE, name, implementation, applied == "fused")
    return {"device": "any", **row, "ms": ms, "% of copy bandwidth": 80}


def test_it_says_what_none_should_take_and_what_is_reached() -> None:
    rows: dict[str, list[gpu_report.Row]] = {part: [] for part in gpu_report.PARTS}
    assert "XLA" in "".join(gpu_report.verdict(rows))
    rows["step"] = [
        case("optax.adamw", "None", "after", 10.0),
        case("microadam", "None", "after", 7.0),
        case("microadam", "triton", "after", 6.0),
        case("microadam", "None", "fused", 5.9),  # with no other to compare
    ]
    text = "\n".join(gpu_report.verdict(rows))
    assert "`microadam`: None should take `triton` (1 programs" in text
    assert "microadam`, triton, after: 0.60 of AdamW's time, goal 0.8: reached" in text
    assert "microadam`, None, fused: 0.59 of AdamW's time, goal 0.55: missed" in text


def test_every_size_of_block_of_the_models_is_compared() -> None:
    sizes = dict(gpu_report.block_sizes())
    assert {160, 172, 192, 228, 256} <= sizes.keys()


def test_parts_together_take_less_than_ten_minutes() -> None:
    assert sum(part.minutes for part in gpu_report.PARTS.values()) < 10


def test_the_page_has_a_place_for_each_table() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    for part in (*gpu_report.PARTS, "programs", "verdict"):
        assert f"<!-- gpu {part} -->" in page


def test_cases_that_are_there_are_not_measured_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def one(case: gpu_report.Row, _: gpu_report.Measuring) -> list[gpu_report.Row]:
        measured.append(case["n"])
        if case["n"] == 1:
            raise NotImplementedError("not this one\nfor reasons")
        return [{"ms": 1.0}]

    part = gpu_report.Part(lambda _: iter([{"n": i} for i in range(3)]), one, 1.0)
    monkeypatch.setitem(gpu_report.PARTS, "step", part)
    assert gpu_report.measure("step", tmp_path, True, minutes=-1) == 0
    assert measured == []
    gpu_report.measure("step", tmp_path, True, minutes=1)
    gpu_report.measure("step", tmp_path, True, minutes=1)
    assert measured == [0, 1, 2]
    assert [row.get("note") for row in gpu_report.kept(tmp_path, "step")] == [
        None,
        "not this one",
        None,
    ]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report"])
    with pytest.raises(SystemExit, match=r"finds no GPU here, only cpu: .* --rehearse\.$"):
        gpu_report.main()


@pytest.mark.slow
def test_all_parts_run_and_are_kept(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--rehearse", "--minutes", "60"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, cwd=ROOT)
    for part in gpu_report.PARTS:
        lines = (tmp_path / f"{part}.jsonl").read_text().splitlines()
        assert lines
        for row in map(json.loads, lines):
            assert not any(value for key, value in row.items() if key.endswith("that differ"))
    for part in gpu_verdict.PICTURES:
        assert (tmp_path / f"gpu_{part}.svg").exists()
