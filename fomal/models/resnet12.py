"""The twelve-layer residual network of the few-shot literature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fomal.models.norm import BatchNorm, set_statistics
from fomal.utils.checks import WIDE, fits_as_weights, nonnegative, numbers, one_of, positive

_SLOPE = 0.1  # of the leaky ReLU


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, global average pooling and a linear head.

    The network of TADAM (Oreshkin et al. 2018, arXiv:1805.10123) in the form of MetaOptNet (Lee et al. 2019,
    arXiv:1904.03758): leaky ReLUs of slope 0.1, widths 64-160-320-640, 12.4 million parameters without the head.
    Images of any size from 16x16 on; sizes halve, rounding down, in each block. Left out are MetaOptNet's dropout
    and DropBlock, whose rates grow with the number of batches seen; and its option to flatten the last feature map
    instead of averaging it.

    Args:
        ways: classes, the size of the output.
        in_channels: channels of the images.
        widths: channels of the four blocks.
        eps: of the batch norm; MetaOptNet's 1e-5.
        statistics: of the batch norm, see `BatchNorm`.

    Raises:
        ValueError: `widths` are not four.
    """

    def __init__(
        self,
        ways: int = 5,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 160, 320, 640),
        eps: float = 1e-5,
        statistics: Literal["batch", "support"] = "batch",
    ) -> None:
        super().__init__()
        positive(WIDE, ways=ways, in_channels=in_channels)
        nonnegative(eps=eps)
        one_of(("batch", "support"), statistics=statistics)
        numbers(widths=widths)
        if len(widths) != 4:
            raise ValueError(f"widths={list(widths)}: ResNet12 has four blocks, give four widths.")
        for width in widths:
            positive(WIDE, widths=width)
        inputs = [in_channels, *widths[:-1]]
        weights = sum(o * (10 * i + 18 * o) for i, o in zip(inputs, widths, strict=True)) + widths[-1] * ways
        fits_as_weights("the network", weights, ways=ways, in_channels=in_channels, widths=list(widths))
        self.blocks = nn.Sequential(*(_Block(i, o, eps) for i, o in zip(inputs, widths, strict=True)))
        set_statistics(self, statistics)
        self.head = nn.Linear(widths[-1], ways)
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="leaky_relu"
                )  # slope 0, as released

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, ways).

        Raises:
            ValueError: for images that the four poolings leave nothing of.
        """
        height, width = x.shape[-2:]
        if min(height, width) < 16:
            raise ValueError(f"the images are {height}x{width} pixels, but ResNet12 needs 16x16: resize them.")
        return self.head(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """(B, channels, H, W) -> (B, filters, H // 2, W // 2)."""

    def __init__(self, channels: int, filters: int, eps: float) -> None:
        super().__init__()
        widths = [channels, filters, filters]
        # No biases: batch norm would remove them.
        self.convs = nn.ModuleList(nn.Conv2d(width, filters, 3, padding=1, bias=False) for width in widths)
        self.norms = nn.ModuleList(BatchNorm(filters, eps) for _ in widths)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, bias=False), BatchNorm(filters, eps))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(F.leaky_relu(y, _SLOPE) if i else y))
        return F.max_pool2d(F.leaky_relu(y + self.shortcut(x), _SLOPE), 2)
