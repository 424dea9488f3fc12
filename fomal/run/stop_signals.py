"""The answer of a process that is asked to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

EXIT_CODE = 128 + signal.SIGTERM
"""The exit code of a run that saved and ended because it was asked to, by SIGTERM or before a requeue: 143."""

Handler = Callable[[int, FrameType | None], Any] | int | None


class Handlers:
    """Signal handlers that are put in place for a while."""

    def __init__(self) -> None:
        self._earlier: dict[int, Handler] = {}

    def install(self, numbers: set[int], handler: Callable[[int, FrameType | None], Any]) -> None:
        """Handle `numbers`; nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                before = signal.signal(number, handler)
                self._earlier.setdefault(number, before)

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """End the process in order, with the exit code that shells give `number`."""
    raise SystemExit(128 + number)


def at_once(number: int, frame: FrameType | None) -> NoReturn:
    """End the process now, without a word, with the exit code that shells give `number`."""
    os._exit(128 + number)


def in_order(number: int, frame: FrameType | None) -> NoReturn:
    """End the process in order, so that unfinished files are removed; the next signal ends it at once."""
    listen(at_once)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    leave(number, frame)


def listen(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Handle Ctrl-C and SIGTERM, but for Ctrl-C where it is ignored, as in the background of a script."""
    signal.signal(signal.SIGTERM, handler)  # the first process of a container has no default
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
