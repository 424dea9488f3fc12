"""A small network, and tasks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fomal.models import Conv4
from fomal.tasks.episode import Episode


class SmallConv(nn.Module):
    """A small classifier with batch norm, quick in float64."""

    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.net = Conv4(ways=ways, in_channels=1, image_size=9, filters=4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


def classification_episode(tasks: int = 4, ways: int = 3, shots: int = 4, query: int = 2, seed: int = 0) -> Episode:
    """Random images, float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways)
    return Episode(
        support_x=torch.rand(tasks, ways * shots, 1, 9, 9, generator=generator, dtype=torch.float64),
        support_y=labels.repeat_interleave(shots).expand(tasks, -1),
        query_x=torch.rand(tasks, ways * query, 1, 9, 9, generator=generator, dtype=torch.float64),
        query_y=labels.repeat_interleave(query).expand(tasks, -1),
        number=torch.arange(tasks),
        ways=ways,
    )
