"""Reports a comparison: one table, the loss curves and their numbers."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..llama.report import plot_losses, write_csv
from .training import Finetuned


def write_report(results: dict[str, Finetuned], out: Path, console: Console) -> None:
    """Prints the table and writes `summary.csv` and two plots.

    Args:
        results: What came of each run, by label.
        out: Directory to write to.
        console: Where the table goes.
    """
    lines = [_summary(label, result) for label, result in results.items()]
    write_csv(out / "summary.csv", list(lines[0]), [list(line.values()) for line in lines])
    for name, label in (("step", "optimizer step"), ("seconds", "training time (s)")):
        plot_losses(
            results,
            out / f"loss_by_{name}.png",
            label,
            lambda row, name=name: getattr(row, name),
            "loss (nats)",
        )
    table = Table()
    table.add_column("run")
    for heading in (
        "trained\nparameters",
        "state\nMiB",
        "step keeps\nMiB",
        "training\nloss",
        "held-out\nloss",
        "accuracy\n%",
        "step time\nms",
    ):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            str(line["run"]),
            f"{line['trained_parameters']:,}",
            f"{line['state_bytes'] / 2**20:.2f}",
            f"{line['step_bytes'] / 2**20:.1f}",
            f"{line['training_loss']:.3f}",
            f"{line['held_out_loss']:.3f}",
            f"{100 * line['accuracy']:.1f} ± {100 * line['standard_error']:.1f}",
            f"{1000 * line['step_seconds']:.0f}",
        )
    console.print(table)
    console.print(
        "A step keeps weights, gradient, optimizer state and what the forward pass saves; the "
        "accuracy's ± is one standard error.",
        soft_wrap=True,
    )


def _summary(label: str, result: Finetuned) -> dict[str, str | int | float]:
    return {
        "run": label,
        "trained_parameters": result.parameters,
        "weight_bytes": result.weight_bytes,
        "gradient_bytes": result.gradient_bytes,
        "state_bytes": result.state_bytes,
        "saved_bytes": result.saved_bytes,
        "step_bytes": result.step_bytes,
        "training_loss": result.training_loss,
        "held_out_loss": result.held_out_loss,
        "accuracy": result.accuracy,
        "standard_error": result.standard_error,
        "held_out_examples": len(result.correct),
        "step_seconds": result.step_seconds,
    }
