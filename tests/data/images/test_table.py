"""Tables that other people made, as rows of text."""

from __future__ import annotations

import json
import os
import re

import pytest

from fomal.data.images.table import Row, check_table_settings, read_table

PLAIN = "file,label\na.png,é\nb.png,2\n"
ROWS = [Row(2, {"file": "a.png", "label": "é"}), Row(3, {"file": "b.png", "label": "2"})]


def cells(content: str | bytes, **settings) -> list[dict[str, str]]:
    content = content.encode() if isinstance(content, str) else content
    return [row.cells for row in read_table(content, "t", **settings).rows]


@pytest.mark.parametrize(
    ("written", "given"),
    [("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("utf-32", None), ("utf-16-le", "utf-16-le")]
    + [("latin-1", "latin-1"), ("cp1252", "cp1252"), ("utf-8-sig", "utf-8"), ("utf-16", "utf-16")],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings(written: str, given: str | None, newline: str) -> None:
    content = PLAIN.replace("\n", newline).encode(written)
    assert read_table(content, "t", encoding=given) == (["file", "label"], ROWS)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_are_told_by_the_header(separator: str) -> None:
    def fits(columns) -> bool:
        return {"file", "label"} <= set(columns)

    content = PLAIN.replace(",", separator).replace("2", "x,y;z" if separator not in ",;" else "x y")
    for given in (None, separator):
        rows = cells(content, separator=given, fits=fits)
        assert [row["file"] for row in rows] == ["a.png", "b.png"]
        assert rows[0]["label"] == "é"
    assert cells("file;label, as seen;n\na;b;c\n", fits=lambda columns: "file" in columns) == [
        {"file": "a", "label, as seen": "b", "n": "c"}
    ]


def test_separators_by_name_and_as_excel_says_them() -> None:
    expected = [{"file": "a,b", "label": "c"}]
    assert cells("file\tlabel\na,b\tc\n", separator="tab") == expected
    assert cells("file\tlabel\na,b\tc\n", separator="\\t") == expected
    assert cells("sep=;\r\nfile;label\r\na,b;c\r\n") == expected


def test_blanks_quotes_and_rows_of_other_lengths() -> None:
    content = '\n file , label \n\n  a.png ,  "x, y"  \n ,, \n"b ""1"".png",z,,\nc.png\nd.png,e,f\n'
    assert read_table(content.encode(), "t").rows == [
        Row(4, {"file": "a.png", "label": "x, y"}),
        Row(6, {"file": 'b "1".png', "label": "z"}),
        Row(7, {"file": "c.png"}),
        Row(8, {"file": "d.png", "label": "e"}, overlong=True),
    ]


def test_json_lines_and_a_json_list_have_the_texts_that_csv_would_have() -> None:
    values = [3, 3.0, 0.5, True, " x ", None, [1], {"a": 1}, float("nan")]
    lines = "\n\n".join(json.dumps({"file_name": f"{i}", "label": value}) for i, value in enumerate(values))
    table = read_table(lines.encode("utf-8-sig"), "t")
    assert table.columns == ["file_name", "label"]
    assert [row.cells.get("label") for row in table.rows] == ["3", "3", "0.5", "True", "x", None, None, None, None]
    assert [row.line for row in table.rows][:3] == [1, 3, 5]
    assert cells('[{"a": 1, "b": "x"}, {"a": 2, "c": ""}]') == [{"a": "1", "b": "x"}, {"a": "2"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PLAIN.encode("latin-1"), "t is not text in utf-8: save it in UTF-8, or set encoding, e.g. to cp1252"),
        (PLAIN.encode("utf-16-be"), "t is not text in utf-8"),
        (b"file,label\0\n", "t is no text in utf-8: give a CSV file or JSON lines"),
        (b"\x89PNG\r\n\x1a\n" + os.urandom(200), "t is not text in utf-8"),
        (b"PK\3\4\0\0\0\0", "t is no text in utf-8"),
        (b'file,label\n"a.png,x\nb.png,y\n', "t cannot be read as CSV, nor as JSON lines: unexpected end of data"),
        (b"file,label\na.png," + b"x" * 200_000, "t cannot be read as CSV, nor as JSON lines: field larger than"),
        (b'{"file": 1}\nfile', "t cannot be read as CSV, nor as JSON lines: Expecting value"),
        (b"[1, 2]", "t cannot be read as CSV, nor as JSON lines: row 1 is int, and no JSON object"),
        (b"[" * 100_000, "t cannot be read as CSV, nor as JSON lines: maximum recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "t cannot be read as CSV, nor as JSON lines: Exceeds the limit"),
    ],
)
def test_what_is_no_table_is_one_line(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        read_table(content, "t")
    assert "\n" not in str(error.value)


def test_an_empty_file_has_no_columns() -> None:
    assert read_table(b"", "t") == ([], [])
    assert read_table(b"\xef\xbb\xbf \n\n", "t") == ([], [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((";;", None), "separator=';;' is no separator: give one character, or tab"),
        (("", None), "separator='' is no separator"),
        (('"', None), "separator='\"' is no separator"),
        ((None, "klingon"), "encoding='klingon' is unknown: use e.g. utf-8, utf-16, cp1252 or latin-1"),
        ((None, "hex"), "encoding='hex' is unknown"),
        ((None, "a\0b"), r"encoding='a\\x00b' is unknown"),
    ],
)
def test_settings_that_there_cannot_be(settings, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_table_settings(*settings)
