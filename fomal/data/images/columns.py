"""The columns of a table that name an image's file, its class and its split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fomal.data.images.listing import enumerated
from fomal.data.images.table import check_table_settings

# Of each part the first group that a table has counts, so that common habits and those of Hugging Face need no setting.
_USUAL = {
    "file": (
        ("filename",),
        ("file", "path", "filepath", "image", "imagepath", "imagefile", "imagename", "imagefilename", "img", "imgpath"),
        ("name", "imageid", "id"),
    ),
    "label": (("label",), ("class", "category", "target", "classname", "labelname", "classlabel"), ("labels", "y")),
    "split": (("split",), ("set", "partition", "subset")),
}


@dataclass(frozen=True)
class TableSettings:
    """The settings of how a table of images is written; None is found out from the table.

    Attributes:
        file_column: name of the column with the files.
        label_column: likewise, with the classes.
        split_column: likewise, with the splits.
        separator: between the cells of a row.
        encoding: as Python calls it.
    """

    file_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    separator: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        check_table_settings(self.separator, self.encoding)

    def candidates(self, columns: Sequence[str], part: str) -> list[str]:
        """The columns that may be the "file", the "label" or the "split"."""
        given: str | None = getattr(self, f"{part}_column")
        if given is None:
            return next(filter(None, (_written(columns, names) for names in _USUAL[part])), [])
        return [column for column in columns if column == given] or _written(columns, [_key(given)])

    def fit(self, columns: Sequence[str]) -> bool:
        """Tell whether a table with these columns has files and classes."""
        return all(self.candidates(columns, part) for part in ("file", "label"))

    def find(self, columns: Sequence[str], where: str) -> dict[str, str]:
        """The columns of "file" and "label" and, if there is one, "split".

        Args:
            columns: of the table.
            where: what to call it in messages.

        Raises:
            ValueError: there is no such column, or several.
        """
        found = {}
        for part in _USUAL:
            candidates, given = self.candidates(columns, part), getattr(self, f"{part}_column")
            usual = "filename" if part == "file" else part
            if len(candidates) > 1:
                raise ValueError(
                    f"{where} has several columns that may be the {part}, {enumerated(candidates)}: say which by "
                    f"{part}_column, or rename the others."
                )
            if candidates:
                found[part] = candidates[0]
            elif given is not None or part != "split":
                wanted = f"column {usual}" if given is None else f"column {given!r}, which {part}_column names"
                raise ValueError(
                    f"{where} has no {wanted}, but {enumerated(columns, 10) or 'none at all'}: name that of the {part} "
                    f"by {part}_column, or call it {usual}."
                )
        return found


AUTOMATIC = TableSettings()
"""Everything is found out."""


def _written(columns: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The columns with one of these names, in any writing."""
    return [column for column in columns if _key(column) in keys]


def _key(column: str) -> str:
    """A column's name without the differences of writing: File Name, file-name and file_name are equal."""
    return re.sub(r"[\W_]+", "", column.casefold())
