"""One run on many hosts: joining its processes, and what they have to agree on."""

import contextlib
import hashlib
import re
import signal
import socket
import time
from collections.abc import Generator

import jax
import numpy as np
from jax.experimental import multihost_utils

from .config import Config, PretrainError

_MESSAGE_BYTES = 1024
PATIENCE_SECONDS = 300.0  # JAX's own


def join(config: Config) -> None:
    """Makes the devices of all processes visible to each; without the flags, does nothing.

    Args:
        config: Names the coordinator, or leaves it to JAX to find the cluster.

    Raises:
        PretrainError: If the flags contradict each other, JAX finds no cluster, or process 0 does
            not answer.
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
    elif not re.fullmatch(r"\S+:\d+", config.coordinator):
        raise PretrainError(
            f"--coordinator {config.coordinator} must be auto, or HOST:PORT of process 0."
        )
    else:
        address = config.coordinator
        if config.process_id:
            _wait_for(address)
    try:
        with _quit_at_once():
            jax.distributed.initialize(address, config.processes, config.process_id)
    except ValueError as error:
        raise PretrainError(
            f"--coordinator {config.coordinator} does not lead to a cluster: {error}"
        ) from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise PretrainError(
            f"Joining at --coordinator {config.coordinator} failed ({reason}). The port must be "
            "free on the host of process 0, and each process needs its own --process-id."
        ) from error


def _wait_for(address: str) -> None:
    """Waits until process 0 listens; JAX would abort, with a stack trace, where it does not."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PretrainError(
                    f"There is no process 0 at --coordinator {address} ({error}), after "
                    f"{PATIENCE_SECONDS:.0f} seconds. Start it on that host, with --process-id 0, "
                    "and let the port be open to the others."
                ) from error
        time.sleep(0.5)


def joining_flags(config: Config) -> list[str]:
    """The flags with which this process joined, for it to join again."""
    values = {
        "--coordinator": config.coordinator,
        "--processes": config.processes,
        "--process-id": config.process_id,
    }
    return [text for flag, v in values.items() if v is not None for text in (flag, str(v))]


def leads() -> bool:
    """Whether this process is the one that prints, and writes what is not a checkpoint."""
    return jax.process_index() == 0


def anywhere(answer: bool) -> bool:
    """Whether some process answers yes; every process has to ask."""
    return bool(np.any(multihost_utils.process_allgather(np.array(answer))))


@contextlib.contextmanager
def together() -> Generator[None]:
    """Goes on when every process has come here, or raises in all what one of them raised inside.

    A process that gave up alone would leave the others waiting for it.

    Raises:
        PretrainError: If any process raised one, or an OSError, or was interrupted.
    """
    if jax.process_count() == 1:
        yield
        return
    mistake, text = None, ""
    try:
        yield
    except (PretrainError, OSError) as error:
        mistake, text = error, str(error)
    except KeyboardInterrupt as error:
        mistake, text = error, "It was interrupted before training began."
    texts = _gathered(text)
    if all(texts) and len(set(texts)) == 1:
        raise PretrainError(texts[0]) from mistake
    for process, text in enumerate(texts):
        if text:
            raise PretrainError(f"Process {process}: {text}") from mistake


def require_same(text: str, sentence: str) -> None:
    """Compares what the processes have.

    Args:
        text: What this one has.
        sentence: What to say if another one has something else.

    Raises:
        PretrainError: In every process, if they differ.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest).reshape(-1, digest.size)
    if np.any(digests != digests[0]):
        raise PretrainError(sentence)


def _gathered(text: str) -> list[str]:
    """What each process says, cut to a length that all know."""
    own = np.frombuffer(text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(own).reshape(-1, _MESSAGE_BYTES)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


@contextlib.contextmanager
def _quit_at_once() -> Generator[None]:
    """Lets Ctrl-C end the process while JAX waits, which does not look at Python's signals."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
