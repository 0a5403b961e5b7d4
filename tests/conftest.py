"""Settings of every test: eight virtual devices, so that meshes can be tested anywhere."""

from collections.abc import Iterator

import hypothesis
import jax
import pytest

# Each new shape compiles anew, which takes longer than any deadline and leaves time for few.
hypothesis.settings.register_profile("jax", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("jax")

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def fewer_optimizations() -> Iterator[None]:
    """For promises that do not depend on how well the step is compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
