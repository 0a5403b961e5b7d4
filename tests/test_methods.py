"""The table of methods, and that neither code nor pages forget a row of it."""

import inspect
import math
import pathlib
import re
import types

import jax
import pytest

import microadam_jax
from microadam_jax import aliases, memory_report
from microadam_jax.methods import METHODS
from microadam_jax.optimizer_names import factories, factory_named, option_value

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "window": "microadam",
    "shared moments": "second_moments",
    "low bits": "low_bit",
    "full matrix": "efcp",
    "subspace": "subspace",
}
each_method = pytest.mark.parametrize("name", METHODS)


def formula(name: str, inputs: int, outputs: int, rank: int) -> float:
    """Returns what a row says of the bytes per parameter of a kernel."""
    sides = {"L": max(inputs, outputs), "s": min(inputs, outputs)}
    numbers = {"R": inputs, "C": outputs, "r": rank, **sides}
    return eval(METHODS[name].bytes_per_parameter, {}, numbers)


def test_every_optimizer_has_a_row() -> None:
    public = {name for name in aliases.__all__ if name.islower()}
    assert set(METHODS) == public <= set(microadam_jax.__all__)


@each_method
def test_the_row_agrees_with_the_docstring(name: str) -> None:
    method = METHODS[name]
    reference = " ".join((method.factory.__doc__ or "").partition("Reference:")[2].split())
    cited = re.search(r"arXiv [\d.]+|NeurIPS \d+", method.paper)
    assert cited is not None
    assert cited[0] in reference
    assert set(method.options) | set(method.at_rank(4)) <= set(method.parameters)


@each_method
def test_the_bytes_are_those_of_the_state(name: str) -> None:
    inputs, outputs, rank = 2048, 4096, 512
    method = METHODS[name]
    params = {"kernel": jax.ShapeDtypeStruct((inputs, outputs), "float32")}
    report = memory_report(method.factory(1e-3, **method.at_rank(rank)), params)
    # Counts, norms and the system of M-FAC do not grow with the parameter.
    beside = 4 * 32**2 + 64
    expected = formula(name, inputs, outputs, rank) * inputs * outputs
    assert 0 <= report.total - expected <= beside


@each_method
def test_the_pages_have_it(name: str) -> None:
    assert re.search(rf"\b{name}\b", (DOCS / f"{PAGES[METHODS[name].kind]}.md").read_text())
    assert re.search(rf"^::: microadam_jax\..*\.{name}$", (DOCS / "api.md").read_text(), re.M)


def test_bytes_of_the_page_on_choosing() -> None:
    """Of a kernel of 4096 by 4096, and at a rank of a quarter."""
    checked = set()
    for line in (DOCS / "choosing.md").read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        names = set(re.findall(r"`(\w+)`", cells[1])) & set(METHODS) if len(cells) == 3 else set()
        if not names:
            continue
        checked |= names
        numbers = re.findall(r"\d+(?:\.\d+)?", re.split(r" at |, ", cells[2])[0])
        sizes = [formula(name, 4096, 4096, 1024) for name in names]
        for number, size in ((numbers[0], min(sizes)), (numbers[-1], max(sizes))):
            half = 0.501 * 10 ** -len(number.partition(".")[2])
            assert math.isclose(float(number), size, rel_tol=0, abs_tol=half), line
    assert checked == set(METHODS)


def test_names_are_found_in_this_library_first() -> None:
    known = factories()
    assert known["galore"] is microadam_jax.galore
    assert {"adamw", "muon"} <= set(known)
    assert not {"decay_updated_weights", "scale_by_adam_mini", "constant_schedule"} & set(known)


def test_values_are_literals_or_words() -> None:
    found = [option_value(text) for text in ("0.5", "True", "(1, 2)", "paper", "e4m3(")]
    assert found == [0.5, True, (1, 2), "paper", "e4m3("]


def test_unknown_names_and_options_say_what_there_is() -> None:
    with pytest.raises(ValueError, match="no optimizer 'microadan'; did you mean microadam"):
        factory_named("microadan", {})
    with pytest.raises(ValueError, match=r"came has no option 'b4'; it has b1, b2, b3"):
        factory_named("came", {"b4": 0.5})


def test_no_test_module_imports_another() -> None:
    """Keeps what several share in modules that hold no tests."""
    pattern = re.compile(r"^(from tests\S*\.test_|from tests\S* import test_|import tests)", re.M)
    tests = (ROOT / "tests").rglob("*.py")
    assert [path for path in tests if pattern.search(path.read_text())] == []


def test_few_names_are_at_the_top() -> None:
    """Optimizers, transformations and specs that most need; the others are in submodules."""
    assert len(microadam_jax.__all__) <= 60


def test_how_an_optimizer_runs_stands_in_no_signature() -> None:
    """``run_with`` says it."""
    for name in microadam_jax.__all__:
        public = getattr(microadam_jax, name)
        if name != "run_with" and not isinstance(public, types.ModuleType):
            assert not {"implementation", "shardings"} & set(inspect.signature(public).parameters)
