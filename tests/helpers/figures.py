"""Learners on random images, and what they have drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn

from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.inner import Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import EvalSchedule, InnerSchedule
from fomal.outer import Reptile


class RandomImages(ImageDataModule):
    """Eight classes of five random images."""

    def load(self) -> dict[str, ClassImages]:
        images = torch.rand(40, 1, 9, 9, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
        return dict.fromkeys(("train", "val", "test"), ClassImages.of(images, torch.full((8,), 5)))

    def preprocess(self, x: Tensor) -> Tensor:
        return x.float() / 255


def learner(network: nn.Module) -> MetaLearner:
    return MetaLearner(network, Reptile(), Adam(0.01), train=InnerSchedule(2, 5), eval=EvalSchedule(6, 4))


def fit(model: MetaLearner, data: L.LightningDataModule, folder: Path, *callbacks: Any, **settings: Any) -> None:
    logger = L.pytorch.loggers.CSVLogger(folder, name="", version="run")
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    steps = {"max_steps": 4, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 2}
    trainer = L.Trainer(accelerator="cpu", logger=logger, callbacks=list(callbacks), **{**quiet, **steps, **settings})
    trainer.fit(model, datamodule=data)


def assert_drawn(path: Path) -> None:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert len(image.getcolors(1 << 24) or ()) > 20  # not blank
