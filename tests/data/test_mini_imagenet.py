"""Mini-ImageNet in all its forms, made of tiny images: at its true counts as pickles, else at small ones."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fomal.cli import main
from fomal.data import MiniImageNetDataModule, mini_imagenet
from fomal.data.mini_imagenet import find_form
from tests.helpers.pictures import encoded, picture, zipped

SMALL = {"train": 3, "val": 2, "test": 2}
EACH = 4  # images of a small class
SIZE = 6
MODULE = "learn2learn.vision.datasets.mini_imagenet"


def labels_of(split: str, counts: dict[str, int]) -> list[str]:
    return [f"n{list(counts).index(split)}{i:07}" for i in range(counts[split])]


def write_pickles(
    root: Path, counts: dict[str, int] = SMALL, each: int = EACH, size: int = SIZE, **changes: Any
) -> Path:
    """The three pickles; the images are those that the other writers write."""
    root.mkdir(parents=True, exist_ok=True)
    for split in counts:
        labels = labels_of(split, counts)
        if size == SIZE:
            names = [f"{label}{number:08}" for label in labels for number in range(each)]
            images = np.stack([picture(name, size, size) for name in names])
        else:
            rng = np.random.default_rng(len(labels))
            images = rng.integers(0, 256, (len(labels) * each, size, size, 3), np.uint8)
        places = {label: list(range(i * each, (i + 1) * each)) for i, label in enumerate(labels)}
        content = {"image_data": images, "class_dict": places} | changes.get(split, {})
        (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content, 2))
    return root


def write_folders(root: Path, suffix: str = "png") -> Path:
    """As the released code of Reptile lays them out."""
    for split in SMALL:
        for label in labels_of(split, SMALL):
            (root / split / label).mkdir(parents=True)
            for number in range(EACH):
                name = f"{label}{number:08}"
                (root / split / label / f"{name}.{suffix}").write_bytes(encoded(picture(name, SIZE, SIZE)))
    return root


def write_csvs(root: Path, tables: str = ".") -> Path:
    """Images in one folder and three CSV files, as those of Ravi and Larochelle, in `tables`."""
    (root / "images").mkdir(parents=True)
    (root / tables).mkdir(exist_ok=True)
    for split in SMALL:
        rows = ["filename,label"]
        for label in labels_of(split, SMALL):
            for number in range(EACH):
                name = f"{label}{number:08}"
                (root / "images" / f"{name}.png").write_bytes(encoded(picture(name, SIZE, SIZE)))
                rows.append(f"{name}.png,{label}")
        (root / tables / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


def nested(root: Path) -> Path:
    """The same below a folder of its own, as zips often have it."""
    shutil.move(root, root.with_name("moved"))
    root.mkdir()
    shutil.move(root.with_name("moved"), root / "mini-imagenet")
    return root


FORMS = {
    "pickles": write_pickles,
    "folders": write_folders,
    "csv": write_csvs,
    "csv beside images": lambda root: write_csvs(root, "split"),
    "folders nested": lambda root: nested(write_folders(root)),
    "csv nested": lambda root: nested(write_csvs(root)),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Mini-ImageNet were small."""
    monkeypatch.setattr(mini_imagenet, "CLASSES", SMALL)
    monkeypatch.setattr(mini_imagenet, "IMAGES", EACH)


@pytest.fixture
def ready(tmp_path: Path) -> Callable[..., MiniImageNetDataModule]:
    """Builds a datamodule and loads its images, with its cache in the test's own folder."""

    def build(root: Path, **settings: Any) -> MiniImageNetDataModule:
        sizes = {"ways": 2, "train_shots": 2, "train_query_shots": 1, "image_size": SIZE}
        data = MiniImageNetDataModule(str(root), **{**sizes, "cache_dir": str(tmp_path / "cache"), **settings})
        data.prepare_data()
        data.setup()
        return data

    return build


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))


# -- the whole of it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pickles of 64, 16 and 20 classes with 600 images of 2 x 2 pixels."""
    return write_pickles(tmp_path_factory.mktemp("whole"), {"train": 64, "val": 16, "test": 20}, 600, 2)


def test_all_of_it_is_read_once(whole: Path, ready: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ready(whole, image_size=2, ways=5, shots=5)
    assert {split: len(names) for split, names in data.class_names.items()} == {"train": 64, "val": 16, "test": 20}
    assert all((classes.counts == 600).all() for classes in data.classes.values())
    for split in ("train", "val", "test"):
        content = pickle.loads((whole / f"mini-imagenet-cache-{split}.pkl").read_bytes())
        images = torch.from_numpy(content["image_data"]).permute(0, 3, 1, 2)
        for i, label in enumerate(data.class_names[split]):
            taken = data.classes[split].take(torch.tensor([[i]]), torch.arange(600).view(1, 1, -1))[0, 0]
            assert torch.equal(taken, images[content["class_dict"][label]])
    expected = data.episodes("test", torch.arange(5))
    monkeypatch.setattr(mini_imagenet, "load_pickle", lambda file: pytest.fail("is unpickled again"))
    again = ready(whole, image_size=2, ways=5, shots=5)
    assert same(again.episodes("test", torch.arange(5)), expected)


def test_what_is_missing_of_the_whole_is_named(tmp_path: Path, ready: Callable) -> None:
    counts = {"train": 63, "val": 16, "test": 20}
    short = {"n20000003": list(range(599)), "n20000007": []}
    rest = {label: list(range(600)) for label in labels_of("test", counts) if label not in short}
    write_pickles(tmp_path, counts, 600, 2, test={"class_dict": short | rest})
    message = (
        f"^root='{tmp_path}' is not all of Mini-ImageNet: train has 63 of 64 classes; test has 19 of 20 classes; "
        r"test has classes of other than 600 images, 'n20000003: 599'\. Complete it from its origin\.$"
    )
    with pytest.raises(ValueError, match=message):
        ready(tmp_path)


# -- its forms


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_episodes(name: str, tmp_path: Path, ready: Callable) -> None:
    root, expected = FORMS[name](tmp_path / "root"), ready(write_pickles(tmp_path / "pickles"))
    places = [root] if name == "pickles" else [root, zipped(root, tmp_path / "root.zip")]
    for place in places:
        assert find_form(place) == name.partition(" ")[0]
        for cache_gb in (4, 0):
            data = ready(place, cache_gb=cache_gb)
            assert data.class_names == {split: labels_of(split, SMALL) for split in SMALL}
            for split in SMALL:
                numbers = torch.arange(30)
                assert same(data.episodes(split, numbers), expected.episodes(split, numbers))


@pytest.mark.usefixtures("small")
def test_the_pictures_are_those_of_their_class(tmp_path: Path, ready: Callable) -> None:
    data = ready(write_pickles(tmp_path / "root"))
    known = {
        picture(f"{label}{number:08}", SIZE, SIZE).transpose(2, 0, 1).tobytes(): label
        for split in SMALL
        for label in labels_of(split, SMALL)
        for number in range(EACH)
    }
    episode = data.episodes("val", torch.arange(20))
    for x, y in zip(episode.support_x, episode.support_y, strict=True):
        assert len({(known[image.numpy().tobytes()], int(label)) for image, label in zip(x, y, strict=True)}) == 2
    assert {known[image.numpy().tobytes()] for image in episode.query_x.flatten(0, 1)} == set(labels_of("val", SMALL))


@pytest.mark.usefixtures("small")
def test_images_are_stretched_as_the_released_code_does(tmp_path: Path, ready: Callable) -> None:
    root = write_folders(tmp_path / "root", "JPEG")
    for path in root.rglob("*.JPEG"):
        path.write_bytes(encoded(picture(path.stem, 10, 20), "JPEG"))
    data = ready(root, resample="nearest")
    for i, label in enumerate(labels_of("train", SMALL)):
        taken = data.classes["train"].take(torch.tensor([[i]]), torch.arange(EACH).view(1, 1, -1))[0, 0]
        for image, path in zip(taken, sorted((root / "train" / label).iterdir()), strict=True):
            whole = Image.open(path).resize((SIZE, SIZE), Image.Resampling.NEAREST)
            assert torch.equal(image, torch.from_numpy(np.array(whole)).permute(2, 0, 1))
    assert MiniImageNetDataModule().image_format.height == 84


@pytest.mark.usefixtures("small")
def test_the_validation_pickle_may_have_its_longer_name(tmp_path: Path, ready: Callable) -> None:
    root = write_pickles(tmp_path / "root")
    (root / "mini-imagenet-cache-val.pkl").rename(root / "mini-imagenet-cache-validation.pkl")
    assert ready(root).class_names["val"] == labels_of("val", SMALL)


@pytest.mark.usefixtures("small")
def test_one_image_in_two_classes_is_used_as_published(tmp_path: Path, ready: Callable) -> None:
    root = write_folders(tmp_path / "root")
    one, other = root / "train/n00000000/n0000000000000000.png", root / "train/n00000001/n0000000100000000.png"
    other.write_bytes(one.read_bytes())
    assert len(ready(root).classes["train"].first) == 3


@pytest.mark.usefixtures("small")
def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path: Path, ready: Callable) -> None:
    root = write_pickles(tmp_path / "root")
    expected = ready(root).episodes("test", torch.arange(5))
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written"):
        data = ready(root, cache_dir=str(tmp_path / "file" / "cache"))
    assert same(data.episodes("test", torch.arange(5)), expected)


# -- parts of it


def without(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root, "does not exist"),
        (lambda root: without(write_folders(root), *SMALL), "has none of its forms"),
        (lambda root: without(write_folders(root), "val", "test"), "has the folder train alone"),
        (lambda root: without(write_folders(root), "test"), "has the folder train, val alone"),
        (lambda root: without(write_csvs(root), "val.csv"), "has a CSV file of train, test alone"),
        (
            lambda root: without(write_pickles(root), "mini-imagenet-cache-val.pkl"),
            "has the pickles of train, test, but not of val",
        ),
    ],
)
def test_what_is_missing_of_a_form_is_named(make: Callable, message: str, tmp_path: Path, ready: Callable) -> None:
    root = make(tmp_path / "root")
    with pytest.raises(
        FileNotFoundError,
        match=f"^root='{root}' {message}: Mini-ImageNet is folders train/, .*; images and train.csv, .*; or "
        r"mini-imagenet-cache-train.pkl, .*\. Put one there, or set data.download: true\.$",
    ):
        ready(root)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", ["folders", "csv"])
def test_missing_classes_and_images_are_named(form: str, tmp_path: Path, ready: Callable) -> None:
    root = FORMS[form](tmp_path / "root")
    if form == "folders":
        without(root, "val/n10000001", "test/n20000000/n2000000000000002.png")
    else:
        for split, label, keep in (("val", "n10000001", ""), ("test", "n2000000000000002", "")):
            path = root / f"{split}.csv"
            path.write_text("\n".join(line for line in path.read_text().splitlines() if label not in line) + keep)
    message = "val has 1 of 2 classes; test has classes of other than 4 images, 'n20000000: 3'. Complete it"
    with pytest.raises(ValueError, match=f"^root='{root}' is not all of Mini-ImageNet: {message}"):
        ready(root)


# -- pickles that cannot be used


class Call:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.usefixtures("small")
def test_a_hostile_pickle_is_refused_before_it_is_run(tmp_path: Path, ready: Callable) -> None:
    root = write_pickles(tmp_path / "root", test={"class_dict": Call(tmp_path / "done")})
    path = root / "mini-imagenet-cache-test.pkl"
    with pytest.raises(
        ValueError, match=f"^{path} cannot be used: it refers to [a-z]+.system, but only arrays in plain"
    ):
        ready(root)
    path.write_bytes((root / "mini-imagenet-cache-val.pkl").read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"^{path} cannot be used: it is damaged: .*; fetch it anew"):
        ready(root)
    assert not (tmp_path / "done").exists()
    assert not (tmp_path / "cache").exists()


NO_SUCH = "it has no image_data (N, H, W, 3) uint8 and class_dict of places; fetch it anew".replace("(", r"\(")
NO_SUCH = NO_SUCH.replace(")", r"\)")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], NO_SUCH),
        ({"image_data": np.zeros((8, 6, 6, 3), np.uint8)}, NO_SUCH),
        ({"image_data": np.zeros((8, 6, 6, 3), np.float32), "class_dict": {"a": [0]}}, NO_SUCH),
        ({"image_data": np.zeros((8, 6, 6, 4), np.uint8), "class_dict": {"a": [0]}}, NO_SUCH),
        ({"image_data": np.zeros((8, 108), np.uint8), "class_dict": {"a": [0]}}, NO_SUCH),
        ({"image_data": [[1]], "class_dict": {"a": [0]}}, NO_SUCH),
        ({"image_data": np.zeros((8, 6, 6, 3), np.uint8), "class_dict": ["a"]}, NO_SUCH),
        ({"image_data": np.zeros((8, 6, 6, 3), np.uint8), "class_dict": {"a": "xy"}}, NO_SUCH),
        ({"image_data": np.zeros((8, 6, 6, 3), np.uint8), "class_dict": {"a": [0, 8]}}, "its class_dict names images"),
        ({"image_data": np.zeros((8, 6, 6, 3), np.uint8), "class_dict": {"a": [-1]}}, "its class_dict names images"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: Any, message: str, tmp_path: Path, ready: Callable) -> None:
    path = write_pickles(tmp_path / "root") / "mini-imagenet-cache-val.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"^{path} cannot be used: {message}"):
        ready(path.parent)


# -- download


def stand_in(write: Callable[[Path, str], None]) -> ModuleType:
    """A module like learn2learn's, whose download is `write`(folder, mode)."""
    module = ModuleType(MODULE)

    class MiniImagenet:
        def __init__(self, root: str, mode: str = "train", download: bool = False) -> None:
            path = Path(root) / f"mini-imagenet-cache-{mode}.pkl"
            if download and not path.exists():
                write(Path(root), mode)
            with path.open("rb") as file:
                self.data = module.pickle.load(file)

    module.pickle, module.MiniImagenet = pickle, MiniImagenet
    return module


def given_away(folder: Path, mode: str) -> None:
    """What learn2learn's servers have."""
    split = "val" if mode == "validation" else mode
    content = (write_pickles(folder / "servers") / f"mini-imagenet-cache-{split}.pkl").read_bytes()
    (folder / f"mini-imagenet-cache-{mode}.pkl").write_bytes(content)


@pytest.mark.usefixtures("small")
def test_learn2learns_own_download_fetches_what_is_missing(
    tmp_path: Path, ready: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = pytest.importorskip(MODULE)
    fetched = []

    def fetch(source: str, destination: str) -> None:
        fetched.append(source)
        given_away(Path(destination).parent, Path(destination).stem.rpartition("-")[2])

    monkeypatch.setattr(theirs, "download_file", fetch)
    data = ready(tmp_path / "new" / "root", download=True)
    assert data.class_names == {split: labels_of(split, SMALL) for split in SMALL}
    assert [name for url in fetched for name in ("train", "validation", "test") if f"-{name}.pkl" in url] == [
        *("train", "validation", "test")
    ]
    assert theirs.pickle is pickle
    ready(tmp_path / "new" / "root", download=True)
    assert len(fetched) == 3


@pytest.mark.usefixtures("small")
def test_what_is_downloaded_is_not_run(tmp_path: Path, ready: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def hostile(folder: Path, mode: str) -> None:
        (folder / f"mini-imagenet-cache-{mode}.pkl").write_bytes(pickle.dumps(Call(tmp_path / "done")))

    module = stand_in(hostile)
    monkeypatch.setitem(sys.modules, MODULE, module)
    with pytest.raises(
        RuntimeError,
        match=r"^download=True could not fetch Mini-ImageNet by learn2learn \(it refers to [a-z]+.system, but .*: put ",
    ):
        ready(tmp_path / "root", download=True)
    assert not (tmp_path / "done").exists()
    assert module.pickle is pickle


def test_a_download_that_fails_says_what_to_do(
    tmp_path: Path, ready: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(folder: Path, mode: str) -> None:
        raise ConnectionError("no route to host")

    root = tmp_path / "root"
    monkeypatch.setitem(sys.modules, MODULE, stand_in(unreachable))
    message = (
        r"^download=True could not fetch Mini-ImageNet by learn2learn \(no route to host\): put it into root='.*' by"
    )
    with pytest.raises(RuntimeError, match=message):
        ready(root, download=True)
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^download=True needs learn2learn, .*: pip install fomal\[learn2learn"
    ):
        ready(root, download=True)


@pytest.mark.usefixtures("small")
def test_nothing_is_downloaded_where_it_is_there(
    tmp_path: Path, ready: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULE, stand_in(lambda folder, mode: pytest.fail("is fetched")))
    root = write_folders(tmp_path / "root")
    for place in (root, write_pickles(tmp_path / "pickles"), zipped(root, tmp_path / "root.zip")):
        assert len(ready(place, download=True).classes["test"].first) == 2


# -- from the command line


def test_a_run_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(SMALL, 5)
    monkeypatch.setattr(mini_imagenet, "CLASSES", counts)
    monkeypatch.setattr(mini_imagenet, "IMAGES", 16)
    root = write_pickles(tmp_path / "root", counts, 16)
    monkeypatch.chdir(tmp_path)
    settings = ["--data.image_size=6", "--model.network.image_size=6", "--model.network.filters=2"]
    settings += [f"--data.root={root}", f"--data.cache_dir={tmp_path / 'cache'}", "--data.val_tasks=1"]
    settings += ["--trainer.accelerator=cpu", "--trainer.fast_dev_run=2", "--model.eval.steps=1"]
    cli = main(["fit", "--config", "mini_imagenet/5way_1shot_reptile", *settings])
    assert cli.trainer.global_step == 2
    assert cli.trainer.callback_metrics["val/accuracy"].isfinite()
