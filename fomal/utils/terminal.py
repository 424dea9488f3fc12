"""The terminal: tables and bars that take names as they are, and one line for each message of others."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from fomal.utils.output import one_line, shown, shown_lines


class PlainConsole(Console):
    """A console that takes strings as they are: no markup, no codes for emoji, no control characters."""

    def render_str(self, text: str, *, style: Any = "", justify: Any = None, overflow: Any = None, **_: Any) -> Text:
        """Make a string what is printed."""
        return Text(shown_lines(text), style, justify=justify, overflow=overflow)


# What Lightning says in every run, or advises that does not hold here, and what fomal says in its own words.
_NOISE = (
    r"(GPU|TPU|HPU) available: False|TPU available|litlogger|litmodels|`Trainer\.fit` stopped|Seed set to|"
    r"Detected KeyboardInterrupt|(Received|Bypassing) SIGTERM|(Restor|Load)(ing|ed) .* checkpoint|LOCAL_RANK: |"
    r"Initializing distributed|All distributed processes registered|properly utilize them"
)
_NO_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning's own use of torch
    r"It is recommended to use `self.log\(.*sync_dist=True",  # figures are the same in every process already
    r".*does not have many workers",
    r"Checkpoint directory .* exists and is not empty",
    r"Your `IterableDataset` has `__len__` defined",
    r"The `srun` command is available",
)


def calm_lightning() -> None:
    """Let Lightning say what matters alone, with control characters made visible; the rest of warnings' state stays."""
    for text in _NO_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(known, _Matters) for known in handler.filters):
                handler.addFilter(_Matters())
                handler.setFormatter(_Visible())


class _Matters(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return re.search(_NOISE, record.getMessage()) is None


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown_lines(super().format(record))


def own() -> None:
    """Prepare the terminal of a process that is fomal's alone: each warning is a line, and no text fails to print."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    where = f" ({filename}:{lineno})" if os.environ.get("FOMAL_TRACEBACK") == "1" else ""
    print(f"fomal: warning: {one_line(message)}{shown(where)}", file=sys.stderr, flush=True)


@contextmanager
def logs_to_stderr() -> Iterator[None]:
    """Let handlers of logs that write to the stderr of before write to that of now, which a live display has taken."""
    handlers = [
        handler
        for logger in (logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict)))
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.__stderr__)
