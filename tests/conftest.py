"""Settings of every test: eight virtual devices, so that meshes can be tested anywhere."""

import collections
import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# Each new shape compiles anew, which takes longer than any deadline and leaves time for few.
hypothesis.settings.register_profile("jax", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("jax")

jax.config.update("jax_num_cpu_devices", 8)

# Compiling is two thirds of what the tests take, and these emitters double it. The newest JAX has
# no other ones, so the tests there are compiled by them.
if jax.__version_info__ < (0, 11):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()


def pytest_addoption(parser: pytest.Parser) -> None:
    """For a second Python, after all cases have run with the first."""
    parser.addoption("--cases", type=int, help="run at most so many cases of a test, evenly spread")


@pytest.hookimpl(trylast=True)  # after those of another mark have gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves ``--cases`` of each test."""
    most = config.getoption("--cases")
    if not most:
        return
    of_test = collections.defaultdict(list)
    for item in items:
        # Cases of Optax's suites are numbered.
        of_test[item.nodeid.partition("[")[0].rstrip("0123456789")].append(item)
    kept = {cases[len(cases) * i // most] for cases in of_test.values() for i in range(most)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests make the same optimizer again and again: its step is compiled for the first of them."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # then each worker has a folder in the run's
        directory = directory.parent
    jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


@pytest.fixture(scope="module")
def fewer_optimizations() -> Iterator[None]:
    """For promises that do not depend on how well the step is compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
