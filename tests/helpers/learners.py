"""Small learners, their data and trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.inner import Adam, InnerOptimizer
from fomal.learner.meta_learner import MetaLearner
from fomal.models import MLP, BatchNorm, Conv4
from fomal.outer import OuterRule, Reptile
from tests.helpers.groups import grouped


class Blobs(ImageDataModule):
    """Random images: each class has a pattern of its own, each image noise on it."""

    def __init__(self, **settings: Any) -> None:
        defaults: dict[str, Any] = {"ways": 3, "shots": 2, "train_shots": 4, "meta_batch_size": 4, "rotations": True}
        super().__init__(**{**defaults, **settings})

    def load(self) -> dict[str, ClassImages]:
        generator = torch.Generator().manual_seed(0)
        pattern = torch.rand(12, 1, 1, 9, 9, generator=generator)
        noise = torch.rand(12, 8, 1, 9, 9, generator=generator)
        images = ((0.7 * pattern + 0.3 * noise) * 255).to(torch.uint8).flatten(0, 1)
        return dict.fromkeys(("train", "val", "test"), ClassImages.of(images, torch.full((12,), 8)))

    def preprocess(self, x: Tensor) -> Tensor:
        return x.float() / 255


def sine_learner(
    rule: OuterRule | None = None,
    inner: InnerOptimizer | None = None,
    network: nn.Module | None = None,
    **settings: Any,
) -> MetaLearner:
    torch.manual_seed(0)
    network = network or MLP(hidden=(16,))
    defaults = {"train": {"steps": 3, "batch_size": 5}, "eval": {"steps": 4, "batch_size": 10}}
    return MetaLearner(network, rule or Reptile(), inner or Adam(0.01), **grouped(defaults, settings))


def blob_learner(
    rule: OuterRule | None = None,
    inner: InnerOptimizer | None = None,
    network: nn.Module | None = None,
    **settings: Any,
) -> MetaLearner:
    torch.manual_seed(0)
    network = network or Conv4(3, image_size=9, filters=8)
    defaults = {"train": {"steps": 3, "batch_size": 6}, "eval": {"steps": 4, "batch_size": 3}}
    return MetaLearner(network, rule or Reptile(), inner or Adam(0.01), **grouped(defaults, settings))


def trainer(steps: int = 4, **settings: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_steps": steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "check_val_every_n_epoch": None,
        "val_check_interval": 1000,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**defaults, **settings})


def weights(learner: MetaLearner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.network.state_dict().items()}


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class StopAfter(L.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def smooth_learner(rule: OuterRule | None, inner: InnerOptimizer | None) -> MetaLearner:
    """Without the bends of ReLU, beyond which second derivatives in few digits mean little; no gradient is zero."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2, bias=False), BatchNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    return blob_learner(rule, inner, network)
