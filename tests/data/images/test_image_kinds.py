"""Which files are images, and that all of them can be read."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fomal.data.images.image_format import ImageFormat, Remarks
from fomal.data.images.image_kinds import HEAD, KINDS, kind_of, not_an_image
from fomal.data.images.source import FolderSource, open_source
from tests.helpers.pictures import picture, zipped

IMAGE = picture("x", 16, 16)
FORMAT = ImageFormat(16, 16)
LOSSLESS = {
    **{".png": {}, ".apng": {}, ".bmp": {}, ".dib": {}, ".tga": {}, ".tif": {}, ".tiff": {}, ".ppm": {}, ".pnm": {}},
    **{".pcx": {}, ".sgi": {}, ".rgb": {}, ".qoi": {}, ".dds": {}, ".webp": {"lossless": True}},
    **{".jp2": {"irreversible": False}, ".j2k": {"irreversible": False}, ".vst": {}, ".ico": {"sizes": [(16, 16)]}},
}
NEAR = (".jfif", ".jpe", ".jpg", ".jpeg", ".gif", ".avif", ".icns")
SURE = (".png", ".webp", ".gif", ".bmp", ".jpg", ".tif", ".ppm", ".jp2", ".j2k", ".avif", ".qoi")  # by their content


def encoded(suffix: str) -> bytes:
    kind = Image.registered_extensions()[suffix]
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, kind, **LOSSLESS.get(suffix, {}))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [*LOSSLESS, *NEAR])
def test_every_suffix_is_read(suffix: str) -> None:
    remarks, content = Remarks(), encoded(suffix)
    for name in (f"x{suffix}", f"X{suffix.upper()}"):
        decoded = FORMAT.decode(content, name, remarks).transpose(1, 2, 0)
        if suffix in LOSSLESS:
            np.testing.assert_array_equal(decoded, IMAGE)
        else:
            assert decoded.shape == IMAGE.shape
    assert remarks == Remarks()


@pytest.mark.parametrize("suffix", SURE)
def test_content_tells_without_a_suffix(suffix: str) -> None:
    content = encoded(suffix)
    kind = kind_of(content[:HEAD])
    assert kind in KINDS[suffix]
    assert FORMAT.decode(content, "x").shape == (3, 16, 16)
    assert not_an_image("x", lambda: content[:HEAD]) is None
    assert not_an_image("IMG.0001", lambda: content[:HEAD]) == (None if kind != "TIFF" else ".0001")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"BMW, Audi and Porsche",
        b"P5",
        b"Peter",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"PK\3\4",
        b"\x93NUMPY",
        b"RIFF",
    ]
    + [b"\0" * 40, b"%PDF-1.7", b"<svg>", b"GIF89"],
)
def test_other_content_is_no_image(content: bytes) -> None:
    assert kind_of(content) is None


def test_what_would_run_another_program_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS to Ghostscript."""
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("runs a program"))
    for name in ("x.eps", "x.ps", "x.png", "x"):
        with pytest.raises(ValueError, match="^no image of a known kind$"):
            FORMAT.decode(buffer.getvalue(), name)
        assert bool(not_an_image(name, lambda: buffer.getvalue()[:HEAD])) == (name != "x.png")


def test_files_of_a_folder_and_a_zip(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "fig").mkdir(parents=True)
    images = {"a.jfif": encoded(".jpg"), "b.tga": encoded(".tga"), "c": encoded(".png"), "d.part": encoded(".gif")}
    images |= {"e.jpg": encoded(".png"), "f.tif": b"damaged"}
    others = {"g.txt": b"BM, a text", "h": b"none", "i.nef": encoded(".tif"), "j.heic": b"\0\0\0 ftypheic", "k": b""}
    for name, content in (images | others).items():
        (root / "fig" / name).write_bytes(content)
    archive = zipped(root, tmp_path / "x.zip")
    os.mkfifo(root / "fig/l")
    os.mkfifo(root / "fig/m.png")
    left = {"fig/g.txt": ".txt", "fig/h": "no suffix", "fig/i.nef": ".nef", "fig/j.heic": ".heic", "fig/k": "no suffix"}
    source = open_source(str(archive))
    assert source.images == [f"fig/{name}" for name in images]
    assert source.left_out == left
    source = FolderSource(root)
    assert source.images == [*(f"fig/{name}" for name in images), "fig/m.png"]
    assert source.left_out == left | {"fig/l": "unreadable (it is a fifo, and no regular file)"}
