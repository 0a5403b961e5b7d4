"""What a comparison ends with: one table, the loss curves and their numbers."""

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .metrics import Row
from .training import Result

# Okabe and Ito's palette, told apart with every kind of colour vision; dark enough on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def write_report(
    results: dict[str, Result], bytes_per_token: float, out: Path, console: Console
) -> None:
    """Prints the table and writes `summary.csv`, `metrics.csv` and two plots.

    Args:
        results: What came of each optimizer, by label.
        bytes_per_token: Bytes of held-out text per token, to convert losses.
        out: Directory to write to.
        console: Where the table goes.
    """
    lines = [_summary(label, result, bytes_per_token) for label, result in results.items()]
    write_csv(out / "summary.csv", list(lines[0]), [list(line.values()) for line in lines])
    names = [field.name for field in dataclasses.fields(Row)]
    write_csv(
        out / "metrics.csv",
        ["optimizer", *names],
        [[label, *dataclasses.astuple(row)] for label, res in results.items() for row in res.rows],
    )
    plot_losses(results, out / "loss_by_step.png", "optimizer step", lambda row: row.step)
    plot_losses(results, out / "loss_by_time.png", "training time (s)", lambda row: row.seconds)
    _print_table(lines, console)


def _summary(label: str, result: Result, bytes_per_token: float) -> dict[str, str | int | float]:
    return {
        "optimizer": label,
        "parameters": result.parameters,
        "state_bytes": result.state_bytes,
        "state_bytes_per_parameter": result.state_bytes / result.parameters,
        "held_out_loss": result.held_out_loss,
        "held_out_bits_per_byte": result.held_out_loss / math.log(2) / bytes_per_token,
        "step_seconds": result.step_seconds,
    }


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> None:
    """Writes a table with a header."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def _print_table(lines: list[dict[str, str | int | float]], console: Console) -> None:
    table = Table()
    table.add_column("optimizer")
    for heading in (
        "state\nbytes/parameter",
        "held-out loss\nnats/token",
        "held-out loss\nbits/byte",
        "step time\nms",
    ):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            str(line["optimizer"]),
            f"{line['state_bytes_per_parameter']:.3f}",
            f"{line['held_out_loss']:.3f}",
            f"{line['held_out_bits_per_byte']:.3f}",
            f"{1000 * line['step_seconds']:.1f}",
        )
    console.print(table)


def plot_losses(
    results: Mapping[str, Result],
    path: Path,
    x_label: str,
    x_of: Callable[[Row], float],
    y_label: str = "loss (nats per token)",
) -> None:
    """Draws training and held-out losses of all results over `x_of` their rows."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    training, held_out = figure.subplots(1, 2, sharex=True, sharey=True)
    for (label, result), colour in zip(results.items(), _COLOURS * len(results), strict=False):
        x = np.array([x_of(row) for row in result.rows])
        loss = np.array([row.loss for row in result.rows])
        width = max(1, len(loss) // 50)
        training.plot(x, loss, color=colour, alpha=0.2, linewidth=0.7)
        training.plot(x[width - 1 :], _running_mean(loss, width), color=colour, label=label)
        seen = [row for row in result.rows if row.held_out_loss is not None]
        held_out.plot(
            [x_of(row) for row in seen],
            [row.held_out_loss for row in seen],
            color=colour,
            marker="o",
            markersize=4,
            label=f"{label}: {result.held_out_loss:.3f}",
        )
    _finish(training, f"Training, mean over {width} steps", x_label)
    _finish(held_out, "Held-out text", x_label)
    training.set_ylabel(y_label)
    figure.savefig(path, dpi=150)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    if not values.size:  # somebody removed the rows of a run that was finished
        return values
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def _finish(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
