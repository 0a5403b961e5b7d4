"""Devices that need not be there: the compilers of TPUs and GPUs run without them."""

import functools
import importlib.util

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from microadam_jax.planner.targets import target

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def devices(name: str, compiler: str) -> np.ndarray:
    """The devices of a topology such as ``"v5e:16x16"``; skips where there is no compiler."""
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"the compiler ({compiler}) is not installed: make test-targets")
    return np.array(target(name).devices)


tpu_devices = functools.cache(functools.partial(devices, compiler="libtpu"))
h200_devices = functools.cache(functools.partial(devices, "h200:2", compiler="jax_cuda13_plugin"))


@pytest.fixture(params=TPUS)
def tpu(request: pytest.FixtureRequest) -> Mesh:
    """One chip of each generation."""
    return Mesh(tpu_devices(TPUS[request.param])[:1], ("x",))


@pytest.fixture
def v5e() -> Mesh:
    """One TPU v5e chip."""
    return Mesh(tpu_devices(TPUS["v5e"])[:1], ("x",))


@pytest.fixture(params=["v5e:2x2", "v5e:16x16"])
def tpu_mesh(request: pytest.FixtureRequest) -> Mesh:
    """A square of chips, for parameters sharded both ways, with Explicit axes."""
    devices = tpu_devices(request.param)
    side = int(len(devices) ** 0.5)
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    return Mesh(devices.reshape(side, side), ("fsdp", "tp"), axis_types=explicit)


@pytest.fixture
def h200() -> Mesh:
    """One NVIDIA H200."""
    return Mesh(h200_devices()[:1], ("x",))


@pytest.fixture(params=[1, 2])
def h200_mesh(request: pytest.FixtureRequest) -> Mesh:
    """One NVIDIA H200 or two, with Explicit axes."""
    devices = h200_devices()[: request.param].reshape(1, -1)
    return Mesh(devices, ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
