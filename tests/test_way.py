"""A gradient's way through the library: files that an update runs through, and changes of file."""

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from microadam_jax.methods import METHODS

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(str(ROOT / package) for package in ("microadam_jax", "pallas_kernels"))


def on_cpu(*arrays: Any, cpu: Any = None, default: Any = None, **others: Any) -> Any:
    """Returns what CPUs compute, of all that is traced."""
    return (cpu or default)(*arrays)


def way(name: str) -> list[str]:
    """The files of the functions that are called, one after another, in the update of a kernel."""
    tx = METHODS[name].factory(1e-3)
    params = {"mlp": {"kernel": jnp.ones((256, 512))}}
    state = tx.init(params)
    files: list[str] = []

    def called(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGES) and file != (files or [""])[-1]:
            files.append(file)

    update = jax.jit(tx.update)
    sys.setprofile(called)
    try:
        update.trace(params, state, params)
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize(
    ("name", "files", "changes"),
    [("adam_mini", 10, 25), ("adam_mini4bit", 24, 91), ("microadam", 25, 86)],
)
def test_the_way_gets_no_longer(
    name: str, files: int, changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.lax, "platform_dependent", on_cpu)
    found = way(name)
    assert len(set(found)) <= files
    assert len(found) - 1 <= changes


def test_transformations_do_not_know_how_they_are_run() -> None:
    """Kernels, chunks, placement on a mesh and the memory report are asked for elsewhere."""
    ours = ("engine.chunks", "sharding", "memory")
    how = ("pallas_kernels", "jax.sharding", *(f"microadam_jax.{name}" for name in ours))
    for path in (ROOT / "microadam_jax" / "transforms").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (module or "").startswith(how), f"{path.name} imports {module}"
