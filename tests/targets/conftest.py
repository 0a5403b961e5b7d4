"""Devices that need not be there: the compilers of TPUs and GPUs run without them."""

import functools
import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# The compiler needs no metadata server and no lock on a chip that is not there.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@functools.cache
def tpu_devices(topology: str) -> np.ndarray:
    """The devices of a topology such as ``"v5e:16x16"``; skips where there is no compiler."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler (libtpu) is not installed: make test-targets")
    os.environ.update(ENVIRONMENT)
    return np.array(topologies.get_topology_desc(topology, platform="tpu").devices)


@functools.cache
def h200_devices() -> np.ndarray:
    """Two H200s; skips where there is no compiler."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the GPU compiler (jax_cuda13_plugin) is not installed: make test-targets")
    jax.devices()  # looks for plugins, and so registers the compiler
    target = (Path(__file__).parent / "h200.txtpb").read_text()
    description = topologies.get_topology_desc(
        "h200", platform="cuda", topology="1x1x2", target_config=target
    )
    return np.array(description.devices)


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
