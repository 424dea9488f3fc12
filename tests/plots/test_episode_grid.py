"""The picture of a task: each image in its place, each query with its prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fomal.plots.episode_grid import draw_episode, is_image
from fomal.tasks.episode import Episode


def colours(count: int) -> Tensor:
    """Different plain images (count, 3, 6, 6) uint8 of colours that neither text nor frames have."""
    levels = torch.tensor([0, 100, 200])
    mixed = torch.cartesian_prod(levels, levels, levels)
    mixed = mixed[(mixed.max(1).values > 0) & (mixed.min(1).values < mixed.max(1).values)]  # no grey
    return mixed[:count, :, None, None].expand(-1, -1, 6, 6).to(torch.uint8)


def centre(picture: np.ndarray, image: Tensor) -> tuple[float, float] | None:
    """Where a plain image is in the picture, as (x, y)."""
    y, x = np.nonzero((picture == image[:, 0, 0].numpy()).all(-1))
    return (float(x.mean()), float(y.mean())) if len(x) > 100 else None


@pytest.mark.parametrize("stored", ["uint8", "unit", "normalised"])
def test_rows_are_classes_and_queries_are_right_of_supports(tmp_path: Path, stored: str) -> None:
    ways, shots, queries, shown = 3, 3, 2, 2
    images = colours(ways * (shots + queries)).view(ways, shots + queries, 3, 6, 6)
    support, query = images[None, :, :shots], images[None, :, shots:]
    if stored != "uint8":  # pure red and such are in the images, so that the range is known
        scale = {"unit": lambda x: x / 200 * (200 / 255), "normalised": lambda x: x / 255 * 4 - 2}[stored]
        support, query = scale(support.float()), scale(query.float())
    episode = Episode.of_classes(support, query, torch.tensor([0]), 0, 1)
    draw_episode(tmp_path / "new" / "task.png", episode, torch.zeros(ways * queries, ways), "A task", shown)
    with Image.open(tmp_path / "new" / "task.png") as file:
        picture = np.asarray(file.convert("RGB"))
    if stored == "normalised":  # stretched to its range, 0 to 200
        images = (images.float() * 255 / 200).round().to(torch.uint8)
    places = [[centre(picture, images[w, i]) for i in range(shots + queries)] for w in range(ways)]
    for row in places:
        assert row[shown:shots] == [None] * (shots - shown)
        drawn = [place for place in row if place is not None]
        assert len(drawn) == shown + queries
        x, y = (np.array(part) for part in zip(*drawn, strict=True))
        assert (np.diff(x) > 100).all()
        assert np.ptp(y) < 2  # one row
        assert x[shown] - x[shown - 1] > 1.3 * (x[1] - x[0])  # a gap before the queries
    heights = [row[0][1] for row in places if row[0]]
    assert (np.diff(heights) > 100).all()


def texts(monkeypatch: pytest.MonkeyPatch, *args: object) -> list[str]:
    """What is written into a drawn figure."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    draw_episode(*args)  # type: ignore[arg-type]
    (figure,) = drawn
    return [text.get_text() for text in (*figure.texts, *figure.axes[0].texts)]


def test_each_query_has_its_prediction_and_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 1, 1, 5, 5, dtype=torch.uint8)
    episode = Episode.of_classes(x, x.expand(-1, -1, 2, -1, -1, -1), torch.tensor([0]), 0, 1)
    odds = torch.tensor([[9.0, 1.0], [1.0, 3.0], [1.0, 4.0], [1.0, 1.0]])  # of queries of classes 0, 0, 1, 1
    found = texts(monkeypatch, tmp_path / "a.png", episode, odds.log().bfloat16(), "The title")
    assert found[:2] == ["The title", "2 of 4 queries right, each forwarded by itself (non-transductive)"]
    marks = [text for text in found if text[0] in "✓✗"]
    assert marks == ["✓ 90 %", "✗ class 1, 75 %", "✓ 80 %", "✗ class 0, 50 %"]
    assert [text for text in found if text.startswith("class")] == ["class 0", "class 1"]
    assert not any("not shown" in text for text in found)


def test_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support, query = (torch.zeros(1, 22, k, 1, 5, 5, dtype=torch.uint8) for k in (3, 1))
    episode = Episode.of_classes(support, query, torch.tensor([0]), 0, 1)
    found = texts(monkeypatch, tmp_path / "a.png", episode, torch.eye(22), "The title", 2)
    assert "22 of 22 queries right" in found[1]
    notes = " ".join(found[2 : found.index("support")])
    assert notes == "not shown: 26 of 66 support images, 2 of 22 queries, 2 of 22 classes"
    assert [text for text in found if text.startswith("class")] == [f"class {label}" for label in range(20)]


def test_only_grey_and_rgb_images_are_images() -> None:
    assert is_image(torch.zeros(1, 2, 1, 5, 4))
    assert is_image(torch.zeros(1, 2, 3, 5, 4))
    assert not any(is_image(torch.zeros(1, 2, *shape)) for shape in [(7,), (5, 5), (2, 5, 5), (1, 1, 5)])
