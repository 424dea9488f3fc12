"""Omniglot: what is read, how it is split, and what goes wrong when files are missing or damaged."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Omniglot

from fomal.data import omniglot
from fomal.data.omniglot import PARTS, SIDE, OmniglotDataModule
from fomal.tasks.sampler import SPLITS
from tests.helpers.tiny_omniglot import DRAWINGS, TINY, png, write_folders


def zip_part(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in folder.rglob("*"):
            zipped.write(path, path.relative_to(folder.parent))


def write_zips(root: Path, folders: Path) -> Path:
    root.mkdir(exist_ok=True)
    for part in PARTS:
        zip_part(folders / part, root / f"{part}.zip")
    return root


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture
def folders(tiny_folders: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(tiny_folders, tmp_path / "folders"))


@pytest.fixture
def zips(tiny_folders: Path, tmp_path: Path) -> Path:
    return write_zips(tmp_path / "zips", tiny_folders)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def full(omniglot_root: Path, image_cache: Path) -> Callable[..., OmniglotDataModule]:
    """Makes datamodules over the complete data."""
    return lambda **options: ready(omniglot_root, image_cache, **options)


def ready(root: Path, cache_dir: Path, **options: Any) -> OmniglotDataModule:
    data = OmniglotDataModule(root=str(root), cache_dir=str(cache_dir), **options)
    data.prepare_data()
    data.setup()
    return data


def tiny(root: Path, cache_dir: Path, **options: Any) -> OmniglotDataModule:
    return ready(root, cache_dir, **{"ways": 2, "train_classes": 8, **options})


class Characters(NamedTuple):
    """All characters of both parts: images (N, 1, H, W), how many each has, and their names."""

    images: torch.Tensor
    counts: torch.Tensor
    names: list[str]


def load(root: Path, cache_dir: Path, image_size: int = 28, download: bool = False) -> Characters:
    """In the order of their names; 0 and 1."""
    options: dict[str, Any] = {"rotations": False, "train_classes": 8, "shots": 1, "train_shots": 1, "ways": 2}
    data = OmniglotDataModule(str(root), download, image_size, cache_dir=str(cache_dir), **options)
    data.prepare_data()
    source, listing = data.find()
    counts = Counter(file.label for file in listing.files)
    data.setup()
    images = data.classes["train"].images
    assert isinstance(images, torch.Tensor)
    return Characters(data.preprocess(images), torch.tensor(list(counts.values())), list(counts))


def spoil(root: Path) -> None:
    """Make every file useless but keep its size and times: what loads afterwards has not been read from it."""
    for path in root.rglob("*"):
        if path.is_file():
            stat = path.stat()
            path.write_bytes(bytes(stat.st_size))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# What is read


def test_zips_and_folders_in_any_mixture_give_the_same(folders: Path, zips: Path, cache_dir: Path) -> None:
    expected = load(zips, cache_dir)
    shutil.copy(zips / "images_evaluation.zip", folders)
    shutil.rmtree(folders / "images_evaluation")
    mixed = load(folders, cache_dir)
    (folders / "omniglot-py").mkdir()
    for part in ("images_background", "images_evaluation.zip"):
        (folders / part).rename(folders / "omniglot-py" / part)
    as_torchvision = load(folders, cache_dir)
    for found in (mixed, as_torchvision):
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.counts, expected.counts)
        assert found.names == expected.names


def test_order_is_alphabetical_part_by_part(folders: Path, cache_dir: Path) -> None:
    images, counts, names = load(folders, cache_dir)
    assert names == [
        f"{part}/{alphabet}/character{i:02}"
        for part in PARTS
        for alphabet in sorted(TINY[part])
        for i in range(1, TINY[part][alphabet] + 1)
    ]
    assert counts.tolist() == [DRAWINGS] * len(names)
    assert images.shape == (DRAWINGS * len(names), 1, 28, 28)
    for i, name in enumerate(names):
        for j in range(DRAWINGS):
            with Image.open(folders / name / f"{j + 1:02}.png") as image:
                small = np.array(image.resize((28, 28), Image.Resampling.NEAREST), dtype=np.uint8)
            np.testing.assert_array_equal(images[i * DRAWINGS + j, 0].numpy(), small)


@pytest.mark.parametrize("image_size", [1, 13, 28, SIDE])
def test_every_image_size_survives_the_packing(tiny_folders: Path, cache_dir: Path, image_size: int) -> None:
    built, cached = (load(tiny_folders, cache_dir, image_size).images for _ in range(2))
    with Image.open(tiny_folders / "images_background/Alpha_(old)/character01/01.png") as image:
        small = np.array(image.resize((image_size, image_size), Image.Resampling.NEAREST), dtype=np.uint8)
    assert torch.equal(built, cached)
    np.testing.assert_array_equal(built[0, 0].numpy(), small)


def test_nearest_takes_the_middle_pixel() -> None:
    pixels = np.random.default_rng(1).random((SIDE, SIDE)) < 0.5
    middle = (np.arange(28) * 2 + 1) * SIDE // 56
    expected = 255 * pixels[np.ix_(middle, middle)]
    np.testing.assert_array_equal(OmniglotDataModule().file_format.decode(png(pixels))[0], expected)


def test_shades_of_grey_are_cut_not_dithered() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    found = OmniglotDataModule(image_size=SIDE).file_format.decode(png(pixels))[0]
    np.testing.assert_array_equal(found, 255 * (pixels > 127))


def test_other_files_are_passed_over(folders: Path, cache_dir: Path) -> None:
    expected = load(folders, cache_dir)
    alphabet = folders / "images_background" / "Beta"
    for other in ("Thumbs.db", "character01/._01.png", "character01/.DS_Store", "stray.png"):
        (alphabet / other).write_bytes(b"not a drawing")
    assert torch.equal(load(folders, cache_dir).images, expected.images)
    archives = write_zips(folders / "zipped", folders)
    with zipfile.ZipFile(archives / "images_background.zip", "a") as zipped:
        for other in ("__MACOSX/Beta/character01/01.png", "images_evaluation/Beta/character01/01.png", "etc/x/y.png"):
            zipped.writestr(other, b"not a drawing")
    assert torch.equal(load(archives, cache_dir).images, expected.images)


def test_uneven_characters(folders: Path, cache_dir: Path) -> None:
    (folders / "images_background/Beta/character02/03.png").unlink()
    data = tiny(folders, cache_dir, partition="alphabet", rotations=False)
    assert sorted(data.classes["train"].counts.tolist()) == [3] + [4] * 6
    assert data.classes["test"].first.tolist() == [27, 31, 35, 39, 43]
    with pytest.raises(
        ValueError, match=r"^shots=3 plus query_shots=1 exceeds the 3 images .* use at most 3 together, or leave such"
    ):
        tiny(folders, cache_dir, partition="alphabet", shots=3, train_shots=1)


# The complete data


def test_the_complete_data(omniglot_root: Path, image_cache: Path, tmp_path: Path) -> None:
    images, counts, names = load(omniglot_root, image_cache)
    assert len(set(names)) == 1623
    assert counts.tolist() == [20] * 1623
    assert [sum(name.startswith(part) for name in names) for part in PARTS] == [964, 659]
    assert len({name.split("/")[1] for name in names}) == 50
    assert images.shape == (32460, 1, 28, 28)
    assert images.unique().tolist() == [0.0, 1.0]
    assert 0.85 < images.mean() < 0.98  # the background is 1
    for part, place, name in ((0, 0, "Alphabet_of_the_Magi/character01/0709_01"), (1, -1, "ULOG/character26/1623_20")):
        with zipfile.ZipFile(omniglot_root / f"{PARTS[part]}.zip") as zipped:
            drawing = zipped.extract(f"{PARTS[part]}/{name}.png", tmp_path)
        with Image.open(drawing) as image:
            assert image.mode == "1"
            expected = np.array(image.resize((28, 28)).convert("L")) // 255  # as in the released code
        np.testing.assert_array_equal(images[place, 0].numpy(), expected)


def test_the_papers_split(full: Callable[..., OmniglotDataModule]) -> None:
    data = full(ways=20, shots=5, train_shots=15)
    assert {split: len(classes.first) for split, classes in data.classes.items()} == {
        "train": 4800,
        "val": 1200,
        "test": 423,
    }
    train, val, test = (set(data.characters[split]) for split in ("train", "val", "test"))
    assert len(train) == 1200
    assert val == train
    assert len(test) == 423
    assert not train & test
    # Random: both parts on both sides, about as often as they occur.
    for names in (train, test):
        assert 0.5 < sum(name.startswith(PARTS[0]) for name in names) / len(names) < 0.7
    for split in ("train", "val", "test"):
        episode = data.episodes(split, torch.arange(3)).check()
        shots, query_shots = data.examples(split)
        assert episode.support_x.shape == (3, 20 * shots, 1, 28, 28)
        assert episode.query_x.shape[1] == 20 * query_shots


def test_alphabet_split(full: Callable[..., OmniglotDataModule]) -> None:
    data = full(partition="alphabet", val_classes=100)
    assert {split: len(names) for split, names in data.characters.items()} == {"train": 864, "val": 100, "test": 659}
    assert len(data.classes["train"].first) == 4 * 864
    for split, part in {"train": 0, "val": 0, "test": 1}.items():
        assert all(name.startswith(f"{PARTS[part]}/") for name in data.characters[split])


PINNED = {  # of the first and of later tasks, as fomal 0.1 made them with a reader of Omniglot's own
    "the paper's": ({}, "e2f43576e269f7e0c4d7a1574e84bb53"),
    "20 ways": (
        {"ways": 20, "shots": 5, "train_shots": 15, "query_shots": 3, "seed": 7},
        "c1fc2c53352245f7b20c22d240aac284",
    ),
    "another split": (
        {"partition_seed": 3, "val_classes": 100, "train_classes": 1000},
        "586f37284d904b3bc079ecf2c2a700a5",
    ),
    "alphabets": (
        {"partition": "alphabet", "val_classes": 64, "rotations": False},
        "fe79da0d3c55a3a2cecd5554097ce04f",
    ),
}


@pytest.mark.parametrize("case", PINNED)
def test_episodes_are_pinned(full: Callable[..., OmniglotDataModule], case: str) -> None:
    options, expected = PINNED[case]
    data, digest = full(**options), hashlib.sha256()
    for split in SPLITS:
        episode = data.episodes(split, torch.tensor([0, 1, 2, 99, 12_345, 10**9]))
        for x in (episode.support_x, episode.query_x):
            digest.update(data.preprocess(x).numpy().tobytes())
        for y in (episode.support_y, episode.query_y):
            digest.update(y.numpy().tobytes())
        digest.update("\n".join(data.characters[split]).encode())
    assert digest.hexdigest()[:32] == expected


# Splits and rotations


def test_val_classes_come_from_training(tiny_folders: Path, cache_dir: Path) -> None:
    without, with_val = (tiny(tiny_folders, cache_dir, val_classes=n).characters for n in (0, 3))
    assert with_val["test"] == without["test"]  # test characters do not depend on the validation
    assert not set(with_val["train"]) & set(with_val["val"])
    assert set(with_val["train"]) | set(with_val["val"]) == set(without["train"])
    assert len(with_val["val"]) == 3
    assert len(with_val["train"]) == 5
    assert len(with_val["test"]) == 4
    assert without["val"] == without["train"]


def test_rotations(tiny_folders: Path, cache_dir: Path) -> None:
    turned, upright = (tiny(tiny_folders, cache_dir, rotations=r).classes for r in (True, False))
    for split in ("val", "test"):
        assert not turned[split].variant.any()
        assert torch.equal(turned[split].first, upright[split].first)
    assert len(turned["train"].first) == 4 * len(upright["train"].first) == 32
    members = torch.arange(DRAWINGS).expand(1, 1, -1)
    for character in range(8):
        original = upright["train"].take(torch.tensor([[character]]), members)
        for quarter in range(4):
            rotated = turned["train"].take(torch.tensor([[4 * character + quarter]]), members)
            assert torch.equal(rotated, torch.rot90(original, quarter, (-2, -1)))
            image = Image.fromarray(original[0, 0, 0, 0].bool().numpy()).rotate(90 * quarter)  # the released code
            np.testing.assert_array_equal(rotated[0, 0, 0, 0].bool().numpy(), np.array(image))


def test_split_depends_on_partition_seed_alone(tiny_folders: Path, zips: Path, cache_dir: Path) -> None:
    first = tiny(tiny_folders, cache_dir)
    again = tiny(zips, cache_dir, seed=7, shots=2, num_workers=1)
    other = tiny(tiny_folders, cache_dir, partition_seed=1)
    assert again.characters == first.characters != other.characters
    number = torch.arange(4)
    assert torch.equal(
        first.episodes("test", number).support_x, tiny(zips, cache_dir).episodes("test", number).support_x
    )


def test_split_is_pinned() -> None:
    """Another order would make old checkpoints be tested on characters they were trained on."""
    names = [f"{PARTS[i >= 964]}/{i}" for i in range(1623)]
    random = OmniglotDataModule(val_classes=4).split(names)
    assert random["val"].tolist() == [1343, 57, 1260, 1181]
    assert random["test"][:4].tolist() == [229, 97, 1087, 750]
    alphabet = OmniglotDataModule(partition="alphabet", val_classes=4).split(names)
    assert alphabet["val"].tolist() == [57, 796, 557, 956]
    assert alphabet["test"].tolist() == list(range(964, 1623))


def test_preprocess() -> None:
    x = OmniglotDataModule().preprocess(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)).flatten()
    assert x.dtype == torch.float32
    assert x.tolist() == [0.0, 1.0]


def test_loader_yields_episodes(tiny_folders: Path, cache_dir: Path) -> None:
    data = tiny(tiny_folders, cache_dir, train_shots=3, meta_batch_size=2, val_tasks=3)
    episode = next(iter(data.train_dataloader())).check()
    assert episode.support_x.shape == (2, 6, 1, 28, 28)
    assert episode.support_x.dtype == torch.uint8
    assert sum(batch.tasks for batch in data.val_dataloader()) == 3


def test_cache_is_reused(folders: Path, cache_dir: Path) -> None:
    first = tiny(folders, cache_dir)
    spoil(folders)
    again = tiny(folders, cache_dir)
    assert torch.equal(again.classes["test"].images, first.classes["test"].images)
    assert len(list(cache_dir.glob("*.pixels"))) == 1


def test_setup_again_loads_nothing(zips: Path, cache_dir: Path) -> None:
    data = tiny(zips, cache_dir)
    classes = dict(data.classes)
    shutil.rmtree(cache_dir)
    shutil.rmtree(zips)
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    assert all(data.classes[split] is classes[split] for split in classes)


def test_setup_without_prepare_data(zips: Path, cache_dir: Path) -> None:
    data = OmniglotDataModule(root=str(zips), cache_dir=str(cache_dir), ways=2, train_classes=8)
    data.setup("fit")
    assert len(data.classes["train"].first) == 32


def test_changed_sources_make_another_cache(folders: Path, cache_dir: Path) -> None:
    first = load(folders, cache_dir)
    drawing = folders / "images_background/Alpha_(old)/character01/01.png"
    drawing.write_bytes(png(np.zeros((SIDE, SIDE), dtype=bool)))
    second = load(folders, cache_dir)
    assert not torch.equal(second.images[0], first.images[0])
    assert torch.equal(second.images[1:], first.images[1:])
    (folders / "images_background/Beta").rename(folders / "images_evaluation/Beta")
    assert sum(name.startswith(PARTS[1]) for name in load(folders, cache_dir).names) == 8
    assert load(folders, cache_dir, image_size=20).images.shape[-1] == 20
    assert len(list(cache_dir.glob("*.pixels"))) == 4


# Downloads


@pytest.fixture
def download_from(zips: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces torchvision's download by a copy from `zips`; the list collects the addresses asked for."""
    asked: list[str] = []

    def download_url(url: str, root: str, filename: str, md5: str) -> None:
        assert md5 == Omniglot.zips_md5[Path(filename).stem]
        asked.append(url)
        shutil.copy(zips / filename, root)

    monkeypatch.setattr(omniglot, "download_url", download_url)
    return asked


def test_download_everything(tmp_path: Path, zips: Path, cache_dir: Path, download_from: list[str]) -> None:
    root = tmp_path / "new" / "root"
    assert torch.equal(load(root, cache_dir, download=True).images, load(zips, cache_dir).images)
    prefix = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
    assert download_from == [f"{prefix}/{part}.zip" for part in PARTS]
    assert sorted(path.name for path in root.iterdir()) == [f"{part}.zip" for part in PARTS]
    load(root, cache_dir, download=True)
    assert len(download_from) == 2


def test_download_only_what_is_missing(folders: Path, cache_dir: Path, download_from: list[str]) -> None:
    shutil.rmtree(folders / "images_evaluation")
    data = tiny(folders, cache_dir, download=True)
    assert [url.rsplit("/")[-1] for url in download_from] == ["images_evaluation.zip"]
    assert len(data.characters["test"]) == 4


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_failed_download(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download_url(url: str, root: str, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(b"cut off")
        raise error

    monkeypatch.setattr(omniglot, "download_url", download_url)
    root = tmp_path / "root"
    expected = rf"^download=True could not fetch https://.*/images_background.zip \({error}\): try again, or put images"
    with pytest.raises(RuntimeError, match=expected):
        load(root, cache_dir, download=True)
    assert not list(root.iterdir())


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"train_classes": 0}, "train_classes=0 must be at least 1"),
        ({"val_classes": -1}, "val_classes=-1 must not be negative"),
        ({"partition_seed": -1}, "partition_seed=-1 must not be negative"),
        ({"partition": "alphabets"}, "partition='alphabets' is unknown: use one of random, alphabet"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OmniglotDataModule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_classes": 12},
            r"^train_classes=12 leaves none of the 12 characters .*: use data.train_classes < 12\.$",
        ),
        (
            {"val_classes": 8},
            r"^val_classes=8 leaves none of the 8 training characters .*: use data.val_classes < 8\.$",
        ),
        ({"val_classes": 7, "partition": "alphabet"}, r"^val_classes=7 leaves none of the 7 training characters"),
        ({"ways": 5}, r"^ways=5 exceeds the 4 classes of the test split"),
        ({"ways": 4, "val_classes": 3}, r"^ways=4 exceeds the 3 classes of the val split"),
    ],
)
def test_too_few_characters(tiny_folders: Path, cache_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tiny_folders, cache_dir, **options)


def test_default_train_classes_with_a_subset(tiny_folders: Path, cache_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"^train_classes=1200 leaves none of the 12 characters in root='.*' for"):
        ready(tiny_folders, cache_dir)


def test_root_does_not_exist(tmp_path: Path, cache_dir: Path) -> None:
    message = (
        r"^root='.*nowhere' is not a folder, so it has neither images_background.zip nor a folder images_background/ "
        r"and neither images_evaluation.zip nor a folder images_evaluation/, also not below omniglot-py/: "
        r"set data.root to .*, or set data.download: true\.$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load(tmp_path / "nowhere", cache_dir)
    assert not cache_dir.exists()


@pytest.mark.parametrize("part", PARTS)
def test_one_part_is_missing(zips: Path, cache_dir: Path, part: str) -> None:
    (zips / f"{part}.zip").unlink()
    with pytest.raises(
        FileNotFoundError, match=f"^root='{zips}' has neither {part}.zip nor a folder {part}/, also not"
    ):
        load(zips, cache_dir)


def test_root_may_begin_with_home(tiny_folders: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folders.parent))
    assert len(load(Path("~") / tiny_folders.name, cache_dir).names) == 12


def test_truncated_zip(zips: Path, cache_dir: Path) -> None:
    archive = zips / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"^root='{archive}' is not a readable zip .*: fetch or make it anew"):
        load(zips, cache_dir)
    assert not cache_dir.exists()


BAD_DRAWINGS = {
    "text": (b"not a PNG", "no image of a known kind"),
    "truncated": (png(np.ones((SIDE, SIDE), dtype=bool))[:60], "damaged: "),
    "size": (png(np.ones((30, 20), dtype=bool)), "a PNG of 20 x 30 pixels; a drawing of Omniglot is a PNG of 105 x 10"),
    "bomb": (png(np.ones((20000, 20000), dtype=bool)), "20000 x 20000 pixels, more than max_pixels=128000000"),
    "kind": (png(np.ones((SIDE, SIDE), dtype=bool), kind="GIF"), "a GIF of 105 x 105 pixels; a drawing of Omniglot is"),
}


@pytest.mark.parametrize("as_zip", [False, True])
def test_bad_drawings_are_named(folders: Path, cache_dir: Path, as_zip: bool) -> None:
    drawings = [f"images_background/Beta/character02/0{number}.png" for number in range(1, 5)]
    drawings.append("images_background/Beta/character03/01.png")
    for drawing, (content, _) in zip(drawings, BAD_DRAWINGS.values(), strict=True):
        (folders / drawing).write_bytes(content)
    root = write_zips(folders / "zipped", folders) if as_zip else folders
    with pytest.raises(
        ValueError, match=rf"^root='{root}' has 6 that cannot be used: .*, or set on_error: skip"
    ) as error:
        load(root, cache_dir)
    assert "\n" not in str(error.value)
    for drawing, (_, reason) in zip(drawings, BAD_DRAWINGS.values(), strict=True):
        assert f"{drawing} ({reason}" in str(error.value)
    assert "images_background/Beta/character02 (a class without images)" in str(error.value)
    with pytest.warns(UserWarning, match="they are left out"):
        data = tiny(root, cache_dir, on_error="skip", partition="alphabet", rotations=False, shots=1, train_shots=1)
    assert sorted(data.classes["train"].counts.tolist()) == [3] + [4] * 5


def test_hostile_zips_are_refused(zips: Path, cache_dir: Path) -> None:
    archive = zips / "images_background.zip"
    honest = archive.read_bytes()
    with zipfile.ZipFile(archive, "a") as zipped:
        zipped.writestr("../../../escape.png", b"not a drawing")
    with pytest.raises(ValueError, match=r"'../../../escape.png' leaves the zip's root; nothing of this zip is used"):
        load(zips, cache_dir)
    archive.write_bytes(honest)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("images_background/Beta/character09/01.png", bytes(64 * 2**20))
    with pytest.raises(ValueError, match=r"character09/01.png' inflates to \d+ times its size, more than 100"):
        load(zips, cache_dir)
    assert not cache_dir.exists()


def test_link_to_nowhere(folders: Path, cache_dir: Path) -> None:
    drawing = folders / "images_background/Beta/character02/03.png"
    drawing.unlink()
    drawing.symlink_to(folders / "nowhere.png")
    with pytest.raises(ValueError, match=r"Beta/character02/03.png \(cannot be read: No such file or directory\)"):
        load(folders, cache_dir)


@pytest.mark.parametrize("as_zip", [False, True])
def test_no_characters(folders: Path, cache_dir: Path, as_zip: bool) -> None:
    shutil.rmtree(folders / "images_evaluation")
    (folders / "images_evaluation" / "empty").mkdir(parents=True)
    root = write_zips(folders / "zipped", folders) if as_zip else folders
    message = r"images_evaluation(\.zip)? holds no characters, no <alphabet>/<character>/\*.png: put a whole copy of Om"
    with pytest.raises(ValueError, match=message):
        load(root, cache_dir)
