"""A user's own images: what episodes hold, what is refused or left out, and a run from the command line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fomal.cli import main
from fomal.cli.checkpoint import refuse_differences
from fomal.cli.errors import UsageError
from fomal.data import ImageFolderDataModule
from fomal.data.images.image_format import ImageFormat
from tests.helpers.pictures import encoded, picture, write_images, zipped

SPLITS = {"train": ("ant", "bee", "cat", "dog"), "val": ("elk", "fox"), "test": ("gnu", "hen", "ibis")}
SMALL = {"ways": 2, "shots": 2, "query_shots": 1, "train_query_shots": 1, "image_size": 8, "meta_batch_size": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders in train/, val/ and test/, of 4 or 5 images, 12 x 8 pixels; nothing may change them."""
    counts = {f"{split}/{label}": 4 + (label < "c") for split, labels in SPLITS.items() for label in labels}
    return write_images(tmp_path_factory.mktemp("folders"), counts, 12, 8)


@pytest.fixture
def make(folders: Path, tmp_path: Path) -> Callable[..., ImageFolderDataModule]:
    """Builds a datamodule, of `folders` if nothing else is said, with its cache in the test's own folder."""

    def build(root: Path = folders, **settings: Any) -> ImageFolderDataModule:
        return ImageFolderDataModule(str(root), **{**SMALL, "cache_dir": str(tmp_path / "cache"), **settings})

    return build


def ready(data: ImageFolderDataModule) -> ImageFolderDataModule:
    data.prepare_data()
    data.setup()
    return data


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))


def cut(path: str) -> bytes:
    """The middle 8 x 8 pixels of a 12 x 8 file, as (3, 8, 8)."""
    return np.asarray(Image.open(path))[2:10].transpose(2, 0, 1).tobytes()


# -- what episodes hold


@pytest.mark.parametrize("split", SPLITS)
def test_episodes_hold_the_files_of_their_classes(split: str, folders: Path, make: Callable) -> None:
    known = ImageFolder(str(folders / split))  # torchvision's, an independent reader
    labels = {cut(path): known.classes[label] for path, label in known.samples}
    data = ready(make())
    assert data.class_names[split] == known.classes == list(SPLITS[split])
    episode = data.episodes(split, torch.arange(60)).check()
    assert episode.support_x.dtype == torch.uint8
    assert episode.support_x.shape == (60, 4, 3, 8, 8)
    seen = set()
    for x, y in zip(
        torch.cat([episode.support_x, episode.query_x], 1),
        torch.cat([episode.support_y, episode.query_y], 1),
        strict=True,
    ):
        contents = [image.numpy().tobytes() for image in x]
        assert len(set(contents)) == 6  # no image twice in a task
        pairs = {(label, labels[content]) for label, content in zip(y.tolist(), contents, strict=True)}
        assert sorted(label for label, _ in pairs) == [0, 1]  # each label is one class
        assert len({name for _, name in pairs}) == 2
        seen.update(contents)
    assert seen == labels.keys()  # all of them are used


@pytest.mark.parametrize("workers", [0, 2])
def test_episodes_are_the_same_cached_decoded_zipped_and_on_workers(
    workers: int, folders: Path, make: Callable, tmp_path: Path
) -> None:
    cached = ready(make())
    assert isinstance(cached.classes["train"].images, Tensor)
    expected = {split: cached.episodes(split, torch.arange(20)) for split in SPLITS}
    archive = zipped(folders, tmp_path / "images.zip")
    for settings in ({"cache_gb": 0}, {"root": archive}, {"root": archive, "cache_gb": 0}):
        data = ready(make(num_workers=workers, **settings))
        assert isinstance(data.classes["train"].images, Tensor) == ("cache_gb" not in settings)
        for split, loader in (("train", data.train_dataloader()), ("test", data.test_dataloader())):
            for batch in islice(iter(loader), 2):
                assert same(batch, expected[split].select(batch.number))
    few = 3 * 8 * 8 * 38 / 1e9  # the pixels of all 38 images
    assert isinstance(ready(make(cache_gb=few)).classes["val"].images, Tensor)
    assert not isinstance(ready(make(cache_gb=few * 0.99)).classes["val"].images, Tensor)


def test_a_csv_gives_the_episodes_of_the_folders_it_describes(folders: Path, make: Callable, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    rows = ["split,label,filename"]
    for path in sorted(folders.rglob("*.png")):
        split, label, name = path.relative_to(folders).parts
        (tmp_path / "flat" / f"{label}_{name}").write_bytes(path.read_bytes())
        rows.append(f"{split},{label},{label}_{name}")
    (tmp_path / "flat" / "labels.csv").write_text("\n".join(rows))
    by_csv, by_folders = ready(make(tmp_path / "flat", labels="labels.csv")), ready(make())
    assert by_csv.class_names == by_folders.class_names
    for split in SPLITS:
        numbers = torch.arange(20)
        assert same(by_csv.episodes(split, numbers), by_folders.episodes(split, numbers))


def test_size_colour_and_values_follow_the_settings(folders: Path, make: Callable) -> None:
    numbers = torch.arange(3)
    grey = make(image_size=(6, 10), color="gray", fit="stretch", resample="nearest", mean=[0.5], std=[0.25])
    x = grey.preprocess(ready(grey).episodes("train", numbers).support_x)
    assert x.shape == (3, 4, 1, 6, 10)
    files = [Image.open(path).convert("L").resize((10, 6), 0) for path in sorted(folders.glob("train/*/*.png"))]
    values = {((np.asarray(file) / np.float32(255) - 0.5) / 0.25).astype("f4").round(4).tobytes() for file in files}
    assert all(image.numpy().round(4).tobytes() in values for image in x.flatten(0, 1))
    colour, plain = make(mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0]), make()
    pixels = ready(colour).episodes("val", numbers).query_x
    expected = v2.functional.normalize(pixels / 255, [0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    torch.testing.assert_close(colour.preprocess(pixels), expected)
    torch.testing.assert_close(plain.preprocess(pixels), pixels / 255)
    assert same(ready(plain).episodes("val", numbers), colour.episodes("val", numbers))  # one cache serves both


def test_tables_and_patterns_are_settings(folders: Path, make: Callable, tmp_path: Path, fails: Callable) -> None:
    """Read from the command line too, the table in Latin-1 and with semicolons; masks lie beside the pictures."""
    root = shutil.copytree(folders, tmp_path / "images")
    rows = ["Bild;Art;Teil"]
    for path in sorted(root.rglob("*.png")):
        split, label, name = path.relative_to(root).parts
        path.with_name(f"{path.stem}_mask.png").write_bytes(encoded(picture(f"mask {path}")))
        rows.append(f"{split}\\{label}\\{name};ä{label};{'Validation' if split == 'val' else split}")
    (tmp_path / "list.csv").write_text("\n".join([*rows, "gone;x;test"]), "latin-1")
    columns = {"file_column": "bild", "label_column": "art", "split_column": "teil", "encoding": "latin-1"}
    given = {"labels": str(tmp_path / "list.csv"), **columns}
    with pytest.raises(ValueError, match="1 rows that cannot be used: 1 name files that .* lacks \\('gone'\\)"):
        make(root, **given).prepare_data()
    with pytest.warns(UserWarning, match="1 rows that cannot be used: .*: they are left out"):
        by_table = ready(make(root, on_error="skip", **given))
    by_folders, plain = ready(make(root, exclude="*_mask.*")), ready(make())
    assert by_folders.class_names == plain.class_names == {split: list(labels) for split, labels in SPLITS.items()}
    assert by_table.class_names == {split: [f"ä{label}" for label in labels] for split, labels in SPLITS.items()}
    for split in SPLITS:
        numbers = torch.arange(20)
        assert same(by_folders.episodes(split, numbers), plain.episodes(split, numbers))
        assert same(by_table.episodes(split, numbers), plain.episodes(split, numbers))
    settings = [f"--data.{key}={value}" for key, value in given.items() if key != "encoding"]
    message = fails("fit", "--config", config(root, tmp_path), *settings, code=1)
    assert "is not text in utf-8: save it in UTF-8, or set encoding, e.g. to cp1252" in message
    settings += ["--data.encoding=latin-1", "--data.on_error=skip"]
    with pytest.warns(UserWarning, match="they are left out"):
        cli = main(["fit", "--config", config(root, tmp_path), *settings])
    assert cli.datamodule.class_names == by_table.class_names


def test_a_share_does_not_depend_on_the_seed_of_the_tasks(folders: Path, make: Callable) -> None:
    data = [ready(make(split="share", seed=seed, partition_seed=part)) for seed, part in ((0, 0), (1, 0), (0, 1))]
    names = [module.class_names for module in data]
    assert sorted(len(labels) for labels in names[0].values()) == [2, 2, 5]
    assert sorted(sum(names[0].values(), [])) == sorted(sum(map(list, SPLITS.values()), []))
    assert names[0] == names[1] != names[2]


# -- what cannot be used


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Folders with one file of each fault, and what must be said of it."""
    root = write_images(tmp_path / "damaged", dict.fromkeys(("ant", "bee", "cat", "dog", "elk"), 5))
    write_images(root, {"bad": 3, "empty": 0})
    (root / "ant/00.png").write_bytes((root / "ant/00.png").read_bytes()[:60])
    (root / "bee/01.png").unlink()
    os.mkfifo(root / "bee/01.png")
    (root / "cat/02.png").write_bytes(b"no image")
    (root / "cat/twin.png").write_bytes((root / "dog/03.png").read_bytes())
    (root / "dog/twin.png").write_bytes((root / "dog/04.png").read_bytes())  # twice in one class: no fault
    (root / "elk/04.png").write_bytes(b"")
    for number in range(3):
        (root / f"bad/{number:02}.png").write_bytes(b"GIF89a")
    return root, {
        "ant/00.png": r"ant/00.png \(damaged: ",
        "bee/01.png": r"bee/01.png \(cannot be read: it is a fifo, and no regular file\)",
        "cat/02.png": r"cat/02.png \(no image of a known kind",
        "cat/twin.png": r"cat/twin.png \(the same image as dog/03.png, of another class\)",
        "dog/03.png": r"dog/03.png \(the same image as cat/twin.png, of another class\)",
        "elk/04.png": r"elk/04.png \(",
        "bad/00.png": r"bad/00.png \(",
        "bad/01.png": r"bad/01.png \(",
        "bad/02.png": r"bad/02.png \(",
        "bad": r"bad \(a class without images\)",
        "empty": r"empty \(a class without images\)",
    }


def test_all_that_cannot_be_used_is_said_at_once(damaged: tuple[Path, dict[str, str]], make: Callable) -> None:
    root, faults = damaged
    data = make(root, split="share")
    for attempt in (data.prepare_data, data.setup, make(root, split="share", cache_gb=0).prepare_data):
        with pytest.raises(ValueError, match=f"^root='{root}' has {len(faults)} that cannot be used: ") as error:
            attempt()
        for fault in faults.values():
            error.match(fault)
        error.match(r": mend or remove them, or set on_error: skip to leave them out\.$")


@pytest.mark.parametrize("cache_gb", [4, 0])
def test_skip_leaves_out_what_cannot_be_used(
    damaged: tuple[Path, dict[str, str]], make: Callable, cache_gb: float
) -> None:
    root, faults = damaged
    data = make(root, split="lists", train_classes=["ant", "bad", "bee", "cat", "dog", "elk"], on_error="skip", shots=3)
    with pytest.warns(UserWarning, match=f"^root='{root}' has {len(faults)} that cannot be used: ") as warned:
        ready(data)
    assert all(any(str(warning.message).count(name) for warning in warned) for name in faults)
    assert data.class_names["train"] == ["ant", "bee", "cat", "dog", "elk"]
    good = {
        np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes(): path.parent.name
        for path in root.rglob("*.png")
        if str(path.relative_to(root)) not in faults
    }
    episode = data.episodes("train", torch.arange(80)).check()
    images = torch.cat([episode.support_x, episode.query_x], 1).flatten(0, 1)
    assert {image.numpy().tobytes() for image in images} == good.keys()


def test_damage_does_not_change_which_classes_are_trained_on(make: Callable, tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {f"class{i}": 3 for i in range(10)})
    before = ready(make(root)).class_names
    victim = before["train"][0]
    for path in (root / victim).iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="3 that|4 that"):
        after = ready(make(root, on_error="skip")).class_names
    assert after == {**before, "train": before["train"][1:]}


def test_many_faults_are_cut_but_counted(make: Callable, tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 4, "b": 4})
    for number in range(30):
        (root / f"a/bad{number}.png").write_bytes(b"%d" % number)
    with pytest.raises(ValueError, match=r"has 30 that cannot be used: a/bad0.png .*; and 10 more: mend"):
        make(root, split="lists", train_classes=["a", "b"]).prepare_data()


def test_nothing_usable_and_no_folder_at_all(make: Callable, tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 1})
    (root / "a/00.png").write_bytes(b"")
    data = make(root, split="lists", train_classes=["a"], on_error="skip")
    with pytest.warns(UserWarning, match="2 that cannot be used"), pytest.raises(ValueError, match="has no image that"):
        data.setup()
    with pytest.raises(FileNotFoundError, match=r"^root='.*nowhere' does not exist"):
        make(tmp_path / "nowhere").prepare_data()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shots": 4, "train_shots": 1},
            r"^shots=4 plus query_shots=1 exceeds the 4 images that the smallest class of the val split has",
        ),
        (
            {"train_shots": 9},
            r"^train_shots=9 plus train_query_shots=1 exceeds the 4 images that the smallest class of",
        ),
        (
            {"ways": 3},
            r"^ways=3 exceeds the 2 classes of the val split: use ways <= 2, or give it more classes, by data.val_",
        ),
        (
            {"split": "share", "val_share": 0.1},
            r"^ways=2 exceeds the 1 class of the val split: give it more classes, by data.val_share and "
            r"data.test_share or by lists of classes, e.g. data.test_classes\.$",
        ),
        (
            {"split": "lists", "train_classes": ["ant"]},
            r"^ways=2 exceeds the 1 class of the train split: give it more classes, by",
        ),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_classes_too_small_for_a_task_are_found_before_pictures_are_decoded(
    settings: dict[str, Any], message: str, on_error: str, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "shots" not in settings or on_error == "raise":  # a class of one size more may lose it with a damaged file
        with monkeypatch.context() as patch:
            patch.setattr(ImageFormat, "decode", None)
            with pytest.raises(ValueError, match=message):
                make(on_error=on_error, **settings).prepare_data()
    with pytest.raises(ValueError, match=message):
        make(on_error=on_error, **settings).setup()


def test_rotations_need_squares(make: Callable) -> None:
    with pytest.raises(ValueError, match=r"^rotations=True needs square images, not 4 x 8"):
        make(image_size=(4, 8), rotations=True).setup()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "random"}, "split='random' is unknown: use one of auto, given, lists, share"),
        ({"on_error": "ignore"}, "on_error='ignore' is unknown: use one of raise, skip"),
        ({"ways": 1}, "ways=1 must be at least 2: with one class there is nothing to tell apart"),
        ({"separator": ",,"}, "separator=',,' is no separator"),
        ({"encoding": "utf-9"}, "encoding='utf-9' is unknown"),
        ({"val_share": -0.1}, "val_share=-0.1 must not be negative"),
        ({"cache_gb": -1}, "cache_gb=-1 must not be negative"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\] has 2 values for 3 channels"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, make: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


# -- from the command line


def config(root: Path, folder: Path, **data: Any) -> str:
    """A run of two meta-iterations on `root`."""
    network = {"class_path": "fomal.models.Conv4"}
    network["init_args"] = {"ways": 2, "in_channels": 3, "image_size": 8, "filters": 4, "downsample": "pool"}
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": "run"}}
    content = {
        "seed_everything": 3,
        "model": {
            "network": network,
            "rule": {"class_path": "fomal.outer.Reptile"},
            "inner_optimizer": {"class_path": "fomal.inner.SGD", "init_args": {"lr": 0.02}},
            **{"train": {"steps": 2}, "eval": {"steps": 2}},
        },
        "data": {
            "class_path": "fomal.data.ImageFolderDataModule",
            "init_args": {
                **{"root": str(root), "image_size": 8, "cache_dir": str(folder / "cache"), "ways": 2, "shots": 2},
                **{"meta_batch_size": 2, "val_tasks": 2, "test_tasks": 2, **data},
            },
        },
        "trainer": {
            **{"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu", "enable_progress_bar": False},
            **{"log_every_n_steps": 1, "logger": logger},
        },
    }
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


TRANSFORMS = {
    "rotations": True,
    "new_classes": [{"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 1.0}}],
    "class_transforms": [
        {"class_path": "torchvision.transforms.v2.RandomAffine", "init_args": {"degrees": 10, "translate": [0.1, 0.1]}},
    ],
    "image_transforms": [
        {"class_path": "torchvision.transforms.v2.ColorJitter", "init_args": {"brightness": 0.4}},
        {"class_path": "torchvision.transforms.v2.RandomCrop", "init_args": {"size": 8, "padding": 1}},
    ],
}


def test_a_run_with_transforms_from_yaml_and_its_checkpoint(
    folders: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    cli = main(["fit", "--config", config(folders, tmp_path, mean=[0.5], std=[0.5], **TRANSFORMS)])
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["val/accuracy"].isfinite()
    data = cli.datamodule
    assert [type(transform) for transform in data.image_transforms] == [v2.ColorJitter, v2.RandomCrop]
    assert len(data.classes["train"].first) == len(SPLITS["train"]) * (1 + 3 + 1)
    plain = ImageFolderDataModule(**{**SMALL, "root": str(folders), "seed": 3, "cache_dir": str(tmp_path / "cache")})
    plain.setup()
    assert same(data.episodes("test", torch.arange(4)), plain.episodes("test", torch.arange(4)))
    path = str(next((tmp_path / "run").rglob("*.ckpt")))
    tested = main(["test", "--ckpt_path", path, "--data.test_tasks=3", "--trainer.enable_progress_bar=false"])
    assert tested.datamodule.test_tasks == 3
    assert len(tested.datamodule.image_transforms) == 2
    assert fails("test", "--ckpt_path", path, "--data.split=share") == (
        "data.split is auto in the checkpoint, but share was given: leave it out."
    )
    assert fails("test", "--ckpt_path", path, "--data.new_classes=null").startswith("data.new_classes is [")


@pytest.mark.parametrize("key", sorted(ImageFolderDataModule.partition_settings))
def test_no_other_classes_are_tested_than_the_run_left_out(key: str) -> None:
    data = "fomal.data.ImageFolderDataModule"
    before, now = ({"data": {"class_path": data, "init_args": {key: value}}} for value in ("this", "that"))
    for verb in ("test", "validate", "predict", "fit"):
        with pytest.raises(UsageError, match=f"^data.{key} is this in the checkpoint, but that was given"):
            refuse_differences(before, now, verb)


def test_training_needs_no_test_classes_but_testing_does(
    make: Callable, tmp_path: Path, fails: Callable[..., str]
) -> None:
    root = write_images(tmp_path / "images", {"train/a": 3, "train/b": 3})
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    data = make(root)
    cli = main(["fit", "--config", config(root, tmp_path)])
    assert cli.trainer.global_step == 2
    with pytest.raises(ValueError, match=r"^the data have no test classes, only those of train, val: add some\.$"):
        L.Trainer(**quiet).test(cli.model, datamodule=data)
    message = fails("test", "--config", config(root, tmp_path), code=1)
    assert message == "the data have no test classes, only those of train, val: add some."


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["--data.root=no_such"], 1, "root='no_such' does not exist"),
        (
            ["--data.train_classes=[ant, emu]"],
            1,
            "train_classes names classes that there are not: 'emu'; there are 'ant'",
        ),
        (["--data.color=purple"], 2, "data.color=purple"),
        (["--data.image_transforms=[torchvision.transforms.v2.NoSuch]"], 2, "data.image_transforms"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], code: int, message: str, folders: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    assert message in fails("fit", "--config", config(folders, tmp_path), *given, code=code)
