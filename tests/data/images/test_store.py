"""The cache of decoded images: the same pixels as without it, whatever happens to it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fomal.data.images import store as store_module
from fomal.data.images.image_format import ImageFormat
from fomal.data.images.source import ArraySource, FolderSource, Source, open_source
from fomal.data.images.store import Cached, Decoding, Store, fingerprint, load_images, scan
from tests.helpers.pictures import encoded, picture, zipped

FORMAT = ImageFormat(8, 6, "rgb", "crop", "nearest")
NAMES = [f"{label}/{i}.png" for label in ("fig", "pear") for i in range(6)]

fork = multiprocessing.get_context("fork")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on one core
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(name)))
    return root


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(root: Path, cache_dir: Path, **options: Any) -> Store:
    source = open_source(str(root))
    return load_images(source, source.images, FORMAT, str(cache_dir), **options)


def expected_pixels(names: Sequence[str] = NAMES) -> Tensor:
    """Columns 1 to 6 of the eight."""
    return torch.stack([torch.from_numpy(picture(name)[:, 1:7]).permute(2, 0, 1) for name in names])


def check(store: Store) -> None:
    """It has the images of NAMES, whole."""
    assert tuple(store.images.shape) == (len(NAMES), 3, 8, 6)
    assert torch.equal(store.images.index_select(0, torch.arange(len(NAMES))), expected_pixels())
    assert store.problems == {}


def files(cache_dir: Path, suffix: str = "") -> list[Path]:
    return sorted(path for path in cache_dir.iterdir() if path.suffix == suffix or not suffix)


def suffixes(cache_dir: Path) -> list[str]:
    return [path.suffix for path in files(cache_dir) if path.suffix != ".lock"]


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the names of the images that are decoded."""
    names: list[str] = []
    decode = ImageFormat.decode

    def counted(self: ImageFormat, content: Any, name: str = "", *rest: Any) -> np.ndarray:
        names.append(name)
        return decode(self, content, name, *rest)

    monkeypatch.setattr(ImageFormat, "decode", counted)
    return names


def in_child(fn: Callable[..., None], *args: Any) -> int | None:
    """The exit code of a process that runs `fn`."""
    process = fork.Process(target=fn, args=args)
    process.start()
    process.join(100)
    return process.exitcode


# The same pixels


@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_cached_is_decoded(as_zip: bool, folder: Path, cache_dir: Path, tmp_path: Path, decodes: list[str]) -> None:
    root = zipped(folder, tmp_path / "x.zip") if as_zip else folder
    built = load(root, cache_dir)
    assert sorted(decodes) == NAMES
    cached = load(root, cache_dir)
    assert len(decodes) == len(NAMES)
    uncached = load(root, tmp_path / "other", cache_gb=0)
    for store, kind in ((built, Tensor), (cached, Tensor), (uncached, Decoding)):
        assert isinstance(store.images, kind)
        check(store)
        index = torch.tensor([7, 0, 7, 11])
        assert torch.equal(store.images.index_select(0, index), expected_pixels()[index])
        assert store.images.index_select(0, index).dtype == torch.uint8
        np.testing.assert_array_equal(store.digests, built.digests)
    assert suffixes(cache_dir) == [".cache", ".pixels"]


def test_pixels_can_be_changed_in_memory_alone(folder: Path, cache_dir: Path) -> None:
    images = load(folder, cache_dir).images
    assert isinstance(images, Tensor)
    images.zero_()
    check(load(folder, cache_dir, verify=True))


class Shuffled(Dataset[Tensor]):
    """Images of a store, a few at a time."""

    def __init__(self, images: Tensor | Decoding) -> None:
        self.images = images

    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> Tensor:
        return self.images.index_select(0, torch.tensor([place % 12, (5 * place) % 12]))


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_workers_see_the_same(cache_gb: float, folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    store = load(zipped(folder, tmp_path / "x.zip"), cache_dir, cache_gb=cache_gb)
    check(store)  # the zip is open when the workers are forked
    loader = DataLoader(Shuffled(store.images), None, num_workers=2, multiprocessing_context="fork")
    for place, pair in enumerate(loader):
        assert torch.equal(pair, expected_pixels()[[place % 12, (5 * place) % 12]])


def test_digests_tell_contents_apart(folder: Path, cache_dir: Path) -> None:
    (folder / "pear/5.png").write_bytes((folder / "fig/1.png").read_bytes())
    store = load(folder, cache_dir)
    assert store.digests.shape == (12, 16)
    for name, digest in zip(NAMES, store.digests, strict=True):
        assert digest.tobytes() == hashlib.blake2b((folder / name).read_bytes(), digest_size=16).digest()
    equal = (store.digests[:, None] == store.digests[None]).all(-1)
    assert np.argwhere(np.triu(equal, 1)).tolist() == [[1, 11]]


def test_problems_are_named(folder: Path, cache_dir: Path, tmp_path: Path, decodes: list[str]) -> None:
    (folder / "fig/0.png").write_bytes(b"text")
    (folder / "pear/2.png").unlink()
    (folder / "pear/2.png").symlink_to("nowhere")
    (folder / "pear/4\udcff.png").write_bytes((folder / "pear/4.png").read_bytes()[:60])  # no UTF-8
    expected = {
        "fig/0.png": "no image of a known kind",
        "pear/2.png": "cannot be read: No such file or directory",
        "pear/4\udcff.png": "damaged: ",
    }
    source = FolderSource(folder)
    names = source.images
    first = load(folder, cache_dir)
    count = len(decodes)
    again = load(folder, cache_dir)
    assert len(decodes) == count
    uncached = load(folder, tmp_path / "other", cache_gb=0)
    good = [i for i, name in enumerate(names) if name not in expected]
    for store in (first, again, uncached, Store(Decoding(source, names, FORMAT), *scan(source, names, FORMAT))):
        assert list(store.problems) == sorted(expected)
        for name, reason in expected.items():
            assert store.problems[name].startswith(reason)
        assert torch.equal(store.images.index_select(0, torch.tensor(good)), expected_pixels([names[i] for i in good]))
    assert isinstance(first.images, Tensor)
    assert not first.images[[names.index(name) for name in expected]].any()
    with pytest.raises(
        ValueError, match=r"images: fig/0.png has become unreadable \(no image of a known kind\): put it back\.$"
    ):
        uncached.images.index_select(0, torch.tensor([2, 0]))


def test_files_that_vanish_are_named(folder: Path, cache_dir: Path) -> None:
    images = load(folder, cache_dir, cache_gb=0).images
    (folder / "fig/2.png").unlink()
    with pytest.raises(ValueError, match=r"images: fig/2.png has become unreadable \(.*No such file.*\): put it back"):
        images.index_select(0, torch.tensor([2]))


def test_a_file_that_can_be_read_again_is(folder: Path, cache_dir: Path, decodes: list[str]) -> None:
    """Rights and mounts come back without a change of size and time; it is no verdict for ever."""
    with pytest.MonkeyPatch.context() as patch:
        read = FolderSource.read

        def without_rights(self: FolderSource, name: str) -> bytes:
            if name == "pear/1.png":
                raise PermissionError(errno.EACCES, "Permission denied")
            return read(self, name)

        patch.setattr(FolderSource, "read", without_rights)
        for _ in range(2):
            assert load(folder, cache_dir).problems == {"pear/1.png": "cannot be read: Permission denied"}
        assert len(decodes) == 11  # while nothing changes, nothing is built again
    check(load(folder, cache_dir))


def test_no_images(cache_dir: Path) -> None:
    source = ArraySource("nothing", [], lambda: [], (0, 0))
    for cache_gb in (1, 0):
        store = load_images(source, [], FORMAT, str(cache_dir), cache_gb)
        assert tuple(store.images.shape) == (0, 3, 8, 6)
        assert store.digests.shape == (0, 16)


# When it is built


def test_over_budget_nothing_large_is_written(folder: Path, cache_dir: Path, decodes: list[str]) -> None:
    size = len(NAMES) * 3 * 8 * 6
    for _ in range(2):
        assert isinstance(load(folder, cache_dir, cache_gb=(size - 1) / 1e9).images, Decoding)
    assert len(decodes) == len(NAMES)  # what was found out is cached
    assert suffixes(cache_dir) == [".cache"]
    assert sum(path.stat().st_size for path in files(cache_dir)) < 3000
    check(load(folder, cache_dir, cache_gb=size / 1e9))
    assert suffixes(cache_dir) == [".cache", ".pixels"]
    assert files(cache_dir, ".pixels")[0].stat().st_size == size


def test_fingerprint(folder: Path) -> None:
    names = FolderSource(folder).images

    def current(names: Sequence[str] = names, image_format: ImageFormat = FORMAT) -> str:
        return fingerprint(FolderSource(folder), names, image_format)

    first = current()
    assert current() == first
    same = [
        replace(FORMAT, mean=[0.5]),
        replace(FORMAT, std=[1, 2, 3]),
        ImageFormat(**json.loads(json.dumps(vars(FORMAT)))),
    ]
    assert {current(image_format=image_format) for image_format in same} == {first}
    other = [
        {"height": 9},
        {"width": 7},
        {"color": "gray"},
        {"fit": "pad"},
        {"resample": "bilinear"},
        {"background": 0},
        {"max_pixels": 100},
    ]
    found = [current(image_format=replace(FORMAT, **changes)) for changes in other]  # type: ignore[arg-type]
    found += [current(names[:-1]), current(names[::-1])]
    about = (folder / names[0]).stat()
    (folder / names[0]).write_bytes((folder / names[0]).read_bytes() + b"!")
    os.utime(folder / names[0], ns=(0, about.st_mtime_ns))
    found.append(current())
    os.utime(folder / names[1], ns=(0, about.st_mtime_ns + 1))
    found.append(current())
    (folder / names[2]).rename(folder / "fig/z.png")
    found.append(current(FolderSource(folder).images))
    assert len({first, *found}) == 1 + len(found)


def test_changed_files_are_read_again(folder: Path, cache_dir: Path) -> None:
    before = load(folder, cache_dir)
    (folder / "fig/1.png").write_bytes(encoded(picture("another")))
    after = load(folder, cache_dir)
    assert torch.equal(after.images.index_select(0, torch.tensor([1])), expected_pixels(["another"]))
    check(before)  # nobody's pixels change under them


# Damage


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_damaged_pixels_are_found(folder: Path, cache_dir: Path) -> None:
    load(folder, cache_dir)
    (pixels,) = files(cache_dir, ".pixels")
    flip_a_bit(pixels)
    assert not torch.equal(
        load(folder, cache_dir).images.index_select(0, torch.arange(12)), expected_pixels()
    )  # it was not read
    with pytest.warns(UserWarning, match=rf"^The cache file {pixels} is damaged: building it again\.$"):
        check(load(folder, cache_dir, verify=True))
    check(load(folder, cache_dir))


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_incomplete_pixels_are_made_anew(damage: Callable[[Path], None], folder: Path, cache_dir: Path) -> None:
    load(folder, cache_dir)
    damage(files(cache_dir, ".pixels")[0])
    check(load(folder, cache_dir))


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
def test_damaged_index_is_made_anew(damage: Callable[[Path], None], folder: Path, cache_dir: Path) -> None:
    load(folder, cache_dir)
    (index,) = files(cache_dir, ".cache")
    whole = index.read_bytes()
    damage(index)
    with pytest.warns(UserWarning, match=f"^The cache file {index} is damaged .*: building it again"):
        check(load(folder, cache_dir))
    assert index.read_bytes()[:20] == whole[:20]
    check(load(folder, cache_dir, verify=True))


# Killed


def be_killed(folder: Path, cache_dir: Path, when: str) -> None:
    """Build the cache, and be killed on the way."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    patch = pytest.MonkeyPatch()
    decode, rename, calls = ImageFormat.decode, os.replace, []

    def decode_some(self: ImageFormat, content: Any, name: str = "", *rest: Any) -> np.ndarray:
        if name == "pear/3.png":
            die()
        return decode(self, content, name, *rest)

    def rename_some(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == (1 if when == "before the pixels are in place" else 2):
            die()
        rename(source, target)

    if when == "while decoding":
        patch.setattr(store_module, "_CHUNK", 4)  # so that some are written before
        patch.setattr(ImageFormat, "decode", decode_some)
    else:
        patch.setattr(os, "replace", rename_some)
    load(folder, cache_dir)


@pytest.mark.parametrize("when", ["while decoding", "before the pixels are in place", "before the index is in place"])
def test_killed(when: str, folder: Path, cache_dir: Path) -> None:
    assert in_child(be_killed, folder, cache_dir, when) == -signal.SIGKILL
    left = files(cache_dir)
    assert any(path.suffix in (".tmp", ".pixels") for path in left)
    assert not files(cache_dir, ".cache")
    check(load(folder, cache_dir))
    check(load(folder, cache_dir, verify=True))
    assert [suffix for suffix in suffixes(cache_dir) if suffix != ".tmp"] == [".cache", ".pixels"]
    assert sum(path.stat().st_size for path in files(cache_dir, ".tmp")) < 3000


def test_interrupted(folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: ImageFormat, content: Any, name: str = "", *rest: Any) -> np.ndarray:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ImageFormat, "decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(folder, cache_dir)
    assert suffixes(cache_dir) == []
    check(load(folder, cache_dir))


# Two at once


def load_when_all_are_ready(barrier: Any, folder: Path, cache_dir: Path, log: Path) -> None:
    decode = ImageFormat.decode

    def logged(self: ImageFormat, content: Any, name: str = "", *rest: Any) -> np.ndarray:
        with log.open("ab") as file:
            file.write(b".")
        return decode(self, content, name, *rest)

    pytest.MonkeyPatch().setattr(ImageFormat, "decode", logged)
    barrier.wait(60)
    check(load(folder, cache_dir))


def test_processes_build_at_once(folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    barrier, log = fork.Barrier(3), tmp_path / "log"
    args = barrier, folder, cache_dir, log
    processes = [fork.Process(target=load_when_all_are_ready, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.stat().st_size == len(NAMES)  # one of them has decoded, each image once
    check(load(folder, cache_dir, verify=True))


# A cache that cannot be written

WARNING = r"^cache_dir='{}' cannot be written \({}\): images are decoded when episodes need them; set data.cache_dir to"


def test_full_disk(folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.warns(UserWarning, match=WARNING.format(cache_dir, "No space left on device")):
            store = load(folder, cache_dir)
    assert isinstance(store.images, Decoding)
    check(store)
    assert suffixes(cache_dir) == []
    check(load(folder, cache_dir))  # there is room again
    assert suffixes(cache_dir) == [".cache", ".pixels"]


def fill_up(folder: Path, cache_dir: Path, room: int, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    source, wanted = open_source(str(folder)), ImageFormat(size, size, resample="nearest")
    for _ in range(2):
        with pytest.warns(UserWarning, match=WARNING.format(cache_dir, "File too large")):
            store = load_images(source, NAMES, wanted, str(cache_dir))
        assert isinstance(store.images, Decoding)
        assert suffixes(cache_dir) == []
        middle = torch.tensor([picture(name)[4, 4].tolist() for name in NAMES])
        assert torch.equal(store.images.index_select(0, torch.arange(12))[:, :, size // 2, size // 2], middle)


@pytest.mark.parametrize(("room", "size"), [(0, 8), (1000, 8), (100, 1)])
def test_no_room_for_all(room: int, size: int, folder: Path, cache_dir: Path) -> None:
    """For none or a part of 2,304 bytes of pixels, or for 36 bytes of them but not for the index."""
    assert in_child(fill_up, folder, cache_dir, room, size) == 0
    check(load(folder, cache_dir))


@pytest.mark.parametrize("below", [".", "below"])
def test_cache_dir_that_is_a_file(below: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    cache_dir = tmp_path / "file" / below
    for cache_gb in (1, 0):
        with pytest.warns(UserWarning, match=WARNING.format(cache_dir, ".*")):
            check(load(folder, cache_dir, cache_gb=cache_gb))
    assert (tmp_path / "file").read_text() == "mine"


# What is written, and how much memory it takes


def write_below(folder: Path, cache_dir: Path, archive: Path) -> None:
    written = set()

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            written.add(args[0])
        if event in ("os.mkdir", "os.remove", "os.truncate", "os.chmod"):
            written.add(args[0])
        if event in ("os.rename", "os.link", "os.symlink"):
            written.update(args[:2])

    sys.addaudithook(watch)  # for good, hence in a process of its own
    for root in (folder, archive):
        for cache_gb in (1, 0):
            check(load(root, cache_dir, cache_gb=cache_gb))
    assert len(written) > 4
    assert all(isinstance(path, int) or Path(os.fsdecode(path)).is_relative_to(cache_dir) for path in written), written


def test_nothing_is_written_outside_the_cache(folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    archive = zipped(folder, tmp_path / "x.zip")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert in_child(write_below, folder, cache_dir, archive) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if not path.is_relative_to(cache_dir)}
    assert after == before


class Repeated(Source):
    """One image under many names."""

    def __init__(self, count: int) -> None:
        self.where, self.names, self.folders = "memory", [f"{i}.png" for i in range(count)], []
        self.image = np.zeros((84, 84, 3), np.uint8)

    def read(self, name: str) -> np.ndarray:
        return self.image

    def stamp(self, name: str) -> tuple[int, int]:
        return 0, 0


class SlowDisk(io.BytesIO):
    """Takes nothing before the decoding has come to a halt."""

    def __init__(self, decodes: list[str]) -> None:
        super().__init__()
        self.decodes, self.ahead = decodes, 0

    def write(self, content: Any) -> int:
        while not self.ahead:
            count = len(self.decodes)
            time.sleep(0.5)
            self.ahead = count if len(self.decodes) == count else 0
        return super().write(content)


def test_decoding_waits_for_the_disk(decodes: list[str]) -> None:
    source, disk = Repeated(2000), SlowDisk(decodes)
    scan(source, source.names, ImageFormat(4, 4), disk)
    assert len(disk.getvalue()) == 2000 * 3 * 4 * 4
    assert 0 < disk.ahead <= 256


def build_within(cache_dir: Path, most: int) -> None:
    def peak() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    pytest.MonkeyPatch().setattr(store_module, "_IN_MEMORY", 0)
    load_images(Repeated(1), ["0.png"], ImageFormat(84, 84), str(cache_dir / "warm"))
    before = peak()
    source = Repeated(5000)
    store = load_images(source, source.names, ImageFormat(84, 84), str(cache_dir))
    assert isinstance(store.images, Cached)
    assert store.images.size == 5000 * 3 * 84 * 84 > 100e6
    assert peak() - before < most


def test_memory_does_not_grow_with_the_images(cache_dir: Path) -> None:
    assert in_child(build_within, cache_dir, 30_000_000) == 0
