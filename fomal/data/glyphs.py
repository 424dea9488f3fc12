"""Characters of invented scripts, drawn as they are asked for: image tasks without a download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomal.data.images.image_format import ImageFormat
from fomal.tasks.datamodule import EpisodeDataModule, split_index
from fomal.tasks.episode import Episode
from fomal.tasks.philox import below, uniform
from fomal.tasks.sampler import task_words
from fomal.utils.checks import height_and_width, nonnegative, positive, several

GRID = 4  # anchors in a row, and rows
ANCHORS = GRID * GRID
EXTENT = 0.64  # of the anchors, in sides of the image
PEN = (1.0, 2.0)  # how much ink an example's pen gives, which is how thick it writes
UNIT = 256  # ink is counted in whole parts of this size, so that sums are exact in any order
SMALLEST = 14
_STROKES = 1000  # more than make anything but a black image


class GlyphDataModule(EpisodeDataModule):
    """N-way K-shot tasks of characters that exist in one task alone; needs no files, and never runs out of classes.

    A character is a few strokes: quadratic Bezier curves whose three points are anchors, of a 4 x 4 grid. A stroke
    begins where the last one ended, or elsewhere. Each example has its own places of the anchors, linear map, shift
    and pen.

    Args:
        ways: classes per task.
        image_size: height and width of the images, in pixels.
        strokes: the most strokes that a character has; the fewest are half as many.
        wobble: how far the anchors of an example stray from their grid, at most, in sides of the image.
        warp: how far the linear map of an example strays from the identity, at most, in each of its four entries.
        shift: how far an example is moved, at most, in either direction, in sides of the image.
        kwargs: see `EpisodeDataModule`.

    Raises:
        ValueError: images too small to write in; a size or share out of its range.
    """

    def __init__(
        self,
        ways: int = 5,
        image_size: int = 28,
        strokes: int = 4,
        wobble: float = 0.06,
        warp: float = 0.2,
        shift: float = 0.08,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        several(ways=ways)
        height_and_width(image_size)
        positive(_STROKES, strokes=strokes)
        nonnegative(wobble=wobble, warp=warp, shift=shift)
        if image_size < SMALLEST:
            raise ValueError(f"image_size={image_size} is too small to write in: use image_size >= {SMALLEST}.")
        self.ways = ways
        self.image_size = image_size
        self.strokes = strokes
        self.wobble = wobble
        self.warp = warp
        self.shift = shift
        self.image_format = ImageFormat(image_size, image_size, "gray", "pad")

    def episodes(self, split: str, number: Tensor) -> Episode:
        """Tasks `number` of a split, images (T, examples, 1, H, W) uint8, dark ink on white."""
        place = split_index(split)
        shots, query_shots = self.examples(split)
        tasks, each = len(number), shots + query_shots
        common, own = 1 + 3 * self.strokes, 2 * ANCHORS + 4 + 2 + 1  # words of a class, and of an example
        words = task_words(self.seed, place, number, self.ways * (common + each * own))
        of_classes, of_examples = words[:, : self.ways * common], words[:, self.ways * common :]
        cells, present = self._characters(of_classes.reshape(tasks, self.ways, 1, common))
        curves, pen = self._written(cells, of_examples.reshape(tasks, self.ways, each, own))
        present = present.expand(*curves.shape[:-2])
        x = draw(curves.flatten(0, 2), present.flatten(0, 2), pen.flatten(), self.image_size)
        x = x.view(tasks, self.ways, each, 1, self.image_size, self.image_size)
        return Episode.of_classes(x[:, :, :shots], x[:, :, shots:], number, self.seed, place)

    def preprocess(self, x: Tensor) -> Tensor:
        """Pixels uint8 to float32 in [0, 1], white 1."""
        return self.image_format.normalize(x)

    def _characters(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """The anchors (..., strokes, 3) of each stroke's begin, middle and end, and whether it is there."""
        fewest = (self.strokes + 1) // 2
        count = fewest + below(words[..., :1], self.strokes - fewest + 1)
        travel, middle, end = words[..., 1:].reshape(*words.shape[:-1], self.strokes, 3).unbind(-1)
        travel = (below(travel, 2 * ANCHORS) - ANCHORS).clamp(min=0)  # half of the time the pen is not lifted
        middle = below(middle, ANCHORS)
        move = 1 + below(end, ANCHORS - 1)  # a stroke ends elsewhere than it began
        end = (travel + move).cumsum(-1)
        cells = torch.stack([(end - move) % ANCHORS, middle, end % ANCHORS], -1)
        return cells, torch.arange(self.strokes) < count

    def _written(self, cells: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Bezier points (T, W, E, strokes, 3, 2), x before y, the image being [0, 1] x [0, 1], and pens (T, W, E)."""
        stray = uniform(words, -1, 1).float()  # (T, W, E, own)
        x, y, rest = stray[..., :ANCHORS], stray[..., ANCHORS : 2 * ANCHORS], stray[..., 2 * ANCHORS :, None]
        place = torch.arange(ANCHORS)
        x = EXTENT * ((place % GRID) / (GRID - 1) - 0.5) + self.wobble * x  # (T, W, E, anchors)
        y = EXTENT * ((place // GRID) / (GRID - 1) - 0.5) + self.wobble * y
        a, b, c, d = (self.warp * rest[..., :4, :]).unbind(-2)  # (T, W, E, 1)
        right, down = (self.shift * rest[..., 4:6, :]).unbind(-2)
        x, y = x + a * x + b * y + (0.5 + right), y + c * x + d * y + (0.5 + down)
        index = cells.flatten(-2).expand(*x.shape[:-1], -1)  # (T, W, E, strokes * 3)
        curves = torch.stack([x.gather(-1, index), y.gather(-1, index)], -1).view(*x.shape[:-1], self.strokes, 3, 2)
        return curves, uniform(words[..., -1], *PEN).float()


def draw(curves: Tensor, present: Tensor, pen: Tensor, size: int) -> Tensor:
    """Draw quadratic Bezier curves; an image depends on its own curves alone, to the bit.

    Args:
        curves: (N, strokes, 3, 2), x before y, the image being [0, 1] x [0, 1].
        present: (N, strokes), which of them there are.
        pen: (N,), ink per length.
        size: height and width of the images, in pixels.

    Returns:
        (N, size, size) uint8, 255 white.
    """
    reach = max(2, round(size / 14))  # of the blur, in pixels
    width = size + 2 * reach
    t = torch.linspace(0, 1, size + 1)
    start, middle, end = (curves * size + (reach - 0.5))[..., None].unbind(2)  # (N, strokes, 2, 1), in pixels
    # Without a matrix product, whose rounding may depend on the number of images.
    points = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end  # (N, strokes, 2, size + 1)
    length = points.diff().square()
    length = (length[:, :, 0] + length[:, :, 1]).sqrt() * present[..., None]  # (N, strokes, size)
    # What leaves the image gathers on the rim of the canvas, which is cut off.
    points = ((points[..., 1:] + points[..., :-1]) / 2).clamp(0, width - 1.001)
    canvas = splat(points, UNIT * length, width)
    blurred = box_sums(box_sums(canvas, reach), reach)[:, 1:-1, 1:-1]
    ink = (blurred * (pen[:, None, None] / (UNIT * reach**3))).clamp(max=1)
    return (255 - 255 * ink).round().to(torch.uint8)


def splat(points: Tensor, ink: Tensor, width: int) -> Tensor:
    """Share each point's ink among the four pixels around it, by bilinear weights rounded to whole numbers.

    Args:
        points: (N, strokes, 2, L), x before y, in [0, width - 1).
        ink: (N, strokes, L).
        width: height and width of the images, in pixels.

    Returns:
        (N, width, width) float32.
    """
    corner = points.floor()
    x, y = (points - corner).unbind(2)  # (N, strokes, L)
    column, row = corner.long().unbind(2)
    image = torch.arange(len(points))[:, None, None]
    place = (image * width + row) * width + column  # (N, strokes, L)
    canvas = torch.zeros(len(points) * width * width)
    for down, share in ((0, 1 - y), (1, y)):
        for across, part in ((0, 1 - x), (1, x)):
            parts = (ink * share * part).round()
            canvas.index_add_(0, (place + (down * width + across)).flatten(), parts.flatten())
    return canvas.view(-1, width, width)


def box_sums(x: Tensor, side: int) -> Tensor:
    """Sums over all squares of a side, (N, H, W) to (N, H - side + 1, W - side + 1)."""
    for axis in (1, 2):
        count = x.shape[axis] - side + 1
        x = sum((x.narrow(axis, place, count) for place in range(1, side)), x.narrow(axis, 0, count))
    return x
