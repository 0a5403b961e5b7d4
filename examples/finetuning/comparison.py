"""A comparison: every run from the same weights and on the same batches, then the report."""

import functools
import itertools

from rich.console import Console

from microadam_jax.state_format import STATE_FORMAT

from ..llama import optimizers
from ..llama.checkpoints import Checkpoints
from ..llama.comparison import clear, resume_line
from ..llama.config import save
from ..llama.interruption import Interruption
from ..llama.metrics import MetricsFile, Row
from ..llama.progress import progress
from .classification import Classification
from .config import Config
from .jobs import Job
from .report import write_report
from .training import Finetuned, require_fit, train


def compare(config: Config, console: Console) -> bool:
    """Fine-tunes in each way of a configuration and reports on all of them.

    Args:
        config: The settings, including whether to continue an earlier run.
        console: Where progress and the table are shown.

    Returns:
        Whether everything was finished, and not interrupted.

    Raises:
        PretrainError: If something in the settings does not fit.
    """
    chosen = optimizers.named(config.named_optimizers(), clip=config.clip)
    job = job_of(config, console)
    # Before anything is written or trained.
    require_fit(config, job, chosen)
    if config.resume is None:
        clear(config, chosen)
        for label, name in itertools.product(chosen, ("metrics.csv", "held_out.json")):
            (config.out / label / name).unlink(missing_ok=True)
        save(config)
    console.print(
        f"{config.job}: {config.steps} steps of {config.batch} x {config.seq_len} tokens, accuracy "
        f"on at most {config.held_out} held-out examples; results go to {config.out}",
        soft_wrap=True,
    )
    results: dict[str, Finetuned] = {}
    digest = job.digest  # of all weights, which takes a while
    message = "Finishing the step, then saving (Ctrl-C again quits at once) ..."
    with Interruption(console, message) as interruption:
        for label, method in config.runs().items():
            folder = config.out / label
            identity = {
                **config.identity(),
                "examples and weights": digest,
                "state format": STATE_FORMAT,
            }
            with Checkpoints(folder / "checkpoints", identity) as checkpoints:
                metrics = MetricsFile(folder / "metrics.csv", checkpoints.latest_step)
                with progress(console, label, config.steps, metrics.rows) as show:
                    result = train(
                        config,
                        job,
                        method,
                        chosen[label],
                        folder=folder,
                        checkpoints=checkpoints,
                        rows=metrics.rows,
                        observe=functools.partial(_observe, metrics, show),
                        stop=interruption.requested,
                    )
            results[label] = result
            if not result.finished:
                console.print(
                    f"{label} is saved at step {len(result.rows)} of {config.steps}. "
                    f"To resume:\n  {resume_line(config.out)}",
                    soft_wrap=True,
                )
                return False
    write_report(results, config.out, console)
    return True


def _observe(metrics: MetricsFile, show: object, rows: list[Row]) -> None:
    metrics.append(rows)
    show(rows)


def job_of(config: Config, console: Console) -> Job:
    """Reads the weights and the examples of a job.

    Raises:
        PretrainError: If they are not there or not as they should be.
    """
    if config.job == "classification":
        return Classification(config, console)
    # Imported where it is needed: it needs packages that classification does not.
    from .language import Arithmetic

    return Arithmetic(config, console)
