"""Options of the verbs that read labelled images: tables of classes, and which files are meant."""

from __future__ import annotations

import argparse

from fomal.data.images.columns import TableSettings
from fomal.data.images.selection import Selection


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add --labels, how it is written, --include and --exclude."""
    parser.add_argument("--labels", nargs="+", help="CSV, JSON or JSON lines with the class of each file")
    parser.add_argument("--file_column", type=str, help="its column of files; by default filename, path or the like")
    parser.add_argument("--label_column", type=str, help="its column of classes; by default label, class or the like")
    parser.add_argument("--separator", type=str, help="between its cells, e.g. ';' or tab; by default found out")
    parser.add_argument("--encoding", type=str, help="of it, e.g. latin-1; by default UTF-8, or UTF-16 with its mark")
    parser.add_argument("--include", nargs="+", help="use only images whose name matches a pattern, e.g. '*.jpg'")
    parser.add_argument("--exclude", nargs="+", help="use no image whose name matches one, e.g. '*_mask.*'")


def table_settings(given: argparse.Namespace) -> TableSettings:
    """The settings of how the table of --labels is written.

    Raises:
        ValueError: there is no such separator or encoding.
    """
    columns = {"file_column": given.file_column, "label_column": given.label_column}
    return TableSettings(separator=given.separator, encoding=given.encoding, **columns)


def selection(given: argparse.Namespace) -> Selection:
    """The images that --include and --exclude mean."""
    return Selection.of(given.include, given.exclude)
