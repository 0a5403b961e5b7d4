"""Benchmarks are run by hand, so only this notices a name that moved."""

import importlib
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_its_imports_are_there(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
