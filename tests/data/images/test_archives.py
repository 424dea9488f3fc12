"""Tars and npz files as sources: the same as folders, hostile ones refused by name, nothing extracted."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fomal.data.image_folder import ImageFolderDataModule
from fomal.data.images import tar_source
from fomal.data.images.image_format import ImageFormat
from fomal.data.images.source import FolderSource, NpzSource, TarSource, is_archive, open_source
from tests.helpers.pictures import picture, write_images

MIB = 2**20


def tarred(folder: Path, archive: Path, mode: Any = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(archive, mode, format=form) as out:
        out.add(folder, ".")
    return archive


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = write_images(tmp_path / "images", {"fig": 3, "pear/süß": 3})
    (root / ("long" * 40)).mkdir()
    (root / ("long" * 40) / ("name" * 40)).write_bytes(b"text")
    (root / "fig/.hidden.png").write_bytes(b"")
    (root / "empty").mkdir()
    return root


# Tars


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x"])
def test_tar_and_folder_are_the_same(name: str, form: int, folder: Path, tmp_path: Path) -> None:
    if form == tarfile.USTAR_FORMAT:  # which has no long names
        shutil.rmtree(folder / ("long" * 40))
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2"}.get(Path(name).suffix, "w")
    archive = tarred(folder, tmp_path / name, mode, form)
    expected, source = FolderSource(folder), open_source(str(archive), "images")
    assert isinstance(source, TarSource)
    assert is_archive(archive)
    assert (source.names, source.folders, source.images) == (expected.names, expected.folders, expected.images)
    assert source.left_out == expected.left_out
    assert source.label == f"images='{archive}'"
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        for each in (source, again):
            assert list(pool.map(each.read, source.names)) == [expected.read(name) for name in source.names]
    assert source.stamp("fig/00.png") == (len(source.read("fig/00.png")), archive.stat().st_mtime_ns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", name]


def member(name: str, content: bytes = b"x", **about: Any) -> Callable[[tarfile.TarFile], None]:
    def add(out: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in about.items():
            setattr(info, key, value)
        out.addfile(info, io.BytesIO(content) if info.isreg() else None)

    return add


def twice(out: tarfile.TarFile) -> None:
    for name in ("pear/1.png", "./pear//1.png"):
        member(name)(out)


def with_holes(out: tarfile.TarFile) -> None:
    member(
        "pear/1.png", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 15}
    )(out)


HOSTILE: dict[str, tuple[Callable[[tarfile.TarFile], None], str]] = {
    "parent": (member("../x.png"), r"its member '../x.png' leaves the tar's root; nothing of this tar is used\.$"),
    "inner parent": (member("pear/../../x.png"), "leaves the tar's root"),
    "absolute": (member("/etc/x.png"), "its member '/etc/x.png' has an absolute or a foreign path"),
    "backslash": (member("pear\\..\\x.png"), "has an absolute or a foreign path"),
    "drive": (member("C:/x.png"), "has an absolute or a foreign path"),
    "hidden parent": (member(".hidden/../../x.png"), "leaves the tar's root"),
    "link": (member("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "its member 'x.png' is a link; nothing"),
    "hard link": (member("x.png", type=tarfile.LNKTYPE, linkname="fig/0.png"), "is a link; nothing"),
    "device": (member("x.png", type=tarfile.CHRTYPE), "is neither a file nor a folder; nothing"),
    "disk": (member("x.png", type=tarfile.BLKTYPE), "is neither a file nor a folder"),
    "fifo": (member("x.png", type=tarfile.FIFOTYPE), "is neither a file nor a folder"),
    "twice": (twice, "has two members 'pear/1.png': make the tar anew, with one of them"),
    "sparse": (with_holes, "'pear/1.png' is a file with holes|not a readable tar"),
    "long header": (member("a/" * 2**16 + "x.png"), "is not a readable tar .it has a header of .* bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_hostile_tar_is_refused(kind: str, mode: Any, tmp_path: Path) -> None:
    add, message = HOSTILE[kind]
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, mode, format=tarfile.PAX_FORMAT if kind == "sparse" else tarfile.GNU_FORMAT) as out:
        member("fig/0.png")(out)  # an honest one first
        add(out)
    with pytest.raises(ValueError, match=message) as error:
        open_source(str(archive), "images")
    assert str(error.value).startswith(f"images='{archive}'")
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def header(size: bytes, kind: bytes = b"0", name: bytes = b"x.png") -> bytes:
    """A header with any twelve bytes as its size."""
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, size.ljust(12, b"\0"), kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "content",
    [
        header(b"\xff" * 11 + b"\x00") * 2,  # of negative size: an endless circle
        header(b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7),  # of 2**63 bytes
        header(b"77777777777"),
        header(b"77777777777", b"L"),  # a name of 8 GB
        header(b"77777777777", b"x"),
        header(b"77777777777", b"g"),
        header(b"4") + b"abcd",  # cut short
    ],
)
def test_absurd_sizes_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for whole in (content, gzip.compress(content)):
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=f"^root='{path}' is not a readable tar "):
            open_source(str(path))


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_source, "_SLACK", MIB)
    size = 20 * MIB
    for name, compressor in (("gz", zlib.compressobj(9, zlib.DEFLATED, 31)), ("bz2", bz2.BZ2Compressor())):
        path = tmp_path / f"x.tar.{name}"
        with path.open("wb") as out:
            out.write(compressor.compress(header(b"%o" % size)))
            for _ in range(size // MIB):
                out.write(compressor.compress(bytes(MIB)))
            out.write(compressor.flush())
        with pytest.raises(ValueError, match=r"inflates to more than 100 times its size, as no honest tar of images"):
            open_source(str(path))


def test_a_compressed_tar_must_fit_the_cache(folder: Path, tmp_path: Path) -> None:
    archive = tarred(folder, tmp_path / "x.tgz", "w:gz")
    message = r"inflates to more than cache_gb=1e-05 allows: raise data.cache_gb, or decompress it\.$"
    with pytest.raises(ValueError, match=message):
        open_source(str(archive), cache_gb=1e-5)
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(str(archive), cache_gb=1e-5).find()
    assert open_source(str(tarred(folder, tmp_path / "x.tar")), cache_gb=0).images


@pytest.mark.parametrize(
    ("compress", "method"), [(lzma.compress, "xz"), (lambda c: b"\x28\xb5\x2f\xfd" + c, "zstandard")]
)
def test_other_compression_is_named(compress: Callable[[bytes], bytes], method: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar.zz"
    path.write_bytes(compress(header(b"0")))
    with pytest.raises(ValueError, match=f"is compressed by {method}, which is not read: decompress it"):
        open_source(str(path))


def test_any_damage_to_a_tar_is_an_error_of_the_stated_kind(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    original = {f"b/{i}.png": rng.bytes(200) for i in range(3)}
    outcomes = Counter[str]()
    for mode in ("w", "w:gz"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as out:  # type: ignore[call-overload]
            for name, content in original.items():
                member(name, content)(out)
        for _ in range(150):
            damaged = bytearray(buffer.getvalue())
            for place in rng.integers(0, min(len(damaged), 3072), 3):
                damaged[place] = rng.integers(256)
            (tmp_path / "x.tar").write_bytes(damaged[: rng.integers(len(damaged) // 2, 2 * len(damaged))])
            try:
                source = TarSource(tmp_path / "x.tar")
            except ValueError:
                outcomes["refused"] += 1
                continue
            for name in source.names:
                try:
                    source.read(name)
                    outcomes["read"] += 1
                except OSError:
                    outcomes["damaged"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 30


# npz


IMAGES = np.stack([picture(str(i)) for i in range(12)])  # (12, 8, 8, 3)


def published(path: Path, labels: dict[str, list[int]], **changes: Any) -> Path:
    """As MedMNIST has them: labels (N, 1)."""
    arrays: dict[str, Any] = {}
    start = 0
    for split, each in labels.items():
        arrays[f"{split}_images"] = IMAGES[start : start + len(each)]
        arrays[f"{split}_labels"] = np.array(each, np.uint8)[:, None]
        start += len(each)
    np.savez_compressed(path, **(arrays | changes))
    return path


def test_npz_whose_splits_share_classes(tmp_path: Path) -> None:
    path = published(tmp_path / "x.npz", {"train": [0, 0, 1, 1, 2, 2], "val": [0, 1, 2], "test": [2, 1, 0]})
    source = open_source(str(path), "support")
    assert isinstance(source, NpzSource)
    assert source.label == f"support='{path}'"
    assert source.names == source.images == sorted(source.names)
    assert source.folders == ["0", "1", "2"]
    expected = {"0": [0, 1, 6, 11], "1": [2, 3, 7, 10], "2": [4, 5, 8, 9]}
    for each in (source, pickle.loads(pickle.dumps(source))):
        for label, rows in expected.items():
            names = sorted(name for name in each.names if name.startswith(f"{label}/"))
            found = {each.read(name).tobytes() for name in names}
            assert found == {IMAGES[row].tobytes() for row in rows}
    assert [name for name in source.names if name.startswith("0/")][0] == "0/test-0000002"


def test_npz_whose_splits_have_classes_of_their_own(tmp_path: Path) -> None:
    path = published(tmp_path / "x.npz", {"train": [0, 0, 0, 1, 1, 1], "val": [2, 2, 2], "test": [3, 3, 3]})
    data = ImageFolderDataModule(
        str(path), image_size=8, ways=2, shots=1, query_shots=1, cache_dir=str(tmp_path / "cache")
    )
    source, listing = data.find()
    assert data.divide(listing.files) == {"train": ["0", "1"], "val": ["2"], "test": ["3"]}
    assert {(file.split, file.label) for file in listing.files} == {
        ("train", "0"),
        ("train", "1"),
        ("val", "2"),
        ("test", "3"),
    }
    np.testing.assert_array_equal(source.read("val/2/0000001"), IMAGES[7])


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (IMAGES[..., 0], IMAGES[..., :1].repeat(3, -1)),
        (IMAGES[..., :1], IMAGES[..., :1].repeat(3, -1)),
        (IMAGES.transpose(0, 3, 1, 2), IMAGES),
        (np.asfortranarray(IMAGES), IMAGES),
        (IMAGES[..., 0].astype(np.uint16) << 8, IMAGES[..., :1].repeat(3, -1)),
        (IMAGES[..., 0] > 99, 255 * (IMAGES[..., :1] > 99).repeat(3, -1)),
    ],
    ids=["grey", "one channel", "channels first", "Fortran", "16 bits", "bool"],
)
@pytest.mark.parametrize(
    "keys", [("images", "labels"), ("x_train", "y_train"), ("X", "Y"), ("train_images", "train_labels")]
)
def test_npz_of_every_form(keys: tuple[str, str], images: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    labels = np.array(["fig", "pear"] * 6) if keys[0] == "images" else np.array([0.0, 1.0] * 6)
    np.savez(tmp_path / "x.npz", **{keys[0]: images, keys[1]: labels, "other": np.zeros(3)})
    source = open_source(str(tmp_path / "x.npz"))
    assert len(source.names) == 12
    for name in source.names:
        decoded = ImageFormat(8, 8).decode(source.read(name), name)
        np.testing.assert_array_equal(decoded.transpose(1, 2, 0), expected[int(name[-7:])])
        label = labels[int(name[-7:])]
        assert name.split("/")[-2] == (label if isinstance(label, str) else str(int(label)))


def test_npz_without_labels_has_images_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=IMAGES)
    source = open_source(str(tmp_path / "x.npz"))
    assert source.images == [f"{i:07}" for i in range(12)]
    np.testing.assert_array_equal(source.read("0000003"), IMAGES[3])


def npy(shape: str, dtype: str = "|u1", content: bytes = b"") -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def raw(**members: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name, content in members.items():
                out.writestr(f"{name}.npy", content)

    return make


def arrays(**found: Any) -> Callable[[Path], None]:
    return lambda path: np.savez_compressed(path, **found)


LABELS = np.zeros(12, int)
WRONG_NPZ: dict[str, tuple[Callable[[Path], None], str]] = {
    "objects": (
        arrays(images=np.array([{}, 1], object), labels=LABELS),
        "its array images has dtype object",
    ),
    "object labels": (arrays(images=IMAGES, labels=np.array([None] * 12)), "its array labels has dtype object"),
    "structured": (arrays(images=IMAGES, labels=np.zeros(12, "i4,i4")), "its array labels has dtype"),
    "dates": (arrays(images=IMAGES, labels=np.zeros(12, "M8[s]")), "its array labels has dtype datetime64"),
    "absurd shape": (
        raw(images=npy("(10000000000000, 28, 28)")),
        r"images says that it has shape \(1000",
    ),
    "negative shape": (raw(images=npy("(-1, 28, 28)", content=b"x")), "says that it has shape|is no array"),
    "code": (raw(images=npy("(__import__('os').system('true'),)")), "its array images is no array of numpy's"),
    "no array": (raw(images=b"text, not an array"), "its array images is no array of numpy's"),
    "path": (raw(**{"../images": npy("(0,)")}), r"its member '../images.npy' leaves the zip's root"),
    "bomb": (raw(images=npy("(4096, 64, 64)", content=bytes(16 * MIB))), "inflates to .* times its size"),
    "volumes": (
        arrays(images=np.zeros((2, 28, 28, 28), np.uint8), labels=[0, 1]),
        r"has shape \(2, 28, 28, 28\), uint8",
    ),
    "several labels": (
        arrays(images=IMAGES, labels=np.zeros((12, 14), int)),
        r"labels has shape \(12, 14\), and not",
    ),
    "too few labels": (
        arrays(images=IMAGES, labels=np.zeros(11, int)),
        r"shape \(11,\), and not a label for each",
    ),
    "no whole numbers": (arrays(images=IMAGES, labels=np.full(12, np.nan)), "has labels that are no whole numbers"),
    "path label": (arrays(images=IMAGES, labels=np.array(["../x"] * 12)), "has the label '../x'"),
    "other names": (
        arrays(a=IMAGES, b=LABELS),
        "images and labels or the like, but a, b: save it",
    ),
    "twice": (arrays(val_images=IMAGES, valid_images=IMAGES), "has two arrays of the same split"),
    "no zip": (lambda path: path.write_bytes(b"text") and None, r"is not a readable npz \(File is not a zip file\)"),
}


@pytest.mark.parametrize("kind", WRONG_NPZ)
def test_hostile_npz_is_refused(kind: str, tmp_path: Path) -> None:
    make, message = WRONG_NPZ[kind]
    make(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=message) as error:
        open_source(str(tmp_path / "x.npz"))
    assert str(error.value).startswith(f"root='{tmp_path}/x.npz'")
    assert "\n" not in str(error.value)


def test_a_large_npz_must_fit_the_cache(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(ValueError, match="has 2304 bytes of images, more than cache_gb=1e-06 allows: rais"):
        open_source(str(tmp_path / "x.npz"), cache_gb=1e-6)


# Through the data module


def test_episodes_are_those_of_the_folder(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", dict.fromkeys("abcdef", 4))
    names = FolderSource(root).images
    pixels = np.stack(
        [ImageFormat(8, 8).decode(FolderSource(root).read(name), name).transpose(1, 2, 0) for name in names]
    )
    np.savez_compressed(tmp_path / "x.npz", images=pixels, labels=np.array([name[0] for name in names]))
    roots = [root, tarred(root, tmp_path / "x.tar"), tarred(root, tmp_path / "x.tgz", "w:gz"), tmp_path / "x.npz"]
    episodes = []
    for each in roots:
        for cache_gb in (1, 2e-5):  # cached; decoded when they are asked for, though a tar fits
            options: dict[str, Any] = {"ways": 2, "shots": 1, "query_shots": 2, "cache_gb": cache_gb}
            if cache_gb < 1 and each.suffix in (".tgz", ".npz"):
                options["cache_gb"] = 1
            data = ImageFolderDataModule(str(each), image_size=8, cache_dir=str(tmp_path / "cache"), **options)
            data.prepare_data()
            data.setup()
            episodes.append(data.episodes("train", torch.arange(5)))
    for episode in episodes[1:]:
        assert torch.equal(episode.support_x, episodes[0].support_x)
        assert torch.equal(episode.query_x, episodes[0].query_x)
