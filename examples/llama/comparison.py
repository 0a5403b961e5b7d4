"""A comparison: every optimizer on the same weights and batches, then the report."""

import functools
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import optax
from rich.console import Console

from microadam_jax.state_format import STATE_FORMAT

from . import config as configuration
from . import optimizers
from .checkpoints import Checkpoints
from .config import Config, PretrainError, naming
from .data import Corpus, load_corpus
from .interruption import Interruption
from .metrics import DiagnosticsFile, MetricsFile, Row, largest_lost_share
from .model import init_params
from .partitioning import place
from .processes import joining_flags, leads, require_same, together
from .progress import progress
from .report import write_report
from .training import Result, state_shapes_of, train


def compare(config: Config, console: Console) -> bool:
    """Trains with each optimizer of a configuration and reports on all of them.

    Args:
        config: The settings, including whether to continue an earlier run.
        console: Where progress and the table are shown, by one of several processes.

    Returns:
        Whether everything was finished, and not interrupted.

    Raises:
        PretrainError: If something in the settings does not fit.
    """
    with together():
        chosen = optimizers.build(config)
        corpus = load_corpus(config)
        # Before anything is written: a mesh, or an optimizer, that does not fit.
        place(config, corpus.vocab)
        for label, optimizer in chosen.items():
            with naming(label):
                state_shapes_of(config, optimizer, corpus.vocab)
    require_same(
        json.dumps(config.shared()),
        "The processes were started with different flags: only --process-id may differ.",
    )
    require_same(
        corpus.digest,
        "The processes have read different texts: give each the same files, with --text.",
    )
    with together():
        if config.resume is None and leads():
            clear(config, chosen)
            configuration.save(config)
    own_console = console
    console = console if leads() else Console(quiet=True)
    console.print(
        f"{config.preset} model of {_millions(config, corpus)} million parameters with "
        f"{corpus.vocab} tokens, {config.steps} steps of {config.batch} x {config.seq_len} tokens "
        f"from {config.text or 'the Python standard library'}; results go to {config.out}",
        soft_wrap=True,
    )
    results: dict[str, Result] = {}
    with Interruption(own_console, _on_interruption(config)) as interruption:
        for label, optimizer in chosen.items():
            result = _train_one(config, label, optimizer, corpus, console, interruption)
            results[label] = result
            if not result.finished:
                console.print(
                    f"{label} is saved at step {len(result.rows)} of {config.steps}. "
                    f"{resume_command(config)}",
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
        require_same(
            str(checkpoints.latest_step),
            "The processes see different checkpoints: let --out be a directory that all share.",
        )
        run = functools.partial(
            train, config, optimizer, corpus, checkpoints=checkpoints, stop=interruption.requested
        )
        with together():
            metrics = None
            if leads():
                metrics = MetricsFile(folder / "metrics.csv", checkpoints.latest_step)
                if config.diagnostics:
                    file = DiagnosticsFile(folder / "diagnostics.csv", checkpoints.latest_step)
                    run = functools.partial(run, observe_state=file.append)
                elif optimizers.loses_updates(config):
                    run = functools.partial(run, observe_state=_warn_of_lost(label, console))
        if metrics is None:
            return run()
        with progress(console, label, config.steps, metrics.rows) as show:

            def observe(rows: list[Row]) -> None:
                metrics.append(rows)
                show(rows)

            return run(rows=metrics.rows, observe=observe)


def _warn_of_lost(label: str, console: Console) -> Callable[[int, optax.OptState], None]:
    """Warns once, when rounding to nearest loses most of the updates."""
    warned = False

    def look(step: int, state: optax.OptState) -> None:
        nonlocal warned
        share = largest_lost_share(state)
        if share > 0.5 and not warned:
            warned = True
            console.print(
                f"{label}: in step {step} bfloat16 rounds {share:.0%} of the updates of some "
                "parameters away. --rounding stochastic loses none, on average.",
                soft_wrap=True,
            )

    return look


def clear(config: Config, labels: Iterable[str]) -> None:
    """Removes what an earlier run left in the directory of results.

    A finished run in the directory that nobody has named makes place for the next.

    Raises:
        PretrainError: If there is another run that is not to be overwritten, or the directory is a
            file.
    """
    if config.out.exists() and not config.out.is_dir():
        raise PretrainError(f"--out {config.out} is a file; give a directory for the results.")
    summary = config.out / "summary.csv"
    finished, unnamed = summary.exists(), config.out == type(config).out
    holds = any(config.out.glob("*/checkpoints/*"))
    if holds and not config.overwrite and not (finished and unnamed):
        kind, verb = ("a finished", "report on") if finished else ("an interrupted", "continue")
        raise PretrainError(
            f"{config.out} holds {kind} run: {verb} it with --resume {config.out}, start anew with "
            "--overwrite, or name another directory with --out."
        )
    summary.unlink(missing_ok=True)
    for label in labels:
        shutil.rmtree(config.out / label / "checkpoints", ignore_errors=True)


def _millions(config: Config, corpus: Corpus) -> str:
    # A preset is as large as its name only with the vocabulary of those who published it.
    shapes = jax.eval_shape(lambda: init_params(config.model(corpus.vocab), config.seed))
    return f"{sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6:.1f}"


def _on_interruption(config: Config) -> str:
    if jax.process_count() == 1:
        return "Finishing the step, then saving (Ctrl-C again quits at once) ..."
    return (
        f"All processes save and stop at the next multiple of --log-every {config.log_every} steps "
        "(Ctrl-C again quits this one at once, without saving, and the others fail) ..."
    )


def resume_command(config: Config) -> str:
    """Says how to continue the run, with the flags with which this process joined it."""
    joining = joining_flags(config)
    each = " on every host"
    if config.process_id is not None:
        each += ", each with its own --process-id"
    return f"To resume{each if joining else ''}:\n  {resume_line(config.out, joining)}"


def resume_line(out: Path, joining: Sequence[str] = ()) -> str:
    """The command that continues the run in a directory with this script."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), sys.argv[0], "--resume", str(out), *joining])
