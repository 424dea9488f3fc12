"""The four-block convolutional network of the few-shot literature, in both of the paper's forms."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fomal.models.norm import BatchNorm, set_statistics
from fomal.utils.checks import WIDE, fits_as_weights, height_and_width, nonnegative, one_of, positive


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm and ReLU, and a linear head (Nichol et al. 2018, appendix A).

    `downsample="stride"` is the Omniglot form (convolutions of stride 2); `"pool"` is the Mini-ImageNet form
    (stride 1, then batch norm, 2x2 max-pooling, ReLU). Sizes halve, rounding up, in each block.

    Args:
        ways: classes, the size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images, or both, in pixels.
        filters: channels of every convolution.
        downsample: how a block halves the image.
        padding: "tensorflow" pads right and bottom only where stride 2 meets an even size, as the released code;
            "symmetric" pads one pixel on every side.
        init: "released" is Glorot-uniform with zero biases, as the released code; "torch" keeps torch's defaults.
        eps: of the batch norm.
        statistics: of the batch norm, see `BatchNorm`.
    """

    def __init__(
        self,
        ways: int = 5,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        filters: int = 64,
        downsample: Literal["stride", "pool"] = "stride",
        padding: Literal["tensorflow", "symmetric"] = "tensorflow",
        init: Literal["released", "torch"] = "released",
        eps: float = 1e-3,
        statistics: Literal["batch", "support"] = "batch",
    ) -> None:
        super().__init__()
        height, width = height_and_width(image_size)
        positive(WIDE, ways=ways, in_channels=in_channels, filters=filters)
        nonnegative(eps=eps)
        one_of(("stride", "pool"), downsample=downsample)
        one_of(("tensorflow", "symmetric"), padding=padding)
        one_of(("released", "torch"), init=init)
        one_of(("batch", "support"), statistics=statistics)
        weights = 9 * filters * (in_channels + 3 * filters) + filters * -(-height // 16) * -(-width // 16) * ways
        sizes = {"ways": ways, "in_channels": in_channels, "image_size": image_size, "filters": filters}
        fits_as_weights("the network", weights, **sizes)
        blocks: list[nn.Module] = []
        channels = in_channels
        for _ in range(4):
            blocks.append(_Block(channels, filters, (height, width), downsample, padding, eps))
            height, width, channels = -(-height // 2), -(-width // 2), filters
        self.blocks = nn.Sequential(*blocks)
        set_statistics(self, statistics)
        self.head = nn.Linear(filters * height * width, ways)
        if init == "released":
            _glorot(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, ways)."""
        return self.head(self.blocks(x).flatten(1))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """(B, C, H, W) -> (B, filters, ceil(H / 2), ceil(W / 2))."""

    def __init__(
        self, channels: int, filters: int, size: tuple[int, int], downsample: str, padding: str, eps: float
    ) -> None:
        super().__init__()
        self.pool = downsample == "pool"
        below, right = (downsample == "stride" and padding == "tensorflow" and side % 2 == 0 for side in size)
        self.pad_end = (0, int(right), 0, int(below))  # as F.pad has it
        stride = 1 if self.pool else 2
        # No bias: batch norm would remove it.
        self.conv = nn.Conv2d(channels, filters, 3, stride, padding=(int(not below), int(not right)), bias=False)
        self.norm = BatchNorm(filters, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(F.pad(x, self.pad_end) if any(self.pad_end) else x))
        return F.relu(F.max_pool2d(x, 2, ceil_mode=True) if self.pool else x)


def _glorot(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
