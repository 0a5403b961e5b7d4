"""The pre-training script as several processes: the losses of one, checkpoints, shared mistakes."""

import csv
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from rich.console import Console

from examples.llama import processes
from examples.llama.comparison import compare, resume_command
from examples.llama.config import PretrainError, from_flags, unchecked
from examples.llama.processes import join, require_same, together

ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--optimizer microadam --hidden 32 --intermediate 64 --layers 2 --heads 2 --seq-len 16 "
    "--batch 8 --accumulation 2 --eval-batches 2 --max-bytes 100000 --steps 6 --eval-every 3 "
    "--log-every 2"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


def run(environment: dict[str, str], *flags: str, second: str = "") -> list[tuple[int, str]]:
    """Exit statuses and texts of one run by two processes with two devices each.

    Args:
        environment: of both.
        *flags: of both.
        second: flags that only the second process is given.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joining = ["--coordinator", address, "--processes", "2", "--process-id"]
    alone = {1: shlex.split(second)}
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "examples/pretrain_llama.py", *flags, *joining, str(process)),
                *alone.get(process, ()),
            ],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for process in range(2)
    ]
    printed = [process.communicate(timeout=200)[0] for process in running]
    print("\n".join(printed))
    assert "microadam: step" not in printed[1]  # one of them speaks
    return [(process.returncode, text) for process, text in zip(running, printed, strict=True)]


def losses(out: Path) -> list[float]:
    """The training losses, then the held-out ones."""
    with (out / "microadam" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row[name]) for name in ("loss", "held_out_loss") for row in rows if row[name]]


def alone(*flags: str) -> None:
    """A run by this process."""
    assert compare(from_flags(list(flags)), Console(quiet=True))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_processes_share_a_run_and_another_number_resumes_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    alone(*SMALL, "--out", str(tmp_path / "alone"))
    expected = losses(tmp_path / "alone")

    out = tmp_path / "run"
    first = [*SMALL, "--out", str(out), "--mesh", "data=2,fsdp=2", "--save-every", "4"]
    assert [status for status, _ in run(environment, *first)] == [0, 0]
    assert losses(out) == pytest.approx(expected, rel=1e-5)

    # As if they had been killed after the checkpoint of step 4.
    checkpoints = out / "microadam" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"4", "6"}
    (checkpoints / "6").rename(tmp_path / "6 of two")
    alone("--resume", str(out), "--mesh", "fsdp=2,tensor=2")
    assert losses(out) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_mistake_of_one_process_is_said_by_all(
    environment: dict[str, str], tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    flags = [*SMALL, "--out", str(tmp_path / "run"), "--mesh", "data=2,fsdp=2"]
    for status, printed in run(environment, *flags, second=f"--text {missing}"):
        assert status == 2
        assert f"error: Process 1: There is no file or directory {missing}" in printed
        assert "Traceback" not in printed


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """A second process, which has gathered what is put here."""
    gathered: list[np.ndarray] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda own: np.stack([own, gathered.pop()])
    )
    return gathered


def said(text: str) -> np.ndarray:
    return np.frombuffer(text.encode().ljust(1024, b"\0"), np.uint8)


def test_all_raise_what_one_of_them_raised(other: list[np.ndarray]) -> None:
    other.append(said(""))
    with together():
        pass
    other.append(said("The disk is full."))
    with pytest.raises(PretrainError, match=r"^Process 1: The disk is full\.$"), together():
        pass
    other.append(said(""))
    with pytest.raises(PretrainError, match="Process 0: It was interrupted before"), together():
        raise KeyboardInterrupt
    other.append(said("No such optimizer."))
    with pytest.raises(PretrainError, match=r"^No such optimizer\.$"), together():
        raise PretrainError("No such optimizer.")


def test_a_process_alone_raises_its_own() -> None:
    with pytest.raises(FileNotFoundError), together():
        raise FileNotFoundError


def test_what_differs_is_refused(other: list[np.ndarray]) -> None:
    other.append(np.zeros(32, np.uint8))
    with pytest.raises(PretrainError, match="Not the same"):
        require_same("text", "Not the same.")


def test_a_coordinator_that_does_not_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "PATIENCE_SECONDS", 0.0)
    with socket.socket() as taken:
        taken.bind(("localhost", 0))  # and nobody listens
        flags = f"--coordinator localhost:{taken.getsockname()[1]} --processes 2 --process-id 1"
        with pytest.raises(PretrainError, match=r"no process 0 at --coordinator .*refused"):
            join(unchecked(flags.split()))


def test_what_jax_says_of_joining_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(*_: object) -> None:
        raise RuntimeError("UNKNOWN: Failed to start RPC server\nmore of it")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    before = signal.getsignal(signal.SIGINT)
    flags = ["--coordinator", "host:1234", "--processes", "2", "--process-id", "0"]
    with pytest.raises(PretrainError, match=r"host:1234 failed \(UNKNOWN: Failed to start"):
        join(unchecked(flags))
    assert signal.getsignal(signal.SIGINT) is before
    (command,) = resume_command(unchecked([*flags, "--out", "run"])).splitlines()[1:]
    assert command.endswith(shlex.join(["--resume", "run", *flags]))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--processes 2", "--processes and --process-id need --coordinator"),
        ("--coordinator localhost:1", "needs --processes and --process-id"),
        ("--coordinator here --processes 2 --process-id 0", "must be auto, or HOST:PORT"),
    ],
)
def test_mistakes(flags: str, sentence: str) -> None:
    with pytest.raises(PretrainError, match=sentence):
        join(unchecked(flags.split()))
