"""The four-block convolutional network of the few-shot literature, in both of the paper's forms."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fomal.checks import one_of, positive
from fomal.models.norm import BatchNorm


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, batch norm and ReLU, and a linear head (Nichol et al. 2018, appendix A).

    `downsample="stride"` is the Omniglot form (convolutions of stride 2); `"pool"` is the Mini-ImageNet form
    (stride 1, then batch norm, 2x2 max-pooling, ReLU). Sizes halve, rounding up, in each block.

    Args:
        ways: classes, the size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images, in pixels.
        filters: channels of every convolution.
        downsample: how a block halves the image.
        padding: "tensorflow" pads right and bottom only where stride 2 meets an even size, as the released code;
            "symmetric" pads one pixel on every side.
        init: "released" is Glorot-uniform with zero biases, as the released code; "torch" keeps torch's defaults.
        eps: of the batch norm.
    """

    def __init__(
        self,
        ways: int = 5,
        in_channels: int = 1,
        image_size: int = 28,
        filters: int = 64,
        downsample: Literal["stride", "pool"] = "stride",
        padding: Literal["tensorflow", "symmetric"] = "tensorflow",
        init: Literal["released", "torch"] = "released",
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        positive(ways=ways, in_channels=in_channels, image_size=image_size, filters=filters)
        one_of(("stride", "pool"), downsample=downsample)
        one_of(("tensorflow", "symmetric"), padding=padding)
        one_of(("released", "torch"), init=init)
        blocks: list[nn.Module] = []
        size, channels = image_size, in_channels
        for _ in range(4):
            blocks.append(_Block(channels, filters, size, downsample, padding, eps))
            size, channels = -(-size // 2), filters
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(filters * size * size, ways)
        if init == "released":
            _glorot(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, ways)."""
        return self.head(self.blocks(x).flatten(1))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """(B, C, H, W) -> (B, filters, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, channels: int, filters: int, size: int, downsample: str, padding: str, eps: float) -> None:
        super().__init__()
        self.pool = downsample == "pool"
        self.pad_end = downsample == "stride" and padding == "tensorflow" and size % 2 == 0
        stride = 1 if self.pool else 2
        # No bias: batch norm would remove it.
        self.conv = nn.Conv2d(channels, filters, 3, stride, padding=0 if self.pad_end else 1, bias=False)
        self.norm = BatchNorm(filters, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x))
        return F.relu(F.max_pool2d(x, 2, ceil_mode=True) if self.pool else x)


def _glorot(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
