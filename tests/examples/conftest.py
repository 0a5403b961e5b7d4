"""What the tests of the example scripts share."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation(
    fewer_optimizations: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Compiles with few optimizations, and each program once per module.

    The models here are so small that compiling them takes nearly all of the time.
    """
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
