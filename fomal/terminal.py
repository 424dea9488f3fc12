"""The terminal: tables and bars that take names as they are, and one line for each message of others."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fomal.output import shown_lines


class PlainConsole(Console):
    """A console that takes strings as they are: no markup, no codes for emoji, no control characters."""

    def render_str(self, text: str, *, style: Any = "", justify: Any = None, overflow: Any = None, **_: Any) -> Text:
        """Make a string what is printed."""
        return Text(shown_lines(text), style, justify=justify, overflow=overflow)


def print_table(table: Table) -> None:
    """Print a table whose cells, headings, title and caption are plain text."""
    PlainConsole().print(table)
