"""Images of more than 8 bits, against values computed from the arrays that they were made of."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fomal.data.image_folder import ImageFolderDataModule
from fomal.data.images.image_format import ImageFormat, Remarks
from fomal.data.images.source import FolderSource
from fomal.data.images.store import load_images, scan

H, W = 5, 7
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 4096, (H, W))
GRAY[0, :2] = 0, 4095
COLOR = RNG.integers(0, 4096, (H, W, 3))
ALPHA = RNG.integers(0, 65536, (H, W))
ALPHA[0, :3] = 0, 65535, 65535

same = np.testing.assert_array_equal


def wanted(value_range: Any = None, color: Any = "rgb", **changes: Any) -> ImageFormat:
    return ImageFormat(H, W, color, value_range=value_range, **changes)


def saved(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(values: NDArray[Any], **extra: bytes) -> bytes:
    """A PNG of 16 bits with one to four channels; Pillow writes but one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    color = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 16, color, 0, 0, 0))]
    parts += [chunk(kind.encode(), data) for kind, data in extra.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def tiff(values: NDArray[Any], order: str = "<", deflated: bool = False, planes: bool = False, ink: int = 2) -> bytes:
    """A TIFF of uint16 or float32 with one, three or four channels."""
    values = values[..., None] if values.ndim == 2 else values
    size, count = 8 * values.dtype.itemsize, values.shape[2]
    content = values.astype(values.dtype.newbyteorder(order))
    strips = [content[..., i] for i in range(count)] if planes else [content]
    data = [zlib.compress(strip.tobytes()) if deflated else strip.tobytes() for strip in strips]
    tags = {256: [W], 257: [H], 258: [size] * count, 259: [8 if deflated else 1], 262: [ink], 273: [], 277: [count]}
    tags |= {278: [H], 279: [len(part) for part in data], 284: [2 if planes else 1]}
    tags |= {338: [2]} if count == 4 and ink != 5 else {}
    tags[339] = [3 if values.dtype.kind == "f" else 1] * count
    tags[273] = [0] * len(data)
    long = (256, 257, 273, 278, 279)
    place = 8 + 2 + 12 * len(tags) + 4
    first = place + sum(
        len(v) * (4 if t in long else 2) for t, v in tags.items() if len(v) * (4 if t in long else 2) > 4
    )
    tags[273] = [first + sum(map(len, data[:i])) for i in range(len(data))]
    entries, rest = b"", b""
    for tag, numbers in tags.items():
        kind, letter = (4, "I") if tag in long else (3, "H")
        raw = struct.pack(order + letter * len(numbers), *numbers)
        entries += struct.pack(order + "HHI", tag, kind, len(numbers))
        entries += raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(order + "I", place + len(rest))
        rest += raw if len(raw) > 4 else b""
    begin = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return begin + entries + bytes(4) + rest + b"".join(data)


def three(gray: NDArray[Any]) -> NDArray[Any]:
    return np.broadcast_to(gray[..., None], (H, W, 3))


SIXTEEN = GRAY.astype(np.uint16)
COLOR16 = COLOR.astype(np.uint16)
OPAQUE = np.dstack([COLOR16, np.full((H, W), 65535, np.uint16)])
INKS = np.dstack([65535 - COLOR16, np.zeros((H, W), np.uint16)])
TWELVE: dict[str, tuple[bytes, NDArray[Any]]] = {  # 12 bits in 16, and what they show
    "PNG": (saved(SIXTEEN), three(GRAY)),
    "TIFF": (saved(SIXTEEN, "TIFF"), three(GRAY)),
    "big-endian TIFF": (tiff(SIXTEEN, ">", ink=1), three(GRAY)),
    "deflated TIFF": (tiff(SIXTEEN, deflated=True, ink=1), three(GRAY)),
    "PGM": (b"P5 7 5 65535\n" + SIXTEEN.astype(">u2").tobytes(), three(GRAY)),
    "32 bits": (saved(GRAY.astype(np.int32), "TIFF"), three(GRAY)),
    "grey with alpha": (png(np.dstack([GRAY, OPAQUE[..., 3]])), three(GRAY)),
    "colours": (png(COLOR), COLOR),
    "colours with alpha": (png(OPAQUE), COLOR),
    "colours, TIFF": (tiff(COLOR16), COLOR),
    "colours, big-endian TIFF": (tiff(COLOR16, ">"), COLOR),
    "colours, deflated TIFF": (tiff(COLOR16, deflated=True), COLOR),
    "colours, big-endian deflated TIFF": (tiff(COLOR16, ">", deflated=True), COLOR),
    "colours, PPM": (b"P6 7 5 65535\n" + COLOR16.astype(">u2").tobytes(), COLOR),
    "inks, TIFF": (tiff(INKS, ink=5), COLOR),
    "inks, big-endian TIFF": (tiff(INKS, ">", ink=5), COLOR),
    "inks, deflated TIFF": (tiff(INKS, deflated=True, ink=5), COLOR),
    "colours with alpha, TIFF": (tiff(OPAQUE), COLOR),
    "colours with alpha, deflated TIFF": (tiff(OPAQUE, deflated=True), COLOR),
}


@pytest.mark.parametrize("kind", TWELVE)
def test_twelve_bits(kind: str) -> None:
    content, values = TWELVE[kind]
    remarks = Remarks()
    same(wanted().decode(content, remarks=remarks).transpose(1, 2, 0), values >> 8)  # nearly black
    assert remarks.peaks == [values.max()]
    same(wanted(12).decode(content).transpose(1, 2, 0), values >> 4)
    same(wanted(10).decode(content).transpose(1, 2, 0), (values >> 2).clip(0, 255))
    window = (256 * (values - 1000.0) / 2000).clip(0, 255).astype(np.uint8)
    same(wanted([1000, 3000]).decode(content).transpose(1, 2, 0), window)
    low, high = values.min(), values.max()
    stretched = (256 * (values - low) / (high - low)).clip(0, 255).astype(np.uint8)
    same(wanted("image").decode(content).transpose(1, 2, 0), stretched)


def test_alpha_stays_that_of_16_bits() -> None:
    for values in (np.dstack([COLOR, ALPHA]), np.dstack([GRAY, ALPHA])):
        color = values[..., :-1] >> 4
        share = ALPHA[..., None] / 65535
        decoded = wanted(12, background=100).decode(png(values)).transpose(1, 2, 0)
        np.testing.assert_allclose(decoded, np.broadcast_to(color * share + 100 * (1 - share), (H, W, 3)), atol=1.1)
    clear = COLOR[2, 3]
    decoded = wanted(12).decode(png(COLOR, tRNS=struct.pack(">HHH", *clear.tolist()))).transpose(1, 2, 0)
    same(decoded, np.where((clear == COLOR).all(-1)[..., None], 255, COLOR >> 4))


def test_separate_planes_are_refused() -> None:
    """Pillow would take bytes for samples."""
    for deflated in (False, True):
        with pytest.raises(ValueError, match="^16-bit colours in separate planes: store them pixel by pixel$"):
            wanted().decode(tiff(COLOR16, deflated=deflated, planes=True))


def test_the_brightest_value_of_a_ppm_is_white() -> None:
    """Its header says which that is, as for greys."""
    content = b"P6 7 5 4095\n" + COLOR16.astype(">u2").tobytes()
    expected = np.rint(COLOR * (65535 / 4095)).astype(int) >> 8
    same(wanted().decode(content).transpose(1, 2, 0), expected)
    same(wanted(16).decode(content).transpose(1, 2, 0), expected)


def test_inks_are_mixed_in_16_bits() -> None:
    inks = RNG.integers(0, 65536, (H, W, 4)).astype(np.uint16)
    light = 1 - inks / 65535
    same(
        wanted([0, 20000]).decode(tiff(inks, ink=5)).transpose(1, 2, 0),
        (256 * np.floor(65535 * light[..., :3] * light[..., 3:] + 1e-9) / 20000).clip(0, 255).astype(np.uint8),
    )


def test_what_pillow_would_cut_to_8_bits_is_refused() -> None:
    color = RNG.integers(0, 256, (H, W, 3), np.uint8)
    for plain in (False, True):
        content = saved(color, "JPEG2000", no_jp2=plain)
        same(wanted().decode(content).transpose(1, 2, 0), color)
        sizes = content.index(b"\xff\x51") + 40  # of the three channels, in bits less one
        deep = bytearray(content)
        deep[sizes : sizes + 9 : 3] = [11] * 3
        with pytest.raises(ValueError, match="^12-bit JPEG2000, of which 8 bits would be read: store it as PNG or TIF"):
            wanted(12).decode(bytes(deep))
    same(wanted().decode(saved(SIXTEEN, "JPEG2000"))[0], GRAY >> 8)  # of one channel Pillow gives all
    for pixels in (color, color[..., 0]):
        content = saved(pixels, "SGI")
        same(wanted().decode(content, "a.sgi").transpose(1, 2, 0), pixels if pixels.ndim == 3 else three(pixels))
        with pytest.raises(ValueError, match="^16-bit SGI, of which"):
            wanted().decode(saved(pixels, "SGI", bpc=2), "a.sgi")
    text = b"P3 7 5 65535\n" + b" ".join(b"%d" % value for value in COLOR.ravel())
    with pytest.raises(ValueError, match=r"^16-bit colours written as text \(P3\): store them as PNG"):
        wanted().decode(text)


def test_the_smallest_value_may_be_white() -> None:
    same(wanted(12).decode(tiff(SIXTEEN, ink=0)).transpose(1, 2, 0), three(255 - (GRAY >> 4)))


def test_ordinary_images_have_no_range() -> None:
    image = RNG.integers(0, 256, (H, W, 3), np.uint8)
    remarks = Remarks()
    for kind in ("PNG", "TIFF", "BMP"):
        for value_range in (None, 12, [0, 10], "image"):
            same(wanted(value_range).decode(saved(image, kind), remarks=remarks).transpose(1, 2, 0), image)
    assert remarks == Remarks()


def test_signed_values() -> None:
    """Of computed tomography: Hounsfield units, in a window."""
    units = RNG.integers(-1024, 3072, (H, W)).astype(np.int32)
    content = saved(units, "TIFF")
    with pytest.raises(ValueError, match=r"^pixels from -\d+ to \d+, not of 16 bits: set value_range$"):
        wanted().decode(content)
    expected = (256 * (units + 160.0) / 400).clip(0, 255).astype(np.uint8)
    same(wanted([-160, 240], "gray").decode(content)[0], expected)


def test_unsigned_values_of_32_bits() -> None:
    values = np.array([[0, 2**31, 2**32 - 1, 2**30, 5, 6, 7]] * H, np.uint32)
    same(wanted(32, "gray").decode(tiff(values, ink=1))[0], values >> 24)


def test_floating_point() -> None:
    values = RNG.normal(size=(H, W)).astype(np.float32)
    content = saved(values, "TIFF")
    with pytest.raises(ValueError, match="^floating-point pixels, whose range is not defined: set value_range$"):
        wanted().decode(content)
    expected = (256 * (values.astype(float) + 1) / 2).clip(0, 255).astype(np.uint8)
    same(wanted([-1, 1], "gray").decode(content)[0], expected)
    ends = wanted("image", "gray").decode(content)[0]
    assert (ends[np.unravel_index(values.argmin(), (H, W))], ends[np.unravel_index(values.argmax(), (H, W))]) == (
        0,
        255,
    )
    same(wanted("image", "gray").decode(saved(np.full((H, W), 3.5, np.float32), "TIFF"))[0], 0)  # of one value
    for wrong in (np.nan, np.inf, -np.inf):
        for value_range in (None, [0, 1], 12, "image"):
            values[1, 1] = wrong
            with pytest.raises(ValueError, match="^has pixels that are NaN or infinite$"):
                wanted(value_range).decode(saved(values, "TIFF"))


def test_arrays() -> None:
    for array in (SIXTEEN, GRAY, GRAY.astype(np.float32), SIXTEEN[..., None]):
        same(wanted([0, 4096], "gray").decode(array)[0], GRAY >> 4)
    same(wanted().decode(COLOR).transpose(1, 2, 0), COLOR >> 8)
    same(wanted(12).decode(OPAQUE).transpose(1, 2, 0), COLOR >> 4)
    same(wanted(None, "gray").decode(GRAY > 99)[0], 255 * (GRAY > 99))


# What is said, and where the setting goes


@pytest.mark.parametrize(
    ("value_range", "peak", "said"),
    [
        (
            None,
            4095,
            r"^the 3 images of more than 8 bits have no value above 4095 of 65535, .* data.value_range: 12 \(",
        ),
        (None, 1023, r"data.value_range: 10 \(bits\), \[darkest, brightest\] or image$"),
        (None, 20000, None),
        (12, 4095, None),
        (12, 4096, r"have values up to 4096, of which value_range=12 bits cut the top$"),
        ((5000, 6000), 4095, r"have no value above 4095, so that value_range=\[5000, 6000\] blackens all$"),
        ("image", 10, None),
    ],
)
def test_a_range_that_does_not_fit_is_said_in_one_line(value_range: Any, peak: int, said: str | None) -> None:
    lines = Remarks(peaks=[1, peak, 2]).lines(value_range)
    assert len(lines) == (said is not None)
    if said:
        assert re.search(said, lines[0])


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two classes of 12-bit images, one of them with the name of another kind, and an ordinary one."""
    root = tmp_path / "scans"
    for label in ("ill", "well"):
        (root / label).mkdir(parents=True)
        for number in range(3):
            values = RNG.integers(0, 4096, (H, W)).astype(np.uint16)
            (root / f"{label}/{number}.png").write_bytes(saved(values))
    (root / "ill/0.png").write_bytes(saved(SIXTEEN, "TIFF"))
    (root / "well/2.png").write_bytes(saved(SIXTEEN.astype(np.uint8)))
    return root


def test_each_run_says_it_once(scans: Path, tmp_path: Path) -> None:
    source = FolderSource(scans)
    lines = [
        rf"^root='{scans}': images of another kind than their names say are read all the same: ill/0.png \(TIFF\)\.$",
        rf"^root='{scans}': the 5 images of more than 8 bits have no value above 4095 of 65535, so that they become ",
    ]
    for cache_gb in (1, 1, 0):  # built, found, not used
        with pytest.warns(UserWarning, match="^root=") as said:
            load_images(source, source.images, wanted(), str(tmp_path / "cache"), cache_gb, verify=True)
        assert len(said) == 2
        for line in lines:
            assert any(re.match(line, str(warning.message)) for warning in said)
    with pytest.warns(UserWarning, match="another kind") as said:
        scan(source, source.images, wanted(12))
    assert len(said) == 1  # of the name alone


def test_the_setting_is_part_of_the_format(scans: Path) -> None:
    data = ImageFolderDataModule(str(scans), value_range=[0, 4095])
    assert data.image_format.value_range == (0, 4095)
    for value_range in (None, 12, [0, 4095], "image"):
        image_format = wanted(value_range)
        assert ImageFormat(**json.loads(json.dumps(asdict(image_format)))) == image_format
        assert hash(image_format) == hash(wanted(value_range))
    old = {key: value for key, value in asdict(wanted()).items() if key != "value_range"}
    assert ImageFormat(**old) == wanted()  # of a model that was adapted before


@pytest.mark.parametrize(
    "value_range",
    [
        0,
        33,
        -1,
        12.0,
        True,
        "data",
        "",
        [1],
        [1, 1],
        [2, 1],
        [0, float("nan")],
        [0, float("inf")],
        [0, 10**400],
        ["a", 1],
    ]
    + [{"a": 1}, [0, 1, 2]],
)
def test_wrong_ranges(value_range: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^value_range=.* is no range of values: give bits \(1 to 32\), \[darkest, bri"
    ):
        wanted(value_range)
