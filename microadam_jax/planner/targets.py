"""Devices to compile for by name: the compilers of TPUs and GPUs run without them."""

import dataclasses
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

GPUS = ("h100", "h200")  # each has a file of what the compiler is told of it
GPUS_OF_HOST = 8
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices of one kind.

    Attributes:
        platform: ``"tpu"`` or ``"cuda"``.
        devices: in order; they need not be there.
        memory: bytes of each, where the compiler does not refuse what needs more; else None.
    """

    platform: str
    devices: list[Any]
    memory: int | None


def target(name: str) -> Target:
    """The devices that ``--topology`` names.

    Args:
        name: TPUs such as ``"v5e:16x16"``, or a number of GPUs such as ``"h200:8"``, of
            which h100 and h200 are known.

    Raises:
        ValueError: if the compiler is not installed, or there are no such devices.
    """
    return _gpus(name) if name.split(":")[0] in GPUS else _tpus(name)


def _tpus(name: str) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology {name}: of GPUs h100 and h200 are known, as in h200:8, and all else needs "
            "the TPU compiler, which runs without a TPU: pip install libtpu. Without --topology "
            "the table is arithmetic."
        )
    # libtpu looks for the machine's own TPUs, and locks them, unless it is told otherwise.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        # Hosts have four chips unless it is said that one is all there is.
        one = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
        devices = topologies.get_topology_desc(name, platform="tpu", **one).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"libtpu does not know --topology {name}, which must be such as v5e:16x16, or h200:8 "
            f"for GPUs: {reason}"
        ) from error
    return Target("tpu", devices, memory=None)


def _gpus(name: str) -> Target:
    kind, _, number = name.partition(":")
    count = int(number) if number.isdecimal() else 0 if ":" in name else 1
    if count < 1 or (count > GPUS_OF_HOST and count % GPUS_OF_HOST):
        raise ValueError(
            f"--topology {name} must be such as {kind}:{GPUS_OF_HOST}: up to {GPUS_OF_HOST} GPUs "
            f"of one host, or a multiple of {GPUS_OF_HOST}."
        )
    if not any(map(importlib.util.find_spec, _CUDA_PLUGINS)):
        raise ValueError(
            f"--topology {name} needs JAX's CUDA plugin, which compiles without a GPU: "
            "pip install jax[cuda13]. Without --topology the table is arithmetic."
        )
    config = (Path(__file__).parent / f"{kind}.txtpb").read_text()
    jax.devices()  # looks for plugins, and so registers the compiler
    shape = f"1x{-(-count // GPUS_OF_HOST)}x{min(count, GPUS_OF_HOST)}"
    described = topologies.get_topology_desc(
        kind, platform="cuda", topology=shape, target_config=config
    )
    size = re.search(r"device_memory_size: (\d+)", config)
    assert size is not None
    return Target("cuda", described.devices, memory=int(size.group(1)))
