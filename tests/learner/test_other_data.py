"""A checkpoint tested on other data than it was trained on: the same images in another form give the same figures."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fomal.cli import main
from fomal.data import OmniglotDataModule

QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def omniglot(omniglot_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run's folder, and Omniglot as plain folders below test/, with a list of them in the data module's order."""
    folder = tmp_path_factory.mktemp("omniglot")
    data = [f"--data.root={omniglot_root}", f"--data.cache_dir={folder}", "--data.val_tasks=1"]
    small = ["--model.network.filters=4", "--trainer.max_steps=20", "--trainer.val_check_interval=20"]
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=run"]
    config = ["fit", "--config", "omniglot/quick_5way_1shot_reptile"]
    main([*config, *data, *small, *logger, *QUICK])
    module = OmniglotDataModule(str(omniglot_root), cache_dir=str(folder))
    module.setup()
    names = module.characters["test"]
    for part in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(omniglot_root / f"{part}.zip") as archive:
            wanted = [name for name in archive.namelist() if name.rpartition("/")[0] in set(names)]
            archive.extractall(folder / "plain", [name for name in wanted if name.endswith(".png")])
    (folder / "classes.txt").write_text("\n".join(names))
    return folder / "run" / "version_0", folder


def test_omniglot_as_plain_folders(omniglot: tuple[Path, Path], omniglot_root: Path) -> None:
    run, folder = omniglot
    checkpoint = ["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--data.test_tasks=60", *QUICK]
    plain = ["--data=fomal.data.ImageFolderDataModule", f"--data.root={folder / 'plain'}", "--data.image_size=28"]
    plain += ["--data.color=binary", "--data.resample=nearest", "--data.fit=stretch", "--data.split=lists"]
    plain += [f"--data.test_classes={folder / 'classes.txt'}", f"--data.cache_dir={folder}"]
    main([*checkpoint, "--data.shots=1"])
    expected = json.loads((run / "results.json").read_text())["metrics"]
    cli = main([*checkpoint, *plain, "--data.shots=1"])
    assert len(cli.datamodule.class_names["test"]) == 423
    found = json.loads((run / "results.json").read_text())
    assert found["config"]["data"]["class_path"] == "fomal.data.ImageFolderDataModule"
    assert found["metrics"] == expected


def test_the_number_of_ways_stays(omniglot: tuple[Path, Path], fails: Callable[..., str]) -> None:
    run, folder = omniglot
    said = fails(
        *("test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")),
        *("--data=fomal.data.ImageFolderDataModule", f"--data.root={folder / 'plain'}", "--data.ways=4"),
    )
    assert said.startswith("data.ways is 5 in the checkpoint, but 4 was given")


def test_training_goes_on_with_the_same_data(omniglot: tuple[Path, Path], fails: Callable[..., str]) -> None:
    run, folder = omniglot
    said = fails(
        *("fit", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")),
        *("--data=fomal.data.ImageFolderDataModule", f"--data.root={folder / 'plain'}"),
    )
    assert said.startswith("data.class_path is fomal.data.OmniglotDataModule in the checkpoint, but")
