"""The sheet of classified images."""

from __future__ import annotations

import matplotlib.colors
import torch

from fomal.plots.contact_sheet import contact_sheet


def test_every_image_has_its_label_and_mistakes_are_red() -> None:
    images = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 3, 4, 4) * 10
    labels = ["cat", "dog", "a/very/long/name/of/a/class", *["cat"] * 6]
    truth = ["cat", "cat", None, *["cat"] * 6]
    figure = contact_sheet(images, labels, torch.linspace(0.5, 0.9, 9), truth)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(figure.axes) == 16  # two rows of eight
    assert len(drawn) == 9
    titles = [axes.get_title() for axes in drawn]
    assert titles[:2] == ["cat 50 %", "dog 55 %\n(is cat)"]
    assert titles[2].endswith("of/a/class 60 %")
    red = [matplotlib.colors.same_color(axes.title.get_color(), "tab:red") for axes in drawn]
    assert red == [False, True, *[False] * 7]
    for place, axes in enumerate(drawn):
        assert (axes.images[0].get_array() == 10 * place).all()


def test_grey_images_and_a_single_one() -> None:
    figure = contact_sheet(torch.full((1, 1, 4, 4), 128, dtype=torch.uint8), ["a"], torch.ones(1), [None])
    (axes,) = figure.axes
    assert axes.images[0].get_array().shape == (4, 4)
    assert axes.images[0].get_clim() == (0, 255)
