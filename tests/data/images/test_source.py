"""Files by name from folders, zips and arrays; what hostile and damaged zips do, which is nothing."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import stat
import struct
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomal.data.images.source import (
    LARGEST_RATIO,
    ArraySource,
    FileSource,
    FolderSource,
    Source,
    ZipSource,
    open_source,
)
from tests.helpers.pictures import zipped

MIB = 2**20
FILES = {
    "pear/1.png": b"one",
    "pear/2.PNG": b"two" * 1000,
    "pear/notes.txt": b"no image",
    "Äpfel/süß/1.jpeg": b"",
    "top.bmp": bytes(range(256)) * 300,
    "no suffix": b"x",
}
HIDDEN = (".DS_Store", "pear/._1.png", ".git/1.png", "__MACOSX/pear/1.png", "pear/.thumbs/1.png")


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = write(tmp_path / "folder", FILES | dict.fromkeys(HIDDEN, b"hidden"))
    (root / "empty/below").mkdir(parents=True)
    return root


# Names and bytes


def check_all(source: Source) -> None:
    """It has exactly FILES."""
    assert source.names == sorted(FILES)
    assert source.images == ["pear/1.png", "pear/2.PNG", "top.bmp", "Äpfel/süß/1.jpeg"]
    assert {name: source.read(name) for name in source.names} == FILES


def test_folder_and_zip_are_the_same(folder: Path, tmp_path: Path) -> None:
    archive = zipped(folder, tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "sparse.zip", "w", zipfile.ZIP_STORED) as out:  # without members for most folders
        for name in sorted(FILES, reverse=True):
            out.write(folder / name, name)
        out.writestr("empty/below/", b"")
    for root in (folder, archive, tmp_path / "sparse.zip"):
        source = open_source(str(root))
        check_all(source)
        assert source.folders == ["empty", "empty/below", "pear", "Äpfel", "Äpfel/süß"]
        assert source.label == f"root='{root}'"


def test_relative_root_and_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    for root in (".", "../folder", "../folder/", "~/folder"):
        check_all(open_source(root))


def test_stamps(folder: Path, tmp_path: Path) -> None:
    in_zip = open_source(str(zipped(folder, tmp_path / "x.zip")))
    for name, content in FILES.items():
        assert in_zip.stamp(name) == (len(content), zlib.crc32(content))
    path = folder / "top.bmp"
    size, now = len(FILES["top.bmp"]), 1_700_000_000_123_456_789
    for content, time in ((b"x" * size, now), (b"x" * size, now + 1000), (b"x" * (size + 1), now)):
        path.write_bytes(content)
        os.utime(path, ns=(0, time))
        for source, name in ((FolderSource(folder), "top.bmp"), (FileSource([str(path)]), str(path))):
            assert source.stamp(name) == (len(content), time)


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"1.png": b"far", "deep/2.png": b"away"})
    (folder / "plum").symlink_to(outside)
    (folder / "fig").symlink_to("plum")
    (folder / "pear/3.png").symlink_to(outside / "1.png")
    source = FolderSource(folder)
    linked = {f"{place}/{name}" for place in ("plum", "fig") for name in ("1.png", "deep/2.png")}
    assert set(source.names) == {*FILES, *linked, "pear/3.png"}
    assert {"plum", "plum/deep", "fig", "fig/deep"} <= set(source.folders)
    assert (source.read("fig/deep/2.png"), source.read("pear/3.png")) == (b"away", b"far")
    (tmp_path / "link").symlink_to(folder)
    assert open_source(str(tmp_path / "link")).names == source.names


def test_circles_of_links_end(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"a/1.png": b"1", "b/c/2.png": b"2"})
    (root / "a/self").symlink_to(".")
    (root / "a/up").symlink_to(root)
    (root / "a/b").symlink_to("../b")
    (root / "b/c/a").symlink_to("../../a")
    source = FolderSource(root)
    assert source.names == ["a/1.png", "a/b/c/2.png", "b/c/2.png", "b/c/a/1.png"]
    assert source.folders == ["a", "a/b", "a/b/c", "b", "b/c", "b/c/a"]


def test_links_do_not_multiply_without_end(tmp_path: Path) -> None:
    """Twenty folders with two links each to the next one have a million paths."""
    for number in range(20):
        (tmp_path / f"root/{number}").mkdir(parents=True)
        for link in ("a", "b"):
            (tmp_path / f"root/{number}/{link}").symlink_to(f"../{number + 1}")
    with pytest.raises(ValueError, match=r"root': links lead to .* on more than 16 ways: remove them\.$"):
        FolderSource(tmp_path / "root")


def test_what_is_neither_folder_nor_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    for root in (tmp_path / "x.tar", Path("/dev/zero")):
        with pytest.raises(FileNotFoundError, match=f"^root='{root}' is neither a folder nor a regular file: give a"):
            open_source(str(root))
        with pytest.raises(FileNotFoundError, match="is no regular file: give files"):
            FileSource([str(root)])


def test_link_to_nowhere_is_a_file_that_cannot_be_read(folder: Path) -> None:
    (folder / "pear/3.png").symlink_to(folder / "nowhere")
    source = FolderSource(folder)
    assert source.stamp("pear/3.png") == (0, 0)
    with pytest.raises(OSError, match="No such file"):
        source.read("pear/3.png")


def test_files_by_path(folder: Path) -> None:
    paths = [f"{folder}/top.bmp", f"{folder}/pear/notes.txt", f"{folder}/top.bmp"]
    source = FileSource(paths, "images")
    assert source.names == source.images == paths[:2]
    assert source.read(paths[1]) == b"no image"
    assert source.label == "images='3 files'"
    with pytest.raises(FileNotFoundError, match=f"^images='{folder}/pear' is no regular file: give files, or"):
        FileSource([*paths, f"{folder}/pear"], "images")


def test_arrays() -> None:
    calls = []

    def load() -> list[np.ndarray]:
        calls.append(1)
        return [np.full((2, 2, 3), value, np.uint8) for value in (7, 8, 9)]

    source = ArraySource("data.pickle", ["b/0", "a/0", "b/1"], load, (5, 6))
    assert source.images == source.names == ["b/0", "a/0", "b/1"]
    assert source.folders == ["a", "b"]
    assert source.stamp("a/0") == (5, 6)
    assert not calls
    assert [int(source.read(name).max()) for name in ("b/1", "b/0", "a/0")] == [9, 7, 8]
    assert calls == [1]


def test_root_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^support='{tmp_path}/x' does not exist: give a folder or a zip"):
        open_source(f"{tmp_path}/x", "support")


# Several processes and threads


def read_often(source: Source, barrier: Any, rounds: int) -> None:
    barrier.wait(60)
    for _ in range(rounds):
        assert [zlib.crc32(source.read(name)) for name in source.names] == [
            source.stamp(name)[1] for name in source.names
        ]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_read_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    root = write(tmp_path / "folder", {f"{i}.png": rng.bytes(200_000) for i in range(20)})
    source = open_source(str(zipped(root, tmp_path / "x.zip")))
    source.read("0.png")  # the file is open before the fork, as it may be before a DataLoader's workers start
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(4)
    processes = [fork.Process(target=read_often, args=(source, barrier, 10)) for _ in range(3)]
    for process in processes:
        process.start()
    read_often(source, barrier, 10)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_threads_read_at_once(folder: Path, tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source(str(zipped(folder, tmp_path / "x.zip")))))  # not open yet
    names = list(FILES) * 100
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, names)) == [FILES[name] for name in names]


def test_pickled(folder: Path, tmp_path: Path) -> None:
    for root in (folder, zipped(folder, tmp_path / "x.zip")):
        source = open_source(str(root))
        check_all(source)
        check_all(pickle.loads(pickle.dumps(source)))


# Hostile zips


def plain(out: zipfile.ZipFile, name: str, content: bytes = b"content", **about: Any) -> None:
    """Write a member with a name and attributes of any kind."""
    member = zipfile.ZipInfo(name)
    member.compress_type = zipfile.ZIP_DEFLATED
    for key, value in about.items():
        setattr(member, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, about members of one name
        out.writestr(member, content)


def patched(archive: Path, old: bytes, new: bytes) -> None:
    content = archive.read_bytes()
    assert old in content
    archive.write_bytes(content.replace(old, new))


def with_nul(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as out:
        plain(out, "pear/1.png_.txt")
    patched(archive, b"1.png_.txt", b"1.png\0.txt")


def encrypted(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as out:
        plain(out, "pear/1.png")
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x03\x04") + 6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)


def members(*names: str, content: bytes = b"content", **about: Any) -> Callable[[Path], None]:
    def make(archive: Path) -> None:
        with zipfile.ZipFile(archive, "w") as out:
            plain(out, "pear/0.png")  # an honest one first
            for name in names:
                plain(out, name, content, **about)

    return make


HOSTILE = {
    "parent": (members("../x.png"), r"its member '../x.png' leaves the zip's root; nothing of this zip is used\.$"),
    "inner parent": (members("pear/../../x.png"), "leaves the zip's root"),
    "parent folder": (members("pear/.."), "leaves the zip's root"),
    "hidden parent": (members(".hidden/../../x.png"), "leaves the zip's root"),
    "absolute": (members("/etc/x.png"), "its member '/etc/x.png' has an absolute or a foreign path; nothing of"),
    "drive": (members("C:/x.png"), "'C:/x.png' has an absolute or a foreign path"),
    "drive, backslash": (members("C:\\x.png"), "has an absolute or a foreign path"),
    "backslash": (members("pear\\..\\x.png"), "has an absolute or a foreign path"),
    "share": (members("\\\\host\\x.png"), "has an absolute or a foreign path"),
    "NUL": (with_nul, r"'pear/1.png\\x00.txt' has an absolute or a foreign path"),
    "link": (members("pear/1.png", external_attr=(stat.S_IFLNK | 0o777) << 16), "'pear/1.png' is a link; nothing"),
    "encrypted": (encrypted, "'pear/1.png' is encrypted; nothing"),
    "twice": (members("pear/1.png", "pear/1.png"), "has two members 'pear/1.png': make the zip anew, with one of"),
    "bomb": (members("x.png", content=bytes(2 * MIB)), "'x.png' inflates to 10.. times its size, more than 100; noth"),
    "bzip2": (members("x.png", compress_type=zipfile.ZIP_BZIP2), "'x.png' is compressed by another method than defl"),
    "lzma": (members("x.png", compress_type=zipfile.ZIP_LZMA), "is compressed by another method than deflate"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_zip_is_refused(kind: str, tmp_path: Path) -> None:
    make, message = HOSTILE[kind]
    archive = tmp_path / "x.zip"
    make(archive)
    with pytest.raises(ValueError, match=message) as error:
        open_source(str(archive), "images")
    assert str(error.value).startswith(f"images='{archive}'")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the field is not read by older Pythons")
def test_second_name_is_checked(tmp_path: Path) -> None:
    """A field of a member may name it anew, in Unicode."""
    name = b"../x.png"
    field = struct.pack("<HHBI", 0x7075, 5 + len(name), 1, zlib.crc32(b"pear/1.png")) + name
    members("pear/1.png", extra=field)(tmp_path / "x.zip")
    with pytest.raises(ValueError, match="leaves the zip's root"):
        ZipSource(tmp_path / "x.zip")


def test_drawings_may_compress_well(tmp_path: Path) -> None:
    """Small members have any ratio; large ones that of their limit."""
    rng = np.random.default_rng(0)
    photograph = rng.bytes(MIB)
    honest = photograph + bytes(50 * MIB)  # 51 times its size
    members("small.png", content=bytes(MIB))(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as out:
        plain(out, "honest.png", honest)
        plain(out, "stored.png", photograph * 2, compress_type=zipfile.ZIP_STORED)
    source = ZipSource(tmp_path / "x.zip")
    assert source.read("small.png") == bytes(MIB)
    assert source.read("honest.png") == honest
    assert source.read("stored.png") == photograph * 2
    members("small.png", content=bytes(MIB + 1))(tmp_path / "x.zip")
    with pytest.raises(ValueError, match=f"more than {LARGEST_RATIO}; nothing"):
        ZipSource(tmp_path / "x.zip")


@pytest.mark.parametrize("checksum_fits", [False, True])
def test_member_that_lies_about_its_size(checksum_fits: bool, tmp_path: Path) -> None:
    archive, size, claimed = tmp_path / "x.zip", 64 * MIB, 1000
    members("x.png", content=bytes(size))(archive)
    patched(archive, size.to_bytes(4, "little"), claimed.to_bytes(4, "little"))
    if checksum_fits:
        true, forged = (zlib.crc32(bytes(n)).to_bytes(4, "little") for n in (size, claimed))
        patched(archive, true, forged)
    source = ZipSource(archive)
    tracemalloc.start()
    try:
        if checksum_fits:
            assert source.read("x.png") == bytes(claimed)
        else:
            with pytest.raises(OSError, match="^damaged in the zip: Bad CRC-32"):
                source.read("x.png")
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_members_that_claim_too_much(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(1000)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        members("x.png", content=content, compress_type=method)(tmp_path / "x.zip")
        archive = bytearray((tmp_path / "x.zip").read_bytes())
        place = archive.rindex(b"PK\x01\x02") + 24  # the size once it is inflated
        archive[place : place + 4] = (50_000).to_bytes(4, "little")
        (tmp_path / "x.zip").write_bytes(archive)
        assert ZipSource(tmp_path / "x.zip").read("x.png") == content  # all that there is, and its checksum fits


# Nothing is written


def listing(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*")}


def read_everything_without_writing(archives: list[Path], good: list[Path]) -> None:
    written = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            written.append(args[0])
        if event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod"):
            written.append((event, args))

    sys.addaudithook(watch)  # for good, hence in a process of its own
    for archive in archives:
        with pytest.raises(ValueError, match="zip"):
            open_source(str(archive))
    for root in good:
        check_all(open_source(str(root)))
    assert written == []
    (good[0] / "pear/1.png").write_bytes(FILES["pear/1.png"])
    assert len(written) == 1  # the watch does watch


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    archives = []
    for place, (make, _) in enumerate(HOSTILE.values()):
        archives.append(tmp_path / f"hostile/below/{place}.zip")
        archives[-1].parent.mkdir(parents=True, exist_ok=True)
        make(archives[-1])
    good = [folder, zipped(folder, tmp_path / "good.zip")]
    before = listing(tmp_path)
    args = archives, good
    process = multiprocessing.get_context("fork").Process(target=read_everything_without_writing, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    after = listing(tmp_path)
    for changed in (str(folder / "pear"), str(folder / "pear/1.png")):
        del before[changed], after[changed]  # by the last lines of the process
    assert after == before


# Damaged zips


@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_truncated_zip(keep: float, folder: Path, tmp_path: Path) -> None:
    archive = zipped(folder, tmp_path / "x.zip")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=rf"^root='{archive}' is not a readable zip \(.*\): fetch or make it anew\.$"):
        open_source(str(archive))


def test_no_zip(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"notes.txt' is not a readable zip \(File is not a zip file\): fetch or"):
        open_source(str(folder / "pear/notes.txt"))


def test_damaged_member_is_named(folder: Path, tmp_path: Path) -> None:
    """Others can still be read."""
    archive = zipped(folder, tmp_path / "x.zip")
    with zipfile.ZipFile(archive) as opened:
        start = opened.getinfo("top.bmp").header_offset + 30 + len("top.bmp")
    content = bytearray(archive.read_bytes())
    content[start : start + 20] = b"\xff" * 20
    archive.write_bytes(content)
    source = open_source(str(archive))
    with pytest.raises(OSError, match="^damaged in the zip: .*invalid"):
        source.read("top.bmp")
    assert source.read("pear/2.PNG") == FILES["pear/2.PNG"]


def test_any_damage_is_an_error_of_the_stated_kind(tmp_path: Path) -> None:
    """What zipfile and zlib raise on damaged bytes is of many kinds, none of which may end a program."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    original = {"Äpfel/1.png": rng.bytes(200) * 2, "b/2.png": rng.bytes(100), "b/3.png": bytes(1000)}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in original.items():
            out.writestr(name, content)
    outcomes = Counter[str]()
    for _ in range(500):
        damaged = bytearray(buffer.getvalue())
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "x.zip").write_bytes(damaged)
        try:
            source = ZipSource(tmp_path / "x.zip")
        except ValueError:
            outcomes["refused"] += 1
            continue
        for name in source.names:
            try:
                assert source.read(name) in original.values()
                outcomes["read"] += 1
            except OSError as error:
                outcomes[str(error).partition(" ")[0]] += 1
    assert min(outcomes["refused"], outcomes["read"], outcomes["damaged"]) > 30
