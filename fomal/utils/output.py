"""Text for people: names from outside are shown, never obeyed by a terminal, a spreadsheet or a figure."""

from __future__ import annotations

import re
import sys
import unicodedata

_JOINERS = "\u200c\u200d"  # which Persian, Hindi and emoji are written with
# What spreadsheets take for the start of a formula, also in the wide forms of East Asian keyboards.
_FORMULA = re.compile(r"'*[ \u00a0\u3000]*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def shown(text: object) -> str:
    r"""Make the control characters of a text visible, in one line: an escape becomes `\x1b`, a new line `\n`.

    Control and format characters (among them those that turn the direction of writing), line separators, and
    characters that are private, unassigned or half of a pair become Python's escapes; all others stay.
    """
    return "".join(map(_visible, str(text)))


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    if (category[0] != "C" and category not in ("Zl", "Zp")) or character in _JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def shown_lines(text: object) -> str:
    """Do as `shown`, line by line."""
    return "\n".join(map(shown, str(text).split("\n")))


def one_line(text: object) -> str:
    """Do as `shown`, with a space for each line break and other white space."""
    return shown(" ".join(str(text).split()))


def plotted(text: object) -> str:
    """Make a text what matplotlib draws as it is: what is between two dollars would be a formula."""
    return shown_lines(text).replace("$", r"\$")


def quoted(value: object) -> object:
    """Put an apostrophe before a text that a spreadsheet would run as a formula; numbers stay, as text too."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value


def unquoted(cell: str) -> str:
    """Undo `quoted`."""
    return cell[1:] if cell.startswith("'") and quoted(cell[1:]) == cell else cell


def tell(text: object) -> None:
    """Print one line."""
    print(shown(text), flush=True)


def say(text: object) -> None:
    """Tell the user one line on stderr, in the first process alone."""
    from lightning_utilities.core.rank_zero import rank_zero_only

    if getattr(rank_zero_only, "rank", 0) == 0:  # Lightning sets it when it is imported
        print(f"fomal: {shown(text)}", file=sys.stderr, flush=True)


def rank_zero_info(text: object) -> None:
    """Do as Lightning's, with control characters made visible."""
    from lightning.pytorch.utilities import rank_zero_info as inform

    inform(shown(text))


def rank_zero_warn(text: object) -> None:
    """Do as Lightning's, with control characters made visible."""
    from lightning.pytorch.utilities import rank_zero_warn as warn

    warn(shown(text), stacklevel=5)
