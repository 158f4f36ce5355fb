"""Ending a run when somebody asks for it: at the end of a step, with everything saved."""

import os
import signal
import threading
from typing import Any


class StopRequest:
    """Notes SIGTERM and Ctrl-C within a with block; a second Ctrl-C interrupts at once. For the main thread only."""

    def __init__(self, *, silent: bool) -> None:
        self.number: int | None = None
        self._silent = silent
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if not self._silent:
            # Not print: a signal may come in the middle of one, and the stream refuses to be entered twice.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
