"""Data with tasks that are not finite."""

from __future__ import annotations

from typing import Any

import torch

from fomal.data import SinusoidDataModule


class Poisoned(SinusoidDataModule):
    """Sine waves, of which the training episodes `bad` have a NaN among their targets."""

    def __init__(self, bad: set[int], **settings: Any) -> None:
        super().__init__(**{"train_query_shots": 5, "meta_batch_size": 4, **settings})
        self.bad = bad

    def episodes(self, split: str, number: torch.Tensor) -> Any:
        episode = super().episodes(split, number)
        for place, i in enumerate(number.tolist()):
            if split == "train" and i in self.bad:
                episode.support_y[place] = torch.nan
        return episode
