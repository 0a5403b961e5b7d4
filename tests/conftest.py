"""Settings of every test: eight virtual devices, so that meshes can be tested anywhere."""

from collections.abc import Iterator

import hypothesis
import jax
import pytest

# Each new shape compiles anew, which takes longer than any deadline and leaves time for few.
hypothesis.settings.register_profile("jax", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("jax")

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests make the same optimizer again and again: its step is compiled for the first of them."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


@pytest.fixture(scope="module")
def fewer_optimizations() -> Iterator[None]:
    """For promises that do not depend on how well the step is compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
