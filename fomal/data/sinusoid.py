"""Sine waves, the paper's first experiment: y = a sin(x + b)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fomal.tasks.datamodule import EpisodeDataModule, split_index
from fomal.tasks.episode import Episode
from fomal.tasks.philox import uniform
from fomal.tasks.sampler import task_words

INTERVAL = (-5.0, 5.0)


class SinusoidDataModule(EpisodeDataModule):
    """Regression tasks y = a sin(x + b) with a ~ U[0.1, 5], b ~ U[0, 2 pi], x ~ U[-5, 5] (Nichol et al. 2018, 4).

    Needs no download. Support points are sampled at random; the query points of validation and test tasks are
    spread evenly over the interval, ends included, so that their mean squared error estimates the paper's
    integral loss; those of training tasks are sampled at random like the support.

    Args:
        shots: support points of a validation or test task.
        query_shots: points on the interval at which a validation or test task is judged, at least 2.
        kwargs: see `EpisodeDataModule`.

    Raises:
        ValueError: fewer than 2 query points.
    """

    samples_anywhere: ClassVar[bool] = True

    def __init__(self, shots: int = 10, query_shots: int = 100, **kwargs: Any) -> None:
        super().__init__(shots=shots, query_shots=query_shots, **kwargs)
        if query_shots < 2:
            raise ValueError(f"query_shots={query_shots} must be at least 2, the ends of the interval.")

    def network_sizes(self) -> dict[str, Any]:
        """One input and one output."""
        return {"in_features": 1, "out_features": 1}

    def episodes(self, split: str, number: Tensor) -> Episode:
        """Tasks `number` of a split, inputs and targets (T, points, 1) float32; devices may differ by rounding."""
        place = split_index(split)
        shots, query_shots = self.examples(split)
        tasks = len(number)
        words = task_words(self.seed, place, number, 2 + shots + query_shots)
        amplitude = uniform(words[:, :1], 0.1, 5.0)  # (T, 1)
        phase = uniform(words[:, 1:2], 0.0, 2 * math.pi)  # (T, 1)
        x = uniform(words[:, 2:], *INTERVAL)  # (T, K + Q)
        if split != "train":
            x[:, shots:] = torch.linspace(*INTERVAL, query_shots, dtype=x.dtype, device=x.device)
        y = amplitude * torch.sin(x + phase)
        x, y = (t.float().view(tasks, -1, 1) for t in (x, y))
        return Episode(
            support_x=x[:, :shots],
            support_y=y[:, :shots],
            query_x=x[:, shots:],
            query_y=y[:, shots:],
            number=number,
            ways=1,
            seed=self.seed,
            split=place,
        )
