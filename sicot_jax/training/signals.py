"""Signals that ask a run to stop: noted, and read by the training loop between steps."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Notes SIGTERM and SIGINT while the context lasts; a second SIGINT interrupts at once.

    Attributes:
      received: number of the signal that came; None without one.
    """

    received: int | None

    def __enter__(self) -> StopSignals:
        self.received = None
        self._handlers: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """Name of the signal, for messages."""
        if self.received is None:
            return "a signal to another process"
        return signal.Signals(self.received).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        with contextlib.suppress(OSError):  # the terminal may be closed
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step, then saving; Ctrl-C stops at once\n")
