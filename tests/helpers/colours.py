"""A checkpoint that knows how to learn colours, and images of colours it has not met."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fomal.cli import main

SIZE = 10
NAMES = [f"colour{i:02}" for i in range(14)]


def colour_images(root: Path, names: list[str], count: int, size: int = SIZE, seed: int = 0) -> Path:
    """Folders of noisy images, one colour and direction of stripes for each; returns `root`."""
    for name in names:
        own = np.random.default_rng(int(name[-2:]))
        base, stripes = own.uniform(60, 200, 3), own.integers(1, 4)
        rng = np.random.default_rng((seed, int(name[-2:])))
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            waves = 40 * np.sin(np.arange(size) * stripes + rng.uniform(0, 6))[:, None, None]
            pixels = base + waves + rng.normal(0, 15, (size, size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{number:02}.png")
    return root


def config(root: Path, runs: Path, adam: bool = True) -> dict[str, object]:
    """A small run on the images in `root`."""
    inner = {"class_path": "fomal.inner.Adam", "init_args": {"lr": 0.003, "beta1": 0.0}}
    sgd = {"class_path": "fomal.inner.SGD", "init_args": {"lr": 0.05}}
    network = {"in_channels": 3, "image_size": SIZE, "filters": 8, "downsample": "stride"}
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(runs), "name": "", "version": "run"}}
    return {
        "seed_everything": 1,
        "model": {
            "network": {"class_path": "fomal.models.Conv4", "init_args": network},
            "rule": {"class_path": "fomal.outer.Reptile"},
            "inner_optimizer": inner if adam else sgd,
            "train": {"steps": 4, "batch_size": 6},
            "eval": {"steps": 12, "batch_size": 4},
        },
        "data": {
            "class_path": "fomal.data.ImageFolderDataModule",
            "init_args": {
                "root": str(root),
                "image_size": SIZE,
                "mean": [0.4, 0.5, 0.6],
                "std": [0.2, 0.3, 0.4],
                "cache_dir": str(runs / "cache"),
                "ways": 3,
                "shots": 2,
                "train_shots": 4,
                "query_shots": 3,
                "test_share": 0.3,
                "val_tasks": 4,
                "test_tasks": 10,
            },
        },
        "trainer": {
            "max_steps": 60,
            "val_check_interval": 60,
            "accelerator": "cpu",
            "logger": logger,
            "enable_progress_bar": False,
        },
    }


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen classes of eight images."""
    return colour_images(tmp_path_factory.mktemp("colours"), NAMES, 8)


@pytest.fixture(scope="session")
def checkpoint(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run on them, made through the command line."""
    runs = tmp_path_factory.mktemp("runs")
    main(["fit", "--config", yaml.safe_dump(config(colours, runs))])
    return runs / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def support(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three new classes of 3, 4 and 2 images, of another size than in training."""
    root = tmp_path_factory.mktemp("support")
    for name, count in (("new20", 3), ("new21", 4), ("new22", 2)):
        colour_images(root, [name], count, size=24, seed=1)
    return root


@pytest.fixture(scope="session")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten more images of each of the new classes."""
    return colour_images(tmp_path_factory.mktemp("queries"), ["new20", "new21", "new22"], 10, size=24, seed=2)


@pytest.fixture(scope="session")
def model(checkpoint: Path, support: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "m"
    main(["adapt", "--ckpt_path", str(checkpoint), "--support", str(support), "--out", str(folder)])
    return folder
