"""The cache among other users: what they could have written is not believed, and nothing is written through links."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fomal.data.images.cache import UnsafeCache, cache_folder, make_folder, read_arrays, replacing, write_arrays
from fomal.data.images.image_format import ImageFormat
from fomal.data.images.source import open_source
from fomal.data.images.store import Cached, Decoding, Store, load_images
from tests.helpers.pictures import write_images

FORMAT = ImageFormat(8, 8, resample="nearest")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", {"fig": 3, "pear": 3})


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def as_somebody_else(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, this process seems to be another user's, so that all files are somebody else's."""
    # Of files that the administrator owns anybody may believe the content.
    stat_of = os.fstat

    def planted(about: os.stat_result) -> os.stat_result:
        return os.stat_result((*about[:4], 4321, *about[5:]), {"st_mtime_ns": about.st_mtime_ns})

    def begin() -> None:
        monkeypatch.setattr(os, "fstat", lambda file: planted(stat_of(file)))

    return begin


def load(root: Path, cache_dir: Path, verify: bool = False) -> Store:
    source = open_source(str(root))
    return load_images(source, source.images, FORMAT, str(cache_dir), verify=verify)


def pixels(store: Store) -> torch.Tensor:
    return store.images.index_select(0, torch.arange(6))


def open_to_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | stat.S_IWOTH)


def of_a_group(path: Path) -> None:
    os.chown(path, -1, 54321)
    path.chmod(path.stat().st_mode | stat.S_IWGRP)


def sticky(path: Path) -> None:
    path.chmod(0o1777)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.mark.parametrize(
    ("opened", "why"),
    [
        (open_to_all, "the folder can be written by all users"),
        (sticky, "the folder can be written by all users"),
        pytest.param(of_a_group, r"the folder can be written by its group \(54321\)", marks=needs_root),
        pytest.param(
            lambda path: os.chown(path, 4321, -1), r"the folder belongs to another user \(4321\)", marks=needs_root
        ),
    ],
)
def test_a_folder_that_others_can_write_is_not_used(
    opened: Callable[[Path], None], why: str, folder: Path, cache_dir: Path
) -> None:
    expected = pixels(load(folder, cache_dir))
    opened(cache_dir)
    before = sorted(cache_dir.iterdir())
    for path in before:
        path.write_bytes(b"planted")
    message = rf"^cache_dir='{cache_dir}' is not used \({why}\): images are decoded when episodes need them; set data"
    with pytest.warns(UserWarning, match=message):
        store = load(folder, cache_dir)
    assert isinstance(store.images, Decoding)
    assert torch.equal(pixels(store), expected)
    assert sorted(cache_dir.iterdir()) == before
    assert all(path.read_bytes() == b"planted" for path in before)
    with pytest.raises(UnsafeCache, match=why):
        write_arrays(cache_dir / "x.cache", {})


@pytest.mark.parametrize("suffix", [".cache", ".pixels"])
@pytest.mark.parametrize("kind", ["writable", "link", "fifo"])
def test_a_file_that_others_could_have_written_is_built_again(
    kind: str, suffix: str, folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    expected = pixels(load(folder, cache_dir))
    (path,) = (path for path in cache_dir.iterdir() if path.suffix == suffix)
    if kind == "writable":
        open_to_all(path)
    elif kind == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        os.mkfifo(path)
    with pytest.warns(UserWarning, match=f"^The cache file {path} is not believed .*: building it again"):
        store = load(folder, cache_dir)
    assert torch.equal(pixels(store), expected)
    about = path.lstat()
    assert stat.S_ISREG(about.st_mode)
    assert not about.st_mode & (stat.S_IWOTH | stat.S_IWGRP)


def test_a_planted_file_is_not_believed(
    cache_dir: Path, as_somebody_else: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache_dir / "x.cache"
    write_arrays(path, {"a": np.arange(3)})
    assert read_arrays(path) is not None
    as_somebody_else()
    with pytest.warns(UserWarning, match=r"not believed \(it belongs to another user \(4321\)\)"):
        assert read_arrays(path) is None
    with pytest.raises(UnsafeCache, match="belongs to another user"):
        Cached(path, (1, 1, 1, 1))


def test_a_file_under_another_name_is_not_believed(cache_dir: Path) -> None:
    write_arrays(cache_dir / "x.cache", {"a": np.arange(3)})
    (cache_dir / "x.cache").rename(cache_dir / "y.cache")
    with pytest.warns(UserWarning, match=r"y.cache is damaged \(it was written as x.cache\): building"):
        assert read_arrays(cache_dir / "y.cache") is None


def test_folders_are_made_for_this_user_to_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_folder(tmp_path / "a/b")
        with replacing(tmp_path / "a/b/file") as file:
            file.write(b"mine")
    finally:
        os.umask(before)
    for path in (tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/file"):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_nothing_is_written_through_links(folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Whatever names are taken already, by links to a file that is worth something."""
    load(folder, cache_dir)
    names = [path.name for path in cache_dir.iterdir()]
    treasure = tmp_path / "treasure"
    treasure.write_text("gold")
    for path in cache_dir.iterdir():
        path.unlink()
    for name in names:
        for taken in (name, f".{name}.tmp", name.rpartition(".")[0] + ".unfinished"):
            if not (cache_dir / taken).is_symlink() and not taken.endswith(".lock"):
                (cache_dir / taken).symlink_to(treasure)
    with pytest.warns(UserWarning, match="not believed"):
        load(folder, cache_dir)
    assert treasure.read_text() == "gold"
    assert not any((cache_dir / name).is_symlink() for name in names)
    (lock,) = (cache_dir / name for name in names if name.endswith(".lock"))
    lock.unlink(missing_ok=True)
    lock.symlink_to(treasure)
    (cache_dir / lock.with_suffix(".cache").name).unlink()
    with pytest.warns(UserWarning, match=r"is not used \(.*\.lock is a link\)"):
        load(folder, cache_dir)
    assert treasure.read_text() == "gold"


@needs_root
def test_a_link_of_somebody_else_is_not_followed(folder: Path, tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.mkdir()
    link.symlink_to(mine)
    assert isinstance(load(folder, link / "cache").images, torch.Tensor)  # a link of one's own is
    os.chown(link, 4321, -1, follow_symlinks=False)
    with pytest.warns(UserWarning, match=rf"is not used \({link} is a link that belongs to another user\)"):
        load(folder, link / "another")
    assert not (mine / "another").exists()


# A cache that changes under a run


def cut_short(path: Path) -> None:
    os.truncate(path, 10)


def overwritten(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("damage", [cut_short, overwritten])
def test_a_cache_that_changes_under_a_run_is_an_error(
    damage: Callable[[Path], None], folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is mapped from a file which is cut short ends the process by SIGBUS."""
    monkeypatch.setattr("fomal.data.images.store._IN_MEMORY", 0)
    store = load(folder, cache_dir)
    assert isinstance(store.images, Cached)
    expected = pixels(store)
    (path,) = (path for path in cache_dir.iterdir() if path.suffix == ".pixels")
    path.rename(cache_dir / "kept")
    assert torch.equal(pixels(store), expected)  # a file that was removed or replaced is read on
    damage(cache_dir / "kept")
    message = rf"^The cache file {path} was changed or cut short while it was used: start again, .* set data.cache_dir"
    with pytest.raises(RuntimeError, match=message):
        pixels(store)
    assert torch.equal(pixels(load(folder, cache_dir)), expected)


def test_pixels_that_fit_are_in_memory(folder: Path, cache_dir: Path) -> None:
    store = load(folder, cache_dir)
    assert isinstance(store.images, torch.Tensor)
    expected = pixels(store)
    (path,) = (path for path in cache_dir.iterdir() if path.suffix == ".pixels")
    cut_short(path)
    assert torch.equal(pixels(store), expected)


# Where it is, and what is made of damage


def test_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == tmp_path / ".cache" / "fomal"
    assert cache_folder("~/mine") == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "fomal"


def test_no_home_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(RuntimeError, match=r"^cache_dir=None needs a home directory.*: set data.cache_dir to a folder"):
        cache_folder(None)


def test_damaged_arrays_are_not_read(tmp_path: Path) -> None:
    path, arrays = tmp_path / "some.cache", {"numbers": np.arange(3000)}
    write_arrays(path, arrays)
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    npz, a_pickle = content[content.index(b"PK") :], b"\x80\x04K\x01."
    for damaged in (b"", content[:20], content[:-1], content + b"\0", flipped, npz, a_pickle):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"^The cache file {path} is damaged .*: building it again.$"):
            assert read_arrays(path) is None
    write_arrays(path, {"objects": np.array([print, None], dtype=object)})
    with pytest.warns(UserWarning, match="allow_pickle"):
        assert read_arrays(path) is None


def test_cache_files_have_ordinary_permissions(tmp_path: Path) -> None:
    written, ordinary = tmp_path / "some.cache", tmp_path / "ordinary"
    write_arrays(written, {"numbers": np.arange(3)})
    ordinary.touch()
    assert written.stat().st_mode == ordinary.stat().st_mode
