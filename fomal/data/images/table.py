"""Tables that other people made: CSV of any separator and encoding, JSON lines and JSON, as rows of text."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

SEPARATORS = (",", ";", "\t", "|")
_NAMED = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}
_MARKS = {  # the longer first: UTF-16's mark begins UTF-32's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Row(NamedTuple):
    """A row that is not blank.

    Attributes:
        line: of the file, counted from 1; its last, where a cell has several.
        cells: without the blanks around them, by column; columns that it lacks are left out.
        overlong: whether it has more cells than there are columns.
    """

    line: int
    cells: dict[str, str]
    overlong: bool = False


class Table(NamedTuple):
    """The names of the columns as they are written, one of them perhaps twice, and the rows."""

    columns: list[str]
    rows: list[Row]


def check_table_settings(separator: str | None, encoding: str | None) -> None:
    """Raise ValueError for a separator or an encoding that there cannot be."""
    if separator is not None and (len(_NAMED.get(separator, separator)) != 1 or separator in '"\r\n'):
        raise ValueError(f"separator={separator!r} is no separator: give one character, or tab, or leave it out.")
    if encoding is not None:
        try:
            b"a".decode(encoding)
        except UnicodeError:
            pass  # it is known, and of more than one byte a letter
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"encoding={encoding!r} is unknown: use e.g. utf-8, utf-16, cp1252 or latin-1, or leave it out."
            ) from error


def read_table(
    content: bytes,
    where: str,
    separator: str | None = None,
    encoding: str | None = None,
    fits: Callable[[Sequence[str]], bool] = bool,
) -> Table:
    """Read CSV with a header, JSON lines, or a JSON list of objects.

    Args:
        content: of the file.
        where: what to call it in messages.
        separator: between cells of CSV; None: the first of `SEPARATORS` with which the header `fits`.
        encoding: None: as the mark at its beginning says, else UTF-8.
        fits: whether these are the columns that the table should have.

    Raises:
        ValueError: it is no such table, or not in this encoding.
    """
    text = _decoded(content, where, encoding)
    try:
        if text.lstrip()[:1] in ("{", "["):
            return _json_table(text)
        return _csv_table(text, _NAMED.get(separator or "", separator), fits)
    except (csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as CSV, nor as JSON lines: {error}.") from error


def _decoded(content: bytes, where: str, encoding: str | None) -> str:
    marked = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    name = encoding or marked
    try:
        text = content.decode(name).removeprefix("\ufeff")
    except UnicodeError as error:
        raise ValueError(
            f"{where} is not text in {name}: save it in UTF-8, or set encoding, e.g. to cp1252, latin-1 or utf-16."
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{where} is no text in {name}: give a CSV file or JSON lines, or set encoding, e.g. to utf-16-le."
        )
    return text


def _csv_table(text: str, separator: str | None, fits: Callable[[Sequence[str]], bool]) -> Table:
    first, _, below = text.partition("\n")
    if first.strip().lower().startswith("sep=") and len(first.strip()) == len("sep=;"):  # for Excel
        text, separator = f"\n{below}", separator or first.strip()[-1]
    if separator is None:
        headers = {candidate: _header(text, candidate) for candidate in SEPARATORS}
        suitable = [candidate for candidate, header in headers.items() if fits(header)]
        separator = suitable[0] if suitable else max(SEPARATORS, key=lambda candidate: len(headers[candidate]))
    (_, columns), *rest = _cells(text, separator) or [(0, [])]
    return Table(
        columns,
        [Row(line, dict(zip(columns, cells, strict=False)), any(cells[len(columns) :])) for line, cells in rest],
    )


def _header(text: str, separator: str) -> list[str]:
    """The first row that is not blank; its first line, where a quote in it is not closed there."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return next((cells for _, cells in _parsed(first, separator, strict=False)), [])


def _cells(text: str, separator: str) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, with their lines."""
    try:
        return _parsed(text, separator, strict=True)
    except csv.Error:  # of quotes, e.g. blanks after them; or of one that is never closed, which swallows lines
        rows = _parsed(text, separator, strict=False)
        if any("\n" in cell for _, cells in rows for cell in cells):
            raise
        return rows


def _parsed(text: str, separator: str, strict: bool) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=strict)
    rows = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
    return [(line, cells) for line, cells in rows if any(cells)]


def _json_table(text: str) -> Table:
    objects: list[tuple[int, Any]]
    if text.lstrip().startswith("["):
        objects = list(enumerate(json.loads(text), 1))
    else:
        lines = enumerate(text.splitlines(), 1)
        objects = [(number, json.loads(line)) for number, line in lines if line.strip()]
    for number, row in objects:
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {type(row).__name__}, and no JSON object")
    rows = [
        Row(number, {str(key).strip(): text for key, value in row.items() if (text := _text(value))})
        for number, row in objects
    ]
    keys = chain.from_iterable(row for _, row in objects)
    return Table(list(dict.fromkeys(str(key).strip() for key in keys)), rows)


def _text(value: Any) -> str:
    """A JSON value as a CSV file would have it; empty for one that is no single value."""
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value) if value.is_integer() else value)
    return str(value).strip() if isinstance(value, str | int) else ""
