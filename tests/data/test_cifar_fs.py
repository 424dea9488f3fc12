"""CIFAR-FS and FC100: their classes, on class folders and on torchvision's CIFAR-100."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100, cifar

from fomal.data import CIFARFSDataModule, FC100DataModule
from fomal.data.cifar_fs import CIFAR_FS, FC100
from tests.conftest import shared_data
from tests.helpers.pictures import write_images

# The 20 superclasses of CIFAR-100 (Krizhevsky 2009) in alphabetical order.
SUPERCLASSES = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
# Oreshkin et al. 2018, supplementary material, by the places of the superclasses.
FC100_SUPERCLASSES = {
    "train": {1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19},
    "val": {8, 11, 13, 16},
    "test": {0, 7, 12, 14},
}
NAMES = sorted(name for names in SUPERCLASSES.values() for name in names.split())


# -- the lists


def test_the_classes_of_fc100_are_those_of_its_superclasses() -> None:
    assert list(SUPERCLASSES) == sorted(SUPERCLASSES)
    classes = [names.split() for names in SUPERCLASSES.values()]
    for split, places in FC100_SUPERCLASSES.items():
        assert sorted(FC100[split]) == sorted(name for place in places for name in classes[place])
    assert {split: len(names) for split, names in FC100.items()} == {"train": 60, "val": 20, "test": 20}


@pytest.mark.parametrize("lists", [CIFAR_FS, FC100], ids=["CIFAR-FS", "FC100"])
def test_every_class_of_cifar_100_is_in_one_split(lists: dict[str, list[str]]) -> None:
    assert sorted(name for names in lists.values() for name in names) == NAMES
    assert len(set(NAMES)) == 100


# -- the real images


@pytest.fixture(scope="module")
def archive() -> Path:
    """100 real images of each class, in the folders of CIFAR-FS."""
    return shared_data("cifar_fs") / "cifar_fs_100.zip"


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images are decoded once for both datasets."""
    return tmp_path_factory.mktemp("cifar_cache")


def test_cifar_fs_divides_the_real_images_as_published(archive: Path, real_cache: Path) -> None:
    data = CIFARFSDataModule(str(archive), cache_dir=str(real_cache), shots=5, query_shots=15)
    data.prepare_data()
    data.setup()
    zipped = zipfile.ZipFile(archive)
    files = [name.split("/") for name in zipped.namelist() if name.endswith(".png")]
    for split, size in (("train", 64), ("val", 16), ("test", 20)):
        there = {label for _, part, label, _ in files if part == split}
        assert set(data.class_names[split]) == there
        assert len(data.class_names[split]) == len(there) == size
        assert (data.classes[split].counts == 100).all()
    label = data.class_names["test"].index("worm")
    taken = data.classes["test"].take(torch.tensor([[label]]), torch.arange(100).view(1, 1, -1))[0, 0]
    names = sorted("/".join(name) for name in files if name[2] == "worm")
    for image, name in zip(taken, names, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(zipped.read(name))))
        assert torch.equal(image, torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    episode = data.episodes("test", torch.arange(10)).check()
    assert episode.support_x.shape == (10, 25, 3, 32, 32)


def test_fc100_divides_the_real_images_by_superclass(archive: Path, real_cache: Path) -> None:
    data = FC100DataModule(str(archive), cache_dir=str(real_cache), query_shots=15)
    data.prepare_data()
    data.setup()
    assert data.class_names == FC100
    assert {split: len(classes.first) for split, classes in data.classes.items()} == {
        "train": 60,
        "val": 20,
        "test": 20,
    }


# -- CIFAR-100 as torchvision keeps it


def write_cifar(root: Path) -> tuple[dict[str, Any], dict[str, str], list[tuple[np.ndarray, str]]]:
    """A small cifar-100-python, with the lists and MD5s that torchvision should know, and its images with labels."""
    folder = root / CIFAR100.base_folder
    folder.mkdir(parents=True)
    rng, images = np.random.default_rng(0), []
    contents: dict[str, Any] = {"meta": {"fine_label_names": NAMES}}
    for part, each in (("train", 5), ("test", 2)):
        labels = rng.permutation(np.repeat(np.arange(100), each)).tolist()
        pixels = rng.integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
        contents[part] = {"data": pixels.reshape(-1, 3 * 32 * 32), "fine_labels": labels}
        images += [(image, NAMES[label]) for image, label in zip(pixels, labels, strict=True)]
    digests = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    lists = {f"{part}_list": [[part, digests[part]]] for part in ("train", "test")}
    return lists, {**CIFAR100.meta, "md5": digests["meta"]}, images


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[tuple[np.ndarray, str]]]:
    """A folder with a small CIFAR-100, and its images with labels."""
    lists, meta, images = write_cifar(tmp_path / "root")
    for name, value in {**lists, "meta": meta}.items():
        monkeypatch.setattr(CIFAR100, name, value)
    return tmp_path / "root", images


@pytest.fixture
def ready(tmp_path: Path) -> Callable[..., CIFARFSDataModule]:
    """Builds a datamodule and loads its images, with its cache in the test's own folder."""

    def build(kind: type[CIFARFSDataModule], root: Path, **settings: Any) -> CIFARFSDataModule:
        data = kind(str(root), **{"ways": 3, "cache_dir": str(tmp_path / "cache"), **settings})
        data.prepare_data()
        data.setup()
        return data

    return build


@pytest.mark.parametrize(("kind", "lists"), [(CIFARFSDataModule, CIFAR_FS), (FC100DataModule, FC100)])
@pytest.mark.parametrize("cache_gb", [4, 0])
def test_both_parts_of_cifar_100_are_divided_by_class(
    kind: type[CIFARFSDataModule], lists: dict, cache_gb: float, stored: tuple, ready: Callable
) -> None:
    root, images = stored
    known = {image.tobytes(): label for image, label in images}
    data = ready(kind, root, cache_gb=cache_gb, shots=4)
    assert data.class_names == lists
    for split, labels in lists.items():
        classes = data.classes[split]
        assert (classes.counts == 7).all()
        everything = torch.arange(len(labels)).view(1, -1), torch.arange(7).expand(1, len(labels), -1)
        found = [[known[image.numpy().tobytes()] for image in members] for members in classes.take(*everything)[0]]
        assert found == [[label] * 7 for label in labels]
        assert data.episodes(split, torch.arange(3)).check().support_x.dtype == torch.uint8


def test_one_image_in_two_classes_is_used_as_published(tmp_path: Path, ready: Callable) -> None:
    root = write_images(tmp_path / "root", dict.fromkeys(NAMES, 2), 4, 4)
    (root / "boy/00.png").write_bytes((root / "girl/01.png").read_bytes())
    assert len(ready(CIFARFSDataModule, root, image_size=4).classes["test"].first) == 20


def test_a_damaged_file_is_refused(stored: tuple, ready: Callable) -> None:
    root, _ = stored
    path = root / CIFAR100.base_folder / "test"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = rf"^root='{root}' has a damaged cifar-100-python \(.*corrupted.*\): remove it and set download: true\.$"
    with pytest.raises(ValueError, match=message.replace("\n", " ")):
        ready(CIFARFSDataModule, root)
    path.unlink()
    with pytest.raises(ValueError, match="has a damaged cifar-100-python"):
        ready(FC100DataModule, root)


# -- class folders


@pytest.mark.parametrize("shape", ["flat", "in splits of another kind"])
def test_class_folders_are_divided_as_published_whatever_folders_they_are_in(
    shape: str, tmp_path: Path, ready: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    place = {name: ("" if shape == "flat" else f"{'train' if i % 2 else 'test'}/") for i, name in enumerate(NAMES)}
    root = write_images(tmp_path / "root", {f"{place[name]}{name}": 2 for name in NAMES}, 4, 4)
    with caplog.at_level("INFO"):
        data = ready(CIFARFSDataModule, root, image_size=4)
    assert data.class_names == CIFAR_FS
    assert f"{root} has classes of 2 images; as published, each has 600." in caplog.text
    assert ready(FC100DataModule, root, image_size=4).class_names == FC100


def test_classes_without_a_folder_are_named(tmp_path: Path, ready: Callable) -> None:
    root = write_images(tmp_path / "root", {name: 1 for name in NAMES if name not in ("bear", "worm")}, 4, 4)
    with pytest.raises(ValueError, match=f"^root='{root}' lacks classes of CIFAR-100: 'bear', 'worm'"):
        ready(CIFARFSDataModule, root)


@pytest.mark.parametrize(("make", "state"), [(False, "does not exist, so it has neither"), (True, "has neither")])
def test_a_root_without_either_is_refused(make: bool, state: str, tmp_path: Path, ready: Callable) -> None:
    root = tmp_path / "root"
    if make:
        root.mkdir()
    message = (
        f"^root='{root}' {state} torchvision's cifar-100-python nor folders of images: put one there, or set data."
    )
    with pytest.raises(FileNotFoundError, match=message):
        ready(CIFARFSDataModule, root)


# -- download


def test_a_download_is_torchvisions(tmp_path: Path, ready: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    lists, meta, _ = write_cifar(tmp_path / "server")
    for name, value in {**lists, "meta": meta}.items():
        monkeypatch.setattr(CIFAR100, name, value)
    fetched = []

    def fetch(url: str, root: Path, **settings: Any) -> None:
        fetched.append(url)
        (tmp_path / "server" / CIFAR100.base_folder).rename(Path(root) / CIFAR100.base_folder)

    monkeypatch.setattr(cifar, "download_and_extract_archive", fetch)
    (tmp_path / "root").mkdir()
    for _ in range(2):
        assert ready(CIFARFSDataModule, tmp_path / "root", download=True).class_names == CIFAR_FS
    assert fetched == [CIFAR100.url]


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("no route to host")])
def test_a_download_that_fails_says_what_to_do(
    error: Exception, tmp_path: Path, ready: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(cifar, "download_and_extract_archive", unreachable)
    message = (
        r"^download=True could not fetch CIFAR-100 \(.*no route to host.*\): try again, or put cifar-100-python.tar.gz"
    )
    with pytest.raises(RuntimeError, match=message):
        ready(FC100DataModule, tmp_path / "root", download=True)
    root = write_images(tmp_path / "folders", dict.fromkeys(NAMES, 2), 4, 4)
    assert ready(FC100DataModule, root, image_size=4, download=True).class_names == FC100  # nothing is fetched
