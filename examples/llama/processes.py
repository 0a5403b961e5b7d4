"""One run on many hosts: joining its processes, and what they have to agree on."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from .config import Config, PretrainError


def join(config: Config) -> None:
    """Makes the devices of all processes visible to each; without the flags, does nothing.

    Args:
        config: Names the coordinator, or leaves it to JAX to find the cluster.

    Raises:
        PretrainError: If the flags contradict each other, or JAX finds no cluster.
    """
    if config.coordinator is None:
        if config.processes is not None or config.process_id is not None:
            raise PretrainError(
                "--processes and --process-id need --coordinator, the HOST:PORT of process 0."
            )
        return
    if config.coordinator == "auto":
        address = None
    elif config.processes is None or config.process_id is None:
        raise PretrainError(
            f"--coordinator {config.coordinator} needs --processes and --process-id; "
            "--coordinator auto asks the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU)."
        )
    else:
        address = config.coordinator
    try:
        jax.distributed.initialize(address, config.processes, config.process_id)
    except ValueError as error:
        raise PretrainError(
            f"--coordinator {config.coordinator} does not lead to a cluster: {error}"
        ) from error


def leads() -> bool:
    """Whether this process is the one that prints, and writes what is not a checkpoint."""
    return jax.process_index() == 0


def wait_for_all(moment: str) -> None:
    """Goes on when every process has come to the moment of that name."""
    multihost_utils.sync_global_devices(moment)


def anywhere(answer: bool) -> bool:
    """Whether some process answers yes; every process has to ask."""
    return bool(np.any(multihost_utils.process_allgather(np.array(answer))))


def require_same_text(digest: str) -> None:
    """Compares the tokens that the processes have read.

    Raises:
        PretrainError: If they differ, so that a batch would be a mixture of two texts.
    """
    digests = multihost_utils.process_allgather(np.frombuffer(digest.encode(), np.uint8))
    if np.any(digests != np.frombuffer(digest.encode(), np.uint8)):
        raise PretrainError(
            "The processes have read different texts: give each the same files, with --text."
        )
