"""Settings of every test: eight virtual devices, so that meshes can be tested anywhere."""

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
