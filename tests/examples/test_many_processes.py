"""The pre-training script as several processes: the losses of one, and its checkpoints."""

import csv
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from examples.llama.comparison import compare
from examples.llama.config import PretrainError, from_flags
from examples.llama.processes import join

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
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


def run(environment: dict[str, str], processes: int, *flags: str) -> list[int]:
    """Exit statuses of one run by several processes with a device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joining = ["--coordinator", address, "--processes", str(processes), "--process-id"]
    running = [
        subprocess.Popen(
            [sys.executable, "examples/pretrain_llama.py", *flags, *joining, str(process)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for process in range(processes)
    ]
    printed = [process.communicate(timeout=200)[0] for process in running]
    print("\n".join(printed))
    assert all("microadam: step" not in text for text in printed[1:])  # one of them speaks
    return [process.returncode for process in running]


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
    first = [*SMALL, "--out", str(out), "--mesh", "data=2", "--save-every", "4"]
    assert run(environment, 2, *first) == [0] * 2
    assert losses(out) == pytest.approx(expected, rel=1e-5)

    # As if they had been killed after the checkpoint of step 4, and later of step 5.
    checkpoints = out / "microadam" / "checkpoints"
    (checkpoints / "6").rename(tmp_path / "6 of two")
    resumed = ["--resume", str(out), "--mesh", "data=2,fsdp=2", "--save-every", "5"]
    assert run(environment, 4, *resumed) == [0] * 4
    assert losses(out) == pytest.approx(expected, rel=1e-5)
    assert {path.name for path in checkpoints.iterdir()} == {"5", "6"}

    (checkpoints / "6").rename(tmp_path / "6 of four")
    alone("--resume", str(out), "--mesh", "fsdp=2,tensor=2")
    assert losses(out) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--processes 2", "--processes and --process-id need --coordinator"),
        ("--coordinator localhost:1", "needs --processes and --process-id"),
    ],
)
def test_mistakes(flags: str, sentence: str) -> None:
    with pytest.raises(PretrainError, match=sentence):
        join(from_flags(flags.split()))
