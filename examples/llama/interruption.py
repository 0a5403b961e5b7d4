"""Ctrl-C as a request to stop after the current step."""

import signal
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console


class Interruption:
    """Notes the first Ctrl-C (or SIGTERM) while entered; the second one quits at once."""

    def __init__(self, console: Console, message: str) -> None:
        """Prepares to say `message` on `console` when the request was heard."""
        self._console = console
        self._message = message
        self._requested = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether to save and stop."""
        return self._requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        # Not default_int_handler: Python runs that one only between bytecodes, and a long
        # compilation is one bytecode.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._console.show_cursor()  # the progress bar hid it and may not get to undo that
        self._console.print(self._message, soft_wrap=True)
