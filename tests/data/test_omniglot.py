"""Omniglot: what is read, how it is split, and what goes wrong when files are missing or damaged."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Omniglot

from fomal.data.images import cache, omniglot_files
from fomal.data.images.omniglot_files import PARTS, SIDE, load_characters
from fomal.data.omniglot import OmniglotDataModule

TINY = {  # characters of each alphabet
    "images_background": {"Beta": 3, "Alpha_(old)": 4},
    "images_evaluation": {"Delta": 2, "Gamma": 3},
}
DRAWINGS = 4


def png(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def write_folders(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, alphabets in TINY.items():
        for alphabet, characters in alphabets.items():
            for character in range(characters, 0, -1):  # not in the order they must come out
                folder = root / part / alphabet / f"character{character:02}"
                folder.mkdir(parents=True)
                for drawing in range(DRAWINGS, 0, -1):
                    (folder / f"{drawing:02}.png").write_bytes(png(rng.random((SIDE, SIDE)) < 0.8))
    return root


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


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full_cache")


@pytest.fixture
def full(omniglot_root: Path, full_cache: Path) -> Callable[..., OmniglotDataModule]:
    """Makes datamodules over the complete data."""
    return lambda **options: ready(omniglot_root, full_cache, **options)


def ready(root: Path, cache_dir: Path, **options: Any) -> OmniglotDataModule:
    data = OmniglotDataModule(root=str(root), cache_dir=str(cache_dir), **options)
    data.prepare_data()
    data.setup()
    return data


def tiny(root: Path, cache_dir: Path, **options: Any) -> OmniglotDataModule:
    return ready(root, cache_dir, **{"ways": 2, "train_classes": 8, **options})


def load(root: Path, cache_dir: Path, image_size: int = 28, download: bool = False) -> omniglot_files.Characters:
    return load_characters(str(root), download, str(cache_dir), image_size)


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
    assert len(list(cache_dir.iterdir())) == 2  # the move kept names, sizes and times
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
    assert images.dtype == torch.uint8
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
    np.testing.assert_array_equal(omniglot_files.decode(png(pixels), 28, "x"), pixels[np.ix_(middle, middle)])


def test_shades_of_grey_are_cut_not_dithered() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    np.testing.assert_array_equal(omniglot_files.decode(png(pixels), SIDE, "x"), pixels > 127)


def test_other_files_are_passed_over(folders: Path, cache_dir: Path) -> None:
    expected = load(folders, cache_dir)
    alphabet = folders / "images_background" / "Beta"
    for other in ("Thumbs.db", "character01/._01.png", "character01/.DS_Store", "stray.png"):
        (alphabet / other).write_bytes(b"not a drawing")
    assert torch.equal(load(folders, cache_dir).images, expected.images)
    archives = write_zips(folders / "zipped", folders)
    with zipfile.ZipFile(archives / "images_background.zip", "a") as zipped:
        for other in ("__MACOSX/Beta/character01/01.png", "../../../escape.png", "/etc/x/y/z.png"):
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


def test_counts_of_the_complete_data(omniglot_root: Path, full_cache: Path) -> None:
    images, counts, names = load(omniglot_root, full_cache)
    assert len(set(names)) == 1623
    assert counts.tolist() == [20] * 1623
    assert [sum(name.startswith(part) for name in names) for part in PARTS] == [964, 659]
    assert len({name.split("/")[1] for name in names}) == 50
    assert images.shape == (32460, 1, 28, 28)
    assert int(images.min()) == 0
    assert int(images.max()) == 1
    assert 0.85 < images.float().mean() < 0.98  # the background is 1


@pytest.mark.parametrize(
    ("part", "place", "name"), [(0, 0, "Alphabet_of_the_Magi/character01/0709_01"), (1, -1, "ULOG/character26/1623_20")]
)
def test_known_drawings(
    omniglot_root: Path, full_cache: Path, tmp_path: Path, part: int, place: int, name: str
) -> None:
    with zipfile.ZipFile(omniglot_root / f"{PARTS[part]}.zip") as zipped:
        drawing = tmp_path / "drawing.png"
        drawing.write_bytes(zipped.read(f"{PARTS[part]}/{name}.png"))
    with Image.open(drawing) as image:
        assert image.mode == "1"
        expected = np.array(image.resize((28, 28)).convert("L")) // 255  # as in the released code
    np.testing.assert_array_equal(load(omniglot_root, full_cache).images[place, 0].numpy(), expected)


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
    x = OmniglotDataModule().preprocess(torch.tensor([0, 1], dtype=torch.uint8))
    assert x.dtype == torch.float32
    assert x.tolist() == [0.0, 1.0]


def test_loader_yields_episodes(tiny_folders: Path, cache_dir: Path) -> None:
    data = tiny(tiny_folders, cache_dir, train_shots=3, meta_batch_size=2, val_tasks=3)
    episode = next(iter(data.train_dataloader())).check()
    assert episode.support_x.shape == (2, 6, 1, 28, 28)
    assert episode.support_x.dtype == torch.uint8
    assert sum(batch.tasks for batch in data.val_dataloader()) == 3


@pytest.mark.parametrize("kind", ["zips", "folders"])
def test_cache_is_reused(kind: str, request: pytest.FixtureRequest, cache_dir: Path) -> None:
    root = request.getfixturevalue(kind)
    first = tiny(root, cache_dir)
    spoil(root)
    again = tiny(root, cache_dir)
    assert torch.equal(again.classes["test"].images, first.classes["test"].images)
    assert len(list(cache_dir.iterdir())) == 1


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


def test_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_folder(None) == tmp_path / ".cache" / "fomal"
    assert cache.cache_folder("~/mine") == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder(None) == tmp_path / "xdg" / "fomal"


def test_no_home_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(RuntimeError, match=r"^cache_dir=None needs a home directory.*: set data.cache_dir to a folder"):
        cache.cache_folder(None)


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
    assert len(list(cache_dir.iterdir())) == 4


def damage_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        damage_middle,
        lambda content: b"\x80\x04K\x01.",  # a pickle
        lambda content: content[content.index(b"PK") :],  # an .npz file
    ],
    ids=["empty", "head", "last byte", "longer", "flipped bit", "pickle", "npz"],
)
def test_damaged_cache_is_built_again(zips: Path, cache_dir: Path, damage: Callable[[bytes], bytes]) -> None:
    expected = load(zips, cache_dir)
    (file,) = cache_dir.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    with pytest.warns(UserWarning, match=f"^The cache file {file} is damaged .*: building it again.$"):
        assert torch.equal(load(zips, cache_dir).images, expected.images)
    assert file.read_bytes() == content


def test_cache_never_unpickles(tmp_path: Path) -> None:
    path = tmp_path / "objects.cache"
    cache.write_arrays(path, {"objects": np.array([print, None], dtype=object)})
    with pytest.warns(UserWarning, match="allow_pickle"):
        assert cache.read_arrays(path) is None


def test_failed_write_leaves_nothing(zips: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match=r"^cache_dir='.*cache' cannot be written \(No space left on device\): set data"):
        load(zips, cache_dir)
    assert not list(cache_dir.iterdir())


def test_cache_dir_that_cannot_be_a_folder(zips: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for cache_dir in (file, file / "below"):
        with pytest.raises(OSError, match=f"^cache_dir='{cache_dir}' cannot be written .*: set data.cache_dir to a"):
            load(zips, cache_dir)


def test_cache_that_cannot_be_read(zips: Path, cache_dir: Path) -> None:
    load(zips, cache_dir)
    (file,) = cache_dir.iterdir()
    file.unlink()
    file.mkdir()
    with pytest.raises(OSError, match=rf"^cache_dir='{cache_dir}': {file.name} cannot be read .*: delete it, or set"):
        load(zips, cache_dir)


def test_cache_file_has_ordinary_permissions(zips: Path, cache_dir: Path) -> None:
    load(zips, cache_dir)
    (file,) = cache_dir.iterdir()
    ordinary = cache_dir / "ordinary"
    ordinary.touch()
    assert file.stat().st_mode == ordinary.stat().st_mode


# Plain functions, because other processes run them.


def load_when_all_are_ready(barrier: Any, root: Path, cache_dir: Path) -> None:
    barrier.wait(60)
    load(root, cache_dir)


def be_killed_before_the_end(root: Path, cache_dir: Path) -> None:
    pytest.MonkeyPatch().setattr(os, "replace", lambda source, target: os.kill(os.getpid(), signal.SIGKILL))
    load(root, cache_dir)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_build_at_once(zips: Path, cache_dir: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    processes = [fork.Process(target=load_when_all_are_ready, args=(barrier, zips, cache_dir)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(cache_dir.iterdir())) == 1
    spoil(zips)
    load(zips, cache_dir)


def test_another_process_finishes_first(zips: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        load(zips, cache_dir)  # the other one, from start to end
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    load(zips, cache_dir)
    assert len(list(cache_dir.iterdir())) == 1
    spoil(zips)
    load(zips, cache_dir)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_while_writing(zips: Path, cache_dir: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=be_killed_before_the_end, args=(zips, cache_dir))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (leftover,) = cache_dir.iterdir()
    assert leftover.suffix == ".tmp"
    expected = load(zips, cache_dir)
    assert len(list(cache_dir.glob("*.cache"))) == 1
    assert torch.equal(load(zips, cache_dir).images, expected.images)


# Downloads


@pytest.fixture
def download_from(zips: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces torchvision's download by a copy from `zips`; the list collects the addresses asked for."""
    asked: list[str] = []

    def download_url(url: str, root: str, filename: str, md5: str) -> None:
        assert md5 == Omniglot.zips_md5[Path(filename).stem]
        asked.append(url)
        shutil.copy(zips / filename, root)

    monkeypatch.setattr(omniglot_files, "download_url", download_url)
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

    monkeypatch.setattr(omniglot_files, "download_url", download_url)
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


@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_truncated_zip(zips: Path, cache_dir: Path, keep: float) -> None:
    archive = zips / "images_evaluation.zip"
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(
        ValueError, match=f"^{archive} is not a readable zip .*: replace it by the original, or set data"
    ):
        load(zips, cache_dir)
    assert not cache_dir.exists()


def test_damaged_member(zips: Path, cache_dir: Path) -> None:
    archive = zips / "images_background.zip"
    with zipfile.ZipFile(archive) as zipped:
        (info,) = (info for info in zipped.infolist() if info.filename.endswith("Beta/character02/03.png"))
    content = bytearray(archive.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{archive}: {info.filename} is not a readable member .*: replace it"):
        load(zips, cache_dir)


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a PNG", "is not a readable PNG"),
        (png(np.ones((SIDE, SIDE), dtype=bool))[:60], "is not a readable PNG"),
        (png(np.ones((30, 20), dtype=bool)), "has 20 x 30 pixels, a drawing of Omniglot 105 x 105"),
        (png(np.ones((20000, 20000), dtype=bool)), "is not a readable PNG .*decompression bomb"),
        (bytes(2**20 + 1), "has 1048577 bytes, more than the 1048576 allowed"),
    ],
    ids=["text", "truncated", "size", "bomb", "large"],
)
def test_bad_drawing(folders: Path, cache_dir: Path, content: bytes, message: str, as_zip: bool) -> None:
    (folders / "images_background/Beta/character02/03.png").write_bytes(content)
    root = write_zips(folders / "zipped", folders) if as_zip else folders
    expected = f"images_background.*Beta/character02/03.png {message}.*: replace it by the original, or set data.root"
    with pytest.raises(ValueError, match=expected) as error:
        load(root, cache_dir)
    assert "\n" not in str(error.value)
    assert not cache_dir.exists()


def test_member_that_lies_about_its_size(zips: Path, cache_dir: Path) -> None:
    archive = zips / "images_background.zip"
    name = "images_background/Beta/character09/01.png"
    size = 64 * 2**20
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(name, bytes(size))
    archive.write_bytes(archive.read_bytes().replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{name} is not a readable member"):
        load(zips, cache_dir)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_encrypted_zip(zips: Path, cache_dir: Path) -> None:
    archive = zips / "images_background.zip"
    content = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + flags] |= 1
            place = content.find(signature, place + 4)
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a readable member \(.*encrypted.*\): replace it by the original"):
        load(zips, cache_dir)


def test_link_to_nowhere(folders: Path, cache_dir: Path) -> None:
    drawing = folders / "images_background/Beta/character02/03.png"
    drawing.unlink()
    drawing.symlink_to(folders / "nowhere.png")
    with pytest.raises(ValueError, match=f"^{drawing} is not a readable file .*: replace it by the original"):
        load(folders, cache_dir)


@pytest.mark.parametrize("as_zip", [False, True])
def test_no_characters(folders: Path, cache_dir: Path, as_zip: bool) -> None:
    shutil.rmtree(folders / "images_evaluation")
    (folders / "images_evaluation" / "empty").mkdir(parents=True)
    root = write_zips(folders / "zipped", folders) if as_zip else folders
    message = r"images_evaluation(\.zip)? holds no characters, no <alphabet>/<character>/\*.png: put a whole copy of Om"
    with pytest.raises(ValueError, match=message):
        load(root, cache_dir)
