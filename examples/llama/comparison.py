"""A comparison: every optimizer on the same weights and batches, then the report."""

import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import optax
from rich.console import Console

from microadam_jax.state_format import STATE_FORMAT

from . import config as configuration
from . import optimizers
from .checkpoints import Checkpoints
from .config import Config, PretrainError
from .data import Corpus, load_corpus
from .interruption import Interruption
from .metrics import DiagnosticsFile, MetricsFile, Row
from .partitioning import place
from .processes import leads, require_same_text, wait_for_all
from .progress import progress
from .report import write_report
from .training import Result, train


def compare(config: Config, console: Console) -> bool:
    """Trains with each optimizer of a configuration and reports on all of them.

    Args:
        config: The settings, including whether to continue an earlier run.
        console: Where progress and the table are shown.

    Returns:
        Whether everything was finished, and not interrupted.

    Raises:
        PretrainError: If something in the settings does not fit.
    """
    chosen = optimizers.build(config)
    corpus = load_corpus(config)
    require_same_text(corpus.digest)
    place(config, corpus.vocab)  # refuses a mesh that does not fit before anything is written
    if config.resume is None and leads():
        _clear(config, chosen)
        configuration.save(config)
    wait_for_all("earlier runs are cleared away")
    console.print(
        f"{config.preset} model, {config.steps} steps of {config.batch} x {config.seq_len} tokens "
        f"from {config.text or 'the Python standard library'}; results go to {config.out}",
        soft_wrap=True,
    )
    results: dict[str, Result] = {}
    with Interruption(console) as interruption:
        for label, optimizer in chosen.items():
            result = _train_one(config, label, optimizer, corpus, console, interruption)
            results[label] = result
            if not result.finished:
                console.print(
                    f"{label} is saved at step {len(result.rows)} of {config.steps}. "
                    f"To resume:\n  {_resume_command(config.out)}",
                    soft_wrap=True,
                )
                return False
    if leads():
        write_report(results, corpus.held_out_bytes_per_token, config.out, console)
    return True


def _train_one(
    config: Config,
    label: str,
    optimizer: optax.GradientTransformation,
    corpus: Corpus,
    console: Console,
    interruption: Interruption,
) -> Result:
    folder = config.out / label
    identity = {
        **config.identity(),
        "tokens of the text": corpus.digest,
        "state format": STATE_FORMAT,
    }
    with Checkpoints(folder / "checkpoints", identity) as checkpoints:
        if not leads():
            return train(
                config, optimizer, corpus, checkpoints=checkpoints, stop=interruption.requested
            )
        metrics = MetricsFile(folder / "metrics.csv", checkpoints.latest_step)
        extra: dict[str, Any] = {}
        if config.diagnostics:
            file = DiagnosticsFile(folder / "diagnostics.csv", checkpoints.latest_step)
            extra["observe_state"] = file.append
        with progress(console, label, config.steps, metrics.rows) as show:

            def observe(rows: list[Row]) -> None:
                metrics.append(rows)
                show(rows)

            return train(
                config,
                optimizer,
                corpus,
                checkpoints=checkpoints,
                rows=metrics.rows,
                observe=observe,
                stop=interruption.requested,
                **extra,
            )


def _clear(config: Config, labels: Iterable[str]) -> None:
    summary = config.out / "summary.csv"
    interrupted = any(config.out.glob("*/checkpoints/*")) and not summary.exists()
    if interrupted and not config.overwrite:
        raise PretrainError(
            f"{config.out} holds an interrupted run: continue it with --resume {config.out}, "
            "start anew with --overwrite, or name another directory with --out."
        )
    summary.unlink(missing_ok=True)
    for label in labels:
        shutil.rmtree(config.out / label / "checkpoints", ignore_errors=True)


def _resume_command(out: Path) -> str:
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), sys.argv[0], "--resume", str(out)])
