"""The pre-training script as a person runs it: flags, files, interruption, mistakes."""

import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from examples.llama import optimizers
from examples.llama.checkpoints import Checkpoints
from examples.llama.comparison import compare
from examples.llama.config import PRESETS, PretrainError, from_flags
from examples.llama.metrics import MetricsFile

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--hidden 32 --intermediate 64 --layers 2 --heads 2 --seq-len 16 --batch 2 --eval-batches 2 "
    "--max-bytes 100000"
)


def run(flags: list[str]) -> tuple[bool, str]:
    """Whether a comparison was finished, and what it printed."""
    console = Console(file=io.StringIO(), width=200)
    return compare(from_flags(flags), console), console.file.getvalue()


def losses(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file without their times."""
    with path.open() as stream:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]


@pytest.mark.slow
def test_default_optimizers_side_by_side(tmp_path: Path) -> None:
    finished, printed = run([*SMALL, "--steps", "20", "--out", str(tmp_path)])
    assert finished
    rows = losses(tmp_path / "metrics.csv")
    assert [row["optimizer"] for row in rows] == ["adamw"] * 20 + ["microadam"] * 20
    assert rows[0]["loss"] == rows[20]["loss"]  # the same weights and the same batch
    assert [row["step"] for row in rows if row["held_out_loss"]] == ["20", "20"]

    with (tmp_path / "summary.csv").open() as stream:
        adamw, microadam = csv.DictReader(stream)
    assert float(adamw["state_bytes_per_parameter"]) == pytest.approx(8, abs=0.01)
    assert microadam["parameters"] == adamw["parameters"]
    assert microadam["held_out_loss"] == rows[-1]["held_out_loss"]
    for line in (adamw, microadam):
        assert f"{float(line['held_out_loss']):.3f}" in printed
        assert f"{float(line['state_bytes_per_parameter']):.3f}" in printed
    for plot in ("loss_by_step.png", "loss_by_time.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")

    # A finished run can be shown again, and is replaced where that is asked for.
    again = [*SMALL, "--steps", "20", "--out", str(tmp_path)]
    with pytest.raises(PretrainError, match="holds a finished run: report on it with --resume"):
        run(again)
    for flags in (["--resume", str(tmp_path)], [*again, "--overwrite"]):
        assert run(flags)[0]
        assert losses(tmp_path / "metrics.csv") == rows


class Script:
    """Runs the script in a process of its own."""

    def __init__(self, cache: Path, quick_compilation: bool = True) -> None:
        self._environment = os.environ | {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick_compilation)),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }

    def start(self, *flags: str) -> subprocess.Popen[str]:
        return self.start_command([sys.executable, "examples/pretrain_llama.py", *flags])

    def start_command(self, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(cache=tmp_path_factory.mktemp("compiled"))


LONG = [*SMALL, "--steps", "100", "--eval-every", "20", "--save-every", "20"]


@pytest.fixture(scope="module")
def straight(script: Script, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Losses of an undisturbed run."""
    out = tmp_path_factory.mktemp("straight")
    process = script.start(*LONG, "--out", str(out))
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    return losses(out / "metrics.csv")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "delay"),
    # A save takes some hundredths of a second and begins when the step has been shown.
    [(signal.SIGINT, 0), (signal.SIGKILL, 0.03)],
    ids=["interrupted", "killed while saving"],
)
def test_interrupted_runs_resume_exactly(
    number: signal.Signals,
    delay: float,
    script: Script,
    straight: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    process = script.start(*LONG, "--out", str(out))
    for line in process.stdout:
        if "step 40/100" in line:
            time.sleep(delay)
            process.send_signal(number)
            break
    printed, mistakes = process.communicate()
    assert mistakes == ""
    command = [sys.executable, "examples/pretrain_llama.py", "--resume", str(out)]
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "adamw is saved at step" in printed
        command = shlex.split(printed.splitlines()[-1])
    assert not (out / "summary.csv").exists()
    with pytest.raises(PretrainError, match="holds an interrupted run: continue it with --resume"):
        run([*LONG, "--out", str(out)])

    process = script.start_command(command)
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert losses(out / "metrics.csv") == straight


PUBLISHED = shlex.split(
    "--preset 60m --seq-len 16 --batch 2 --eval-batches 2 --max-bytes 100000 --steps 20 "
    "--eval-every 10 --save-every 10 --log-every 1"
)


@pytest.mark.matrix
@pytest.mark.parametrize("optimizer", ["adamw", "microadam", "adam_mini4bit", "adamw8bit"])
def test_a_published_size_resumes_exactly(optimizer: str, tmp_path: Path) -> None:
    # At this size steps take longer than compiling them well.
    script = Script(tmp_path / "compiled", quick_compilation=False)
    flags = [*PUBLISHED, "--optimizer", optimizer]
    process = script.start(*flags, "--out", str(tmp_path / "straight"))
    assert process.communicate()[1] == ""
    for command, moment in (
        ((*flags, "--out", str(tmp_path / "cut")), "compiling"),
        (("--resume", str(tmp_path / "cut")), "step 10/20"),
    ):
        process = script.start(*command)
        for line in process.stdout:
            if moment in line:
                process.send_signal(signal.SIGINT)
                break
        printed, mistakes = process.communicate()
        assert (process.returncode, mistakes) == (130, ""), printed
    process = script.start("--resume", str(tmp_path / "cut"))
    assert process.communicate()[1] == ""
    straight, cut = (losses(tmp_path / run / "metrics.csv") for run in ("straight", "cut"))
    assert len(cut) == 20
    assert cut == straight
    # What is finished is neither compiled nor read again.
    assert "20/20, finished" in script.start("--resume", str(tmp_path / "cut")).communicate()[0]


def test_a_step_that_does_not_fit_is_refused_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(PretrainError, match=r"this machine has 0: cut its 2 .* --accumulation"):
        run([*SMALL, "--steps", "1", "--optimizer", "sgd", "--out", str(tmp_path)])


def test_optimizers_that_are_tried_out_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    optimizers.build(from_flags(["--optimizer", "adam_mini4bit,adam_sn"]))
    assert not recwarn.list


def test_mistakes_reach_the_terminal_as_one_sentence(script: Script, tmp_path: Path) -> None:
    process = script.start("--optimizer", "adamw,microadan", "--out", str(tmp_path / "out"))
    printed, mistakes = process.communicate()
    assert process.returncode == 2
    assert printed == ""
    assert mistakes == (
        "error: There is no optimizer 'microadan'; did you mean microadam or adan?\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--text {tmp}/nowhere", "no file or directory"),
        ("--mesh data=1000", "needs 1000 devices, but there are"),
        ("--resume {tmp}", "no run to resume in"),
        ("--hidden 36 --heads 4", "--hidden 36 does not split into 4 heads of even width"),
        ("--batch 3 --accumulation 2", "--batch 3 does not split into 2 equal micro-batches"),
        ("--warmup 2", "--warmup 2.0 must be a share of the steps"),
        ("--clip -1", "--clip -1.0 must be a norm, or 0"),
        ("--steps 0", "--steps must be at least 1, not 0"),
        ("--seed -1", "--seed must be at least 0, not -1"),
        ("--eval-batches 10000000000", "--eval-batches must be below 2147483648, not 1"),
        ("--max-bytes 10", "Give more --text, raise --max-bytes 10 or lower --seq-len"),
        ("--mesh data=1,data=1", "each at most once"),
        ("--tokenizer bpe --vocab-size 10", "--vocab-size 10 must be at least 256"),
        ("--optimizer sgd,mfac --update-in-backward", "mfac: .*depends on the gradient of"),
        (
            "--optimizer adamw,lion4bit --param-dtype bfloat16 --rounding momentum",
            "lion4bit: .*momentum",
        ),
    ],
)
def test_mistakes_leave_no_files(flags: str, sentence: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)] if "--resume" not in flags else []
    with pytest.raises(PretrainError, match=sentence) as caught:
        run([*SMALL, *out, *flags.format(tmp=tmp_path).split()])
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_results_do_not_go_into_a_file(tmp_path: Path) -> None:
    file = tmp_path / "results"
    file.touch()
    with pytest.raises(PretrainError, match=r"--out .*results is a file; give a directory"):
        run([*SMALL, "--out", str(file)])


def test_a_damaged_configuration_is_one_sentence(tmp_path: Path) -> None:
    for text in "{}", '{"opt":':
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(PretrainError, match=r"config\.json is damaged"):
            from_flags(["--resume", str(tmp_path)])
    whole = PRESETS["tiny"].to_json()
    for change, sentence in [
        ({"newflag": 1}, "newflag is unknown here"),
        ({"hidden": "x"}, "hidden is 'x'"),
        ({"lr": [3]}, r"lr is \(3,\)"),
        ({"schedule": "foo"}, "schedule is 'foo'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(whole | change))
        with pytest.raises(PretrainError, match=f"of another version .{sentence}"):
            from_flags(["--resume", str(tmp_path)])


def test_a_damaged_checkpoint_is_one_sentence_with_a_remedy(tmp_path: Path) -> None:
    flags = [*SMALL, "--steps", "3", "--save-every", "1", "--optimizer", "sgd"]
    run([*flags, "--out", str(tmp_path)])
    checkpoints = tmp_path / "sgd" / "checkpoints"
    config, state = {"config": ocp.args.JsonRestore()}, {"state": ocp.args.StandardRestore()}
    parts = {"config/metadata": config, "state/_METADATA": state, "state": state}
    for broken, item in parts.items():
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoints / "3", copy)
        damaged = checkpoints / "3" / broken
        shutil.rmtree(damaged) if damaged.is_dir() else damaged.write_text("?")
        message = r"checkpoints/3 cannot be read .*from step 2"
        with Checkpoints(checkpoints, {}) as opened, pytest.raises(PretrainError, match=message):
            opened._read(**item)
        shutil.rmtree(checkpoints / "3")
        shutil.move(copy, checkpoints / "3")


def test_a_torn_row_of_metrics_ends_the_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,tokens,seconds,loss,held_out_loss\n1,64,0.5,2.0,\n2,128,1")
    assert [row.step for row in MetricsFile(path, 1).rows] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_damaged_metrics_are_kept_and_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = "step,tokens,seconds,loss,held_out_loss\n1,64,0.5,2.0,\n"
    torn = first + "2,128"
    whole = first + "2,g\n3,192,1.5,1.9,\n"
    for text, rows in ((whole, 1), (torn, 1), ("\0\0\0", 0), ("step,tok\n1,g", 0)):
        path.write_text(text)
        with pytest.warns(UserWarning, match=f"has {rows} rows that can be read"):
            assert len(MetricsFile(path, 3).rows) == rows
        assert (tmp_path / "metrics.damaged.csv").read_text() == text


def test_flags_override_presets_and_the_resumed_run(tmp_path: Path) -> None:
    assert from_flags([]) == PRESETS["tiny"]
    config = from_flags(["--preset", "60m", "--layers", "2", "--accumulation", "64"])
    assert (config.hidden, config.layers, config.steps) == (512, 2, 10_000)

    flags = [*SMALL, "--steps", "3", "--out", str(tmp_path), "--optimizer", "a=sgd"]
    run([*flags, "--lr", "a=0.5", "--opt", "a.momentum=0.9"])
    resumed = from_flags(["--resume", str(tmp_path), "--mesh", "data=2"])
    assert resumed.lr == ("a=0.5",)
    assert resumed.opt == ("a.momentum=0.9",)
    assert resumed.out == tmp_path
    # Flags need not be repeated, and may be.
    again = from_flags(["--resume", str(tmp_path), "--lr", "a=0.5", "--opt", "a.momentum=0.9"])
    assert (again.lr, again.opt) == (resumed.lr, resumed.opt)
    assert "steps" in json.loads((tmp_path / "config.json").read_text())
    assert run(["--resume", str(tmp_path), "--mesh", "data=2"])[0]
    with pytest.raises(PretrainError, match="steps was 3 and is now 4; seed was 0 and is now 1"):
        run(["--resume", str(tmp_path), "--steps", "4", "--seed", "1"])
    with pytest.raises(PretrainError, match=r"The run in .* optimizer was a=sgd and is now lion"):
        run(["--resume", str(tmp_path), "--optimizer", "lion"])
    # A finished run whose rows somebody removed has a report without them.
    (tmp_path / "a" / "metrics.csv").unlink()
    assert run(["--resume", str(tmp_path)])[0]
    with pytest.raises(PretrainError, match="--out other is not the run to resume"):
        from_flags(["--resume", str(tmp_path), "--out", "other"])
