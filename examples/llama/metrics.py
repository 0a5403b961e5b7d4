"""Losses and times of one run, in memory and in a CSV file that survives a crash."""

import csv
import dataclasses
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import optax


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known after one optimizer step.

    Attributes:
        step: Number of steps done.
        tokens: Number of tokens trained on.
        seconds: Time spent on these steps; compiling, evaluating and saving do not count.
        loss: Training loss of the step's batch, nats per token.
        held_out_loss: Loss on the held-out text, where it was evaluated.
    """

    step: int
    tokens: int
    seconds: float
    loss: float
    held_out_loss: float | None = None


class MetricsFile:
    """Rows in a CSV file, one file per run."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Opens a file, and forgets what it says about steps after `last_step`.

        Args:
            path: The file; it need not exist. One that is damaged is kept beside it.
            last_step: Where training continues: the step of the latest checkpoint, or 0.
        """
        self.path = path
        found, damaged = _read(path)
        # Rows after the checkpoint are from steps that a crash undid.
        self.rows = [row for row in found if row.step <= last_step]
        if damaged or (path.exists() and len(self.rows) < last_step):
            kept = path.with_name("metrics.damaged.csv")
            shutil.copyfile(path, kept)
            warnings.warn(
                f"{path} has {len(found)} rows that can be read. Tables and curves will lack the "
                f"others up to step {last_step}; the file is kept as {kept}.",
                stacklevel=2,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(field.name for field in dataclasses.fields(Row))
            writer.writerows(map(dataclasses.astuple, self.rows))

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows to the file."""
        with self.path.open("a", newline="") as stream:
            csv.writer(stream).writerows(map(dataclasses.astuple, rows))


class DiagnosticsFile:
    """What compression did to each group of parameters, in a CSV file."""

    FIELDS = ("update_norm", "kept_mass", "residual_norm", "quantization_error", "lost_share")

    def __init__(self, path: Path, last_step: int) -> None:
        """Opens a file, and forgets what it says about steps after `last_step`."""
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        # Rows that a crash tore have fewer fields.
        whole = [line for line in lines if line.count(",") == 1 + len(self.FIELDS)]
        kept = [line for line in whole if int(line.partition(",")[0]) <= last_step]
        path.write_text("\n".join([",".join(("step", "group", *self.FIELDS)), *kept, ""]))
        self.path = path

    def append(self, step: int, state: optax.OptState) -> None:
        """Adds the numbers in a state of `microadam_jax.with_diagnostics`."""
        fields = [optax.tree_utils.tree_get(state, field) for field in self.FIELDS]
        with self.path.open("a", newline="") as stream:
            csv.writer(stream).writerows(
                # Without error feedback there is nothing to say of its residual.
                [step, group, *(float(field[group]) if field else "" for field in fields)]
                for group in fields[0]
            )


def largest_lost_share(state: optax.OptState) -> float:
    """Returns the largest share, among groups of parameters, of updates that rounding loses.

    Args:
        state: of `microadam_jax.with_diagnostics`.
    """
    shares = optax.tree_utils.tree_get(state, "lost_share")
    return max(map(float, shares.values()))


def _read(path: Path) -> tuple[list[Row], bool]:
    """The rows of a file up to the first that is none, and whether more than its end is torn."""
    if not path.exists():
        return [], False
    rows: list[Row] = []
    with path.open(newline="", errors="replace") as stream:
        reader = csv.DictReader(line.replace("\0", "") for line in stream)
        damaged = reader.fieldnames != [field.name for field in dataclasses.fields(Row)]
        for row in reader:
            try:
                rows.append(
                    Row(
                        step=int(row["step"]),
                        tokens=int(row["tokens"]),
                        seconds=float(row["seconds"]),
                        loss=float(row["loss"]),
                        held_out_loss=float(row["held_out_loss"]) if row["held_out_loss"] else None,
                    )
                )
            except (KeyError, TypeError, ValueError):
                return rows, damaged or next(reader, None) is not None
    return rows, damaged
