"""Names from outside are shown, not obeyed."""

from __future__ import annotations

import io
import warnings

import pytest
from matplotlib.figure import Figure
from rich.table import Table

from fomal.utils.output import one_line, plotted, quoted, rank_zero_warn, say, shown, unquoted
from fomal.utils.terminal import PlainConsole

HOSTILE = "[red]a\x1b[31m\x9b2J\u202eb\r\nc\x00\u2028\udc80:smile:$x^2$"
VISIBLE = r"[red]a\x1b[31m\x9b2J\u202eb\r\nc\x00\u2028\udc80:smile:$x^2$"


def test_control_characters_become_visible_and_letters_stay() -> None:
    assert shown(HOSTILE) == VISIBLE
    for text in ("Überraschung", "漢字 かな", "می‌خواهم", "👩‍🔬", "a\u00a0b", "C:\\x1b"):
        assert shown(text) == text
    assert one_line("two\n  lines\x07") == r"two lines\x07"


def test_tables_take_cells_as_they_are() -> None:
    table = Table("name", title=HOSTILE, caption=shown(HOSTILE))
    table.add_row(shown(HOSTILE))
    out = io.StringIO()
    PlainConsole(file=out, width=200, force_terminal=True, color_system=None).print(table)
    said = out.getvalue()
    assert said.count(VISIBLE) == 2  # the title alone may have lines
    assert "\x9b" not in said
    assert "\x1b[31m" not in said
    assert ":smile:" in said


def test_messages_are_made_visible(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    assert capsys.readouterr().err == f"fomal: {VISIBLE}\n"
    with pytest.warns(UserWarning, match=r"^\[red\]a") as found:
        rank_zero_warn(HOSTILE)
    assert str(found[0].message) == VISIBLE
    assert found[0].filename == __file__


def test_figures_draw_names_as_they_are() -> None:
    figure = Figure()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks
        for text in (r"$\frac{$", "costs $5 or $6", r"\$", HOSTILE):
            drawn = figure.text(0, 0, plotted(text))
            assert drawn._preprocess_math(drawn.get_text()) == ("\n".join(map(shown, text.split("\n"))), False)
            figure.draw_without_rendering()


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@sum", "\tx", "\r=1", " =1", "＝1", "'=1", "''-x", "-", "--x"])
def test_what_a_spreadsheet_would_run_is_quoted_and_comes_back(text: str) -> None:
    assert quoted(text) == f"'{text}"
    assert unquoted(str(quoted(text))) == text


@pytest.mark.parametrize("value", [-1, -0.5, "-1", "+1.5e-3", "-.5", "a=1", "'tis", "", None, "cat's", "'"])
def test_numbers_and_other_texts_stay(value: object) -> None:
    assert quoted(value) == value
    if isinstance(value, str):
        assert unquoted(value) == value
