"""Learning curves from the metrics of a run and its resumptions."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fomal.plots.curve import draw_curve, read_curves

FIRST = """step,train/loss_last_step,val/accuracy,val/accuracy_ci95,val/loss
50,1.5,,,
100,,0.5,0.02,2.0
200,,0.6,0.01,1.0
"""
RESUMED = """val/accuracy,val/accuracy_ci95,step
0.7,0.03,200
0.8,,300
"""


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def save(figure: Figure, *args: object, **kwargs: object) -> None:
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def files(folder: Path, *contents: str) -> list[Path]:
    paths = [folder / f"metrics_{number}.csv" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    return paths


def test_the_later_file_counts_where_they_overlap(tmp_path: Path) -> None:
    curves = read_curves(files(tmp_path, FIRST, RESUMED))
    assert curves.keys() == {"val/accuracy", "val/loss"}
    *exact, (step, mean, interval) = curves["val/accuracy"]
    assert exact == [(100, 0.5, 0.02), (200, 0.7, 0.03)]
    assert (step, mean) == (300, 0.8)
    assert interval != interval  # not known
    assert [step for step, _, _ in curves["val/loss"]] == [100, 200]
    backwards = read_curves(files(tmp_path, RESUMED, FIRST))
    assert [point[:2] for point in backwards["val/accuracy"]] == [(100, 0.5), (200, 0.6), (300, 0.8)]


def test_accuracies_are_drawn_in_per_cent_with_their_bands(tmp_path: Path, figures: list[Figure]) -> None:
    assert draw_curve(files(tmp_path, FIRST, RESUMED), tmp_path / "curve.png")
    axes, other = figures[0].axes
    (line,) = axes.lines
    assert line.get_label() == "accuracy"
    assert [axes.get_ylabel() for axes in (axes, other)] == ["validation accuracy, %", "validation loss"]
    assert line.get_xydata().tolist() == [[100, 50], [200, 70], [300, 80]]
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert {(100.0, 48.0), (100.0, 52.0), (200.0, 67.0), (200.0, 73.0)} <= {tuple(c) for c in corners.round(9).tolist()}
    assert axes.get_yscale() == "linear"
    with Image.open(tmp_path / "curve.png") as image:
        image.load()
        assert image.format == "PNG"
        assert len(image.getcolors(1 << 24) or ()) > 20


def test_losses_are_drawn_on_a_logarithmic_scale(tmp_path: Path, figures: list[Figure]) -> None:
    losses = "step,val/loss,val/loss_ci95\n10,2.0,3.0\n20,0.2,0.1\n"  # the first band reaches below 0
    assert draw_curve(files(tmp_path, losses), tmp_path / "curve.png")
    (axes,) = figures[0].axes
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_xydata().tolist() == [[10, 2], [20, 0.2]]
    low, high = axes.get_ylim()
    assert 0 < low < 0.2 < 2 < high


def test_distances_are_read_but_not_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    both = files(tmp_path, "step,val/loss,val/distance\n10,2.0,0.3\n20,0.2,0.4\n")
    assert [point[:2] for point in read_curves(both)["val/distance"]] == [(10, 0.3), (20, 0.4)]
    assert draw_curve(both, tmp_path / "curve.png")
    (axes,) = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["loss"]


@pytest.mark.parametrize(
    "content", ["", "step,val/distance\n10,0.3\n", "step,train/loss_last_step\n50,1.5\n", "step,val/loss\n50,\n"]
)
def test_nothing_to_draw(content: str, tmp_path: Path) -> None:
    assert not draw_curve(files(tmp_path, content), tmp_path / "curve.png")
    assert not draw_curve([], tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()
