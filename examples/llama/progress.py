"""Live progress on a terminal, occasional plain lines anywhere else."""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .metrics import Row

_SECONDS_BETWEEN_LINES = 15.0


def make_console() -> Console:
    """Makes a console; a pipe has no width, of which tables would be cut to 80."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


@contextlib.contextmanager
def progress(
    console: Console, label: str, steps: int, done: list[Row]
) -> Iterator[Callable[[list[Row]], None]]:
    """Shows how far a run is.

    Args:
        console: Where to show it.
        label: The run's name.
        steps: The run's number of steps.
        done: The rows of the steps done earlier.

    Yields:
        A function that takes the rows of new steps.
    """
    status = _Status(done)
    if len(done) == steps:
        console.print(f"{label}: step {steps}/{steps}, finished")
        yield lambda rows: None
    elif console.is_terminal:
        with _bar(console, label, steps, len(done), status) as show:
            yield show
    else:
        console.print(f"{label}: step {len(done)}/{steps}, compiling ...")
        yield _lines(console, label, steps, status)


class _Status:
    """One line about the latest steps."""

    def __init__(self, done: list[Row]) -> None:
        self._before = done[-1] if done else Row(step=0, tokens=0, seconds=0.0, loss=0.0)
        self._held_out = ""
        self.seconds_per_step = 0.0

    def update(self, rows: list[Row]) -> str:
        last, before = rows[-1], self._before
        seconds = last.seconds - before.seconds
        self.seconds_per_step = seconds / (last.step - before.step)
        self._before = last
        if last.held_out_loss is not None:
            self._held_out = f"  held-out {last.held_out_loss:.3f}"
        loss = statistics.fmean(row.loss for row in rows)
        speed = (last.tokens - before.tokens) / seconds
        return f"loss {loss:.3f}{self._held_out}  {speed:,.0f} tokens/s"


@contextlib.contextmanager
def _bar(
    console: Console, label: str, steps: int, done: int, status: _Status
) -> Iterator[Callable[[list[Row]], None]]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        expand=True,
    )
    with bar:
        task = bar.add_task(label, total=steps, completed=done, status="compiling")

        def show(rows: list[Row]) -> None:
            bar.update(task, completed=rows[-1].step, status=status.update(rows))

        yield show


def _lines(
    console: Console, label: str, steps: int, status: _Status
) -> Callable[[list[Row]], None]:
    printed = time.monotonic()

    def show(rows: list[Row]) -> None:
        nonlocal printed
        text = status.update(rows)
        last, now = rows[-1], time.monotonic()
        if last.held_out_loss is None and now - printed < _SECONDS_BETWEEN_LINES:
            return
        printed = now
        left = time.strftime("%H:%M:%S", time.gmtime((steps - last.step) * status.seconds_per_step))
        console.print(f"{label}: step {last.step}/{steps}  {text}  {left} left", soft_wrap=True)

    return show
