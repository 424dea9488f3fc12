"""A checkpoint tested on other data than it was trained on: the same images in another form give the same figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fomal.cli import main
from tests.helpers.tiny_omniglot import write_folders

QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run's folder, and one with the same images as plain folders, and a list of the test classes among them."""
    folder = tmp_path_factory.mktemp("omniglot")
    root = write_folders(folder / "plain")
    data = [f"--data.root={root}", f"--data.cache_dir={folder}", "--data.val_tasks=1", "--data.train_classes=8"]
    data += ["--data.ways=3", "--data.train_shots=3"]
    small = ["--model.network.filters=4", "--model.eval.steps=2", "--trainer.max_steps=1"]
    small += ["--trainer.val_check_interval=1"]
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=run"]
    config = ["fit", "--config", "omniglot/quick_5way_1shot_reptile"]
    cli = main([*config, *data, *small, *logger, *QUICK])
    (folder / "classes.txt").write_text("\n".join(cli.datamodule.class_names["test"]))
    return folder / "run" / "version_0", folder


def test_omniglot_as_plain_folders(omniglot: tuple[Path, Path]) -> None:
    run, folder = omniglot
    checkpoint = ["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--data.test_tasks=8", *QUICK]
    plain = ["--data=fomal.data.ImageFolderDataModule", f"--data.root={folder / 'plain'}", "--data.image_size=28"]
    plain += ["--data.color=binary", "--data.resample=nearest", "--data.fit=stretch", "--data.split=lists"]
    plain += [f"--data.test_classes={folder / 'classes.txt'}", f"--data.cache_dir={folder}"]
    main([*checkpoint, "--data.shots=1"])
    expected = json.loads((run / "results.json").read_text())["metrics"]
    cli = main([*checkpoint, *plain, "--data.shots=1"])
    assert len(cli.datamodule.class_names["test"]) == 4
    found = json.loads((run / "results.json").read_text())
    assert found["config"]["data"]["class_path"] == "fomal.data.ImageFolderDataModule"
    assert found["metrics"] == expected


def test_the_number_of_ways_stays(omniglot: tuple[Path, Path], fails: Callable[..., str]) -> None:
    run, folder = omniglot
    said = fails(
        *("test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")),
        *("--data=fomal.data.ImageFolderDataModule", f"--data.root={folder / 'plain'}", "--data.ways=4"),
    )
    assert said.startswith("data.ways is 3 in the checkpoint, but 4 was given")


def test_training_goes_on_with_the_same_data(omniglot: tuple[Path, Path], fails: Callable[..., str]) -> None:
    run, folder = omniglot
    said = fails(
        *("fit", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")),
        *("--data=fomal.data.ImageFolderDataModule", f"--data.root={folder / 'plain'}"),
    )
    assert said.startswith("data.class_path is fomal.data.OmniglotDataModule in the checkpoint, but")
