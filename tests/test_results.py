"""Tables of the pages, which are made of the results in the repository."""

import math
import pathlib

import pytest

from benchmarks.places import filled
from benchmarks.results import Run, append, best, difference, read, renewed, table

ROOT = pathlib.Path(__file__).parents[1]


def run(setting: str, rate: float, seed: int, loss: float, size: float = 8.0) -> Run:
    return Run(setting, rate, seed, "tiny", 600, size, loss, "0.10.2", "abc")


RUNS = [
    run("AdamW", 1e-3, 0, 1.6),
    run("AdamW", 1e-3, 1, 1.7),
    run("AdamW", 2e-3, 0, 1.5),
    run("new", 1e-3, 0, 1.5, 0.5),
    run("new", 1e-3, 1, 1.8, 0.5),
]


def test_rates_with_fewer_seeds_are_not_the_best() -> None:
    assert {name: list(runs) for name, runs in best(RUNS).items()} == {
        "AdamW": [0, 1],
        "new": [0, 1],
    }
    assert best(RUNS[:1] + RUNS[2:3])["AdamW"][0].rate == 2e-3


def test_differences_are_those_of_equal_seeds() -> None:
    mean, error = difference(best(RUNS)["new"], best(RUNS)["AdamW"])
    assert mean == pytest.approx(0.0)
    assert error == pytest.approx(0.1)  # of -0.1 and 0.1
    assert all(map(math.isnan, difference(best(RUNS)["new"], {})))
    assert table(RUNS)[-1] == "| new | 0.50 | 0.001 | 2 | 1.650 | +0.000 ± 0.100 |"


def test_a_file_keeps_what_it_has(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "runs.csv"
    assert read(path) == []
    for one in RUNS:
        append(path, one)
    assert read(path) == RUNS


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_pages_have_the_tables_of_their_files(page: str) -> None:
    text = (ROOT / page).read_text()
    assert renewed(text) == text, "run python -m benchmarks.results"


def test_a_place_is_filled_and_nothing_else() -> None:
    page = "before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n"
    expected = "before\n<!-- a -->\n\nnew\n\n<!-- end of a -->\nafter\n"
    assert filled(page, "a", ["new"]) == expected == filled(expected, "a", ["new"])
    with pytest.raises(ValueError, match="needs one place for this: <!-- b -->"):
        filled(page, "b", ["new"])
